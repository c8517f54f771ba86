"""Muon for the matrices and Adam for the rest, on float32 master weights.

Muon steps along the orthogonalised momentum of each matrix (Jordan et al. 2024, "Muon: An optimizer for hidden layers
in neural networks"). Work is cut into one job per weight and layer, so that threads can share it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tools.demo_model.model import MATRICES, Shape, Weights

__all__ = ["Optimizer", "Rates", "orthogonalize"]

MOMENTUM = 0.95
BETAS = (0.9, 0.95)
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic whose iteration sends singular values to about one


@dataclass(frozen=True, slots=True)
class Rates:
    """Peak learning rates."""

    muon: float = 0.02
    adam: float = 3e-3
    router: float = 1e-3
    decay: float = 0.02  # of the matrices, times the learning rate


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices, roughly, of a batch [..., rows, columns], in bfloat16."""
    a, b, c = NEWTON_SCHULZ
    x: Tensor = matrices.bfloat16()
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT.contiguous()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if is_tall else x


class Optimizer:
    """Holds master weights and moments; `jobs` gives the pieces of one step, which may run in any order at once."""

    def __init__(self, shape: Shape, master: Weights, working: Weights, rates: Rates) -> None:
        self.shape = shape
        self.master = master
        self.working = working
        self.rates = rates
        self.first = {name: torch.zeros_like(weight) for name, weight in master.items()}
        self.second = {name: torch.zeros_like(weight) for name, weight in master.items() if name not in MATRICES}

    def state(self) -> dict[str, Any]:
        """All moments, to save."""
        return {"first": self.first, "second": self.second}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes moments that `state` gave."""
        for name, own in (("first", self.first), ("second", self.second)):
            for key, value in own.items():
                value.copy_(state[name][key])

    def jobs(self, grads: list[Weights], step: int, factor: float) -> list[Callable[[], None]]:
        """Pieces of step number `step` (from zero) on the sum of `grads`, at `factor` of the peak learning rates."""
        pieces: list[Callable[[], None]] = []
        for name in self.master:
            if name in MATRICES:
                pieces += [partial(self._muon, name, layer, grads, factor) for layer in range(self.shape.layers)]
            else:
                pieces.append(partial(self._adam, name, grads, step, factor))
        return pieces

    @torch.no_grad()
    def _muon(self, name: str, layer: int, grads: list[Weights], factor: float) -> None:
        grad = _summed(grads, name, layer)
        moment = self.first[name][layer].mul_(MOMENTUM).add_(grad)
        ahead = grad.add_(moment, alpha=MOMENTUM)
        master = self.master[name][layer]
        master.mul_(1 - self.rates.muon * self.rates.decay * factor)
        for rows in self._parts(name):
            part = ahead[..., rows, :]
            stretch = max(1.0, part.shape[-2] / part.shape[-1]) ** 0.5
            master[..., rows, :].add_(orthogonalize(part).float(), alpha=-self.rates.muon * factor * stretch)
        self.working[name][layer].copy_(master)

    @torch.no_grad()
    def _adam(self, name: str, grads: list[Weights], step: int, factor: float) -> None:
        grad = _summed(grads, name, None)
        first = self.first[name].lerp_(grad, 1 - BETAS[0])
        second = self.second[name].lerp_(grad.square_(), 1 - BETAS[1])
        rate = factor * (self.rates.router if name == "router" else self.rates.adam)
        rate /= 1 - BETAS[0] ** (step + 1)
        scale = (second / (1 - BETAS[1] ** (step + 1))).sqrt_().add_(1e-8)
        self.master[name].addcdiv_(first, scale, value=-rate)
        self.working[name].copy_(self.master[name])

    def _parts(self, name: str) -> list[slice]:
        """Row ranges of a joined weight that are matrices of their own."""
        if name == "gate_up":
            inner = self.shape.intermediate
            return [slice(0, inner), slice(inner, 2 * inner)]
        if name == "qkv":
            q, kv = self.shape.heads * self.shape.head_dim, self.shape.kv_heads * self.shape.head_dim
            return [slice(0, q), slice(q, q + kv), slice(q + kv, q + 2 * kv)]
        return [slice(None)]


def _summed(grads: list[Weights], name: str, layer: int | None) -> Tensor:
    parts = [grad[name] if layer is None else grad[name][layer] for grad in grads]
    for other in parts[1:]:
        parts[0].add_(other)
    return parts[0]
