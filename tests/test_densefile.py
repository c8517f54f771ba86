"""The dense part beside packed experts: packed where it can be, and the same weights and answers whatever it is."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import moeinf
from families import FAMILIES, make_checkpoint
from faults import FailingDisk
from moeinf import densefile, worker
from moeinf.densefile import PACKED_NAME, DenseFiles, read_plain
from moeinf.errors import IntegrityError, MoeinfError, UnsupportedError
from moeinf.forms import ExpertForm
from moeinf.fused import write_fused
from moeinf.kernels import LosslessLinear, is_native_exactly
from moeinf.manifest import DENSE_SCHEMA, MANIFEST_NAME, QUANTIZED_SCHEMA, Manifest, uppers_name
from moeinf.pull import plan_pull, pull
from moeinf.quantizing import quantize_model
from moeinf.store import Store, StoredModel
from outputs import outputs
from packing import edit, pack_float8, pack_mxfp4
from standin import use_device

LOSSLESS, INT4 = ExpertForm.read("lossless", None), ExpertForm.read("int4", None)
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
RELEASES: dict[str, Callable[[Path], object]] = {"mxfp4": pack_mxfp4, "fp8": pack_float8}


@pytest.fixture
def store(home: Path) -> Store:
    return Store(home)


def make(family: str, folder: Path, store: Store) -> tuple[StoredModel, StoredModel]:
    """A model of bfloat16 as it is, and with lossless experts."""
    make_checkpoint(family, folder, "bfloat16")
    plain = pull(str(folder), store=store, name="plain")
    return plain, pull(str(folder), store=store, name="packed", experts="lossless")


@contextmanager
def without_packing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stores made here are as they were when no dense part was packed."""
    with monkeypatch.context() as patch:
        patch.setattr(densefile, "_packable", lambda *_: {})
        yield


@pytest.fixture
def models(store: Store, tmp_path: Path) -> tuple[StoredModel, StoredModel]:
    return make("qwen3_moe", tmp_path / "source", store)


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape), name
        assert torch.equal(tensor.view(-1).view(torch.uint8), other[name].view(-1).view(torch.uint8)), name


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.filterwarnings("ignore")  # what transformers and torch say about families of theirs
def test_every_family_answers_from_packed_weights_as_from_plain_ones(family: str, store: Store, tmp_path: Path) -> None:
    try:
        plain, packed = make(family, tmp_path, store)
    except UnsupportedError as error:
        pytest.skip(str(error))
    assert_same(read_plain(packed.path, packed.manifest), load_file(plain.path / "dense.safetensors"))
    assert store.verify("packed") == []
    assert packed.manifest.unpacked.dense_bytes == plain.manifest.dense_bytes
    assert len(packed.manifest.packed_dense) > 0
    for kernels in ("torch", "auto"):
        (logits, tokens), found = (outputs(name, experts="50%", kernels=kernels) for name in ("plain", "packed"))
        assert torch.equal(found[0], logits), kernels
        assert found[1] == tokens, kernels


