"""Tiny checkpoints of every family of MoE models that the tests know, in the form in which the hub would hold them.

A checkpoint has random weights from a fixed seed, spread so that routers have clear preferences, and a tokenizer of
single characters. `FAMILIES` maps a model type to a function that makes its configuration; `UNSUPPORTED` says why a
family of transformers is left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, set_seed
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

__all__ = [
    "EVERY_KIND",
    "FAMILIES",
    "UNSUPPORTED",
    "make_checkpoint",
    "make_config",
    "make_model",
    "make_tokenizer",
    "spread_weights",
]

VOCAB = 128
EXPERTS = 8
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")

_FIXED = ("balancing_biases",)
"""Buffers in which transformers writes a value of its own after loading."""

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GQA: dict[str, Any] = {"head_dim": 8, "intermediate_size": 24}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
}
_INDEXER: dict[str, Any] = {"index_topk": 64, "index_head_dim": 16, "index_n_heads": 2}
_LINEAR: dict[str, Any] = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 4,
}
_MAMBA: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}


def _family(model_type: str, *parts: dict[str, Any], **fields: Any) -> Callable[[], PreTrainedConfig]:
    merged = dict(_COMMON)
    for part in (*parts, fields):
        merged |= part

    def make() -> PreTrainedConfig:
        return CONFIG_MAPPING[model_type](**merged)

    return make


def _moe(count: int, top_k: int = 2, key: str = "num_experts", top_key: str = "num_experts_per_tok") -> dict[str, Any]:
    return {key: count, top_key: top_k}


_ROUTED = _moe(8, key="n_routed_experts")
_LOCAL = _moe(8, key="num_local_experts")
_GROUPS: dict[str, Any] = {"n_group": 2, "topk_group": 1}
_ONE_GROUP: dict[str, Any] = {"n_group": 1, "topk_group": 1}
_SHARED: dict[str, Any] = {"n_shared_experts": 1}
_SPARSE: dict[str, Any] = {"mlp_layer_types": ["dense", "sparse", "sparse"], "num_hidden_layers": 3}

FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "afmoe": _family(
        "afmoe",
        _GQA,
        _moe(8),
        moe_intermediate_size=24,
        num_dense_layers=1,
        num_shared_experts=1,
        num_hidden_layers=4,
        sliding_window=16,
    ),
    "aria_text": _family(
        "aria_text", _GQA, _moe(8, key="moe_num_experts", top_key="moe_topk"), moe_num_shared_experts=1
    ),
    "axk1": _family("axk1", _MLA, _ROUTED, _GROUPS, _SHARED, _SPARSE),
    "axk2": _family("axk2", _MLA, _ROUTED, _SHARED, _SPARSE, _INDEXER, gated_norm_rank=4, n_group=1, topk_group=1),
    "bailing_hybrid": _family(
        "bailing_hybrid",
        _MLA,
        _moe(8, top_key="num_experts_per_token"),
        num_expert_group=2,
        topk_group=1,
        num_hidden_layers=4,
        first_k_dense_replace=1,
        layer_group_size=2,
        linear_num_heads=4,
        linear_head_dim=8,
        model_max_length=256,
        num_shared_experts=1,
        num_nextn_predict_layers=0,
    ),
    "beam": _family(
        "beam",
        _GQA,
        _moe(8),
        _GROUPS,
        moe_intermediate_size=24,
        num_hidden_layers=3,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        mlp_layer_types=["dense", "sparse", "sparse"],
    ),
    "cohere2_moe": _family(
        "cohere2_moe",
        _GQA,
        _moe(8),
        num_shared_experts=1,
        num_hidden_layers=4,
        sliding_window=16,
    ),
    "deepseek_v2": _family(
        "deepseek_v2",
        _MLA,
        _ROUTED,
        _GROUPS,
        topk_method="group_limited_greedy",
        n_shared_experts=1,
        first_k_dense_replace=1,
        num_hidden_layers=3,
    ),
    "deepseek_v3": _family(
        "deepseek_v3", _MLA, _ROUTED, _GROUPS, _SHARED, first_k_dense_replace=1, num_hidden_layers=3
    ),
    "deepseek_v32": _family("deepseek_v32", _MLA, _ROUTED, _GROUPS, _SHARED, _SPARSE, _INDEXER),
    "deepseek_v4": _family(
        "deepseek_v4",
        _ROUTED,
        _SHARED,
        _INDEXER,
        num_key_value_heads=1,
        head_dim=16,
        q_lora_rank=16,
        o_groups=2,
        o_lora_rank=8,
        num_hidden_layers=3,
        moe_intermediate_size=24,
        sliding_window=16,
        hc_mult=2,
        layer_types=["compressed_sparse_attention", "heavily_compressed_attention", "compressed_sparse_attention"],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        mlp_layer_types=["hash_moe", "moe", "moe"],
        partial_rotary_factor=0.5,
    ),
    "dots1": _family(
        "dots1",
        _GQA,
        _ROUTED,
        _ONE_GROUP,
        _SHARED,
        moe_intermediate_size=24,
        first_k_dense_replace=1,
        num_hidden_layers=3,
    ),
    "dots3_note_text": _family(
        "dots3_note_text",
        _MLA,
        _ROUTED,
        _ONE_GROUP,
        _SHARED,
        _SPARSE,
        _INDEXER,
        layer_types=["indexed_attention", "sliding_attention", "indexed_attention"],
        shared_experts_intermediate_size=24,
        sliding_window=16,
        head_dim=16,
        swa_num_attention_heads=2,
        swa_num_key_value_heads=2,
        swa_q_lora_rank=16,
        swa_kv_lora_rank=8,
        swa_head_dim=16,
        swa_qk_nope_head_dim=8,
        swa_v_head_dim=8,
    ),
    "ernie4_5_moe": _family(
        "ernie4_5_moe",
        _GQA,
        _moe(8, key="moe_num_experts", top_key="moe_k"),
        moe_intermediate_size=24,
        moe_num_shared_experts=1,
        num_hidden_layers=3,
        moe_layer_end_index=2,
        tie_word_embeddings=True,
    ),
    "exaone_moe": _family(
        "exaone_moe",
        _GQA,
        _moe(8),
        _ONE_GROUP,
        moe_intermediate_size=24,
        num_shared_experts=1,
        num_hidden_layers=4,
        sliding_window=16,
    ),
    "flex_olmo": _family("flex_olmo", _GQA, _moe(7)),
    "flint": _family(
        "flint",
        _GQA,
        _moe(8),
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        num_hidden_layers=3,
        mlp_only_layers=[0],
        sliding_window=17,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "gemma4_text": _family(
        "gemma4_text",
        _GQA,
        _moe(8, top_key="top_k_experts"),
        enable_moe_block=True,
        moe_intermediate_size=24,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB,
        num_hidden_layers=2,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        global_head_dim=16,
        num_kv_shared_layers=0,
    ),
    "glm4_moe": _family(
        "glm4_moe",
        _GQA,
        _ROUTED,
        _GROUPS,
        _SHARED,
        moe_intermediate_size=24,
        first_k_dense_replace=1,
        num_hidden_layers=3,
        num_nextn_predict_layers=0,
    ),
    "glm4_moe_lite": _family("glm4_moe_lite", _MLA, _ROUTED, _ONE_GROUP, _SHARED, _SPARSE),
    "glm_moe_dsa": _family("glm_moe_dsa", _MLA, _ROUTED, _ONE_GROUP, _SHARED, _SPARSE, _INDEXER),
    "gpt_oss": _family(
        "gpt_oss",
        _GQA,
        _LOCAL,
        sliding_window=16,
        intermediate_size=32,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "granitemoe": _family("granitemoe", _GQA, _LOCAL),
    "granitemoe_swa": _family("granitemoe_swa", _GQA, _LOCAL, shared_intermediate_size=16, sliding_window=16),
    "granitemoehybrid": _family(
        "granitemoehybrid",
        _GQA,
        _LOCAL,
        _MAMBA,
        shared_intermediate_size=16,
        num_hidden_layers=3,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    ),
    "granitemoeshared": _family("granitemoeshared", _GQA, _LOCAL, shared_intermediate_size=16),
    "hunyuan_v1_moe": _family("hunyuan_v1_moe", _GQA, num_experts=8, moe_topk=[2, 2], num_shared_expert=[1, 1]),
    "hy_v3": _family("hy_v3", _GQA, _moe(8), _SPARSE, moe_intermediate_size=24, num_shared_experts=1),
    "hy_v4": _family(
        "hy_v4",
        _MLA,
        _ROUTED,
        _ONE_GROUP,
        _SHARED,
        _SPARSE,
        _INDEXER,
        hc_mult=2,
        indexer_types=["full", "shared", "full"],
    ),
    "inkling2_text": _family(
        "inkling2_text",
        _ROUTED,
        head_dim=8,
        swa_head_dim=8,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        d_rel=4,
        rel_extent=64,
        sliding_window_size=16,
        moe_intermediate_size=24,
        n_layers_per_attn_res_block=2,
        unpadded_vocab_size=VOCAB - 8,
        num_hidden_layers=3,
        layer_types=["hybrid_sliding", "hybrid", "hybrid_sliding"],
    ),
    "inkling_text": _family(
        "inkling_text",
        _ROUTED,
        head_dim=8,
        swa_head_dim=8,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        d_rel=4,
        rel_extent=64,
        sliding_window_size=16,
        moe_intermediate_size=24,
        intermediate_size=48,
        n_shared_experts=1,
        num_hidden_layers=3,
        layer_types=["hybrid_sliding", "hybrid", "hybrid_sliding"],
        mlp_layer_types=["dense", "sparse", "sparse"],
    ),
    "jamba": _family(
        "jamba",
        _moe(8),
        intermediate_size=24,
        num_hidden_layers=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "kimi_linear": _family(
        "kimi_linear",
        _MLA,
        _moe(8, top_key="num_experts_per_token"),
        q_lora_rank=None,
        num_hidden_layers=3,
        linear_num_heads=4,
        linear_head_dim=8,
        model_max_length=256,
        num_expert_group=1,
        topk_group=1,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        mlp_layer_types=["dense", "sparse", "sparse"],
    ),
    "kolibri1": _family(
        "kolibri1",
        _LOCAL,
        head_dim=8,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        sliding_window=17,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "laguna": _family(
        "laguna",
        _GQA,
        _moe(8),
        _SPARSE,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        sliding_window=16,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        num_attention_heads_per_layer=[4, 2, 4],
    ),
    "lfm2_moe": _family(
        "lfm2_moe",
        _moe(8),
        intermediate_size=48,
        moe_intermediate_size=24,
        num_dense_layers=1,
        num_hidden_layers=4,
        layer_types=["conv", "full_attention", "conv", "full_attention"],
    ),
    "mellum": _family(
        "mellum",
        _GQA,
        _LOCAL,
        moe_intermediate_size=24,
        sliding_window=16,
        layer_types=["full_attention", "sliding_attention"],
    ),
    "mimo_v2_flash": _family(
        "mimo_v2_flash",
        _GQA,
        _ROUTED,
        _ONE_GROUP,
        _SPARSE,
        v_head_dim=4,
        moe_intermediate_size=24,
        sliding_window=17,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "minimax": _family(
        "minimax",
        _GQA,
        _LOCAL,
        block_size=16,
        layer_types=["full_attention", "linear_attention"],
    ),
    "minimax_m2": _family("minimax_m2", _GQA, _LOCAL),
    "minimax_m3_vl_text": _family(
        "minimax_m3_vl_text",
        _GQA,
        _LOCAL,
        dense_intermediate_size=48,
        shared_intermediate_size=24,
        rotary_dim=4,
        index_n_heads=2,
        index_head_dim=8,
        index_block_size=16,
        index_topk_blocks=2,
        num_hidden_layers=3,
        mlp_layer_types=["dense", "sparse", "sparse"],
    ),
    "mixtral": _family("mixtral", _GQA, _LOCAL),
    "nemotron_h": _family(
        "nemotron_h",
        _ROUTED,
        _ONE_GROUP,
        _SHARED,
        head_dim=8,
        intermediate_size=24,
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=16,
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=16,
        n_groups=2,
        chunk_size=16,
        layers_block_type=["linear_attention", "moe", "full_attention", "moe"],
        num_hidden_layers=4,
        use_mamba_kernels=False,
        mtp_layers_block_type=[],
    ),
    "olmoe": _family("olmoe", _GQA, _moe(8)),
    "phimoe": _family("phimoe", _GQA, _LOCAL),
    "qwen2_moe": _family("qwen2_moe", _GQA, _moe(6), moe_intermediate_size=24, shared_expert_intermediate_size=24),
    "qwen3_5_moe_text": _family(
        "qwen3_5_moe_text",
        _LINEAR,
        _moe(8),
        head_dim=8,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        layer_types=["linear_attention", "full_attention"],
    ),
    "qwen3_moe": _family("qwen3_moe", _GQA, _LOCAL, moe_intermediate_size=24, num_hidden_layers=3, mlp_only_layers=[1]),
    "qwen3_next": _family(
        "qwen3_next",
        _GQA,
        _LINEAR,
        _moe(8),
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        layer_types=["linear_attention", "full_attention"],
    ),
    "qwen4_exp_text": _family(
        "qwen4_exp_text",
        _LINEAR,
        _moe(8),
        head_dim=8,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        hc_count=2,
        hc_lowrank=8,
        ple_layer_ids=[1],
        ple_embed_dim=32,
        heads_per_ngram=2,
        ngram_vocab_size_base=50,
        make_ngram_vocab_size_divisible_by=8,
        split_ngram_parts=4,
        num_hidden_layers=2,
        layer_types=["linear_attention", "indexed_attention"],
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=8,
        indexer_budget=32,
        indexer_compress_ratio=4,
    ),
    "solar_open": _family("solar_open", _ROUTED, _ONE_GROUP, _SHARED, head_dim=8, moe_intermediate_size=24),
    "zaya": _family("zaya", _moe(8, 1), head_dim=8, moe_intermediate_size=24, router_hidden_size=16),
}

EVERY_KIND = (
    "deepseek_v2", "gpt_oss", "granitemoe", "jamba", "mixtral", "nemotron_h", "olmoe", "phimoe", "qwen3_moe",
)  # fmt: skip
"""Shared experts, transposed and interleaved weights, biases, no gate, recurrent layers, and plain ones."""

_NO_DECODER = "transformers has no causal language model class for it"
_OTHER_EXPERTS = "its experts are not made by transformers' use_experts_implementation"

UNSUPPORTED: dict[str, str] = {
    "aria": _NO_DECODER,
    "deepseek_ocr2": _NO_DECODER,
    "diffusion_gemma": _NO_DECODER,
    "ernie4_5_vl_moe": _NO_DECODER,
    "glm4v_moe": _NO_DECODER,
    "glm5_next": _NO_DECODER,
    "jetmoe": _OTHER_EXPERTS,
    "llama4_text": _OTHER_EXPERTS,
    "longcat_flash": _OTHER_EXPERTS,
    "minimax_m3_vl": _NO_DECODER,
    "mistral4": _NO_DECODER,
    "mistral_large4": _NO_DECODER,
    "muse_spark": _NO_DECODER,
    "nllb-moe": "it is an encoder-decoder model",
    "openai_privacy_filter": _NO_DECODER,
    "qwen3_omni_moe": _NO_DECODER,
    "qwen3_vl_moe": _NO_DECODER,
    "switch_transformers": "it is an encoder-decoder model",
    "unlimited_ocr": _NO_DECODER,
}


def make_config(family: str, dtype: str = "bfloat16", **sizes: int) -> PreTrainedConfig:
    config = FAMILIES[family]()
    config.dtype = dtype
    for name, size in sizes.items():
        setattr(config, name, size)
    return config


def make_model(family: str, dtype: str = "bfloat16", *, seed: int = 0, **sizes: int) -> PreTrainedModel:
    """A tiny model of the family with random weights, ready to run, with other `sizes` than the family's own."""
    set_seed(seed)
    config = make_config(family, dtype, **sizes)
    auto: Any = AutoModelForCausalLM  # untyped
    model: PreTrainedModel = auto.from_config(config)
    model.train(False)
    spread_weights(model)
    return model


