"""Models whose experts were released packed, in MXFP4: kept so in the store and in memory, and their output is that of
the same experts expanded, to the last bit.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import moeinf
from families import make_checkpoint
from moeinf.checkpoint import Checkpoint
from moeinf.conversion import plan_conversion
from moeinf.errors import IntegrityError, UnsupportedError, UsageError
from moeinf.forms import ExpertForm
from moeinf.kernels.native import NativeMaths
from moeinf.manifest import DENSE_SCHEMA, ExpertLayout, Manifest, TensorSpec, expert_path
from moeinf.pull import plan_pull, preview, pull
from moeinf.quantized import Packer, dequantize
from moeinf.quantizing import quantize_model
from moeinf.store import Store
from moeinf.tensorfile import TensorFile
from moeinf.trace import ModelIdentity
from packing import edit, edit_config, pack_mxfp4

PROMPT = torch.randint(5, 100, (1, 21), generator=torch.Generator().manual_seed(1))
NEW_TOKENS = 24
HIDDEN, INNER, EXPERTS = 64, 96, 8


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny gpt_oss as released, whose rows have two and three groups."""
    folder = tmp_path_factory.mktemp("checkpoint") / "oss"
    make_checkpoint("gpt_oss", folder, hidden_size=HIDDEN, intermediate_size=INNER)
    pack_mxfp4(folder)
    return folder


@pytest.fixture
def store(home: Path) -> Store:
    return Store(home)


