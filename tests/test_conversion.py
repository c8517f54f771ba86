"""The plan of a conversion: what it says of a model, and what it refuses, before any weight is read."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
)
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    Interleave,
    MergeModulelist,
    PermuteForRope,
    Transpose,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from families import EXPERTS, FAMILIES, UNSUPPORTED, VOCAB, make_checkpoint, make_config, make_model, spread_weights
from moeinf.checkpoint import Checkpoint
from moeinf.conversion import Plan, _keeps_experts_apart, _lay_out_experts, plan_conversion
from moeinf.errors import IntegrityError, UnsupportedError, UsageError
from moeinf.ledger import ModelShape
from moeinf.manifest import MoeLayer
from moeinf.metamodel import CACHE, MetaModel, choose_dtype, load_config, model_shape
from moeinf.pull import pull
from moeinf.store import Store


def write_config(folder: Path, config: PreTrainedConfig | None = None, **fields: Any) -> Path:
    """A folder with config.json and an index that names one tensor."""
    folder.mkdir(exist_ok=True)
    if config is not None:
        config.save_pretrained(folder)
    path = folder / "config.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | fields))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "model-1.safetensors"}}))
    return folder


def make_plan(folder: Path, dtype: str = "auto") -> Plan:
    has_weights = (folder / "model.safetensors").exists()
    return plan_conversion((Checkpoint.from_folder if has_weights else Checkpoint.from_index)(folder), dtype)


def meta_model(family: str, folder: Path, **fields: Any) -> MetaModel:
    loaded = load_config(write_config(folder, make_config(family), **fields))
    return MetaModel(loaded, choose_dtype("auto", loaded.dtype))


# What a plan says


def test_what_a_plan_says(tmp_path: Path) -> None:
    make_checkpoint("qwen3_moe", tmp_path)
    plan = make_plan(tmp_path)
    assert (plan.architecture, plan.model_type) == ("Qwen3MoeForCausalLM", "qwen3_moe")
    assert (plan.dtype, plan.precision, plan.max_context) == ("bfloat16", "bfloat16", 256)
    assert plan.layers == tuple(MoeLayer(f"model.layers.{layer}.mlp.experts", 8, 2) for layer in (0, 2))
    assert [(spec.name, spec.dtype, spec.shape) for spec in plan.layout.tensors] == [
        ("gate_up_proj", "BF16", (48, 32)),
        ("down_proj", "BF16", (32, 24)),
    ]
    assert (plan.layout.data_offset, plan.layout.nbytes) == (4096, 2 * 3 * 24 * 32)
    parameters = sum(parameter.numel() for parameter in make_model("qwen3_moe").parameters())
    assert plan.dense_bytes + 16 * plan.layout.nbytes == 2 * parameters
    gate_up, down = plan.expert_parts(1, 5)
    assert [source.name for source in gate_up.recipe.sources] == [
        f"model.layers.2.mlp.experts.5.{name}_proj.weight" for name in ("gate", "up")
    ]
    assert [source.name for source in down.recipe.sources] == ["model.layers.2.mlp.experts.5.down_proj.weight"]
    assert not gate_up.is_fused


def test_experts_of_a_fused_checkpoint_share_their_sources(tmp_path: Path) -> None:
    make_checkpoint("granitemoe", tmp_path)
    (part, _) = make_plan(tmp_path).expert_parts(0, 3)
    assert part.is_fused
    assert [source.name for source in part.recipe.sources] == ["model.layers.0.block_sparse_moe.input_linear.weight"]


def test_a_plan_needs_no_weights(tmp_path: Path) -> None:
    folder = tmp_path / "whole"
    make_checkpoint("deepseek_v3", folder, max_shard_size="60KB")
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors.index.json"):
        (tmp_path / "bare" / name).write_bytes((folder / name).read_bytes())
    whole = plan_conversion(Checkpoint.from_folder(folder))
    bare = plan_conversion(Checkpoint.from_index(tmp_path / "bare"))
    for name in ("layers", "layout", "dense", "config", "kv_token_bytes", "tensor_files", "ignored"):
        assert getattr(whole, name) == getattr(bare, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stored_configuration_reads_back_to_the_same_model(family: str, tmp_path: Path) -> None:
    meta = meta_model(family, tmp_path / "a", auto_map={"AutoConfig": "evil.Evil"}, attn_implementation="evil/kernel")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_text(meta.config_text)
    assert "evil" not in meta.config_text
    again = MetaModel(load_config(tmp_path / "b"), torch.bfloat16)
    assert (again.shapes, again.dtypes) == (meta.shapes, meta.dtypes)
    assert again.config_text == meta.config_text
    assert AutoConfig.from_pretrained(tmp_path / "b").to_dict() == again.model.config.to_dict()


def test_the_text_part_of_a_larger_model(tmp_path: Path) -> None:
    """Only the text part is taken, under its own names; the tensors of the rest are not needed."""
    vision = {
        "depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32, "patch_size": 4,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [],
    }  # fmt: skip
    text = make_config("qwen3_5_moe_text").to_dict()
    model = Qwen3_5MoeForConditionalGeneration(Qwen3_5MoeConfig(text_config=text, vision_config=vision))
    model.bfloat16()
    spread_weights(model)
    model.save_pretrained(tmp_path)
    plan = make_plan(tmp_path)
    assert (plan.architecture, plan.model_type) == ("Qwen3_5MoeForCausalLM", "qwen3_5_moe_text")
    assert plan.ignored
    assert all("visual" in name for name in plan.ignored)
    right = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    experts = {f"{layer.module}.{spec.name}" for layer in plan.layers for spec in plan.layout.tensors}
    assert {tensor.name for tensor in plan.dense} | experts == set(right)


# Experts per token, KV cache


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_per_token_are_found_without_a_run_too(family: str, tmp_path: Path) -> None:
    meta = meta_model(family, tmp_path)
    measured, guessed = meta.probe(), meta._guess_probe()
    assert measured.order == guessed.order
    assert dict(measured.top_k) == dict(guessed.top_k)
    assert set(measured.top_k.values()) == {1 if family == "zaya" else 2}


def test_experts_per_token_may_differ_by_layer(tmp_path: Path) -> None:
    probe = meta_model("hunyuan_v1_moe", tmp_path, moe_topk=[1, 3]).probe()
    assert (probe.origin, list(probe.top_k.values())) == ("measured", [1, 3])


def test_experts_per_token_are_looked_up_by_layer_where_only_the_configuration_has_them(tmp_path: Path) -> None:
    meta = meta_model("hunyuan_v1_moe", tmp_path, moe_topk=[1, 3])
    for module in meta.model.modules():
        vars(module).pop("top_k", None)
    assert list(meta._guess_probe().top_k.values()) == [1, 3]


@pytest.mark.parametrize(
    "family", ["gpt_oss", "granitemoehybrid", "jamba", "minimax", "mixtral", "deepseek_v3", "zaya"]
)
@pytest.mark.parametrize("tokens", [40, 300])
def test_the_kv_cache_is_as_large_as_the_real_one(family: str, tokens: int, tmp_path: Path) -> None:
    from moeinf.metamodel import _bytes_in

    probe = meta_model(family, tmp_path).probe()
    model = make_model(family)
    with torch.no_grad():
        cache = getattr(model(torch.full((1, tokens), 5), use_cache=True), CACHE)
    assert probe.origin == "measured"
    assert probe.fixed_bytes + tokens * probe.token_bytes == _bytes_in(cache)


def test_the_kv_cache_of_full_attention_by_hand(tmp_path: Path) -> None:
    probe = meta_model("mixtral", tmp_path).probe()
    assert (probe.token_bytes, probe.fixed_bytes) == (2 * 2 * 2 * 8 * 2, 0)  # layers, k and v, heads, dimensions, bytes


@pytest.mark.parametrize(("window", "is_full"), [(600, False), (4000, False), (100_000, True)])
def test_a_window_is_known_for_one_up_to_a_length(window: int, is_full: bool, tmp_path: Path) -> None:
    """A longer one is taken for full attention."""
    small, probe = (meta_model("gpt_oss", tmp_path, sliding_window=size).probe() for size in (16, window))
    assert probe.token_bytes == small.token_bytes * (2 if is_full else 1)
    assert (probe.fixed_bytes > small.fixed_bytes) == (not is_full)


def test_a_model_that_cannot_run_without_values_is_computed_from_its_configuration(tmp_path: Path) -> None:
    """Rotary embeddings of this kind look at the length of the text."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 128}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "short_mscale": 1.0, "long_mscale": 1.0}
    probe = meta_model("phimoe", tmp_path, rope_parameters=rope).probe()
    assert (probe.origin, probe.token_bytes) == ("computed", 2 * 2 * 2 * 8 * 2)
    assert list(probe.top_k.values()) == [2, 2]


