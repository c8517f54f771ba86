"""Random checkpoints with the shapes of real models, written layer by layer, so that anybody can repeat the figures in
docs/.

    python benchmarks/shapes.py small FOLDER

The weights are random: such a checkpoint times a machine, and says nothing about the model whose shapes it has.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

__all__ = ["SHAPES", "write_checkpoint"]


def small(layers: int = 16) -> PreTrainedConfig:
    """1.67 B parameters: 16 layers of 64 experts of 3 MiB, 8 per token."""
    return Qwen3MoeConfig(  # type: ignore[call-arg]  # head_dim comes from a base class without types
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2048,
        moe_intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=64,
        num_experts_per_tok=8,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def qwen3_30b_a3b(layers: int = 12) -> PreTrainedConfig:
    """The shapes of Qwen3-30B-A3B: layers of 128 experts of 9 MiB, 8 per token."""
    return Qwen3MoeConfig(  # type: ignore[call-arg]  # head_dim comes from a base class without types
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def mixtral_8x7b(layers: int = 4) -> PreTrainedConfig:
    """The shapes of Mixtral-8x7B: layers of 8 experts of 336 MiB, 2 per token."""
    return MixtralConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_local_experts=8,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


SHAPES = {"small": small, "qwen3-30b-a3b": qwen3_30b_a3b, "mixtral-8x7b": mixtral_8x7b}


def write_checkpoint(config: PreTrainedConfig, folder: Path, seed: int = 0) -> None:
    """Write a random checkpoint of `config`, a shard per layer, under the names and in the shapes of the transformers
    model itself.

    So transformers can map it into memory as it lies, which is the best case for the programs that moeinf is measured
    against. Holds one layer in memory at a time. A folder that has an index already is left as it is.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    _write_tokenizer(folder)
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(_shards(config)):
        tensors = {name: _random(name, shape, generator) for name, shape in shapes.items()}
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def _write_tokenizer(folder: Path) -> None:
    """A tokenizer that knows nothing: the benchmarks speak in token ids."""
    blank = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    fast: Any = PreTrainedTokenizerFast  # untyped
    fast(tokenizer_object=blank, unk_token="<unk>").save_pretrained(folder)


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="default: as many as the benchmarks use")
    arguments = parser.parse_args()
    make = SHAPES[arguments.shape]
    write_checkpoint(make(arguments.layers) if arguments.layers else make(), arguments.folder)


if __name__ == "__main__":
    main()
