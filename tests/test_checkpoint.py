"""Which files of a folder are a checkpoint, and which folders are refused, with which exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moeinf.checkpoint import Checkpoint, is_companion
from moeinf.errors import IntegrityError, ModelNotFoundError, UnsupportedError


def write_weights(folder: Path, name: str, *tensors: str) -> None:
    save_file({tensor: torch.zeros(2) for tensor in tensors}, folder / name)


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_a_single_file(folder: Path) -> None:
    write_weights(folder, "model.safetensors", "b", "a")
    checkpoint = Checkpoint.from_folder(folder)
    assert checkpoint.weight_files == ("model.safetensors",)
    assert checkpoint.tensor_files == {"a": "model.safetensors", "b": "model.safetensors"}


def test_shards_with_an_index(folder: Path) -> None:
    write_weights(folder, "model-00001-of-00002.safetensors", "a")
    write_weights(folder, "model-00002-of-00002.safetensors", "b", "not in the index")
    write_index(folder, {"b": "model-00002-of-00002.safetensors", "a": "model-00001-of-00002.safetensors"})
    checkpoint = Checkpoint.from_folder(folder)
    assert checkpoint.weight_files == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    assert checkpoint.tensor_files["a"] == "model-00001-of-00002.safetensors"
    assert set(checkpoint.tensor_files) == {"a", "b"}


def test_shards_without_an_index(folder: Path) -> None:
    write_weights(folder, "model-2.safetensors", "b")
    write_weights(folder, "model-1.safetensors", "a")
    write_weights(folder, "consolidated.safetensors", "c")
    checkpoint = Checkpoint.from_folder(folder)
    assert checkpoint.weight_files == ("model-1.safetensors", "model-2.safetensors")
    assert checkpoint.tensor_files == {"a": "model-1.safetensors", "b": "model-2.safetensors"}


def test_shards_without_an_index_that_contradict_each_other(folder: Path) -> None:
    write_weights(folder, "model-1.safetensors", "a")
    write_weights(folder, "model-2.safetensors", "a")
    with pytest.raises(IntegrityError, match=r"'a' is both in .*model-1\.safetensors and in model-2\.safetensors"):
        Checkpoint.from_folder(folder)


def test_a_single_file_goes_before_an_index_as_in_transformers(folder: Path) -> None:
    write_weights(folder, "model.safetensors", "a")
    write_index(folder, {"a": "absent.safetensors"})
    assert Checkpoint.from_folder(folder).weight_files == ("model.safetensors",)


def test_an_index_describes_shards_that_are_not_there_yet(folder: Path) -> None:
    write_index(folder, {"b": "model-2.safetensors", "a": "model-1.safetensors"})
    checkpoint = Checkpoint.from_index(folder)
    assert checkpoint.weight_files == ("model-1.safetensors", "model-2.safetensors")
    with pytest.raises(IntegrityError, match=r"lacks model-1\.safetensors, model-2\.safetensors") as caught:
        Checkpoint.from_folder(folder)
    assert caught.value.hint is not None


def test_a_tensor_that_the_index_names_and_the_shard_lacks(folder: Path) -> None:
    write_weights(folder, "model-1.safetensors", "a")
    write_index(folder, {"a": "model-1.safetensors", "b": "model-1.safetensors"})
    with pytest.raises(IntegrityError, match=r"model-1\.safetensors lacks b"):
        Checkpoint.from_folder(folder)


@pytest.mark.parametrize("files", [["model.safetensors"], ["model-1.safetensors"]])
def test_a_damaged_shard_is_found_at_once(folder: Path, files: list[str]) -> None:
    for name in files:
        write_weights(folder, name, "a", "b")
        (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=files[0]):
        Checkpoint.from_folder(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "sub\\model.safetensors",
        "C:model.safetensors",
        "model\0.safetensors",
        "..",
        "",
        ".",
    ],
)
def test_an_index_that_names_anything_but_a_file_beside_it_is_refused(folder: Path, name: str) -> None:
    write_index(folder, {"a": name})
    for make in (Checkpoint.from_index, Checkpoint.from_folder):
        with pytest.raises(UnsupportedError, match="no plain name"):
            make(folder)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("\udcff", "not JSON"),
        ("[]", "no table"),
        ('{"weight_map": {}}', "no table"),
        ('{"weight_map": ["a"]}', "no table"),
        ('{"weight_map": {"a": 1}}', "names 1 as a file"),
    ],
)
def test_an_index_that_is_none(folder: Path, content: str, complaint: str) -> None:
    (folder / "model.safetensors.index.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(IntegrityError, match=complaint):
        Checkpoint.from_folder(folder)


def test_pickles_are_never_opened(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    for make in (Checkpoint.from_folder, Checkpoint.from_index):
        with pytest.raises(UnsupportedError, match=r"pytorch_model\.bin") as caught:
            make(folder)
        assert caught.value.exit_code == 7
    write_index(folder, {"a": "pytorch_model.bin"})
    with pytest.raises(UnsupportedError, match="safetensors only"):
        Checkpoint.from_index(folder)


def test_a_folder_that_holds_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="there is no folder"):
        Checkpoint.from_folder(tmp_path / "absent")
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        Checkpoint.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelNotFoundError, match="no weights"):
        Checkpoint.from_folder(tmp_path)


def test_what_goes_with_the_weights(folder: Path) -> None:
    write_weights(folder, "model.safetensors", "a")
    wanted = [
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    for name in [*wanted, "README.md", "modeling_evil.py", "tokenizer.py", "pytorch_model.bin", "training_args.bin"]:
        (folder / name).write_text("{}")
    (folder / "tokenizer_folder.json").mkdir()
    assert Checkpoint.from_folder(folder).other_files == tuple(sorted(["config.json", *wanted]))
    assert not is_companion("../tokenizer.json")
    assert not is_companion("sub/config.json")