def test_what_the_memory_ledger_is_told(home: Path, tmp_path: Path) -> None:
    """Of heads that share keys and values, of embeddings that are the output layer's too, and of keys and values that
    are made of latents, beside a dense layer wider than any expert.
    """
    found = {}
    sizes: dict[str, dict[str, Any]] = {"qwen3_moe": {}, "ernie4_5_moe": {}, "deepseek_v3": {"intermediate_size": 112}}
    for family, others in sizes.items():
        make_checkpoint(family, tmp_path / family, **others)
        model = pull(str(tmp_path / family), store=Store(home))
        found[family] = model_shape(load_config(model.path).config, model.manifest)
    table = VOCAB * 32 * 2
    plain = ModelShape(32, 48, VOCAB, 0, 2, 3, table, lookup_bytes=table, table="model.embed_tokens.weight")
    assert found == {
        "qwen3_moe": plain,
        "ernie4_5_moe": dataclasses.replace(plain, lookup_bytes=0, table=""),
        "deepseek_v3": dataclasses.replace(
            plain,
            widest=112,
            score_heads=4,
            sharing=1,
            expanded_bytes=4 * (8 + 8 + 8) * 2,
            kept_layers=3,
            has_plain_attention=False,
        ),
    }


# Dtypes


def test_dtype_and_precision(tmp_path: Path) -> None:
    make_checkpoint("olmoe", tmp_path)
    for asked, dtype, precision in (
        ("auto", "bfloat16", "bfloat16"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float32", "float32", "bfloat16 converted to float32"),
    ):
        plan = make_plan(tmp_path, asked)
        assert (plan.dtype, plan.precision, json.loads(plan.config)["dtype"]) == (dtype, precision, dtype)
    with pytest.raises(UsageError, match="--dtype int8 is not known"):
        make_plan(tmp_path, "int8")


def test_a_configuration_without_a_dtype(tmp_path: Path) -> None:
    make_checkpoint("olmoe", tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert make_plan(tmp_path).dtype == "bfloat16"
    (tmp_path / "model.safetensors").unlink()
    write_config(tmp_path)
    with pytest.raises(UsageError, match="no dtype") as caught:
        make_plan(tmp_path)
    assert "--dtype" in str(caught.value.hint)


def test_what_a_family_keeps_in_float32_stays_so(tmp_path: Path) -> None:
    make_checkpoint("deepseek_v4", tmp_path)
    dtypes = {tensor.name: tensor.dtype for tensor in make_plan(tmp_path).dense}
    assert set(dtypes.values()) >= {"F32", "BF16", "I64"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert {name for name, dtype in dtypes.items() if dtype == "F32"} == {
        name for name, tensor in loaded.items() if tensor.dtype == torch.float32
    }


# Which tensors


def change_weights(folder: Path, *, drop: str = "", add: Mapping[str, torch.Tensor] | None = None) -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if name != drop}
    assert len(kept) + bool(drop) == len(tensors)
    save_file({**kept, **(add or {})}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("family", "name", "complaint"),
    [
        ("olmoe", "model.norm.weight", r"no tensor for model\.norm\.weight of OlmoeForCausalLM"),
        ("olmoe", "lm_head.weight", r"no tensor for lm_head\.weight"),
        ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias", "e_score_correction_bias"),
        ("lfm2_moe", "model.embed_tokens.weight", r"model\.embed_tokens\.weight, lm_head\.weight"),
        ("granitemoe", "model.layers.1.block_sparse_moe.output_linear.weight", "experts.down_proj"),
        ("olmoe", "model.layers.1.mlp.experts.7.up_proj.weight", "8 experts, and the checkpoint 7 tensors like"),
    ],
)
def test_a_tensor_that_is_missing_is_named(tmp_path: Path, family: str, name: str, complaint: str) -> None:
    make_checkpoint(family, tmp_path)
    change_weights(tmp_path, drop=name)
    with pytest.raises(IntegrityError, match=complaint):
        make_plan(tmp_path)


def test_experts_that_are_there_one_by_one_and_together_are_refused(tmp_path: Path) -> None:
    make_checkpoint("olmoe", tmp_path)
    together = torch.zeros(EXPERTS, 32, 24, dtype=torch.bfloat16)
    change_weights(tmp_path, add={"model.layers.1.mlp.experts.down_proj": together})
    with pytest.raises(IntegrityError, match=r"layers\.1\.mlp\.experts\.down_proj twice, in different forms"):
        make_plan(tmp_path)


def test_tensors_that_nobody_needs_are_listed(tmp_path: Path) -> None:
    make_checkpoint("glm4_moe", tmp_path)
    unneeded = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
        "model.layers.3.eh_proj.weight": torch.zeros(4),
        "model.layers.3.mlp.experts.0.gate_proj.weight": torch.zeros(24, 32),
    }
    change_weights(tmp_path, add=unneeded)
    assert set(make_plan(tmp_path).ignored) == set(unneeded)


def test_tied_weights_are_stored_once_under_the_name_that_is_there(tmp_path: Path) -> None:
    make_checkpoint("lfm2_moe", tmp_path)
    names = {tensor.name for tensor in make_plan(tmp_path).dense}
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    change_weights(tmp_path, drop="model.embed_tokens.weight", add={"lm_head.weight": embedding})
    swapped = {tensor.name for tensor in make_plan(tmp_path).dense}
    assert swapped == names - {"model.embed_tokens.weight"} | {"lm_head.weight"}


def test_weights_that_may_be_tied_and_are_both_there_are_both_stored(tmp_path: Path) -> None:
    """If they differ, transformers does not tie them: what to do is decided when they are loaded."""
    make_checkpoint("lfm2_moe", tmp_path)
    change_weights(tmp_path, add={"lm_head.weight": torch.zeros(VOCAB, 32, dtype=torch.bfloat16)})
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= {tensor.name for tensor in make_plan(tmp_path).dense}


# What is refused


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_families_that_cannot_work_are_refused_by_name(family: str, tmp_path: Path) -> None:
    config = CONFIG_MAPPING[family]()
    config.dtype = "bfloat16"
    with pytest.raises(UnsupportedError, match=family) as caught:
        make_plan(write_config(tmp_path, config))
    assert caught.value.exit_code == 7
    assert ("encoder-decoder" in UNSUPPORTED[family]) == ("encoder-decoder" in str(caught.value))


def test_a_dense_model_has_no_experts(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, dtype="bfloat16")
    with pytest.raises(UnsupportedError, match=r"llama .* has no experts"):
        make_plan(write_config(tmp_path, config))


def test_a_model_type_that_nobody_knows_is_not_asked_for_its_code(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('code was run')")
    folder = write_config(
        tmp_path, model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.M"}
    )
    with pytest.raises(UnsupportedError, match="does not know the model type 'evil'"):
        make_plan(folder)


def test_code_beside_a_known_model_type_is_not_run(tmp_path: Path) -> None:
    make_checkpoint("olmoe", tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('code was run')")
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.M"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert "auto_map" not in json.loads(make_plan(tmp_path).config)


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", "compressed-tensors", "modelopt", None])
def test_other_quantisations_are_refused_by_name(method: str | None, tmp_path: Path) -> None:
    quantization = {"bits": 4} if method is None else {"quant_method": method, "bits": 4}
    with pytest.raises(UnsupportedError, match=f"quantised with {method or 'a method without a name'}") as caught:
        make_plan(write_config(tmp_path, make_config("olmoe"), quantization_config=quantization))
    assert caught.value.hint is not None


def test_a_quantised_text_part_is_refused_too(tmp_path: Path) -> None:
    text = make_config("qwen3_5_moe_text").to_dict() | {"quantization_config": {"quant_method": "awq", "bits": 4}}
    with pytest.raises(UnsupportedError, match="quantised with awq"):
        make_plan(write_config(tmp_path, Qwen3_5MoeConfig(text_config=text)))


@pytest.mark.parametrize("is_tied", [True, False])
def test_an_output_layer_that_is_the_embedding_table_too_is_not_to_be_packed(is_tied: bool, tmp_path: Path) -> None:
    packable = meta_model("olmoe", tmp_path, hidden_size=256, tie_word_embeddings=is_tied).packable
    assert ("lm_head.weight" in packable) == (not is_tied)
    assert packable


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"hidden_size": -32}, "hidden_size = -32"),
        ({"hidden_size": 10**12}, "hidden_size = "),
        ({"vocab_size": 0}, "vocab_size = 0"),
        ({"vocab_size": 10**15}, "vocab_size = "),
        ({"num_experts": 10**7}, "num_experts = "),
        ({"num_experts": -1}, "num_experts = -1"),
        ({"intermediate_size": 1e300}, "intermediate_size = 1e"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0"),
        ({"num_key_value_heads": 0}, r"config\.json"),
        ({"num_hidden_layers": "two"}, r"config\.json"),
        ({"hidden_act": "evil"}, r"config\.json"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 0]}}, "quantization_config"),
        ({"text_config": {"hidden_size": 10**12}}, "hidden_size = "),
        ({"num_attention_heads": [4, 10**7]}, "num_attention_heads = 10000000"),
        ({"model_type": 3}, "no model_type"),
    ],
)
def test_configurations_that_cannot_be(fields: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises((IntegrityError, UnsupportedError), match=complaint):
        make_plan(write_config(tmp_path, make_config("olmoe"), **fields))


def test_a_list_may_say_that_a_layer_has_nothing(tmp_path: Path) -> None:
    loaded = load_config(write_config(tmp_path, make_config("olmoe"), shared_experts=[-1, 2]))
    assert loaded.config.num_experts == EXPERTS


def test_a_configuration_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = write_config(tmp_path) / "config.json"
    os.truncate(path, 16_000_001)
    with pytest.raises(IntegrityError, match="too large to be a configuration"):
        make_plan(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, '"text"', "{}", "\udc80"])
