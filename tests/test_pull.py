"""Pulling: from folders and from the hub, again and again, on disks and networks that fail, of models that are none."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moeinf.pull as pull_module
from fakehub import FakeHub
from families import make_checkpoint
from faults import FailingDisk, PowerLossDisk
from moeinf import hub
from moeinf.checkpoint import Checkpoint
from moeinf.errors import (
    CapacityError,
    IntegrityError,
    ModelNotFoundError,
    MoeinfError,
    UnsupportedError,
    UsageError,
)
from moeinf.forms import pull_options
from moeinf.manifest import Source, expert_path
from moeinf.origins import FolderOrigin, find_origin
from moeinf.pull import plan_pull, pull
from moeinf.store import Store
from packing import edit, edit_config

SHARDED, SINGLE = "org/Sharded-MoE", "org/single"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model in several weight files and in one. Nothing may change them."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, size in (("sharded", "25KB"), ("single", "5GB")):
        make_checkpoint("mixtral", folder / name, max_shard_size=size)
        for path in (folder / name).iterdir():
            path.chmod(0o444)
    return {SHARDED: folder / "sharded", SINGLE: folder / "single"}


@pytest.fixture(scope="module")
def whole(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every file of the model in the store but the manifest."""
    model = pull(str(checkpoints[SHARDED]), store=Store(tmp_path_factory.mktemp("whole")))
    return contents(model.path)


