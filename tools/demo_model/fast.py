"""Hand-written forward and backward pass of the demo model for CPUs with bfloat16 instructions.

One call handles one micro-batch on one thread; train.py runs one per core, each with gradients of its own. The kernels
are built with the machine's C++ compiler and ninja at first use; where that fails, the training takes model.loss with
autograd.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import cpp_extension

from tools.demo_model.model import NORM_EPS, Shape, Weights, rotary_tables

__all__ = ["FastModel", "load_kernels"]

LOGIT_ROWS = 1024  # rows of logits at a time: 8 MB at 4096 tokens of vocabulary, which stays in the last cache
FLAGS = ["-O3", "-march=native", "-ffast-math", "-mprefer-vector-width=512"]


def load_kernels(build: Path) -> Any:
    """Builds kernels.cpp in `build` (or finds it built) and returns the module.

    Raises OSError or RuntimeError where there is no compiler that can.
    """
    build.mkdir(parents=True, exist_ok=True)
    source = Path(__file__).with_name("kernels.cpp")
    return cpp_extension.load("demo_model_kernels", [str(source)], extra_cflags=FLAGS, build_directory=str(build))


@dataclass(slots=True)
class _LayerTape:
    """What one layer's backward pass needs of its forward pass."""

    attention_in: Tensor
    attention_normed: Tensor
    attention_rstd: Tensor
    qkv: Tensor
    heads: list[Tensor]  # q in blocks, k, v, 1 / rms
    attended: list[Tensor]  # output by token, output in blocks, probabilities
    experts_in: Tensor
    experts_normed: Tensor
    experts_rstd: Tensor
    routing: list[Tensor]  # probabilities, chosen, weights, rows, starts, load
    expert_rows: Tensor
    gate_up_rows: Tensor


