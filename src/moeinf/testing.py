"""Checkpoints of random weights in the shapes of real models, so that anybody can repeat a measurement.

    python -m moeinf.testing qwen3-30b-a3b FOLDER --layers 12
    python -m moeinf.testing gpt-oss-20b FOLDER --mxfp4
    python -m moeinf.testing qwen3-30b-a3b FOLDER --fp8

Such a checkpoint times a machine, and says nothing about the model whose shapes it has: its config.json calls it
random, and so does the store that it is pulled into. Holds one tensor in memory at a time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .checkpoint import INDEX_NAME
from .errors import UsageError
from .manifest import RELEASED_GROUPS
from .tensorfile import encode_header

__all__ = ["RANDOM_KEY", "SHAPES", "Shape", "write_checkpoint"]

_BLOCKS, _EXPONENTS = "_blocks", "_scales"
"""What gpt-oss calls the two tensors of a weight in MXFP4."""

_SCALES = "_scale_inv"
"""What the scales of a weight in float8 are called, beside the weight's name."""
_BLOCK = RELEASED_GROUPS["fp8"]
_FLOAT8_TYPES = ("deepseek_v2", "olmoe", "qwen3_moe")
"""Families whose experts have the tensors of `_float8`, those of DeepSeek-V3."""

_BYTES = 256

RANDOM_KEY = "random_weights"
"""The key of config.json that says whose shapes these are."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What the config of a model says. `layers` are the model's own, `written` as many as take some ten gigabytes;
    `experts` is the field for the number of experts of a layer.
    """

    model_type: str
    layers: int
    written: int
    experts: str
    fields: dict[str, Any]

    def config(
        self,
        layers: int | None = None,
        experts: int | None = None,
        top_k: int | None = None,
        vocabulary: int | None = None,
    ) -> Any:
        """The model's config with so many layers, experts per layer, experts per token, and tokens known; None leaves
        its own, but for the layers. Raises UsageError for numbers that cannot be.
        """
        fields = {"num_hidden_layers": self.written if layers is None else layers, **self.fields}
        fields |= {} if experts is None else {self.experts: experts}
        fields |= {} if top_k is None else {"num_experts_per_tok": top_k}
        fields |= {} if vocabulary is None else {"vocab_size": vocabulary}
        if fields["num_hidden_layers"] < 1 or not 1 <= fields["num_experts_per_tok"] <= fields[self.experts]:
            raise UsageError(
                f"no model has {fields['num_hidden_layers']} layers of {fields[self.experts]} experts,"
                f" {fields['num_experts_per_tok']} per token"
            )
        if fields["vocab_size"] < _BYTES:
            raise UsageError(f"a vocabulary of {fields['vocab_size']} has no room for {_BYTES} bytes")
        make: Any = CONFIG_MAPPING[self.model_type]
        return make(**fields, tie_word_embeddings=False, dtype="bfloat16")


SHAPES = {
    "small": Shape(  # 1.67 B parameters, of nobody's model: experts of 3 MiB
        "qwen3_moe",
        16,
        16,
        "num_experts",
        {
            "vocab_size": 32000,
            "hidden_size": 1024,
            "intermediate_size": 2048,
            "moe_intermediate_size": 512,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "num_experts": 64,
            "num_experts_per_tok": 8,
        },
    ),
    "deepseek-v2-lite": Shape(  # experts of 16.5 MiB; the first layer is dense
        "deepseek_v2",
        27,
        10,
        "n_routed_experts",
        {
            "vocab_size": 102400,
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "n_shared_experts": 2,
            "n_routed_experts": 64,
            "num_experts_per_tok": 6,
            "first_k_dense_replace": 1,
            "q_lora_rank": None,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
        },
    ),
    "gpt-oss-20b": Shape(  # experts of 47.5 MiB, as bfloat16
        "gpt_oss",
        24,
        8,
        "num_local_experts",
        {
            "vocab_size": 201088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "sliding_window": 128,
        },
    ),
    "mixtral-8x7b": Shape(  # experts of 336 MiB
        "mixtral",
        32,
        4,
        "num_local_experts",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    "olmoe": Shape(  # experts of 12 MiB
        "olmoe",
        16,
        12,
        "num_experts",
        {
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
        },
    ),
    "qwen3-30b-a3b": Shape(  # experts of 9 MiB
        "qwen3_moe",
        48,
        12,
        "num_experts",
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
        },
    ),
}