@pytest.fixture
def fake(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr(hub, "_sleep", lambda _: None)
    with FakeHub(checkpoints) as fake:
        fake.connect(monkeypatch)
        yield fake


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


@pytest.fixture
def quick_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan once, for tests that pull a hundred times."""
    plans: dict[str, Any] = {}
    plan = pull_module._plan

    def remember(checkpoint: Checkpoint, dtype: str) -> Any:
        return plans.get(dtype) or plans.setdefault(dtype, plan(checkpoint, dtype))

    monkeypatch.setattr(pull_module, "_plan", remember)


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != "moeinf.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    return target


class Bars:
    """Progress that remembers, and may do something at every step."""

    def __init__(self, on_advance: Callable[[str], object] = lambda _: None) -> None:
        self.tasks: list[Bar] = []
        self.on_advance = on_advance

    @contextmanager
    def task(self, label: str, total: int, unit: str, *, done: int = 0) -> Iterator[Bar]:
        self.tasks.append(Bar(self, label, total, done))
        yield self.tasks[-1]


class Bar:
    def __init__(self, bars: Bars, label: str, total: int, done: int) -> None:
        self.bars, self.label, self.total, self.done = bars, label, total, done

    def advance(self, amount: int) -> None:
        self.done += amount
        self.bars.on_advance(self.label)


def weights_sent(fake: FakeHub) -> dict[str, int]:
    return {path: count for path, count in fake.body_bytes.items() if path.endswith(".safetensors")}


# What arrives


def test_from_a_folder(checkpoints: dict[str, Path], store: Store) -> None:
    folder = checkpoints[SHARDED]
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    model = pull(str(folder), store=store)
    assert model.name == "sharded"
    assert store.verify("sharded") == []
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    manifest = model.manifest
    assert manifest.source == Source(str(folder))
    assert (manifest.architecture, manifest.model_type, manifest.dtype) == ("MixtralForCausalLM", "mixtral", "bfloat16")
    expected = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    expected |= {"chat_template.jinja", "dense.safetensors"}
    expected |= {expert_path(layer, expert) for layer in range(2) for expert in range(8)}
    assert set(manifest.files) == expected
    assert (model.path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert store.resolve(str(folder)) == model


def test_experts_and_dense_tensors_have_the_values_of_the_checkpoint(
    checkpoints: dict[str, Path], store: Store
) -> None:
    model = pull(str(checkpoints[SINGLE]), store=store)
    source = load_file(checkpoints[SINGLE] / "model.safetensors")
    expert = load_file(model.path / expert_path(1, 5))
    name = next(name for name in source if name.startswith("model.layers.1.") and name.endswith("experts.5.w2.weight"))
    assert expert["down_proj"].equal(source[name])
    dense = load_file(model.path / "dense.safetensors")
    assert dense["model.embed_tokens.weight"].equal(source["model.embed_tokens.weight"])
    assert not any(".experts." in name for name in dense)


@pytest.mark.parametrize("repo", [SHARDED, SINGLE])
def test_from_the_hub(repo: str, fake: FakeHub, store: Store, whole: dict[str, bytes]) -> None:
    model = pull(repo, store=store)
    assert model.name == repo.split("/")[1].lower()
    assert model.manifest.source == Source(repo, fake.commit(repo))
    assert contents(model.path) == whole
    assert store.verify(model.name) == []
    assert store.unfinished() == []
    sizes = {f"{repo}/{path}": len(data) for path, data in fake.contents(repo).items()}
    assert weights_sent(fake) == {path: size for path, size in sizes.items() if path.endswith(".safetensors")}


def test_downloads_are_removed_as_soon_as_their_tensors_are_written(fake: FakeHub, store: Store) -> None:
    source = store.models / ".incoming" / "sharded-moe" / "source"
    seen: list[int] = []
    bars = Bars(lambda label: seen.append(len(list(source.glob("*.safetensors*")) if label == "shard" else [])))
    shards = len(list(fake.repos[SHARDED].glob("*.safetensors")))
    pull(SHARDED, store=store, progress=bars)
    assert shards >= 5
    assert max(seen) <= 4
    assert not source.exists()


def test_progress_counts_every_byte(fake: FakeHub, store: Store) -> None:
    bars = Bars()
    pull(SHARDED, store=store, progress=bars)
    assert {bar.label for bar in bars.tasks} == {"download", "shard"}
    assert [(bar.label, bar.done) for bar in bars.tasks] == [(bar.label, bar.total) for bar in bars.tasks]
    downloaded = sum(bar.total for bar in bars.tasks if bar.label == "download")
    assert downloaded == sum(file.size for file in hub.resolve(SHARDED).files)


def test_another_dtype_is_converted(checkpoints: dict[str, Path], store: Store) -> None:
    said: list[str] = []
    model = pull(str(checkpoints[SINGLE]), store=store, name="wide", dtype="float32", notify=said.append)
    assert model.manifest.dtype == "float32"
    assert model.manifest.layout.tensors[0].dtype == "F32"
    assert said == ["precision: bfloat16 converted to float32"]
    assert pull(str(checkpoints[SINGLE]), store=store, name="wide", dtype="float32") == model
    with pytest.raises(UsageError, match=r"wide is here already, and is .* in float32"):
        pull(str(checkpoints[SINGLE]), store=store, name="wide", dtype="bfloat16")


def test_force_keeps_the_dtype_that_was_asked_for(checkpoints: dict[str, Path], store: Store) -> None:
    model = pull(str(checkpoints[SINGLE]), store=store, name="wide", dtype="float32")
    assert pull("wide", store=store, force=True) == model
    assert pull_options(model.manifest) == ["--dtype", "float32"]


def test_a_configuration_that_nobody_could_read_is_refused_before_weights(tmp_path: Path, store: Store) -> None:
    folder = tmp_path / "mix"
    make_checkpoint("mixtral", folder)
    model = pull(str(folder), store=store)
    edit_config(folder, num_experts_per_tok=9)
    for ask in (plan_pull, pull):
        with pytest.raises(IntegrityError, match=r"config.json of .*mix cannot be: .*top_k is 9"):
            ask(str(folder), store=store, force=True)
    assert store.open("mix") == model
    assert store.verify("mix") == []


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.bool], ids=str)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "granitemoe"])
def test_numbers_without_a_scale_are_not_taken_for_weights(
    family: str, dtype: torch.dtype, tmp_path: Path, store: Store
) -> None:
    make_checkpoint(family, tmp_path)
    is_expert = re.compile("experts|block_sparse_moe.*linear")
    edit(
        tmp_path,
        lambda tensors: {name: each.to(dtype) if is_expert.search(name) else each for name, each in tensors.items()},
    )
    with pytest.raises(UnsupportedError):
        pull(str(tmp_path), store=store)
    assert store.names() == []


def test_an_index_that_changes_makes_another_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "mix"
    make_checkpoint("mixtral", folder, max_shard_size="100KB")
    before = FolderOrigin(Checkpoint.from_folder(folder)).identity
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text() + " ")
    assert FolderOrigin(Checkpoint.from_folder(folder)).identity != before


def test_an_empty_revision_is_none(fake: FakeHub, store: Store) -> None:
    with pytest.raises(UsageError, match="the revision is empty"):
        pull(SHARDED, store=store, revision="")


# What is here already


def test_what_is_here_is_not_asked_for_again(fake: FakeHub, store: Store) -> None:
    model = pull(SHARDED, store=store)
    fake.requests.clear()
    for argument in (SHARDED, "sharded-moe", f"{SHARDED}@{fake.commit(SHARDED)}"):
        said: list[str] = []
        assert pull(argument, store=store, notify=said.append) == model
        assert said == [f"sharded-moe is here already, from {SHARDED}"]
    assert fake.requests == []
    assert plan_pull(SHARDED, store=store).is_stored


def test_of_two_models_of_one_source_the_one_that_is_named_is_meant(checkpoints: dict[str, Path], store: Store) -> None:
    first, second = (pull(str(checkpoints[SINGLE]), store=store, name=name) for name in ("first", "second"))
    assert pull("second", store=store) == second
    assert pull("second", store=store, force=True).name == "second"
    assert store.open("first") == first


def test_a_long_name_leaves_room_for_what_its_experts_are(
    checkpoints: dict[str, Path], tmp_path: Path, store: Store
) -> None:
    folder = copy(checkpoints[SINGLE], tmp_path / ("x" * 96))
    assert plan_pull(str(folder), store=store).name == "x" * 96
    assert plan_pull(str(folder), store=store, experts="int8").name == "x" * 91 + "-int8"


def test_force_pulls_again_from_the_same_place(fake: FakeHub, store: Store, whole: dict[str, bytes]) -> None:
    model = pull(SHARDED, store=store, name="mine")
    (model.path / "config.json").write_text("damaged")
    assert store.verify("mine") != []
    again = pull("mine", store=store, force=True)
    assert again == model
    assert contents(again.path) == whole


def test_force_replaces_a_model_whose_manifest_is_damaged(fake: FakeHub, store: Store) -> None:
    model = pull(SHARDED, store=store)
    (model.path / "moeinf.json").write_text("{")
    with pytest.raises(IntegrityError) as caught:
        pull(SHARDED, store=store)
    assert caught.value.hint == "add --force to pull it again"
    with pytest.raises(IntegrityError):
        pull("sharded-moe", store=store, force=True)
    assert pull(SHARDED, store=store, force=True) == model


def test_a_name_that_is_taken_is_not_taken_away(checkpoints: dict[str, Path], fake: FakeHub, store: Store) -> None:
    pull(SHARDED, store=store, name="mine")
    for source in (SINGLE, str(checkpoints[SINGLE]), f"{SHARDED}@main"):
        with pytest.raises(UsageError, match="mine is here already, and is org/Sharded-MoE") as caught:
            pull(source, store=store, name="mine")
        assert "--name" in (caught.value.hint or "")
        assert "--force" in (caught.value.hint or "")
    replaced = pull(SINGLE, store=store, name="mine", force=True)
    assert replaced.manifest.source.repo == SINGLE


def test_an_alias_gives_its_name(fake: FakeHub, store: Store) -> None:
    repo = "mistralai/Mixtral-8x7B-v0.1"
    fake.repos[repo] = fake.repos[SINGLE]
    model = pull("mixtral", store=store)
    assert (model.name, model.manifest.source.repo) == ("mixtral", repo)
    assert pull(repo, store=store) == model
    assert store.names() == ["mixtral"]


def test_revisions(fake: FakeHub, store: Store) -> None:
    commit = fake.commit(SINGLE)
    model = pull(SINGLE, store=store, revision=commit, name="pinned")
    assert model.manifest.source == Source(f"{SINGLE}@{commit}", commit)
    assert pull(f"{SINGLE}@{commit[:8]}", store=store) == model
    assert store.resolve(f"{SINGLE}@{commit}") == model
    with pytest.raises(ModelNotFoundError):
        pull(SINGLE, store=store, revision="v9")
    with pytest.raises(UsageError, match="two revisions"):
        pull(f"{SINGLE}@v1", store=store, revision="v2")
    with pytest.raises(UsageError, match="has no revisions"):
        pull(str(fake.repos[SINGLE]), store=store, revision="v2")


# What is asked for wrongly


@pytest.mark.parametrize("source", ["no-such-model", "mixtrall", "a/b/c", "", "https://example.org/model"])
def test_a_source_that_is_nothing(source: str, store: Store) -> None:
    with pytest.raises(ModelNotFoundError, match="no alias, no hub id and no folder") as caught:
        pull(source, store=store)
    assert ("mixtral" in str(caught.value.hint)) == (source == "mixtrall")
    assert not store.home.exists()


def test_options_that_cannot_be(store: Store, checkpoints: dict[str, Path]) -> None:
    folder = str(checkpoints[SINGLE])
    with pytest.raises(UsageError, match="--dtype int3 is not known"):
        pull(folder, store=store, dtype="int3")
    with pytest.raises(UsageError, match="cannot be a model's name"):
        pull(folder, store=store, name="../mine")
    assert not store.home.exists()


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def truncate(folder: Path) -> None:
    shard = first_shard(folder)
    os.truncate(shard, shard.stat().st_size - 100)


def lie_about_offsets(folder: Path) -> None:
    shard = first_shard(folder)
    data = shard.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    entry = next(value for name, value in header.items() if name != "__metadata__")
    entry["data_offsets"] = [offset + 2 for offset in entry["data_offsets"]]
    text = json.dumps(header).encode()
    shard.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def leave_pickles_only(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")


def make_dense(folder: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
    config |= {"num_attention_heads": 1, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))


def lose_tensor(folder: Path) -> None:
    shard = first_shard(folder)
    tensors = load_file(shard)
    tensors.pop(next(iter(sorted(tensors))))
    save_file(tensors, shard)


BAD_FOLDERS: list[tuple[Callable[[Path], object], type[MoeinfError], str]] = [
    (lambda folder: shutil.rmtree(folder), ModelNotFoundError, "there is no folder"),
    (lambda folder: (folder / "config.json").unlink(), ModelNotFoundError, "no config.json"),
    (lambda folder: (folder / "config.json").write_text("{"), IntegrityError, "config.json"),
    (make_dense, UnsupportedError, "no experts"),
    (leave_pickles_only, UnsupportedError, "safetensors only"),
    (truncate, IntegrityError, "not a sound safetensors file"),
    (lie_about_offsets, IntegrityError, "not a sound safetensors file"),
    (lose_tensor, IntegrityError, "lacks"),
    (lambda folder: first_shard(folder).unlink(), IntegrityError, "lacks"),
    (
        lambda folder: edit_index(folder, lambda names: names.update(x="../../x")),
        UnsupportedError,
        "plain name",
    ),
    (lambda folder: edit_index(folder, lambda names: names.update(x="/etc/passwd")), UnsupportedError, "plain name"),
    (lambda folder: edit_index(folder, lambda names: names.update(x="more.safetensors")), IntegrityError, "lacks"),
    (lambda folder: (folder / "model.safetensors.index.json").write_text("[]"), IntegrityError, "weight_map"),
]


@pytest.mark.parametrize(("damage", "kind", "message"), BAD_FOLDERS)
def test_a_folder_that_is_no_sound_checkpoint(
    damage: Callable[[Path], object],
    kind: type[MoeinfError],
    message: str,
    checkpoints: dict[str, Path],
    tmp_path: Path,
    store: Store,
) -> None:
    folder = copy(checkpoints[SHARDED], tmp_path / "bad")
    damage(folder)
    for call in (pull, plan_pull):
        with pytest.raises(MoeinfError, match=message) as caught:
            call(str(folder), store=store)
        assert type(caught.value) is kind
    assert store.names() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda names: names.update(x="model-00009-of-00001.safetensors"), "lacks model-00009-of-00001.safetensors"),
        (lambda names: names.update(x="../../../x.safetensors"), "no plain name"),
    ],
)
def test_an_index_at_the_hub_that_names_what_is_not_there(
    change: Callable[[dict[str, str]], object], message: str, fake: FakeHub, tmp_path: Path, store: Store
) -> None:
    fake.repos[SHARDED] = copy(fake.repos[SHARDED], tmp_path / "bad")
    edit_index(fake.repos[SHARDED], change)
    for call in (pull, plan_pull):
        with pytest.raises(MoeinfError, match=message):
            call(SHARDED, store=store)
    assert weights_sent(fake) == {}


# Room


def test_a_disk_that_is_too_small_is_seen_before_weights_are_fetched(
    fake: FakeHub, store: Store, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {repo: plan_pull(repo, store=store).needed_bytes for repo in (SHARDED, SINGLE)}
    for repo, needed_bytes in sizes.items():
        monkeypatch.setattr(pull_module, "_free_bytes", lambda _, needed_bytes=needed_bytes: needed_bytes * 3 // 4)
        with pytest.raises(CapacityError, match=r"needs .* more disk, and .* are free at") as caught:
            pull(repo, store=store)
        assert "MOEINF_HOME" in (caught.value.hint or "")
    assert weights_sent(fake) == {}
    monkeypatch.setattr(pull_module, "_free_bytes", lambda _: 1000)
    with pytest.raises(CapacityError):
        pull(str(checkpoints[SINGLE]), store=store)


@pytest.mark.parametrize(
    ("options", "most"),
    [({}, 2), ({"dtype": "bfloat16"}, 1.5), ({"experts": "int8"}, 1.25), ({"experts": "int4"}, 1.125)],
)
def test_for_weights_without_an_index_as_much_room_is_asked_as_any_model_takes(
    options: dict[str, Any], most: float, fake: FakeHub, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be of four bytes each. What is downloaded already needs none."""
    asked: list[float] = []

    def ask(name: str, folder: Path, needed_bytes: int) -> None:
        asked.append(needed_bytes)
        raise EnoughError

    size = len(fake.contents(SINGLE)["model.safetensors"])
    with monkeypatch.context() as patch:
        patch.setattr(pull_module, "_require_room", ask)
        with pytest.raises(EnoughError):
            pull(SINGLE, store=store, **options)
    interrupt(store, SINGLE, "download", 2, **options)
    there = sum(path.stat().st_size for path in (store.models / ".incoming").glob("*/source/*"))
    assert 0 < there < size
    monkeypatch.setattr(pull_module, "_require_room", ask)
    with pytest.raises(EnoughError):
        pull(SINGLE, store=store, **options)
    assert asked == [most * size, most * size - there]


def test_room_is_asked_of_the_disk_where_models_are(
    checkpoints: dict[str, Path], store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`models` may be a link to another one."""
    (tmp_path / "large").mkdir()
    store.home.mkdir()
    store.models.symlink_to(tmp_path / "large")
    free = {store.home: 0, store.models: 1 << 30}
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free[folder]))
    source = str(checkpoints[SINGLE])
    assert plan_pull(source, store=store).has_room
    pull(source, store=store)
    assert plan_pull(source, store=store).free_bytes == 1 << 30


def test_what_is_written_already_needs_no_room_again(
    fake: FakeHub, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed_bytes = plan_pull(SHARDED, store=store).needed_bytes
    interrupt(store, SHARDED, "shard", 40)
    monkeypatch.setattr(pull_module, "_free_bytes", lambda _: needed_bytes // 2)
    assert pull(SHARDED, store=store).name == "sharded-moe"


def test_the_plan_says_what_a_pull_takes(fake: FakeHub, store: Store, checkpoints: dict[str, Path]) -> None:
    from_folder = plan_pull(str(checkpoints[SHARDED]), store=store)
    sharded = plan_pull(SHARDED, store=store)
    single = plan_pull(SINGLE, store=store)
    assert not store.home.exists()
    assert weights_sent(fake) == {}
    assert (from_folder.name, sharded.name, single.name) == ("sharded", "sharded-moe", "single")
    assert from_folder.files == ()
    assert sharded.source == Source(SHARDED, fake.commit(SHARDED))
    assert {file.path: file.size for file in sharded.files} == {
        path: len(data) for path, data in fake.contents(SHARDED).items()
    }
    largest = sorted(file.size for file in sharded.files)[-2:]
    assert sharded.needed_bytes == sharded.store_bytes + sum(largest)
    assert sharded.download_bytes == sum(file.size for file in sharded.files)
    assert (sharded.architecture, sharded.dtype, sharded.precision) == ("MixtralForCausalLM", "bfloat16", "bfloat16")
    assert (sharded.is_estimate, single.is_estimate) == (False, True)
    assert (single.architecture, single.dtype, single.precision) == (None, None, None)
    assert sharded.has_room
    model = pull(SHARDED, store=store)
    weights = [record.size for path, record in model.manifest.files.items() if path.endswith(".safetensors")]
    header_bytes = (model.path / "dense.safetensors").stat().st_size - model.manifest.dense_bytes
    assert sharded.store_bytes == from_folder.store_bytes == sum(weights) - header_bytes


# Interruptions


class EnoughError(Exception):
    """The test has seen enough of this pull."""


def interrupt(
    store: Store, source: str, label: str, steps: int, error: type[BaseException] = EnoughError, **options: Any
) -> None:
    """A pull that ends with `error` at its `steps`th step of that kind."""
    count = itertools.count(1)

    def stop(advanced: str) -> None:
        if advanced == label and next(count) == steps:
            raise error

    with pytest.raises(error):
        pull(source, store=store, progress=Bars(stop), **options)


@pytest.mark.parametrize("error", [EnoughError, KeyboardInterrupt])
def test_an_interrupted_pull_goes_on_where_it_stopped(
    error: type[BaseException], fake: FakeHub, store: Store, whole: dict[str, bytes]
) -> None:
    interrupt(store, SHARDED, "shard", 14, error)
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("moeinf-")] == []
    assert store.names() == []
    assert store.unfinished() == ["sharded-moe"]
    before = weights_sent(fake)
    finished = [
        path for path in before if not (store.models / ".incoming/sharded-moe/source" / Path(path).name).exists()
    ]
    assert finished
    said: list[str] = []
    model = pull(SHARDED, store=store, notify=said.append)
    assert said[0].startswith("going on with an unfinished pull of sharded-moe")
    assert {path: weights_sent(fake)[path] for path in finished} == {path: before[path] for path in finished}
    assert contents(model.path) == whole


def test_an_interrupted_pull_of_another_commit_starts_afresh(
    fake: FakeHub, store: Store, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    interrupt(store, SHARDED, "shard", 14)
    fake.repos[SHARDED] = copy(fake.repos[SHARDED], tmp_path / "next")
    (fake.repos[SHARDED] / "chat_template.jinja").write_text("another one")
    said: list[str] = []
    model = pull(SHARDED, store=store, notify=said.append)
    assert "starts afresh" in said[0]
    assert contents(model.path) == {**whole, "chat_template.jinja": b"another one"}


def test_an_interrupted_pull_in_another_dtype_starts_afresh(checkpoints: dict[str, Path], store: Store) -> None:
    interrupt(store, str(checkpoints[SHARDED]), "shard", 14)
    said: list[str] = []
    model = pull(str(checkpoints[SHARDED]), store=store, dtype="float16", notify=said.append)
    assert "starts afresh" in said[0]
    assert model.manifest.dtype == "float16"
    assert store.verify(model.name) == []


@pytest.mark.parametrize("others", ["int4", "lossless", None])
def test_an_interrupted_pull_of_experts_in_another_form_starts_afresh(
    others: str | None, checkpoints: dict[str, Path], store: Store
) -> None:
    source = str(checkpoints[SHARDED])
    interrupt(store, source, "shard", 30, name="mine", experts="int8")
    said: list[str] = []
    model = pull(source, store=store, name="mine", experts=others, notify=said.append)
    assert "starts afresh" in said[0]
    assert store.verify("mine") == []
    assert model.manifest.layout.quantization is None or model.manifest.layout.quantization.kind == others


def test_an_interrupted_pull_of_a_folder_that_changed_starts_afresh(
    checkpoints: dict[str, Path], store: Store, tmp_path: Path
) -> None:
    folder = copy(checkpoints[SHARDED], tmp_path / "sharded")
    interrupt(store, str(folder), "shard", 14)
    os.utime(first_shard(folder), ns=(1, 1))
    said: list[str] = []
    pull(str(folder), store=store, notify=said.append)
    assert "starts afresh" in said[0]


def test_an_unfinished_pull_of_another_source_is_not_taken_away(fake: FakeHub, store: Store) -> None:
    interrupt(store, SHARDED, "shard", 14)
    before = contents(store.models)
    with pytest.raises(UsageError, match=f"sharded-moe is unfinished, and made of {SHARDED}") as caught:
        pull(SINGLE, store=store, name="sharded-moe")
    assert "`moeinf rm sharded-moe`" in (caught.value.hint or "")
    assert contents(store.models) == before
    said: list[str] = []
    assert pull(SINGLE, store=store, name="sharded-moe", force=True, notify=said.append).manifest.source.repo == SINGLE
    assert "starts afresh" in said[0]


def test_a_folder_that_changes_while_it_is_read_makes_no_model(
    checkpoints: dict[str, Path], store: Store, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    folder = copy(checkpoints[SHARDED], tmp_path / "sharded")
    before = first_shard(folder).stat()
    with pytest.raises(IntegrityError, match="sharded was changed while it was read"):
        pull(str(folder), store=store, progress=Bars(lambda _: os.utime(first_shard(folder), ns=(1, 1))))
    assert store.names() == []
    os.utime(first_shard(folder), ns=(before.st_atime_ns, before.st_mtime_ns))  # as if it had come back
    notes: list[str] = []
    assert contents(pull(str(folder), store=store, notify=notes.append).path) == whole
    assert not any(note.startswith("going on") for note in notes)


def test_a_network_that_breaks_off_is_an_error_and_a_later_pull_goes_on(
    fake: FakeHub, store: Store, whole: dict[str, bytes]
) -> None:
    def break_off(label: str) -> None:
        if label == "shard":
            fake.faults.statuses = [503] * 100

    with pytest.raises(MoeinfError) as caught:
        pull(SHARDED, store=store, progress=Bars(break_off))
    assert caught.value.exit_code == 6
    fake.faults.statuses = []
    assert contents(pull(SHARDED, store=store).path) == whole


# Disks that fail


def check_after_fault(home: Path, source: str, name: str, whole: dict[str, bytes]) -> None:
    """No model or the whole one; and the next pull makes the whole one, and leaves nothing else."""
    store = Store(home)
    if name in store.names():
        assert contents(store.path(name)) == whole
    model = pull(source, store=store)
    assert contents(model.path) == whole
    assert store.verify(name) == []
    assert set(contents(store.models)) == {f"{name}/{path}" for path in whole}


@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "for ever"])
@pytest.mark.usefixtures("quick_plan")
def test_whatever_operation_fails_a_later_pull_from_a_folder_is_whole(
    for_ever: bool, checkpoints: dict[str, Path], tmp_path: Path, whole: dict[str, bytes]
) -> None:
    source = str(checkpoints[SHARDED])
    for number in itertools.count(2 if for_ever else 1, 2):
        home, disk = tmp_path / str(number), FailingDisk(number, errno.ENOSPC, for_ever=for_ever)
        try:
            pull(source, store=Store(home, disk=disk))
        except CapacityError:
            assert disk.has_failed
        else:
            break
        check_after_fault(home, source, "sharded", whole)
        shutil.rmtree(home)
    assert number > 100


@pytest.mark.usefixtures("quick_plan")
def test_whatever_operation_fails_a_later_pull_from_the_hub_is_whole(
    fake: FakeHub, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    for number in itertools.count(1, 3):
        home, disk = tmp_path / str(number), FailingDisk(number, errno.EIO)
        try:
            pull(SHARDED, store=Store(home, disk=disk))
        except MoeinfError:
            assert disk.has_failed
        else:
            break
        check_after_fault(home, SHARDED, "sharded-moe", whole)
        shutil.rmtree(home)
    assert number > 100


@pytest.mark.usefixtures("quick_plan")
def test_whenever_the_power_fails_a_later_pull_from_the_hub_is_whole(
    fake: FakeHub, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    for number in itertools.count(2, 3):
        home, disk = tmp_path / str(number), PowerLossDisk(number)
        try:
            pull(SHARDED, store=Store(home, disk=disk))
        except MoeinfError:
            assert disk.has_failed
        else:
            break
        check_after_fault(home, SHARDED, "sharded-moe", whole)
        shutil.rmtree(home)
    assert number > 100


def test_a_home_that_cannot_be_written(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    source = str(checkpoints[SINGLE])
    for code in (errno.EROFS, errno.EACCES):
        with pytest.raises(UsageError, match="no access to") as caught:
            pull(source, store=Store(tmp_path / "home", disk=FailingDisk(1, code, for_ever=True)))
        assert "MOEINF_HOME" in (caught.value.hint or "")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="no access to"):
        pull(source, store=Store(tmp_path / "file"))


# Other processes


def run_python(code: str, environ: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    source = Path(__file__).parents[1] / "src"
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(source), str(Path(__file__).parent)]), **environ}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, env=environ)


def test_two_pulls_of_one_model_at_once(fake: FakeHub, store: Store, whole: dict[str, bytes]) -> None:
    fake.faults.stalls = [10]
    code = "import pathlib, sys, moeinf.pull as p; p.pull(sys.argv[2], store=p.Store(pathlib.Path(sys.argv[1])))"
    with run_python(code, fake.environment, str(store.home), SHARDED) as other:
        while not fake.body_bytes:
            assert other.poll() is None
        with pytest.raises(MoeinfError, match=f"sharded-moe is busy: process {other.pid} is pulling it"):
            pull(SHARDED, store=store)
        other.kill()
    assert contents(pull(SHARDED, store=store).path) == whole


def test_who_runs_the_demo_while_it_is_brought_waits(store: Store) -> None:
    """Nobody has asked for a pull."""
    with ThreadPoolExecutor(1) as threads:
        with store.incoming("demo"):
            waiting = threads.submit(pull, "demo", store=store)
            with pytest.raises(TimeoutError):
                waiting.result(0.3)
        assert waiting.result(60).name == "demo"


def let_another_pull_come_first(monkeypatch: pytest.MonkeyPatch, source: str, store: Store, name: str) -> None:
    """It is done when the next pull has found its source, and has not taken the lock yet."""

    def find_late(*arguments: Any) -> Any:
        monkeypatch.setattr(pull_module, "find_origin", find_origin)
        pull(source, store=store, name=name)
        return find_origin(*arguments)

    monkeypatch.setattr(pull_module, "find_origin", find_late)


def test_what_another_process_pulled_meanwhile_is_not_pulled_again(
    checkpoints: dict[str, Path], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, bars = str(checkpoints[SINGLE]), Bars()
    let_another_pull_come_first(monkeypatch, source, store, "mine")
    assert pull(source, store=store, name="mine", progress=bars) == store.open("mine")
    assert bars.tasks == []
    assert store.unfinished() == []


def test_a_name_that_was_taken_meanwhile_is_not_taken_away(
    checkpoints: dict[str, Path], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_another_pull_come_first(monkeypatch, str(checkpoints[SINGLE]), store, "mine")
    with pytest.raises(UsageError, match="mine is here already"):
        pull(str(checkpoints[SHARDED]), store=store, name="mine")
    assert store.open("mine").manifest.source.repo == str(checkpoints[SINGLE])


KILLED_AGAIN_AND_AGAIN = """
import os, pathlib, random, signal, sys, time
import torch
from moeinf.checkpoint import Checkpoint
from moeinf.conversion import plan_conversion
from moeinf.files import FileSystem
from moeinf.pull import pull
from moeinf.store import Store
from packing import edit, edit_config

torch.set_num_threads(1)
source, home, seed = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3])
chance = random.Random(seed)
plan_conversion(Checkpoint.from_folder(pathlib.Path(source)))  # what is imported and warm now is so in every child