class FastModel:
    """Forward and backward for one shape and sequence length, on bfloat16 weights that the caller keeps."""

    def __init__(self, kernels: Any, shape: Shape, weights: Weights, length: int) -> None:
        self.kernels = kernels
        self.shape = shape
        self.weights = weights
        self.length = length
        self.cosine, self.sine = (table.contiguous() for table in rotary_tables(shape, length))

    def losses(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each target and choices per expert [layers, experts], without gradients."""
        hidden, tapes, _ = self._forward(tokens[:, :-1].int().contiguous().flatten())
        targets = tokens[:, 1:].int().contiguous().flatten()
        losses = []
        for first in range(0, hidden.shape[0], LOGIT_ROWS):
            logits = hidden[first : first + LOGIT_ROWS] @ self.weights["embed"].t()
            losses.append(self.kernels.cross_entropy(logits, targets[first : first + LOGIT_ROWS], 0.0))
        return torch.cat(losses), torch.stack([tape.routing[5] for tape in tapes])

    def step(self, tokens: Tensor, grads: Weights, pull: Tensor, total: int) -> tuple[Tensor, Tensor]:
        """Adds the gradients of model.loss to `grads` (float32); returns the losses and the choices per expert."""
        inputs = tokens[:, :-1].int().contiguous().flatten()
        targets = tokens[:, 1:].int().contiguous().flatten()
        hidden, tapes, last = self._forward(inputs)
        losses, dhidden = self._head(hidden, targets, grads["embed"], 1.0 / total)
        x, rstd = last
        dx = self.kernels.norm_backward(dhidden, x, rstd, self.weights["norm"], None, grads["norm"])
        counts = torch.stack([tape.routing[5] for tape in tapes])
        for layer in reversed(range(self.shape.layers)):
            tape = tapes.pop()
            dx = self._experts_backward(layer, tape, dx, grads, pull[layer].contiguous())
            dx = self._attention_backward(layer, tape, dx, grads)
        self.kernels.embedding_backward(dx, inputs, grads["embed"])
        return losses, counts

    def _forward(self, inputs: Tensor) -> tuple[Tensor, list[_LayerTape], tuple[Tensor, Tensor]]:
        w, shape, kernels = self.weights, self.shape, self.kernels
        x = w["embed"].index_select(0, inputs)
        delta: Tensor | None = None
        tapes: list[_LayerTape] = []
        for layer in range(shape.layers):
            attention_in, normed, rstd = kernels.add_norm(x, delta, w["norm_attention"][layer], NORM_EPS)
            qkv = normed @ w["qkv"][layer].t()
            heads = kernels.split_heads(
                qkv,
                w["q_norm"][layer],
                w["k_norm"][layer],
                self.cosine,
                self.sine,
                self.length,
                shape.heads,
                shape.kv_heads,
                NORM_EPS,
            )
            attended = kernels.attention(*heads[:3], self.length, shape.heads, shape.kv_heads)
            out = attended[0] @ w["o"][layer].t()
            x, experts_normed, experts_rstd = kernels.add_norm(attention_in, out, w["norm_experts"][layer], NORM_EPS)
            routing = kernels.route(experts_normed @ w["router"][layer].t(), shape.top_k)
            rows = kernels.gather(experts_normed, routing[3], routing[4], routing[5])
            done, both = kernels.experts_forward(rows, routing[4], w["gate_up"][layer], w["down"][layer])
            delta = kernels.combine(done, routing[3], routing[2])
            tapes.append(
                _LayerTape(
                    attention_in,
                    normed,
                    rstd,
                    qkv,
                    heads,
                    attended,
                    x,
                    experts_normed,
                    experts_rstd,
                    routing,
                    rows,
                    both,
                )
            )
        x, hidden, rstd = kernels.add_norm(x, delta, w["norm"], NORM_EPS)
        return hidden, tapes, (x, rstd)

    def _head(self, hidden: Tensor, targets: Tensor, embed_grad: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        embed = self.weights["embed"]
        losses, dhidden = [], torch.empty_like(hidden)
        for first in range(0, hidden.shape[0], LOGIT_ROWS):
            part = slice(first, first + LOGIT_ROWS)
            logits = hidden[part] @ embed.t()
            losses.append(self.kernels.cross_entropy(logits, targets[part], scale))
            torch.mm(logits, embed, out=dhidden[part])
            embed_grad.add_(logits.t() @ hidden[part])
        return torch.cat(losses), dhidden

    def _experts_backward(self, layer: int, tape: _LayerTape, dx: Tensor, grads: Weights, pull: Tensor) -> Tensor:
        w, kernels = self.weights, self.kernels
        probabilities, chosen, weights, rows, starts, load = tape.routing
        dout = kernels.gather(dx, rows, starts, load)
        spread = kernels.spread_weights(weights, rows, starts)
        drows, dweight = kernels.experts_backward(
            dout,
            tape.expert_rows,
            tape.gate_up_rows,
            spread,
            starts,
            w["gate_up"][layer],
            w["down"][layer],
            grads["gate_up"][layer],
            grads["down"][layer],
        )
        dlogits = kernels.route_backward(dweight, probabilities, chosen, weights, rows, pull)
        dnormed = kernels.combine(drows, rows, None)
        dnormed.addmm_(dlogits, w["router"][layer])
        grads["router"][layer].add_(dlogits.t() @ tape.experts_normed)
        into: Tensor = kernels.norm_backward(
            dnormed, tape.experts_in, tape.experts_rstd, w["norm_experts"][layer], dx, grads["norm_experts"][layer]
        )
        return into

    def _attention_backward(self, layer: int, tape: _LayerTape, dx: Tensor, grads: Weights) -> Tensor:
        w, shape, kernels = self.weights, self.shape, self.kernels
        grads["o"][layer].add_(dx.t() @ tape.attended[0])
        q, k, v, rstd = tape.heads
        dheads = kernels.attention_backward(
            dx @ w["o"][layer], tape.attended[1], tape.attended[2], q, k, v, self.length, shape.heads, shape.kv_heads
        )
        dqkv = kernels.split_heads_backward(
            *dheads,
            tape.qkv,
            rstd,
            w["q_norm"][layer],
            w["k_norm"][layer],
            self.cosine,
            self.sine,
            self.length,
            shape.heads,
            shape.kv_heads,
            grads["q_norm"][layer],
            grads["k_norm"][layer],
        )
        grads["qkv"][layer].add_(dqkv.t() @ tape.attention_normed)
        into: Tensor = kernels.norm_backward(
            dqkv @ w["qkv"][layer],
            tape.attention_in,
            tape.attention_rstd,
            w["norm_attention"][layer],
            dx,
            grads["norm_attention"][layer],
        )
        return into
