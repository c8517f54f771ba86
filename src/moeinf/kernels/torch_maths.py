"""The maths of experts, in torch: what transformers' eager experts compute, one expert at a time, from tensors that
lie in slots.

Bit for bit theirs: the same operations on the same rows in the same order (transformers/integrations/moe.py and the
`forward` of each experts class). A module's flags say what its experts look like; two families differ in one more
thing, the dtype they add up in. Packed weights are expanded first, every time; those that were released packed, to what
transformers makes of them, the same way round. Owns nothing, and knows nothing of caches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from moeinf.manifest import Quantization
from moeinf.quantized import dequantize

__all__ = ["DeviceSlots", "ExpertMaths", "PromptMaths", "Routed", "Tensors", "TokenMaths", "route"]

_SUMS_IN_FLOAT32 = {"Inkling2Experts"}
_SUMS_IN_WEIGHTS_DTYPE = {"NemotronHExperts"}
"""Experts classes that do not add up in the dtype of the hidden states."""

Tensors = Mapping[str, torch.Tensor]


class DeviceSlots(Protocol):
    """The slots of a device with memory of its own: `weights` has each tensor of all of them together, [slots, …]."""

    weights: dict[str, torch.Tensor]


class TokenMaths(Protocol):
    """One token's way through one layer: the experts that it chose, in any order, then their sum."""

    def compute(self, places: Sequence[int], experts: Sequence[Tensors]) -> None:
        """Compute `experts`, the tensors of slots, which have these places among the token's choices."""

    def receive(self, places: Sequence[int], rows: torch.Tensor) -> None:
        """Take the rows [n, H] of experts that were computed elsewhere, not yet weighted: `ExpertMaths.rows`."""

    def total(self, places: Sequence[int]) -> torch.Tensor:
        """The rows of the experts computed, added up in the order of `places`: [1, H]."""


class PromptMaths(Protocol):
    """Many tokens' way through one layer. `experts` are those that they chose, ascending, by their numbers in it."""

    experts: Collection[int]

    def compute(self, experts: Sequence[int], tensors: Sequence[Tensors]) -> None:
        """Compute some of `experts`, each of them once in all, from the `tensors` of their slots."""

    def total(self) -> torch.Tensor:
        """When all are computed: the tokens' rows, added up in ascending order of expert, [tokens, H]."""