class SlowDisk(FileSystem):
    def perform(self, operation, /, *args, **kwargs):
        time.sleep(0.002)
        return operation(*args, **kwargs)

kills, longest_s = 0, 0.1
while True:
    child = os.fork()
    if child == 0:
        pull(source, store=Store(home, disk=SlowDisk()))
        os._exit(0)
    time.sleep(chance.uniform(0, longest_s))
    longest_s += 0.02
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        sys.exit(os.WEXITSTATUS(status))
    kills += 1
    for name in Store(home).names():
        assert Store(home).verify(name) == []
    print(kills, flush=True)
"""


def test_a_pull_that_is_killed_again_and_again_gets_there(
    checkpoints: dict[str, Path], tmp_path: Path, whole: dict[str, bytes]
) -> None:
    home = tmp_path / "home"
    seed = str(int.from_bytes(os.urandom(4), "little"))
    with run_python(KILLED_AGAIN_AND_AGAIN, {}, str(checkpoints[SHARDED]), str(home), seed) as process:
        output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, f"seed {seed}"
    store = Store(home)
    assert contents(store.path("sharded")) == whole
    assert store.verify("sharded") == []
    assert output, "it was never killed"


def test_a_model_in_use_is_not_replaced(checkpoints: dict[str, Path], store: Store) -> None:
    model = pull(str(checkpoints[SINGLE]), store=store)
    with model.use():
        assert pull(str(checkpoints[SINGLE]), store=store) == model
        with pytest.raises(MoeinfError, match="this process is using it"):
            pull(str(checkpoints[SINGLE]), store=store, force=True)