def test_a_configuration_that_is_no_json_object(content: str, tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(IntegrityError, match=r"config\.json"):
        make_plan(tmp_path)


def test_layers_whose_experts_differ_are_refused(tmp_path: Path) -> None:
    meta = meta_model("olmoe", tmp_path)
    first, second = meta.experts
    meta.shapes[f"{second}.down_proj"] = (EXPERTS, 32, 25)
    with pytest.raises(UnsupportedError, match=r"layers\.1.* differ in shape or dtype from those of .*layers\.0"):
        _lay_out_experts(meta, [first, second], {})


def test_experts_that_are_not_one_row_each_are_refused(tmp_path: Path) -> None:
    meta = meta_model("olmoe", tmp_path)
    module = next(iter(meta.experts))
    meta.shapes[f"{module}.down_proj"] = (EXPERTS + 1, 32, 24)
    with pytest.raises(UnsupportedError, match=r"down_proj .* has not one row for each expert"):
        _lay_out_experts(meta, [module], {})


@pytest.mark.parametrize(
    ("operation", "is_apart"),
    [
        (MergeModulelist(dim=0), True),
        (MergeModulelist(dim=1), False),
        (Concatenate(dim=1), True),
        (Concatenate(dim=0), False),
        (Interleave(dim=1), True),
        (Interleave(dim=-3), False),
        (Transpose(1, 2), True),
        (Transpose(-1, -2), True),
        (Transpose(0, 1), False),
        (Chunk(dim=0), False),
        (PermuteForRope(), False),
    ],
    ids=repr,
)
def test_only_conversions_that_keep_experts_apart_are_trusted(operation: ConversionOps, is_apart: bool) -> None:
    assert _keeps_experts_apart(operation) == is_apart


@pytest.mark.parametrize("operation", [Transpose(1, 2), Interleave(dim=1), Concatenate(dim=1)], ids=repr)
def test_what_is_trusted_does_to_each_expert_what_it_does_to_all(operation: ConversionOps) -> None:
    whole = torch.arange(4 * 6 * 2).reshape(4, 6, 2)

    def run(tensor: torch.Tensor) -> torch.Tensor:
        made: Any = operation.convert({"x": tensor}, source_patterns=["x"], target_patterns=["y"])["y"]
        assert isinstance(made, torch.Tensor)
        return made

    for expert in range(4):
        assert torch.equal(run(whole[expert : expert + 1]), run(whole)[expert : expert + 1])
