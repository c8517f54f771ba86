"""The demo model's architecture (Qwen3-MoE) in plain PyTorch.

Weights are a dictionary of tensors stacked over layers, so that the optimizer works on a few large tensors. `loss` is
the reference: differentiable, on any device. The training loop prefers fast.py where it applies; both compute the same.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Shape", "Weights", "balance_pull", "forward_hidden", "initial_weights", "loss", "rotary_tables"]

Weights = dict[str, Tensor]

MATRICES = ("qkv", "o", "gate_up", "down")
NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the model; the names follow transformers' Qwen3MoeConfig where it has one."""

    vocab: int = 4096
    hidden: int = 256
    layers: int = 6
    experts: int = 32
    top_k: int = 4
    intermediate: int = 72
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 10000.0
    max_positions: int = 2048

    @property
    def qkv_width(self) -> int:
        """Rows of the joined query, key and value projection."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight."""
        n, h, d = self.layers, self.hidden, self.head_dim
        return {
            "embed": (self.vocab, h),
            "norm": (h,),
            "norm_attention": (n, h),
            "norm_experts": (n, h),
            "qkv": (n, self.qkv_width, h),
            "q_norm": (n, d),
            "k_norm": (n, d),
            "o": (n, h, self.heads * d),
            "router": (n, self.experts, h),
            "gate_up": (n, self.experts, 2 * self.intermediate, h),
            "down": (n, self.experts, h, self.intermediate),
        }

    @property
    def parameters(self) -> int:
        """Number of parameters; the embedding is tied and counts once."""
        return sum(math.prod(size) for size in self.sizes().values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return asdict(self)


def initial_weights(shape: Shape, seed: int) -> Weights:
    """Random float32 weights: norms one, matrices normal, projections into the residual stream smaller."""
    generator = torch.Generator().manual_seed(seed)
    residual = 0.02 / math.sqrt(2 * shape.layers)
    weights: Weights = {}
    for name, size in shape.sizes().items():
        if "norm" in name:
            weights[name] = torch.ones(size)
        else:
            std = residual if name in ("o", "down") else 0.02
            weights[name] = torch.randn(size, generator=generator) * std
    return weights


def rotary_tables(shape: Shape, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, [length, head_dim / 2], float32."""
    half = shape.head_dim // 2
    frequencies = shape.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def balance_pull(shape: Shape, load: Tensor, coefficient: float, tokens: int) -> Tensor:
    """Gradient of the balance loss by each token's router probabilities, [layers, experts].

    The loss is `coefficient * experts * sum(load * mean probability)`, averaged over layers, with `load` the share of
    choices that each expert got over recent batches (Switch Transformers, equation 4, per layer).
    """
    return load * (coefficient * shape.experts / (shape.layers * tokens))


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + NORM_EPS)).to(x.dtype) * weight


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1).to(x.dtype)


def _attention(shape: Shape, weights: Weights, layer: int, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    batch, length, _ = x.shape
    heads, kv = shape.heads, shape.kv_heads
    joined = F.linear(x, weights["qkv"][layer]).view(batch, length, heads + 2 * kv, shape.head_dim).transpose(1, 2)
    q, k, v = torch.split(joined, [heads, kv, kv], dim=1)
    q = _rotate(_norm(q, weights["q_norm"][layer]), *tables)
    k = _rotate(_norm(k, weights["k_norm"][layer]), *tables)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return F.linear(out.transpose(1, 2).reshape(batch, length, -1), weights["o"][layer])


def _experts(shape: Shape, weights: Weights, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, router probabilities and number of choices per expert, for rows [tokens, hidden]."""
    probabilities = F.linear(x, weights["router"][layer]).float().softmax(-1)
    kept, chosen = probabilities.topk(shape.top_k, dim=-1)
    kept = kept / kept.sum(-1, keepdim=True)
    out = torch.zeros_like(x, dtype=torch.float32)
    for expert in range(shape.experts):
        token, choice = torch.where(chosen == expert)
        gate, up = F.linear(x[token], weights["gate_up"][layer, expert]).chunk(2, dim=-1)
        rows = F.linear(F.silu(gate) * up, weights["down"][layer, expert])
        out = out.index_add(0, token, rows.float() * kept[token, choice, None])
    return out.to(x.dtype), probabilities, torch.bincount(chosen.flatten(), minlength=shape.experts)


def forward_hidden(shape: Shape, weights: Weights, tokens: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """Final hidden states [batch, length, hidden], router probabilities per layer, choices [layers, experts]."""
    tables = tuple(table.to(weights["embed"].device) for table in rotary_tables(shape, tokens.shape[1]))
    x = F.embedding(tokens, weights["embed"])
    routed: list[Tensor] = []
    counts: list[Tensor] = []
    for layer in range(shape.layers):
        normed = _norm(x, weights["norm_attention"][layer])
        x = x + _attention(shape, weights, layer, normed, (tables[0], tables[1]))
        flat = _norm(x, weights["norm_experts"][layer]).flatten(0, 1)
        out, probabilities, count = _experts(shape, weights, layer, flat)
        x = x + out.view_as(x)
        routed.append(probabilities)
        counts.append(count)
    return _norm(x, weights["norm"]), routed, torch.stack(counts)


def loss(
    shape: Shape, weights: Weights, tokens: Tensor, pull: Tensor | None, total: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss to differentiate, cross-entropy of each target, and choices per expert, for rows of length + 1 tokens.

    The loss is the sum over these tokens divided by `total` (the tokens of the whole batch), plus the balance loss.
    """
    hidden, routed, counts = forward_hidden(shape, weights, tokens[:, :-1])
    logits = F.linear(hidden, weights["embed"]).flatten(0, 1)
    losses = F.cross_entropy(logits.float(), tokens[:, 1:].flatten(), reduction="none")
    objective = losses.sum() / total
    if pull is not None:
        objective = objective + sum((p * pull[layer]).sum() for layer, p in enumerate(routed))
    return objective, losses.detach(), counts
