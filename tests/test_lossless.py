"""Lossless experts: that nothing is lost, in the store, in torch, in the native library and on a device."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from families import make_checkpoint, make_config
from moeinf import lossless
from moeinf.errors import IntegrityError, MoeinfError, UnpackableError, UnsupportedError, UsageError
from moeinf.forms import ExpertForm
from moeinf.fused import write_fused
from moeinf.kernels import ExpertMaths, Tensors, expands_for_a_token, is_native_exactly
from moeinf.kernels.native import ExpandingMaths, NativeMaths, NativePool
from moeinf.kernels.orders import OWN, Order
from moeinf.lossless import LosslessPacker, pack, read_expert, unpack
from moeinf.manifest import (
    DENSE_SCHEMA,
    EXCEPTION_SHARE,
    TABLE_WORDS,
    ExpertLayout,
    Manifest,
    TensorSpec,
    expert_path,
    lossless_shapes,
    uppers_name,
)
from moeinf.metamodel import model_shape
from moeinf.panels import lossless_layout
from moeinf.pull import plan_pull, preview, pull
from moeinf.quantized import dequantize, fill_randomly
from moeinf.quantizing import quantize_model
from moeinf.shared_library import load_library
from moeinf.store import Store, StoredModel
from outputs import outputs
from packing import edit
from standin import use_device
from test_densefile import Interrupted
from test_native import KINDS, LIBRARY, VARIANTS, Experts, compute, compute_rows, make_expert, make_layout

LOSSLESS = ExpertForm.read("lossless", None)
FAMILIES = ["qwen3_moe", "mixtral", "deepseek_v3", "olmoe", "granitemoe"]


@pytest.fixture(autouse=True)
def packed_by_the_library_under_test(monkeypatch: pytest.MonkeyPatch) -> None:
    if LIBRARY:
        monkeypatch.setattr(lossless, "_library", lambda: load_library(lossless._FUNCTIONS, LIBRARY))


def bits(weight: torch.Tensor) -> torch.Tensor:
    return weight.view(torch.int16)


def draw(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Weights as models have them, and some that none has: the largest and smallest there are, zeros, NaN, infinity."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(rows, width, generator=generator) * 0.02).bfloat16()
    odd = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3e38, 1e-38, 1e-40, -1e-40]).bfloat16()
    for place in torch.randint(rows * width, (rows * width // (2 * EXCEPTION_SHARE),), generator=generator).tolist():
        weight.view(-1)[place] = odd[place % len(odd)]
    return weight


SIDES = [(16, 8), (16, 512), (32, 520), (144, 256), (256, 72), (48, 1544)]


@pytest.mark.parametrize(("rows", "width"), SIDES)
def test_a_weight_is_what_it_was(rows: int, width: int) -> None:
    weight = draw(rows, width)
    panels, uppers = pack(weight)
    shapes = lossless_shapes(rows, width)
    assert (tuple(panels.shape), tuple(uppers.shape)) == (shapes[0][1], shapes[1][1])
    assert torch.equal(bits(unpack(panels, uppers)), bits(weight))


def test_without_the_library_the_same_bytes_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in several chunks, and with as many exceptions as there is room for."""
    weights = [draw(rows, width, seed=1) for rows, width in (*SIDES, (16 * 11, 256))]
    weights.append(torch.full((16, 256), 0.01).bfloat16())
    weights[-1][3, 16 * 5 : 16 * 6] = 2.0 ** torch.arange(2, 34, 2)
    native = [pack(weight) for weight in weights]
    monkeypatch.setattr("moeinf.lossless._CHUNK_WEIGHTS", 3 * 16 * 256)
    monkeypatch.setattr("moeinf.lossless._library", lambda: None)
    for weight, made in zip(weights, native, strict=True):
        assert all(torch.equal(*each) for each in zip(pack(weight), made, strict=True))
        assert torch.equal(bits(unpack(*made)), bits(weight))


def test_threads_take_turns_at_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, inside, seen = pack(draw(16, 8)), list[int](), list[int]()

    def take_a_while(*_: object) -> None:
        inside.append(1)
        seen.append(len(inside))
        time.sleep(0.05)
        inside.pop()

    monkeypatch.setattr(lossless, "_library", lambda: SimpleNamespace(moe_expand_lossless=take_a_while))
    monkeypatch.setattr(lossless, "_open_pool", lambda _: 1)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lossless.expand, *zip(packed, packed, strict=True)))
    assert seen == [1, 1]


