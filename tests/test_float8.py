"""Models whose experts were released in blocks of float8: kept so in the store and in memory, and their output is that
of the same experts expanded, to the last bit.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from families import make_checkpoint
from moeinf.checkpoint import Checkpoint
from moeinf.conversion import plan_conversion
from moeinf.errors import IntegrityError, MoeinfError, UnsupportedError
from moeinf.manifest import DENSE_SCHEMA, ExpertLayout, Manifest, TensorSpec, expert_path, scales_name
from moeinf.pull import plan_pull, preview, pull
from moeinf.quantized import Packer, dequantize
from moeinf.store import Store, StoredModel
from moeinf.tensorfile import TensorFile
from outputs import NEW_TOKENS, PROMPT, outputs
from packing import FLOAT8_CONFIG, edit, edit_config, pack_float8

RELEASED = "fp8 experts (as released)"
FAMILIES: dict[str, dict[str, int]] = {
    "deepseek_v3": {"hidden_size": 256, "moe_intermediate_size": 384},  # whole blocks
    "qwen3_moe": {"moe_intermediate_size": 160},  # as transformers cuts it, two blocks of 80, and 32 the other way
}


def make(family: str, folder: Path) -> dict[str, torch.Tensor]:
    sizes: dict[str, Any] = FAMILIES.get(family, {})
    make_checkpoint(family, folder, **sizes)
    return pack_float8(folder)


@pytest.fixture(scope="session", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / str(request.param)
    make(request.param, folder)
    return folder


@pytest.fixture
def store(home: Path) -> Store:
    return Store(home)


@pytest.mark.filterwarnings("ignore")  # transformers says that it expands
def test_logits_and_tokens_are_those_of_transformers(checkpoint: Path, store: Store) -> None:
    pytest.importorskip("accelerate", reason="transformers loads float8 with it only")
    auto: Any = AutoModelForCausalLM  # untyped
    model = auto.from_pretrained(checkpoint, dtype=torch.bfloat16, experts_implementation="eager")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    with torch.inference_mode():
        answer = model.generate(PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
        logits, tokens = model(PROMPT).logits, answer[0, PROMPT.shape[1] :].tolist()
    stored = pull(str(checkpoint), store=store, name="model")
    assert stored.manifest.precision == RELEASED
    for experts, kernels in (("4", "torch"), ("25%", "auto"), ("50%", "torch"), ("100%", "auto")):
        found = outputs("model", experts=experts, kernels=kernels)
        assert torch.equal(found[0], logits), (experts, kernels)
        assert found[1] == tokens, (experts, kernels)


@pytest.mark.filterwarnings("ignore")
def test_float32_is_computed_with_any_cache(checkpoint: Path, store: Store) -> None:
    """transformers itself cannot: it leaves such a model's norms in bfloat16."""
    pull(str(checkpoint), store=store, name="model", dtype="float32")
    wanted = outputs("model", experts="100%", kernels="torch")
    for experts, kernels in (("4", "auto"), ("25%", "torch")):
        found = outputs("model", experts=experts, kernels=kernels)
        assert torch.equal(found[0], wanted[0])
        assert found[1] == wanted[1]


@pytest.mark.parametrize("experts", ["4", "25%", "100%"])
@pytest.mark.filterwarnings("ignore")
def test_what_is_computed_is_what_the_expanded_store_computes(experts: str, checkpoint: Path, store: Store) -> None:
    """By native kernels as well, whose order of addition is their own on some processors."""
    pull(str(checkpoint), store=store, name="packed")
    pull(str(checkpoint), store=store, name="plain", experts="bf16")
    can_be_native = checkpoint.name == "deepseek_v3"
    for kernels in ("torch", "auto", "native") if can_be_native else ("torch", "auto"):
        found, wanted = (outputs(name, experts=experts, kernels=kernels) for name in ("packed", "plain"))
        assert torch.equal(found[0], wanted[0]), kernels
        assert found[1] == wanted[1], kernels


def test_what_is_stored_is_what_was_released(store: Store, tmp_path: Path) -> None:
    tensors = make("deepseek_v3", tmp_path)
    model = pull(str(tmp_path), store=store, name="model")
    there = model.manifest
    assert (there.precision, there.dtype, there.schema) == (RELEASED, "bfloat16", DENSE_SCHEMA)
    weights = 3 * 256 * 384
    assert there.layout.nbytes == weights + 4 * weights // 128**2
    assert there.layout.plain_bytes == 2 * weights
    assert Manifest.from_json(there.to_json()) == there
    assert store.verify(model.name) == []
    prefix = "model.layers.1.mlp.experts.5"
    for end, dtype in (("", torch.float8_e4m3fn), ("_scale_inv", torch.float32)):
        up = torch.cat([tensors[f"{prefix}.{part}_proj.weight{end}"] for part in ("gate", "up")])
        wanted = {"gate_up_proj": up, "down_proj": tensors[f"{prefix}.down_proj.weight{end}"]}
        with TensorFile.open(model.path / expert_path(0, 5)) as file:
            for name, tensor in wanted.items():
                stored = scales_name(name) if end else name
                assert tensor.dtype == dtype
                assert bytes(file.read(stored)) == tensor.view(torch.uint8).numpy().tobytes()
                assert file.entries[stored].begin % 4 == 0


