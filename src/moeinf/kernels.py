"""The maths of experts, in torch: what transformers' eager experts compute, one expert at a time, from tensors that
lie in slots.

Bit for bit theirs: the same operations on the same rows in the same order (transformers/integrations/moe.py and the
`forward` of each experts class). A module's flags say what its experts look like; two families differ in one more
thing, the dtype they add up in. Owns nothing, and knows nothing of caches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["ExpertMaths", "route"]

_SUMS_IN_FLOAT32 = {"Inkling2Experts"}
_SUMS_IN_WEIGHTS_DTYPE = {"NemotronHExperts"}
"""Experts classes that do not add up in the dtype of the hidden states."""

Rows = tuple[torch.Tensor, torch.Tensor]


class ExpertMaths:
    """The experts of one MoE layer, as functions. `module` is their experts module in the transformers model, without
    its weights.
    """

    def __init__(self, module: nn.Module) -> None:
        flags: Any = module
        self._up = "gate_up_proj" if flags.has_gate else "up_proj"
        self._is_transposed: bool = flags.is_transposed
        self._activate = flags._apply_gate if flags.has_gate else flags.act_fn
        self._norm = flags.post_expert_norm if flags.has_post_expert_norm else None
        self._kind = type(module).__name__

    def expert(self, hidden: torch.Tensor, tensors: Mapping[str, torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
        """One expert's weighted rows [n, H] for `hidden` [n, H] and routing `weights` [n, 1]; `tensors` are its
        slot's.
        """
        inner = self._activate(self._project(hidden, tensors, self._up))
        outer = self._project(inner, tensors, "down_proj")
        if self._norm is not None:
            outer = self._norm(outer)
        return outer * weights

    def zeros(self, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """What the rows are added to, shaped like `hidden`, in the dtype that this family adds up in."""
        dtype = hidden.dtype
        if self._kind in _SUMS_IN_FLOAT32:
            dtype = torch.float32
        elif self._kind in _SUMS_IN_WEIGHTS_DTYPE:
            dtype = weights.dtype
        return torch.zeros_like(hidden, dtype=dtype)

    def _project(self, rows: torch.Tensor, tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        weight, bias = tensors[name], tensors.get(f"{name}_bias")
        product = rows @ weight if self._is_transposed else F.linear(rows, weight)
        return product if bias is None else product + bias


def route(top_k_index: torch.Tensor, top_k_weights: torch.Tensor, num_experts: int) -> dict[int, Rows]:
    """Group a step's requests, both [tokens, k], by expert: {expert: (tokens [n], weights [n, 1])}, experts ascending.

    Within an expert the rows are ordered by (place among the k, token), as the eager forward orders them. An index of
    `num_experts` stands for "no expert" there, and is left out here.
    """
    tokens = top_k_index.shape[0]
    flat = top_k_index.t().reshape(-1)
    order = torch.argsort(flat, stable=True)
    experts, counts = torch.unique_consecutive(flat[order], return_counts=True)
    groups = {}
    for expert, positions in zip(experts.tolist(), torch.split(order, counts.tolist()), strict=True):
        if expert < num_experts:
            token, place = positions % tokens, positions // tokens
            groups[expert] = (token, top_k_weights[token, place, None])
    return groups