@pytest.mark.parametrize(
    ("family", "form", "sizes"),
    [
        ("deepseek_v3", "int8", {}),
        ("gpt_oss", "int8", {}),  # biases, and experts that lossless ones cannot be
        ("mixtral", "int4", {}),
        ("qwen3_moe", "int4", {}),
        ("gpt_oss", "mxfp4", {"hidden_size": 64, "intermediate_size": 96}),
        ("deepseek_v3", "fp8", {"hidden_size": 256, "moe_intermediate_size": 384}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_beside_experts_of_any_form(
    family: str, form: str, sizes: dict[str, Any], store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(family, tmp_path, "bfloat16", **sizes)
    asked = None if form in RELEASES else form
    if asked is None:
        RELEASES[form](tmp_path)
    with without_packing(monkeypatch):
        plain = pull(str(tmp_path), store=store, name="plain", experts=asked)
    packed = pull(str(tmp_path), store=store, name="packed", experts=asked)
    assert (plain.manifest.schema, packed.manifest.schema) == (QUANTIZED_SCHEMA, DENSE_SCHEMA)
    assert packed.manifest.layout == plain.manifest.layout
    assert packed.manifest.layout.quantization is not None
    assert packed.manifest.layout.quantization.kind == form
    assert_same(read_plain(packed.path, packed.manifest), load_file(plain.path / "dense.safetensors"))
    assert store.verify("packed") == []
    for kernels in ("torch", "auto"):
        (logits, tokens), found = (outputs(name, experts="50%", kernels=kernels) for name in ("plain", "packed"))
        assert torch.equal(found[0], logits), kernels
        assert found[1] == tokens, kernels
        with moeinf.load("packed", kernels=kernels) as engine:
            layers = [each for each in engine.model.modules() if isinstance(each, LosslessLinear)]
            assert len(layers) == (len(packed.manifest.packed_dense) if is_native_exactly(kernels) else 0)
    with use_device(monkeypatch):
        (logits, tokens), found = (outputs(name, experts="50%") for name in ("plain", "packed"))
        assert torch.equal(found[0], logits)
        assert found[1] == tokens


def test_what_is_packed(models: tuple[StoredModel, StoredModel], store: Store, tmp_path: Path) -> None:
    """Linear layers of whole panels, and no embedding, norm or router; a head that is one of the embeddings is none."""
    manifest = models[1].manifest
    assert manifest.dense_files == (PACKED_NAME,)
    assert manifest.packed_dense["lm_head.weight"] == (128, 32)
    assert not any(part in name for name in manifest.packed_dense for part in ("embed", "norm", "mlp.gate.weight"))
    assert manifest.packed_dense["model.layers.1.mlp.down_proj.weight"] == (32, 24)
    assert "model.layers.1.mlp.up_proj.weight" not in manifest.packed_dense  # 24 x 32
    tied = make("ernie4_5_moe", tmp_path / "tied", Store(tmp_path / "home"))[1].manifest.packed_dense
    assert Q_PROJ in tied
    assert "lm_head.weight" not in tied


def test_the_file_is_as_documented(models: tuple[StoredModel, StoredModel]) -> None:
    manifest = models[1].manifest
    with DenseFiles(models[1].path, manifest) as files:
        there = {name: entry for name, (_, entry) in files._places.items()}
    assert all((there[name].begin - 4096) % 64 == 0 and there[name].dtype == "U8" for name in manifest.packed_dense)
    assert all(there[uppers_name(name)].dtype == "U32" for name in manifest.packed_dense)
    assert sum(entry.nbytes for entry in there.values()) == manifest.dense_bytes
    assert manifest.files[PACKED_NAME].size == max(entry.end for entry in there.values())


def test_what_is_held_is_what_the_plan_counts(models: tuple[StoredModel, StoredModel]) -> None:
    manifest = models[1].manifest
    for kernels in ("torch", "auto"):
        with moeinf.load("packed", kernels=kernels) as engine, moeinf.load("plain", kernels=kernels) as plain:
            layers = [each for each in engine.model.modules() if isinstance(each, LosslessLinear)]
            is_packed = is_native_exactly(kernels)
            assert len(layers) == (len(manifest.packed_dense) if is_packed else 0)
            assert engine.plan.dense == (manifest.dense_bytes if is_packed else plain.plan.dense)
            ours, theirs = (worker._token_bytes(each.model) for each in (engine, plain))
            assert theirs - ours == plain.plan.dense - engine.plan.dense
            weights = dict(plain.model.named_parameters())
            for name, module in engine.model.named_modules():
                if isinstance(module, LosslessLinear):
                    assert torch.equal(module.weight, weights[f"{name}.weight"])


@pytest.mark.filterwarnings("ignore")
def test_a_device_has_plain_weights(models: tuple[StoredModel, StoredModel], monkeypatch: pytest.MonkeyPatch) -> None:
    with use_device(monkeypatch) as device:
        device.host_slots = 4
        (logits, tokens), found = (outputs(name, experts="3") for name in ("plain", "packed"))
        assert torch.equal(found[0], logits)
        assert found[1] == tokens
        with moeinf.load("packed", experts="3") as engine:
            assert engine.plan.dense + engine.plan.looked_up == models[0].manifest.dense_bytes


def test_a_matrix_that_cannot_be_packed_is_plain(store: Store, tmp_path: Path) -> None:
    make_checkpoint("qwen3_moe", tmp_path, "bfloat16")
    sizes = 2.0 ** (34 * torch.rand(32, 32, generator=torch.Generator().manual_seed(0)) - 32)
    edit(tmp_path, lambda tensors: tensors | {Q_PROJ: tensors[Q_PROJ].sign() * sizes.bfloat16()})
    plain = pull(str(tmp_path), store=store, name="plain")
    packed = pull(str(tmp_path), store=store, name="packed", experts="lossless")
    assert Q_PROJ not in packed.manifest.packed_dense
    assert Q_PROJ.replace("q_proj", "k_proj") in packed.manifest.packed_dense
    assert_same(read_plain(packed.path, packed.manifest), load_file(plain.path / "dense.safetensors"))
    (logits, tokens), found = (outputs(name) for name in ("plain", "packed"))
    assert torch.equal(found[0], logits)
    assert found[1] == tokens


def test_where_no_matrix_can_be_packed_the_dense_part_is_plain(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in stores that were made when none was packed, which are read as ever."""
    with without_packing(monkeypatch):
        plain, old = make("mixtral", tmp_path, store)
        again = quantize_model(plain, "again", LOSSLESS, store=store)
    assert (old.manifest.schema, old.manifest.packed_dense) == (QUANTIZED_SCHEMA, {})
    assert "packed_dense" not in json.loads(old.manifest.to_json())
    assert old.manifest.files["dense.safetensors"] == plain.manifest.files["dense.safetensors"]
    assert again.manifest == old.manifest
    (logits, tokens), found = (outputs(name) for name in ("plain", "packed"))
    assert torch.equal(found[0], logits)
    assert found[1] == tokens
    assert pull(str(tmp_path), store=store, name="packed", experts="lossless") == old
    new = pull(str(tmp_path), store=store, name="packed", experts="lossless", force=True)
    assert new.manifest.schema == DENSE_SCHEMA


def test_a_pull_and_quantize_make_the_same(models: tuple[StoredModel, StoredModel], store: Store) -> None:
    plain, packed = models
    made = quantize_model(plain, "made", LOSSLESS, store=store)
    assert made.manifest == packed.manifest
    assert quantize_model(plain, "made", LOSSLESS, store=store) == made
    small = quantize_model(plain, "small", INT4, store=store)
    assert small.manifest == pull(str(plain.manifest.source.repo), store=store, name="pulled", experts="int4").manifest


def test_what_is_packed_already_is_linked(models: tuple[StoredModel, StoredModel], store: Store) -> None:
    plain, packed = models
    small = quantize_model(packed, "small", INT4, store=store)
    assert os.path.samefile(small.path / PACKED_NAME, packed.path / PACKED_NAME)
    assert small.manifest.packed_dense == packed.manifest.packed_dense
    assert small.manifest.files == quantize_model(plain, "other", INT4, store=store).manifest.files
    store.remove("packed")
    assert store.verify("small") == []


def test_a_store_whose_dense_part_is_plain_is_here_already(
    models: tuple[StoredModel, StoredModel], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with without_packing(monkeypatch):
        old = quantize_model(models[0], "small", INT4, store=store)
    assert old.manifest.schema == QUANTIZED_SCHEMA
    for model in models:
        assert quantize_model(model, "small", INT4, store=store).manifest == old.manifest
    source = models[0].manifest.source.repo
    assert pull(source, store=store, name="small", experts="int4").manifest == old.manifest
    new = quantize_model(models[0], "small", INT4, store=store, force=True)
    assert new.manifest.schema == DENSE_SCHEMA
    for model in models:
        assert quantize_model(model, "small", INT4, store=store).manifest == new.manifest


def test_other_weights_are_not_taken_for_these(models: tuple[StoredModel, StoredModel], store: Store) -> None:
    """A model that was pulled again with another dense weight is not what its lossless one was made of."""
    plain, _ = models
    quantize_model(plain, "made", LOSSLESS, store=store)
    folder = Path(plain.manifest.source.repo)
    edit(folder, lambda tensors: tensors | {Q_PROJ: -tensors[Q_PROJ]})
    changed = pull(str(folder), store=store, name="plain", force=True)
    with pytest.raises(MoeinfError, match="made is here already"):
        quantize_model(changed, "made", LOSSLESS, store=store)


@pytest.mark.filterwarnings("ignore")
def test_programs_to_compare_with_get_plain_weights(models: tuple[StoredModel, StoredModel], tmp_path: Path) -> None:
    found = []
    for model in models:
        (folder := tmp_path / model.name).mkdir()
        write_fused(model, folder)
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        found.append({name: load_file(folder / file)[name] for name, file in index.items()})
    assert_same(*found)


@pytest.mark.parametrize("experts", ["lossless", "int8"])
def test_what_a_pull_takes_is_known_before(experts: str, store: Store, tmp_path: Path) -> None:
    make_checkpoint("qwen3_moe", tmp_path, "bfloat16")
    plan = plan_pull(str(tmp_path), store=store, experts=experts)
    there = pull(str(tmp_path), store=store, experts=experts).manifest
    assert len(there.packed_dense) > 0
    experts_bytes = there.num_experts * there.layout.file_bytes
    assert plan.store_bytes == experts_bytes + there.dense_bytes
    assert plan.needed_bytes == experts_bytes + there.unpacked.dense_bytes + max(plan.download_bytes, there.dense_bytes)


@pytest.mark.parametrize(
    "change",
    [
        lambda packed: packed.update({Q_PROJ: [16, 64]}),
        lambda packed: packed.update({Q_PROJ.replace("q_proj", "x_proj"): [32, 32]}),
        lambda packed: packed.update({"model.embed_tokens.weight": [128, 32]}),
    ],
)
def test_a_manifest_that_does_not_fit_the_file_is_damaged(change: Any, models: tuple[StoredModel, StoredModel]) -> None:
    path = models[1].path / MANIFEST_NAME
    raw = json.loads(path.read_text())
    change(raw["packed_dense"])
    path.write_text(json.dumps(raw))
    for kernels in ("torch", "auto"):
        with pytest.raises(IntegrityError, match="has no lossless model"):
            moeinf.load("packed", kernels=kernels)


@pytest.mark.skipif(not is_native_exactly("auto"), reason="weights are unpacked on this processor")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("field", "value"), [("num_key_value_heads", 4), ("mlp_only_layers", [])])
def test_a_configuration_of_another_model_is_damage(
    field: str, value: object, models: tuple[StoredModel, StoredModel]
) -> None:
    path = models[1].path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(IntegrityError):
        moeinf.load("packed")


class Interrupted:
    """A person who presses Ctrl-C while the dense part is packed."""

    @contextmanager
    def task(self, label: str, total: int, unit: str, *, done: int = 0) -> Iterator[Interrupted]:
        self._is_dense = unit == "matrices"
        yield self

    def advance(self, amount: int) -> None:
        if self._is_dense:
            raise KeyboardInterrupt


def test_an_interrupted_pull_packs_later(
    models: tuple[StoredModel, StoredModel], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = models[0].manifest.source.repo
    with pytest.raises(KeyboardInterrupt):
        pull(source, store=store, name="late", experts="lossless", progress=Interrupted())
    with monkeypatch.context() as patch:
        patch.setattr("moeinf.sharding.Sharder.add_file", lambda *_: pytest.fail("everything is there"))
        late = pull(source, store=store, name="late", experts="lossless")
    assert late.manifest == models[1].manifest
    assert store.verify("late") == []


@pytest.mark.parametrize("is_pulled", [True, False])
def test_whatever_operation_fails_the_model_is_whole_later(
    is_pulled: bool, models: tuple[StoredModel, StoredModel], store: Store, tmp_path: Path
) -> None:
    """Between the packing and the commit, above all: the plain file is gone then."""
    plain, packed = models

    def run(store: Store) -> Manifest:
        if not is_pulled:
            return quantize_model(plain, "made", LOSSLESS, store=store).manifest
        return pull(plain.manifest.source.repo, store=store, name="made", experts="lossless").manifest

    for number in itertools.count(1, 11):
        disk = FailingDisk(number)
        try:
            run(Store(store.home, disk=disk))
        except MoeinfError:
            assert disk.has_failed
        if not disk.has_failed:
            break
        assert dataclasses.replace(run(store), source=packed.manifest.source) == packed.manifest
        assert store.verify("made") == []
        store.remove("made")
    assert number > 40