def expand(packed: StoredModel, plain: StoredModel, layer: int, expert: int) -> None:
    """Whether the tensors of an expert are those of the store that was expanded at once."""
    about = packed.manifest.layout.quantization
    assert about is not None
    path = expert_path(layer, expert)
    with TensorFile.open(packed.path / path) as few, TensorFile.open(plain.path / path) as many:
        for spec in plain.manifest.layout.tensors:
            numbers = torch.frombuffer(few.read(spec.name), dtype=torch.float8_e4m3fn).view(spec.shape)
            scales = torch.frombuffer(few.read(scales_name(spec.name)), dtype=torch.float32)
            scales = scales.view(few.entries[scales_name(spec.name)].shape)
            made = dequantize(numbers, scales, about, spec.shape[1], torch.bfloat16)
            assert torch.equal(made, torch.frombuffer(many.read(spec.name), dtype=torch.bfloat16).view(spec.shape))


@pytest.mark.parametrize(
    "family",
    ["deepseek_v2", "deepseek_v3", "glm4_moe", "minimax_m2", "mixtral", "nemotron_h", "qwen3_moe", "qwen3_next"],
)
@pytest.mark.filterwarnings("ignore")
def test_the_expanded_store_is_there_for_who_wants_it(family: str, tmp_path: Path, store: Store) -> None:
    """Whatever its tensors are called, and with a gate or without."""
    make(family, tmp_path / family)
    packed = pull(str(tmp_path / family), store=store)
    plain = pull(str(tmp_path / family), store=store, name="plain", experts="bf16")
    assert packed.manifest.precision == RELEASED
    assert plain.manifest.precision == "float8 blocks expanded to bfloat16 on request"
    for layer, described in enumerate(plain.manifest.layers):
        for expert in range(described.num_experts):
            expand(packed, plain, layer, expert)


def test_plans_count_packed_bytes(checkpoint: Path, store: Store) -> None:
    """Before anything is downloaded, and what a folder would be."""
    there = preview(str(checkpoint), store=store).manifest
    plans = {experts: plan_pull(str(checkpoint), store=store, experts=experts) for experts in (None, "bf16")}
    model = pull(str(checkpoint), store=store)
    assert there == dataclasses.replace(model.manifest, files={})
    count = sum(layer.num_experts for layer in there.layers)
    assert plans[None].store_bytes == count * model.manifest.layout.file_bytes + model.manifest.dense_bytes
    assert plans["bf16"].store_bytes > plans[None].store_bytes
    assert (plans[None].precision, plans["bf16"].precision) == (
        RELEASED,
        "float8 blocks expanded to bfloat16 on request",
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e8m0fnu])
def test_scales_of_other_floats_become_float32(dtype: torch.dtype, tmp_path: Path, store: Store) -> None:
    make_checkpoint("qwen3_moe", tmp_path)
    tensors = pack_float8(tmp_path, dtype)
    model = pull(str(tmp_path), store=store, name="model")
    with TensorFile.open(model.path / expert_path(0, 3)) as file:
        stored = torch.frombuffer(file.read("down_proj_scales"), dtype=torch.float32)
    assert torch.equal(stored, tensors["model.layers.0.mlp.experts.3.down_proj.weight_scale_inv"].float().flatten())


@pytest.mark.parametrize(
    "other",
    [{"weight_block_size": [16, 16]}, {"weight_block_size": None}, {"expert_dtype": "fp4"}],
    ids=str,
)
def test_experts_in_other_forms_are_expanded(other: dict[str, Any], tmp_path: Path) -> None:
    make("qwen3_moe", tmp_path)
    assert plan_conversion(Checkpoint.from_folder(tmp_path)).packing == "fp8"
    edit_config(tmp_path, quantization_config=FLOAT8_CONFIG | other)
    assert plan_conversion(Checkpoint.from_folder(tmp_path)).packing is None


def test_experts_that_were_left_out_of_float8_are_stored_as_they_are(tmp_path: Path, store: Store) -> None:
    make_checkpoint("qwen3_moe", tmp_path)
    experts = edit(tmp_path, dict)
    tensors = pack_float8(tmp_path)
    kept = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    edit(tmp_path, lambda _: kept | {name: tensor for name, tensor in experts.items() if ".experts." in name})
    model = pull(str(tmp_path), store=store, name="model")
    with TensorFile.open(model.path / expert_path(0, 2)) as file:
        stored = torch.frombuffer(file.read("down_proj"), dtype=torch.bfloat16)
    assert torch.equal(stored, experts["model.layers.0.mlp.experts.2.down_proj.weight"].flatten())


# What is refused

PREFIX = "model.layers.0.mlp.experts"
Change = Callable[[dict[str, torch.Tensor]], object]