def test_a_weight_takes_12_bits_and_an_eighth() -> None:
    packed = sum(tensor.nbytes for tensor in pack(draw(1536, 2048)))
    assert packed * 8 / (1536 * 2048) == pytest.approx(12.13, abs=0.01)


def test_the_format_is_as_documented() -> None:
    """By the words of docs/store-format.md, one weight after the other."""
    weight = draw(32, 24)
    panels, uppers = pack(weight)
    table = uppers[:TABLE_WORDS].view(torch.uint8).tolist()
    begins = uppers[TABLE_WORDS : TABLE_WORDS + 3].tolist()
    for row, column in ((row, column) for row in range(32) for column in range(24)):
        panel, inside = panels[row // 16, column // 8].tolist(), 4 * (row % 16) + (0, 2, 1, 3)[column % 4]
        half = column % 8 // 4
        lower, upper = panel[64 * half + inside], table[panel[128 + inside] >> 4 * half & 15]
        for word in uppers[TABLE_WORDS + 3 :][begins[row // 16] : begins[row // 16 + 1]].tolist():
            if (word >> 12, word >> 8 & 15) == (column, row % 16):
                upper = word & 255
        assert upper << 8 | lower == int(bits(weight)[row, column]) & 0xFFFF


@pytest.mark.parametrize("is_native", [True, False])
def test_numbers_that_are_no_weights_are_refused(is_native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_native:
        monkeypatch.setattr("moeinf.lossless._library", lambda: None)
    noise = torch.randint(-(1 << 15), 1 << 15, (32, 256), generator=torch.Generator().manual_seed(0))
    weight = noise.to(torch.int16).view(torch.bfloat16)
    packer = LosslessPacker(ExpertLayout(4096, (TensorSpec("down_proj", "BF16", (32, 256), 0),)), False)
    with pytest.raises(UnsupportedError, match=r"down_proj of expert 3 has [\d,]+ weights of unusual size, and .* 32"):
        list(packer.encode({"down_proj": weight}, "expert 3"))


@pytest.mark.parametrize(
    ("dtype", "shape", "is_transposed", "complaint"),
    [
        ("F32", (16, 8), False, "experts in F32"),
        ("BF16", (16, 8), True, r"lie \[in, out\]"),
        ("BF16", (24, 8), False, "is 24 x 8: .* multiples of 16 x 8"),
        ("BF16", (16, 12), False, "is 16 x 12"),
        ("BF16", (16, 1 << 16), False, "up to 32,768 wide"),
    ],
)
def test_experts_that_cannot_be_packed(dtype: str, shape: tuple[int, int], is_transposed: bool, complaint: str) -> None:
    layout = ExpertLayout(4096, (TensorSpec("down_proj", dtype, shape, 0),))
    with pytest.raises(UnsupportedError, match=complaint) as caught:
        LosslessPacker(layout, is_transposed)
    assert caught.value.hint == "store them as bf16"


# In the store


@pytest.fixture
def store(home: Path) -> Store:
    return Store(home)


@pytest.fixture(scope="session", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lossless") / str(request.param)
    make_checkpoint(request.param, folder)
    return folder


def both(checkpoint: Path, store: Store) -> tuple[StoredModel, StoredModel]:
    """The model as it is, and packed."""
    plain = pull(str(checkpoint), store=store, name="plain", dtype="bfloat16")
    return plain, pull(str(checkpoint), store=store, name="packed", dtype="bfloat16", experts="lossless")


@pytest.mark.filterwarnings("ignore")  # what transformers says about families of its
def test_every_expert_is_what_it_was_and_so_is_the_output(checkpoint: Path, store: Store, tmp_path: Path) -> None:
    plain, packed = both(checkpoint, store)
    there = packed.manifest
    assert (there.precision, there.schema) == (f"{plain.manifest.precision}, packed without loss", DENSE_SCHEMA)
    assert Manifest.from_json(there.to_json()) == there
    assert store.verify("packed") == []
    for layer, described in enumerate(there.layers):
        for expert in range(described.num_experts):
            tensors, wanted = (
                read_expert(model.path / expert_path(layer, expert), model.manifest.layout) for model in (packed, plain)
            )
            assert tensors.keys() == wanted.keys()
            assert all(torch.equal(bits(tensors[name]), bits(wanted[name])) for name in wanted)
    for experts, kernels in (("50%", "torch"), ("100%", "auto"), ("25%", "auto")):
        logits, tokens = outputs("plain", experts=experts, kernels=kernels)
        found = outputs("packed", experts=experts, kernels=kernels)
        assert torch.equal(found[0], logits), (experts, kernels)
        assert found[1] == tokens, (experts, kernels)


def test_packed_ones_are_quantised_like_plain_ones(store: Store, tmp_path: Path) -> None:
    make_checkpoint("qwen3_moe", tmp_path / "source")
    plain, packed = both(tmp_path / "source", store)
    again = quantize_model(plain, "again", LOSSLESS, store=store)
    assert again.manifest == packed.manifest
    form = ExpertForm.read("int4", None)
    made = [quantize_model(model, f"int4-{model.name}", form, store=store).manifest for model in (plain, packed)]
    assert made[0].files == made[1].files
    with pytest.raises(UnsupportedError, match=r"packed has lossless experts .* already"):
        quantize_model(packed, "once-more", LOSSLESS, store=store)


@pytest.mark.filterwarnings("ignore")
def test_programs_to_compare_with_get_plain_experts(store: Store, tmp_path: Path) -> None:
    make_checkpoint("qwen3_moe", tmp_path / "source")
    folders = []
    for model in both(tmp_path / "source", store):
        (folder := tmp_path / f"fused-{model.name}").mkdir()
        write_fused(model, folder)
        folders.append(folder)
    for path in folders[0].glob("experts-*.safetensors"):
        assert path.read_bytes() == (folders[1] / path.name).read_bytes()


def test_what_a_pull_will_take_is_known_before(store: Store, tmp_path: Path) -> None:
    make_checkpoint("qwen3_moe", tmp_path)
    plan = plan_pull(str(tmp_path), store=store, dtype="bfloat16", experts="lossless")
    model = pull(str(tmp_path), store=store, dtype="bfloat16", experts="lossless")
    there = model.manifest
    assert model.name.endswith("-lossless")
    assert plan.store_bytes == there.num_experts * there.layout.file_bytes + there.dense_bytes
    assert there.layout.plain_bytes == there.layout.unpacked.nbytes > there.layout.nbytes
    plain = pull(str(tmp_path), store=store, name="plain", dtype="bfloat16")
    config = make_config("qwen3_moe")
    assert model_shape(config, there) == model_shape(config, plain.manifest)


def always() -> bool:
    return True


def test_what_is_released_plain_is_packed_unasked(store: Store, tmp_path: Path) -> None:
    make_checkpoint("qwen3_moe", tmp_path)
    source = str(tmp_path)
    foreseen = preview(source, store=store, packs=always).manifest
    plan = plan_pull(source, store=store, packs=always)
    model = pull(source, store=store, packs=always)
    there = model.manifest
    assert model.name == plan.name == tmp_path.name
    assert plan.store_bytes == there.num_experts * there.layout.file_bytes + there.dense_bytes
    assert plan.precision == there.precision == "bfloat16, packed without loss"
    assert foreseen == dataclasses.replace(there, files={})
    assert pull(source, store=store, packs=always) == pull(source, store=store) == model
    assert pull(source, store=store, experts="lossless") == model
    with pytest.raises(UsageError, match=r"is here already, and is .* in bfloat16, lossless experts"):
        pull(source, store=store, experts="bf16")
    assert pull(source, store=store, experts="bf16", packs=always, force=True).manifest.precision == "bfloat16"


def test_a_model_that_is_pulled_again_stays_as_it_is(store: Store, tmp_path: Path) -> None:
    make_checkpoint("qwen3_moe", tmp_path)
    plain, packed = both(tmp_path, store)
    for model in (plain, packed):
        assert pull(model.name, store=store, packs=always, force=True).manifest == model.manifest


@pytest.mark.parametrize(
    ("family", "options", "precision"),
    [
        ("qwen3_moe", {"dtype": "float32"}, "bfloat16 converted to float32"),
        ("gpt_oss", {}, "bfloat16"),  # its experts lie [in, out]
        ("qwen3_moe", {"experts": "int8"}, "int8 experts (groups of 64), from bfloat16"),
    ],
)
def test_what_cannot_or_need_not_be_packed_is_not(
    family: str, options: dict[str, str], precision: str, store: Store, tmp_path: Path
) -> None:
    make_checkpoint(family, tmp_path)
    more: dict[str, Any] = dict(options)
    assert plan_pull(str(tmp_path), store=store, packs=always, **more).precision == precision
    assert pull(str(tmp_path), store=store, packs=always, **more).manifest.precision == precision


def test_a_gpu_computes_from_plain_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # what conftest.py sets for all tests
    from moeinf.kernels import computes_from_packed

    assert computes_from_packed() == is_native_exactly("auto")
    monkeypatch.setattr(torch.cuda, "is_available", always)
    assert not computes_from_packed()


def test_the_demo_is_never_packed(store: Store) -> None:
    assert pull("demo", store=store, packs=always).manifest.precision == "bfloat16"


@pytest.mark.parametrize("is_as_before", [True, False])
def test_a_pull_that_was_interrupted_goes_on_where_experts_are_packed_alike(
    is_as_before: bool, store: Store, tmp_path: Path
) -> None:
    make_checkpoint("qwen3_moe", tmp_path)
    notes: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        pull(str(tmp_path), store=store, name="model", packs=always, progress=Interrupted())
    model = pull(str(tmp_path), store=store, name="model", packs=lambda: is_as_before, notify=notes.append)
    assert store.verify("model") == []
    assert (model.manifest.layout.quantization is not None) == is_as_before
    assert notes[0].startswith("going on with an" if is_as_before else "an unfinished pull of model was of another")


def spoil(folder: Path) -> None:
    """Give the last expert weights of all sizes."""
    noise = torch.randint(-(1 << 14), 1 << 14, (32, 24), generator=torch.Generator().manual_seed(0))
    weight = noise.to(torch.int16).view(torch.bfloat16)
    edit(folder, lambda tensors: tensors | {"model.layers.2.mlp.experts.7.down_proj.weight": weight})


@pytest.mark.parametrize("is_interrupted", [False, True])
def test_a_pull_that_meets_what_cannot_be_packed_stores_experts_as_they_are(
    is_interrupted: bool, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was packed before is unpacked, and not fetched again."""
    make_checkpoint("qwen3_moe", tmp_path, "bfloat16", moe_intermediate_size=24)
    spoil(tmp_path)
    plain = pull(str(tmp_path), store=store, name="plain")
    notes: list[str] = []
    monkeypatch.setattr("moeinf.incoming._BATCH_FILES", 1)
    if is_interrupted:
        left = iter(range(3))
        with monkeypatch.context() as patch:
            patch.setattr("moeinf.lossless.read_expert", lambda *of: next(left) * [] or read_expert(*of))
            with pytest.raises(StopIteration):
                pull(str(tmp_path), store=store, name="packed", experts="lossless")
    model = pull(str(tmp_path), store=store, name="packed", experts="lossless", notify=notes.append)
    assert model.manifest.files == plain.manifest.files
    assert model.manifest.layout == plain.manifest.layout
    assert model.manifest.precision == "bfloat16, not packable without loss"
    assert store.verify("packed") == []
    again: list[str] = []
    assert pull(str(tmp_path), store=store, name="packed", experts="lossless", notify=again.append) == model
    assert again == [f"packed is here already, from {tmp_path}"]
    told = [note for note in notes if note.startswith("experts are stored as they are: down_proj of expert 7 of ")]
    assert len(told) == (not is_interrupted)
    with pytest.raises(UnpackableError, match=r"down_proj of expert 7 of model\.layers\.2\.mlp\.experts has"):
        quantize_model(plain, "quantized", LOSSLESS, store=store)


def test_what_cannot_be_asked_for(store: Store, tmp_path: Path) -> None:
    make_checkpoint("qwen3_moe", tmp_path)
    with pytest.raises(UsageError, match="--group says how int8 experts"):
        pull(str(tmp_path), store=store, experts="lossless", group=32)
    with pytest.raises(UnsupportedError, match="experts in F32 are not packed"):
        pull(str(tmp_path), store=store, dtype="float32", experts="lossless")
    assert store.names() == []


@pytest.mark.parametrize(
    ("tensor", "field", "value"),
    [
        ("down_proj", "shape", [2, 4, 191]),
        ("down_proj", "dtype", "I8"),
        ("down_proj_uppers", "shape", [3]),
        ("down_proj_uppers", "dtype", "F32"),
    ],
)
def test_a_manifest_that_does_not_fit_is_damaged(
    tensor: str, field: str, value: object, store: Store, tmp_path: Path
) -> None:
    make_checkpoint("qwen3_moe", tmp_path)
    raw = json.loads(both(tmp_path, store)[1].manifest.to_json())
    (spec,) = (spec for spec in raw["layout"]["tensors"] if spec["name"] == tensor)
    spec[field] = value
    with pytest.raises(MoeinfError, match=r"moeinf\.json is damaged"):
        Manifest.from_json(json.dumps(raw))
    raw["layout"]["quantization"]["group"] = 32
    with pytest.raises((UnsupportedError, IntegrityError)):
        Manifest.from_json(json.dumps(raw))


@pytest.mark.filterwarnings("ignore")
def test_a_device_has_the_same_output(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint("qwen3_moe", tmp_path)
    both(tmp_path, store)
    with use_device(monkeypatch) as device:
        for experts, device.host_slots in (("3", 4), ("100%", None)):
            (logits, tokens), found = (outputs(name, experts=experts) for name in ("plain", "packed"))
            assert torch.equal(found[0], logits)
            assert found[1] == tokens


# In the native library


@pytest.fixture(params=VARIANTS)
def pool(request: pytest.FixtureRequest) -> Iterator[NativePool]:
    pool = NativePool(2, request.param, LIBRARY)
    yield pool
    pool.close()


def packed(plain: Tensors, packer: LosslessPacker) -> Tensors:
    """In a piece of memory that ends where the expert does, with uppers where an odd number of words ends."""
    memory = torch.frombuffer(bytearray(b"".join(packer.encode(plain, "an expert"))), dtype=torch.uint8)
    dtypes = {"U8": torch.uint8, "U32": torch.uint32, "BF16": torch.bfloat16}
    return {
        spec.name: memory[spec.offset : spec.offset + spec.nbytes].view(dtypes[spec.dtype]).view(spec.shape)
        for spec in packer.layout.tensors
    }


@pytest.mark.parametrize("kind", ["silu", "gelu-tanh", "no-gate", "interleaved"])
def test_experts_give_what_they_give_unpacked(pool: NativePool, kind: str) -> None:
    module = Experts(**KINDS[kind])
    generator = torch.Generator().manual_seed(0)
    for hidden_size, inner in ((16, 16), (64, 72), (528, 272), (1040, 640)):
        inner += inner % 16 if kind == "no-gate" else 0
        plain = make_layout(module, hidden_size, inner, torch.bfloat16)
        packer = LosslessPacker(plain, False)
        experts = [make_expert(plain, generator) for _ in range(3)]
        widths = [spec.name for spec in plain.tensors if len(spec.shape) == 2]
        for expert in experts:
            for name in widths:  # what no table has
                odd = torch.randint(expert[name].numel(), (expert[name].numel() // 600,), generator=generator)
                expert[name].view(-1)[odd] *= 2.0**-30
        few = [packed(expert, packer) for expert in experts]
        native, theirs = NativeMaths(module, packer.layout, pool), NativeMaths(module, plain, pool)
        assert native.computed_by == f"native, {pool.variant}"
        hidden = torch.randn(1, hidden_size, generator=generator).bfloat16()
        weights = torch.rand(1, 3, generator=generator).bfloat16()
        assert torch.equal(compute(native, hidden, weights, few), compute(theirs, hidden, weights, experts))
        for rows in (1, 2, 7, 40, 101):
            some = torch.randn(rows, hidden_size, generator=generator).bfloat16()
            shares = torch.rand(rows, 1, generator=generator).bfloat16()
            wanted = compute_rows(theirs, some, experts[0], shares)
            for maths in (native, ExpandingMaths(module, packer.layout, pool)):
                assert torch.equal(compute_rows(maths, some, few[0], shares), wanted), rows


@pytest.mark.parametrize("order", [OWN, Order(96, 1 << 62)], ids=str)
@pytest.mark.parametrize("width", [8, 40, 512, 1032])
@pytest.mark.parametrize("exponent", [0, -63, -66])
def test_one_row_gives_what_it_gives_unpacked(pool: NativePool, width: int, exponent: int, order: Order) -> None:
    """Also where products are too small to be normal numbers, which an instruction may take for 0."""
    weight = draw(48, width) * 2.0**exponent
    x = (draw(1, width, seed=1).clamp(-4, 4) * 2.0**exponent).contiguous()
    if order != OWN and pool.variant != "avx512amx":
        pytest.skip("chains are of AMX")
    wanted = pool.multiply(x, weight, order=order)
    assert torch.equal(bits(pool.multiply(x, *pack(weight), order)), bits(wanted))


@pytest.mark.parametrize(("rows", "width"), SIDES)
def test_the_library_unpacks_as_torch_does(pool: NativePool, rows: int, width: int) -> None:
    plain = ExpertLayout(4096, (TensorSpec("down_proj", "BF16", (rows, width), 0),))
    about = lossless_layout(plain).quantization
    assert about is not None
    weight = draw(rows, width)
    panels, uppers = pack(weight)
    assert torch.equal(bits(pool.expand(panels, uppers, about, width, is_transposed=False)), bits(weight))
    assert torch.equal(bits(dequantize(panels, uppers, about, width, torch.bfloat16)), bits(weight))
    for first in range(0, rows, 16):
        for count in range(16, rows - first + 1, 16):
            assert torch.equal(bits(pool.unpack(panels, uppers, first, count)), bits(weight[first : first + count]))


def test_damaged_uppers_do_no_harm(pool: NativePool) -> None:
    """Files are not hashed while they are read: what is wrong may give wrong weights, but touches no other memory."""
    rows, width = 48, 72
    plain = ExpertLayout(4096, (TensorSpec("down_proj", "BF16", (rows, width), 0),))
    about = lossless_layout(plain).quantization
    assert about is not None
    panels, uppers = pack(draw(rows, width))
    for seed in range(20):
        noise = torch.randint(-(1 << 31), 1 << 31, uppers.shape, generator=torch.Generator().manual_seed(seed))
        damaged = torch.where(torch.arange(len(uppers)) < TABLE_WORDS, uppers, noise.int())
        if seed % 2:
            damaged[TABLE_WORDS : TABLE_WORDS + 4] = torch.tensor([0, 1 << 30, 2, 1 << 30])
        weight = pool.expand(panels, damaged, about, width, is_transposed=False).clone()
        assert torch.equal(bits(weight) & 255, bits(unpack(panels, uppers)) & 255)
        if pool.adds_as_torch_does:
            pool.multiply(torch.ones(3, width, dtype=torch.bfloat16), panels, damaged)
            pool.multiply(torch.ones(1, width, dtype=torch.bfloat16), panels, damaged)


def test_torch_has_experts_expanded_for_each_token() -> None:
    module = Experts(**KINDS["silu"])
    plain = make_layout(module, 64, 48, torch.bfloat16)
    layout = LosslessPacker(plain, False).layout
    pool = NativePool(2, path=LIBRARY)
    native, expanding = NativeMaths(module, layout, pool), ExpandingMaths(module, layout, pool)
    assert not expands_for_a_token(module, [native, native], layout)
    assert expands_for_a_token(module, [native, expanding], layout)
    assert not expands_for_a_token(module, [native, ExpandingMaths(module, plain, pool)], plain)
    pool.close()


def test_random_experts_are_whole_ones() -> None:
    module = Experts(**KINDS["gelu-tanh"])
    packer = LosslessPacker(make_layout(module, 64, 48, torch.bfloat16), False)
    dtypes = {"U8": torch.uint8, "U32": torch.uint32, "BF16": torch.bfloat16}
    tensors = {spec.name: torch.zeros(spec.shape, dtype=dtypes[spec.dtype]) for spec in packer.layout.tensors}
    fill_randomly(tensors, packer.layout.quantization, torch.Generator().manual_seed(0))
    for name in ("gate_up_proj", "down_proj"):
        weight = unpack(tensors[name], tensors[uppers_name(name)])
        assert float(weight.float().std()) == pytest.approx(0.02, rel=0.1)
    assert float(tensors["down_proj_bias"].float().std()) == pytest.approx(0.02, rel=0.4)


def test_they_are_native_by_themselves_where_that_is_exact() -> None:
    """With `auto`, as plain ones are."""
    from test_native import TORCH_S

    if TORCH_S is None:
        pytest.skip("torch adds in another order on this processor")
    module = Experts(**KINDS["silu"])
    plain = make_layout(module, 512, 256, torch.bfloat16)
    expert = make_expert(plain, torch.Generator().manual_seed(0))
    packer = LosslessPacker(plain, False)
    pool = NativePool(2, path=LIBRARY)
    try:
        native, few = NativeMaths(module, packer.layout, pool), packed(expert, packer)
        for rows in (1, 2, 30):
            hidden = torch.randn(rows, 512, generator=torch.Generator().manual_seed(rows)).bfloat16()
            shares = torch.ones(rows, 1, dtype=torch.bfloat16)
            wanted = compute_rows(ExpertMaths(module), hidden, expert, shares)
            assert torch.equal(compute_rows(native, hidden, few, shares), wanted)
    finally:
        pool.close()