def spread_weights(model: PreTrainedModel) -> None:
    """Give every weight a random value, and the wide dtype to those that transformers would load in it."""
    wide = [re.compile(pattern) for pattern in model._get_dtype_plan(model.dtype)]
    persistent = model.state_dict().keys()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name not in persistent or name.endswith(_FIXED):
            continue
        if any(pattern.search(name) for pattern in wide):
            tensor.data = tensor.data.float()
        if tensor.is_floating_point():
            _spread(tensor.data)
        elif name.endswith("tid2eid"):  # the experts of each token of the vocabulary
            tensor.copy_(torch.rand(len(tensor), EXPERTS).argsort()[:, : tensor.shape[-1]])


def _spread(tensor: torch.Tensor) -> None:
    noise = torch.randn(tensor.shape, dtype=torch.float32)
    if tensor.dim() >= 2:
        tensor.copy_(noise / math.sqrt(tensor.shape[-1]))
    else:
        tensor.add_((0.1 * noise).to(tensor.dtype))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable character, with a chat template."""
    vocab = {token: index for index, token in enumerate([*_SPECIAL, "\n", *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    make: Any = PreTrainedTokenizerFast  # untyped
    fast: PreTrainedTokenizerFast = make(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return fast


def make_checkpoint(
    family: str, folder: Path, dtype: str = "bfloat16", *, seed: int = 0, max_shard_size: str = "5GB", **sizes: int
) -> PreTrainedModel:
    """Write the family's tiny checkpoint under the hub's names of its tensors, and return the model that was saved."""
    model = make_model(family, dtype, seed=seed, **sizes)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    make_tokenizer().save_pretrained(folder)
    return model