def reference(folder: Path, dtype: torch.dtype) -> tuple[torch.Tensor, list[int]]:
    """Logits and greedy tokens of transformers, which expands what it loads."""
    auto: Any = AutoModelForCausalLM  # untyped
    model = auto.from_pretrained(folder, dtype=dtype, experts_implementation="eager")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    with torch.inference_mode():
        tokens = model.generate(PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
        return model(PROMPT).logits, tokens[0, PROMPT.shape[1] :].tolist()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.filterwarnings("ignore")  # transformers says that it expands
def test_logits_and_tokens_are_those_of_transformers(dtype: str, checkpoint: Path, store: Store) -> None:
    logits, tokens = reference(checkpoint, getattr(torch, dtype))
    pull(str(checkpoint), store=store, name="model", dtype=dtype)
    for experts, kernels in (("2", "torch"), ("25%", "auto"), ("50%", "torch"), ("100%", "auto")):
        with moeinf.load("model", experts=experts, kernels=kernels) as engine, torch.inference_mode():
            assert torch.equal(engine.model(PROMPT).logits, logits), (experts, kernels)
            engine.generation_config.eos_token_id = None
            sampling = moeinf.Sampling(max_tokens=NEW_TOKENS, temperature=0)
            assert list(engine.session().generate(PROMPT[0].tolist(), sampling).tokens) == tokens, (experts, kernels)
            assert engine.stats().quantization == "mxfp4 experts (as released)"
            engine.runtime.cache.check_integrity()


@pytest.mark.filterwarnings("ignore")
def test_every_layer_adds_in_the_order_that_was_found(checkpoint: Path, store: Store) -> None:
    """Another one changes one number in some thousands by a bit: comparing what models give does not tell."""
    pull(str(checkpoint), store=store, name="model")
    with moeinf.load("model", experts="100%") as engine:
        native = [maths for maths in engine.runtime._maths if isinstance(maths, NativeMaths)]
        orders = {(maths.layer.up_chain, maths.layer.down_chain) for maths in native}
        assert len(engine.manifest.layers) > 1
        assert len(orders) == bool(native)


def test_what_is_stored_is_what_was_released(checkpoint: Path, store: Store) -> None:
    model = pull(str(checkpoint), store=store)
    there = model.manifest
    assert (there.precision, there.dtype, there.schema) == ("mxfp4 experts (as released)", "bfloat16", DENSE_SCHEMA)
    weights = HIDDEN * INNER * 3
    assert there.layout.nbytes == weights * 17 // 32 + 2 * (2 * INNER + HIDDEN)
    assert there.layout.plain_bytes == 2 * weights
    assert Manifest.from_json(there.to_json()) == there
    assert store.verify(model.name) == []
    with (
        TensorFile.open(checkpoint / "model.safetensors") as source,
        TensorFile.open(model.path / expert_path(1, 5)) as file,
    ):
        for name, entry in file.entries.items():
            released = f"{there.layers[1].module}.{name}"
            if not name.endswith("_bias"):
                released = released if name.endswith("_scales") else f"{released}_blocks"
            assert entry.begin % 4096 + entry.nbytes <= there.layout.nbytes
            assert bytes(file.read(name)) == bytes(source.read(released, 5, 6))


def test_the_expanded_store_is_there_for_who_wants_it(checkpoint: Path, store: Store) -> None:
    packed = pull(str(checkpoint), store=store)
    plain = pull(str(checkpoint), store=store, name="plain", experts="bf16")
    assert plain.manifest.precision == "mxfp4 expanded to bfloat16 on request"
    assert plain.manifest.layout.quantization is None
    assert pull(str(checkpoint), store=store).name != plain.name, "what was released is another model"
    assert pull(plain.name, store=store, force=True).manifest == plain.manifest
    about = packed.manifest.layout.quantization
    assert about is not None
    for path in (expert_path(0, 0), expert_path(1, 7)):
        with TensorFile.open(packed.path / path) as few, TensorFile.open(plain.path / path) as many:
            for spec in plain.manifest.layout.tensors:
                whole = torch.frombuffer(many.read(spec.name), dtype=torch.bfloat16).view(spec.shape)
                if spec.name in about.widths:
                    numbers, factors = (
                        torch.frombuffer(few.read(name), dtype=torch.uint8).view(few.entries[name].shape)
                        for name in (spec.name, f"{spec.name}_scales")
                    )
                    made = dequantize(
                        numbers, factors, about, about.widths[spec.name], torch.bfloat16, is_transposed=True
                    )
                    assert torch.equal(made, whole)
    notes: list[str] = []
    assert pull(str(checkpoint), store=store, notify=notes.append).name == packed.name
    assert pull(str(checkpoint), store=store, experts="bf16", notify=notes.append).name == "plain"
    assert pull("plain", store=store, notify=notes.append).name == "plain"
    assert len(notes) == 3, "all of them were here"
    with pytest.raises(UsageError, match=r"oss is here already, .* mxfp4 experts \(as released\)") as caught:
        pull(str(checkpoint), store=store, name=packed.name, experts="bf16")
    assert "--force" in str(caught.value.hint)


def test_an_interrupted_pull_of_packed_experts_is_not_continued_with_expanded_ones(
    checkpoint: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("moeinf.sharding.Sharder.finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pull(str(checkpoint), store=store, name="model")
    said: list[str] = []
    model = pull(str(checkpoint), store=store, name="model", experts="bf16", notify=said.append)
    assert "starts afresh" in said[0]
    assert model.manifest.layout.quantization is None


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_plans_count_packed_bytes(checkpoint: Path, store: Store) -> None:
    """Before anything is downloaded, and what a folder would be."""
    there = preview(str(checkpoint), store=store).manifest
    plans = {experts: plan_pull(str(checkpoint), store=store, experts=experts) for experts in (None, "bf16")}
    model = pull(str(checkpoint), store=store)
    assert there == dataclasses.replace(model.manifest, files={})
    assert plans[None].store_bytes == 2 * EXPERTS * model.manifest.layout.file_bytes + model.manifest.dense_bytes
    assert plans["bf16"].store_bytes > plans[None].store_bytes
    assert (plans[None].precision, plans["bf16"].precision) == (
        "mxfp4 experts (as released)",
        "mxfp4 expanded to bfloat16 on request",
    )


def test_traces_of_either_form_serve_both(checkpoint: Path, store: Store) -> None:
    packed = pull(str(checkpoint), store=store)
    plain = pull(str(checkpoint), store=store, name="plain", experts="bf16")
    identities = (ModelIdentity.of(model.name, model.manifest) for model in (packed, plain))
    assert next(identities).difference(next(identities)) is None


def test_they_are_quantised_while_pulling_and_not_later(checkpoint: Path, store: Store) -> None:
    packed = pull(str(checkpoint), store=store)
    with pytest.raises(UnsupportedError, match=r"oss has mxfp4 experts \(as released\) already") as caught:
        quantize_model(packed, "small", ExpertForm("int4", 16), store=store)
    assert caught.value.hint == f"moeinf pull {checkpoint} --experts int4 --name small"
    small = pull(str(checkpoint), store=store, name="small", experts="int4")
    assert small.manifest.precision == "int4 experts (groups of 16), from mxfp4 expanded to bfloat16"


# What is refused


@pytest.mark.parametrize("exponent", [253, 255])
def test_exponents_that_no_weights_have_are_named(
    exponent: int, checkpoint: Path, tmp_path: Path, store: Store
) -> None:
    folder = tmp_path / "damaged"
    make_checkpoint("gpt_oss", folder)
    tensors = pack_mxfp4(folder)
    name = "model.layers.1.mlp.experts.down_proj_scales"
    tensors[name][3, 7, 0] = exponent
    edit(folder, lambda _: tensors)
    complaint = rf"down_proj_scales of expert 3 of model\.layers\.1\.mlp\.experts holds the exponent {exponent}"
    with pytest.raises(IntegrityError, match=complaint):
        pull(str(folder), store=store)
    assert store.names() == []


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("down_proj_blocks", lambda tensor: tensor[..., :8], r"down_proj of .* \[32, 1, 8\], not U8 \[32, 1, 16\]"),
        ("down_proj_scales", lambda tensor: tensor[:, :5], r"down_proj_scales of .* \[5, 1\], not U8 \[32, 1\]"),
        ("gate_up_proj_scales", lambda tensor: tensor.float(), r"gate_up_proj_scales of .* torch\.float32 .*, not U8"),
        ("gate_up_proj_blocks", lambda tensor: tensor[:5], "has not one row for each of 8 experts"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(
    name: str, change: Any, complaint: str, tmp_path: Path, store: Store
) -> None:
    make_checkpoint("gpt_oss", tmp_path)
    tensors = pack_mxfp4(tmp_path)
    name = f"model.layers.0.mlp.experts.{name}"
    edit(tmp_path, lambda _: {**tensors, name: change(tensors[name])})
    with pytest.raises(IntegrityError, match=complaint):
        pull(str(tmp_path), store=store, name="model")


def test_rows_that_are_no_whole_groups_are_refused_before_anything_is_read(tmp_path: Path, store: Store) -> None:
    make_checkpoint("gpt_oss", tmp_path)
    pack_mxfp4(tmp_path)
    edit_config(tmp_path, intermediate_size=40)
    with pytest.raises(UnsupportedError, match="down_proj has rows of 40 weights, and mxfp4 has groups of 32"):
        plan_pull(str(tmp_path), store=store)


def test_a_plan_knows_packed_experts_by_how_all_are_made(checkpoint: Path, tmp_path: Path) -> None:
    assert plan_conversion(Checkpoint.from_folder(checkpoint)).packing == "mxfp4"
    make_checkpoint("gpt_oss", tmp_path)
    assert plan_conversion(Checkpoint.from_folder(tmp_path)).packing is None


# An expert


def test_any_bytes_are_expanded_as_the_format_says() -> None:
    specs = (TensorSpec("down_proj", "BF16", (2, 64), 0),)
    about = Packer(ExpertLayout(4096, specs), False, "mxfp4").quantization
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    values += [-value for value in values]
    numbers = torch.randint(0, 256, (2, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    factors = torch.tensor([[0, 127], [126, 252]], dtype=torch.uint8)
    made = dequantize(numbers, factors, about, 64, torch.bfloat16)
    for row, column in ((row, column) for row in range(2) for column in range(64)):
        byte = int(numbers[row, column // 2])
        right = values[byte >> 4 if column % 2 else byte & 15] * 2.0 ** (int(factors[row, column // 32]) - 127)
        assert made[row, column].item() == right
    turned = dequantize(numbers, factors, about, 64, torch.bfloat16, is_transposed=True)
    assert turned.is_contiguous()
    assert torch.equal(turned, made.t())