class ExpertMaths:
    """The experts of one MoE layer, as functions. `module` is their experts module in the transformers model, without
    its weights; `quantization` says how these lie in slots. `computed_by` says what does the maths, and why if that is
    not what it could be; `up` is what the first matrix is called. Of a prompt's experts, as many as `most_at_once` are
    worth computing together.
    """

    most_at_once = 1

    def __init__(self, module: nn.Module, quantization: Quantization | None = None, reason: str = "") -> None:
        flags: Any = module
        self.computed_by = f"torch: {reason}" if reason else "torch"
        self._quantization = quantization
        self.up = "gate_up_proj" if flags.has_gate else "up_proj"
        self._is_transposed: bool = flags.is_transposed and (quantization is None or quantization.is_exact)
        self._activate = flags._apply_gate if flags.has_gate else flags.act_fn
        self._norm = flags.post_expert_norm if flags.has_post_expert_norm else None
        self._kind = type(module).__name__

    def token(self, hidden: torch.Tensor, weights: torch.Tensor) -> TokenMaths:
        """The maths of one token: its `hidden` [1, H] and its routing `weights` [1, k]."""
        return _TorchToken(self, hidden, weights)

    def prompt(
        self, hidden: torch.Tensor, top_k_index: torch.Tensor, weights: torch.Tensor, num_experts: int
    ) -> PromptMaths:
        """The maths of many tokens: their `hidden` [tokens, H], and which of the layer's experts they chose with which
        `weights`, both [tokens, k], the index in host memory.
        """
        return _TorchPrompt(self, hidden, route(top_k_index, weights, num_experts), weights)

    def expert(self, hidden: torch.Tensor, tensors: Tensors, weights: torch.Tensor) -> torch.Tensor:
        """One expert's weighted rows [n, H] for `hidden` [n, H] and routing `weights` [n, 1]; `tensors` are its
        slot's.
        """
        return self._row(hidden, tensors) * weights

    def rows(self, hidden: torch.Tensor, experts: Sequence[Tensors]) -> torch.Tensor:
        """The rows of experts [n, H], not yet weighted, for one token's `hidden` [1, H]."""
        return torch.cat([self._row(hidden, tensors) for tensors in experts])

    def forget(self) -> None:
        """Give back memory that was taken for one product and kept for the next."""

    def inner(self, hidden: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        """What an expert's second matrix is multiplied with, [n, inner], for `hidden` [n, H]."""
        inner: torch.Tensor = self._activate(self._project(hidden, tensors, self.up))
        return inner

    def zeros(self, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """What the rows are added to, shaped like `hidden`, in the dtype that this family adds up in."""
        return torch.zeros_like(hidden, dtype=self.sum_dtype(hidden.dtype, weights.dtype))

    def sum_dtype(self, hidden: torch.dtype, weights: torch.dtype) -> torch.dtype:
        """What this family adds up in."""
        if self._kind in _SUMS_IN_FLOAT32:
            return torch.float32
        return weights if self._kind in _SUMS_IN_WEIGHTS_DTYPE else hidden

    def _row(self, hidden: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        outer = self._project(self.inner(hidden, tensors), tensors, "down_proj")
        return outer if self._norm is None else self._norm(outer)

    def _project(self, rows: torch.Tensor, tensors: Tensors, name: str) -> torch.Tensor:
        weight, bias = tensors[name], tensors.get(f"{name}_bias")
        if self._quantization is not None:
            weight = self._expand(weight, tensors[self._quantization.partner(name)], rows)
        weight = weight.to(rows.dtype)  # another one only on a device that does not compute in the weights' own
        product = rows @ weight if self._is_transposed else F.linear(rows, weight)
        return product if bias is None else product + bias

    def _expand(self, numbers: torch.Tensor, factors: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """A weight for products with `rows`, which lies as the module has it."""
        assert self._quantization is not None, "plain weights are used as they are"
        width, dtype = rows.shape[1], rows.dtype
        return dequantize(numbers, factors, self._quantization, width, dtype, is_transposed=self._is_transposed)


class _TorchToken:
    """A token's experts, one at a time."""

    def __init__(self, maths: ExpertMaths, hidden: torch.Tensor, weights: torch.Tensor) -> None:
        self._maths, self._hidden, self._weights = maths, hidden, weights
        self._rows: dict[int, torch.Tensor] = {}

    def compute(self, places: Sequence[int], experts: Sequence[Tensors]) -> None:
        for place, tensors in zip(places, experts, strict=True):
            self._rows[place] = self._maths.expert(self._hidden, tensors, self._weights[:, place : place + 1])

    def receive(self, places: Sequence[int], rows: torch.Tensor) -> None:
        for place, row in zip(places, torch.split(rows, 1), strict=True):
            self._rows[place] = row * self._weights[:, place : place + 1]

    def total(self, places: Sequence[int]) -> torch.Tensor:
        total = self._maths.zeros(self._hidden, self._weights)
        for place in places:
            total += self._rows[place].to(total.dtype)
        return total.to(self._hidden.dtype)


class _TorchPrompt:
    """Many tokens' experts, one at a time. Rows wait for those of the experts before them."""

    def __init__(self, maths: ExpertMaths, hidden: torch.Tensor, routed: Routed, weights: torch.Tensor) -> None:
        self._maths, self._hidden, self._routed = maths, hidden, routed
        self.experts: Collection[int] = routed.experts
        self._total = maths.zeros(hidden, weights)
        self._rows: dict[int, torch.Tensor] = {}
        self._unadded = deque(routed.experts)

    def compute(self, experts: Sequence[int], tensors: Sequence[Tensors]) -> None:
        for expert, there in zip(experts, tensors, strict=True):
            tokens, weights = self._routed[expert]
            rows = self._maths.expert(self._hidden[tokens], there, weights)
            self._rows[expert] = rows.to(self._total.dtype)
            while self._unadded and self._unadded[0] in self._rows:
                expert = self._unadded.popleft()
                self._total.index_add_(0, self._routed[expert][0], self._rows.pop(expert))

    def total(self) -> torch.Tensor:
        return self._total.to(self._hidden.dtype)


@dataclass(frozen=True, slots=True)
class Routed:
    """A step's requests, grouped by expert, in ascending order: those of `experts[i]` are rows spans[experts[i]] of
    `tokens` [n] and `weights` [n, 1]. Within an expert they are ordered by (place among the k, token), as the eager
    forward orders them.
    """

    tokens: torch.Tensor
    weights: torch.Tensor
    spans: dict[int, tuple[int, int]]

    @property
    def experts(self) -> Collection[int]:
        return self.spans.keys()

    def __getitem__(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One expert's (tokens [n], weights [n, 1])."""
        begin, end = self.spans[expert]
        return self.tokens[begin:end], self.weights[begin:end]


def route(top_k_index: torch.Tensor, top_k_weights: torch.Tensor, num_experts: int) -> Routed:
    """Group a step's requests, both [tokens, k], by expert. The index is in host memory; what is returned is where the
    weights are. An index of `num_experts` stands for "no expert" in the eager forward, and is left out here.
    """
    tokens = top_k_index.shape[0]
    flat = top_k_index.t().reshape(-1)
    order = torch.argsort(flat, stable=True)
    experts, counts = torch.unique_consecutive(flat[order], return_counts=True)
    ends = list(accumulate(counts.tolist(), initial=0))
    spans = dict(zip(experts.tolist(), pairwise(ends), strict=True))
    spans.pop(num_experts, None)
    order = order[: max((end for _, end in spans.values()), default=0)].to(top_k_weights.device)
    token, place = order % tokens, order // tokens
    return Routed(token, top_k_weights[token, place, None], spans)