def write_checkpoint(
    config: PreTrainedConfig, folder: Path, name: str, seed: int = 0, packing: Literal["mxfp4", "fp8"] | None = None
) -> None:
    """Write a random checkpoint of `config`, marked as of the shapes of `name`: a shard per layer, under the names and
    in the shapes of the transformers model itself.

    So transformers can map it into memory as it lies, which is the best case for the programs that moeinf is measured
    against. In the `packing` "mxfp4", experts are packed as gpt-oss is released; in "fp8", all linear layers as
    DeepSeek-V3 is, but for routers and the output layer. Its tokenizer makes a token of every byte. A folder that has
    an index already is left as it is.
    """
    describe = _plain
    if packing == "mxfp4":
        if config.model_type != "gpt_oss":
            raise UsageError(f"{config.model_type} is not released in MXFP4", hint="leave out --mxfp4")
        config.quantization_config = {"quant_method": "mxfp4"}
        describe = _mxfp4
    elif packing == "fp8":
        if config.model_type not in _FLOAT8_TYPES:
            raise UsageError(f"{config.model_type} is not written in float8", hint="leave out --fp8")
        config.quantization_config = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [_BLOCK, _BLOCK]}
        describe = _float8
    index = folder / INDEX_NAME
    if index.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    setattr(config, RANDOM_KEY, name)
    config.save_pretrained(folder)
    _write_tokenizer(folder)
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(_shards(config)):
        file = f"model-{number:05d}.safetensors"
        described = [each for shape in shapes.items() for each in describe(*shape)]
        with (folder / file).open("wb") as shard:
            shard.write(encode_header(described, {"format": "pt"}))
            for tensor, dtype, shape in described:
                shard.write(_random(tensor, dtype, shape, generator).view(torch.uint8).numpy().data)
        weight_map |= dict.fromkeys((tensor for tensor, _, _ in described), file)
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def _write_tokenizer(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast: Any = PreTrainedTokenizerFast  # untyped
    fast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False).save_pretrained(folder)


def _plain(name: str, shape: tuple[int, ...]) -> list[tuple[str, str, tuple[int, ...]]]:
    """A parameter as the checkpoint has it: (name, dtype, shape) of one tensor."""
    return [(name, "BF16", shape)]


def _mxfp4(name: str, shape: tuple[int, ...]) -> list[tuple[str, str, tuple[int, ...]]]:
    """The same of MXFP4, where a weight of experts is two tensors, with rows and columns exchanged."""
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return _plain(name, shape)
    experts, width, rows = shape
    groups = (experts, rows, width // 32)
    return [(f"{name}{_BLOCKS}", "U8", (*groups, 16)), (f"{name}{_EXPONENTS}", "U8", groups)]


def _float8(name: str, shape: tuple[int, ...]) -> list[tuple[str, str, tuple[int, ...]]]:
    """The same of float8, where experts have their weights apart; linear layers are called …_proj, or nearly so."""
    prefix, _, parameter = name.rpartition("experts.")
    if parameter == "gate_up_proj":
        apart = (shape[1] // 2, shape[2])
        names = [f"{prefix}experts.{number}.{part}_proj" for number in range(shape[0]) for part in ("gate", "up")]
        return [each for one in names for each in _float8(f"{one}.weight", apart)]
    if parameter == "down_proj":
        names = [f"{prefix}experts.{number}.down_proj.weight" for number in range(shape[0])]
        return [each for one in names for each in _float8(one, shape[1:])]
    if len(shape) != 2 or "_proj" not in name:
        return _plain(name, shape)
    return [(name, "F8_E4M3", shape), (f"{name}{_SCALES}", "F32", tuple(-(-size // _BLOCK) for size in shape))]


def _random(name: str, dtype: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if dtype == "F8_E4M3":
        return torch.empty(shape).normal_(0, 100, generator=generator).clamp_(-448, 448).to(torch.float8_e4m3fn)
    if dtype == "F32":
        return torch.empty(shape).uniform_(1e-4, 3e-4, generator=generator)
    if name.endswith((_BLOCKS, _EXPONENTS)):
        limits = (0, 256) if name.endswith(_BLOCKS) else (118, 122)
        return torch.empty(shape, dtype=torch.uint8).random_(*limits, generator=generator)
    if len(shape) == 1:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.bfloat16)
    # Embeddings outweigh what attention averages over the context, or all tokens would be routed alike; and not by so
    # much that every layer sees the same: its router then guesses the next one's choice no better than in real models.
    spread = 1.0 if "embed_tokens" in name else 0.02
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, spread, generator=generator)


def _shards(config: PreTrainedConfig) -> Iterator[dict[str, tuple[int, ...]]]:
    """The shapes of all tensors by name, what stands outside the layers first."""
    with torch.device("meta"):
        auto: Any = AutoModelForCausalLM
        model = auto.from_config(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for layer in (None, *range(config.num_hidden_layers)):
        prefix = f"model.layers.{layer}."
        yield {
            name: shape
            for name, shape in shapes.items()
            if (name.startswith(prefix) if layer is not None else ".layers." not in name)
        }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m moeinf.testing", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="default: as many as take some ten gigabytes")
    parser.add_argument("--experts", type=int, help="per layer; default: the model's own")
    parser.add_argument("--top-k", type=int, help="experts per token; default: the model's own")
    parser.add_argument("--vocabulary", type=int, help="tokens; default: the model's own, however few its layers")
    packing = parser.add_mutually_exclusive_group()
    packing.add_argument(
        "--mxfp4", dest="packing", action="store_const", const="mxfp4", help="pack experts as gpt-oss is released"
    )
    packing.add_argument(
        "--fp8", dest="packing", action="store_const", const="fp8", help="pack linear layers as DeepSeek-V3 is released"
    )
    arguments = parser.parse_args()
    try:
        numbers = (arguments.layers, arguments.experts, arguments.top_k, arguments.vocabulary)
        config = SHAPES[arguments.shape].config(*numbers)
        write_checkpoint(config, arguments.folder, arguments.shape, packing=arguments.packing)
    except UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
