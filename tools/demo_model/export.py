"""Writes the latest checkpoint as transformers' Qwen3-MoE: `python -m tools.demo_model export`.

The folder holds what a user would download: bfloat16 safetensors with one tensor per expert and projection,
config.json, generation_config.json, the tokenizer's files, the model card and third-party notices. `--verify` compares
the result, loaded by transformers, with model.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from tools.demo_model.model import NORM_EPS, Shape, Weights, forward_hidden
from tools.demo_model.train import load_checkpoint

__all__ = ["add_arguments", "config", "run", "to_transformers", "verify"]

END_OF_TEXT, END_OF_TURN = 0, 3
TEXTS = {"card.md": "README.md", "notices.md": "NOTICE"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# With the ban on repeated runs of 8 tokens, 48 of 50 long answers at temperature 0 have no loop; without it, 27.
GENERATION = {
    "bos_token_id": None,
    "do_sample": True,
    "eos_token_id": [END_OF_TURN, END_OF_TEXT],
    "no_repeat_ngram_size": 8,
    "pad_token_id": END_OF_TEXT,
    "temperature": 0.7,
    "top_k": 40,
    "top_p": 0.9,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--out", type=Path, help="folder to write; default: export/ in the work folder")
    parser.add_argument("--verify", action="store_true", help="compare logits with transformers' own model")


def config(shape: Shape) -> dict[str, Any]:
    """Contents of config.json."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "decoder_sparse_step": 1,
        "dtype": "bfloat16",
        "eos_token_id": END_OF_TURN,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": 2 * shape.hidden,
        "max_position_embeddings": shape.max_positions,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": shape.intermediate,
        "norm_topk_prob": True,
        "num_attention_heads": shape.heads,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "output_router_logits": False,
        "pad_token_id": END_OF_TEXT,
        "rms_norm_eps": NORM_EPS,
        "rope_parameters": {"rope_theta": shape.rope_theta, "rope_type": "default"},
        "rope_theta": shape.rope_theta,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": shape.vocab,
    }


def to_transformers(shape: Shape, weights: Weights) -> Weights:
    """Weights under the names of a Qwen3-MoE checkpoint on the hub, bfloat16; the tied output matrix is left out."""
    names: Weights = {"model.embed_tokens.weight": weights["embed"], "model.norm.weight": weights["norm"]}
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        names[prefix + "input_layernorm.weight"] = weights["norm_attention"][layer]
        names[prefix + "post_attention_layernorm.weight"] = weights["norm_experts"][layer]
        attention = prefix + "self_attn."
        for name, part in zip("qkv", torch.split(weights["qkv"][layer], [q, kv, kv]), strict=True):
            names[f"{attention}{name}_proj.weight"] = part
        names[attention + "o_proj.weight"] = weights["o"][layer]
        names[attention + "q_norm.weight"] = weights["q_norm"][layer]
        names[attention + "k_norm.weight"] = weights["k_norm"][layer]
        names[prefix + "mlp.gate.weight"] = weights["router"][layer]
        for expert in range(shape.experts):
            mlp = f"{prefix}mlp.experts.{expert}."
            gate, up = weights["gate_up"][layer, expert].chunk(2)
            names[mlp + "gate_proj.weight"] = gate
            names[mlp + "up_proj.weight"] = up
            names[mlp + "down_proj.weight"] = weights["down"][layer, expert]
    return {name: weight.bfloat16().contiguous().clone() for name, weight in names.items()}


@torch.no_grad()
def verify(shape: Shape, weights: Weights, folder: Path) -> float:
    """Largest difference of log-probabilities, float32, between model.py and transformers on the exported files."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    tokens = torch.randint(0, shape.vocab, (2, 200), generator=torch.Generator().manual_seed(1))
    rounded = {name: weight.bfloat16().float() for name, weight in weights.items()}
    ours = F.linear(forward_hidden(shape, rounded, tokens)[0], rounded["embed"])
    other: Tensor = theirs(tokens).logits
    return float((ours.log_softmax(-1) - other.log_softmax(-1)).abs().max())


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    out: Path = arguments.out or arguments.work / "export"
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = load_checkpoint(arguments.work)
    shape, master = Shape(**checkpoint["shape"]), checkpoint["master"]
    save_file(to_transformers(shape, master), out / "model.safetensors", metadata={"format": "pt"})
    for name, content in (("config.json", config(shape)), ("generation_config.json", GENERATION)):
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (arguments.work / "tokenizer" / name).exists():
            shutil.copyfile(arguments.work / "tokenizer" / name, out / name)
    for source, name in TEXTS.items():
        shutil.copyfile(Path(__file__).with_name(source), out / name)
    (out / "model.safetensors").chmod(0o644)  # save_file leaves it to its owner alone
    size = (out / "model.safetensors").stat().st_size
    sys.stdout.write(f"{out}: {checkpoint['tokens'] / 1e6:.2f} M tokens seen, weights {size / 1e6:.2f} MB\n")
    if arguments.verify:
        difference = verify(shape, master, out)
        sys.stdout.write(f"largest difference of log-probabilities from transformers: {difference:.2e}\n")
        return 0 if difference < 1e-3 else 1
    return 0