def set_scale(value: float) -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{PREFIX}.3.up_proj.weight_scale_inv"][1, 0] = value

    return change


def cut(name: str, end: int) -> Change:
    return lambda tensors: tensors.update({f"{PREFIX}.{name}": tensors[f"{PREFIX}.{name}"][:end]})


def cast(name: str, dtype: torch.dtype) -> Change:
    return lambda tensors: tensors.update({f"{PREFIX}.{name}": tensors[f"{PREFIX}.{name}"].float().to(dtype)})


def drop(*parts: str) -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if name.endswith("_scale_inv") and all(part in name for part in parts):
                del tensors[name]

    return change


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (set_scale(float("nan")), r"gate_up_proj_scales of expert 3 of .* holds NaN or infinity"),
        (set_scale(float("inf")), r"gate_up_proj_scales of expert 3 of .* holds NaN or infinity"),
        (drop("experts.3.up_proj"), r"has 8 experts, and the checkpoint 7 tensors like .*up_proj\.weight_scale_inv"),
        (drop("experts"), r"experts\.0\.\w+\.weight is packed as F8_E4M3, and neither config\.json nor"),
        (
            drop("experts", ".up_proj"),
            r"experts\.0\.up_proj\.weight is packed as F8_E4M3, and neither config\.json nor",
        ),
        (cut("3.down_proj.weight_scale_inv", 0), r"down_proj_scales of expert 3 .* \[0, 2\], not F32 \[1, 2\]"),
        (cut("3.down_proj.weight", 20), r"down_proj of expert 3 .* \[20, 160\], not F8_E4M3 \[32, 160\]"),
        (cut("3.up_proj.weight", 5), r"3\.gate_proj\.weight, .*3\.up_proj\.weight do not fit together: .*\[5, 32\]"),
        (cast("3.down_proj.weight", torch.bfloat16), r"down_proj of expert 3 .* is torch\.bfloat16 .*, not F8_E4M3"),
        (cast("3.down_proj.weight", torch.int8), r"down_proj of expert 3 .* is torch\.int8 .*, not F8_E4M3"),
        (cast("3.down_proj.weight_scale_inv", torch.int32), r"down_proj_scales of expert 3 .* is torch\.int32"),
    ],
)
def test_what_is_damaged_is_named(change: Change, complaint: str, tmp_path: Path, store: Store) -> None:
    tensors = make("qwen3_moe", tmp_path)
    change(tensors)
    edit(tmp_path, lambda _: tensors)
    with pytest.raises(MoeinfError, match=complaint):
        pull(str(tmp_path), store=store, name="model")
    assert store.names() == []


def test_sizes_that_transformers_does_not_cut_are_refused_before_anything_is_read(tmp_path: Path, store: Store) -> None:
    make("qwen3_moe", tmp_path)
    edit_config(tmp_path, moe_intermediate_size=129)
    with pytest.raises(UnsupportedError, match="is 258 x 32, which transformers does not cut into blocks of 128"):
        plan_pull(str(tmp_path), store=store)


@pytest.mark.parametrize("shape", [[3, 1], [2, 1], [0, 1], [4, 2], [320], [400, 1]])
def test_a_manifest_whose_scales_are_no_blocks_is_damaged(shape: list[int], tmp_path: Path, store: Store) -> None:
    make("qwen3_moe", tmp_path)
    raw = json.loads(pull(str(tmp_path), store=store, name="model").manifest.to_json())
    (scales,) = (tensor for tensor in raw["layout"]["tensors"] if tensor["name"] == "gate_up_proj_scales")
    assert scales["shape"] == [4, 1]
    scales["shape"] = shape
    with pytest.raises(IntegrityError, match=r"moeinf\.json is damaged"):
        Manifest.from_json(json.dumps(raw))


# An expert


def test_any_bytes_are_expanded_as_the_format_says() -> None:
    specs = (TensorSpec("down_proj", "BF16", (4, 256), 0),)
    packer = Packer(ExpertLayout(4096, specs), False, "fp8", {"down_proj": 2})
    numbers = torch.arange(256, dtype=torch.uint8).repeat(4, 1).view(torch.float8_e4m3fn)
    scales = torch.tensor([[3e-4, 1.0], [-7.7, 2.0**-118]])
    assert [spec.shape for spec in packer.layout.tensors] == [(2, 2), (4, 256)]
    made = dequantize(numbers, scales, packer.quantization, 256, torch.bfloat16)
    for row, byte in ((row, byte) for row in range(4) for byte in range(256)):
        exponent, fraction = byte >> 3 & 15, byte & 7
        size = (8 + fraction) * 2.0 ** (exponent - 10) if exponent else fraction * 2.0**-9
        if byte & 127 == 127:
            assert made[row, byte].isnan()
            continue
        scale = scales[row // 2, byte // 128]
        wanted = (torch.tensor(-size if byte > 127 else size) * scale).bfloat16()
        assert made[row, byte] == wanted
