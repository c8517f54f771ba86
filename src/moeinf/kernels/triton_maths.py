"""Experts of one token computed on a GPU, all that are there in one launch per projection: Triton kernels that find
their weights by slot.

What lies between the projections is the module's own, on all rows at once, so gates, activations and norms are as
transformers has them. Rounds where torch rounds, and adds the products of a row in another order; the experts' rows are
added up in float32. Prompts and quantised experts are left to torch. Block sizes are not tuned: this has not yet run on
a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import nn

from .torch_maths import DeviceSlots, ExpertMaths, Tensors, TokenMaths

__all__ = ["TritonMaths", "slot_linear"]

_BLOCK_OUT = 32
_BLOCK_IN = 128


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]  # triton is untyped, or not there
def _slot_linear(  # type: ignore[no-untyped-def]
    rows, weights, biases, slots, output, row_stride, slot_stride, out_stride, in_stride, bias_stride,
    num_out: tl.constexpr, num_in: tl.constexpr, has_bias: tl.constexpr,
    block_out: tl.constexpr, block_in: tl.constexpr,
):  # fmt: skip
    """One block of outputs of one expert: products in float32, rounded as a product and once more as a sum."""
    number = tl.program_id(1)
    slot = tl.load(slots + number).to(tl.int64)
    out = tl.program_id(0) * block_out + tl.arange(0, block_out)
    total = tl.zeros((block_out,), dtype=tl.float32)
    for begin in range(0, num_in, block_in):
        into = begin + tl.arange(0, block_in)
        row = tl.load(rows + number * row_stride + into, mask=into < num_in, other=0.0).to(tl.float32)
        places = slot * slot_stride + out[:, None].to(tl.int64) * out_stride + into[None, :] * in_stride
        is_there = (out[:, None] < num_out) & (into[None, :] < num_in)
        weight = tl.load(weights + places, mask=is_there, other=0.0).to(tl.float32)
        total += tl.sum(weight * row[None, :], axis=1)
    kind = output.dtype.element_ty
    if has_bias:
        bias = tl.load(biases + slot * bias_stride + out, mask=out < num_out, other=0.0).to(tl.float32)
        total = total.to(kind).to(tl.float32) + bias
    tl.store(output + number * num_out + out, total.to(kind), mask=out < num_out)


def slot_linear(
    rows: torch.Tensor, weights: torch.Tensor, biases: torch.Tensor | None, slots: torch.Tensor, *, is_transposed: bool
) -> torch.Tensor:
    """The projections of experts in `slots` [n] of `weights` [slots, out, in], or [slots, in, out] if transposed: [n,
    out], of `rows` [n, in], or [1, in] where all take the same.
    """
    out, into = (2, 1) if is_transposed else (1, 2)
    num_out, num_in = weights.shape[out], weights.shape[into]
    output = torch.empty(len(slots), num_out, dtype=rows.dtype, device=rows.device)
    kernel: Any = _slot_linear
    kernel[(triton.cdiv(num_out, _BLOCK_OUT), len(slots))](
        rows,
        weights,
        weights if biases is None else biases,
        slots,
        output,
        rows.stride(0) if len(rows) > 1 else 0,
        weights.stride(0),
        weights.stride(out),
        weights.stride(into),
        0 if biases is None else biases.stride(0),
        num_out=num_out,
        num_in=num_in,
        has_bias=biases is not None,
        block_out=_BLOCK_OUT,
        block_in=_BLOCK_IN,
    )
    return output


class TritonMaths(ExpertMaths):
    """The experts of one MoE layer, which are in some of `slots`: one token by the kernels, many by torch."""

    def __init__(self, module: nn.Module, slots: DeviceSlots) -> None:
        super().__init__(module)
        self.computed_by = "triton"
        self._slots = slots

    def token(self, hidden: torch.Tensor, weights: torch.Tensor) -> TokenMaths:
        return _TritonToken(self, hidden.contiguous(), weights)

    def rows(self, hidden: torch.Tensor, experts: Sequence[Tensors]) -> torch.Tensor:
        """The rows of experts [n, H], not yet weighted, for one token's `hidden` [1, H]."""
        anchor = self._slots.weights["down_proj"]
        numbers = [tensors["down_proj"].storage_offset() // anchor.stride(0) for tensors in experts]
        slots = torch.tensor(numbers, dtype=torch.int32).to(anchor.device, non_blocking=True)
        outer = self._linear(self._activate(self._linear(hidden, self._up, slots)), "down_proj", slots)
        return outer if self._norm is None else self._norm(outer)

    def _linear(self, rows: torch.Tensor, name: str, slots: torch.Tensor) -> torch.Tensor:
        weights = self._slots.weights
        biases = weights.get(f"{name}_bias")
        return slot_linear(rows.contiguous(), weights[name], biases, slots, is_transposed=self._is_transposed)


class _TritonToken:
    """A token's experts, as many in a launch as are there."""

    def __init__(self, maths: TritonMaths, hidden: torch.Tensor, weights: torch.Tensor) -> None:
        self._maths, self._hidden, self._weights = maths, hidden, weights
        self._rows: dict[int, torch.Tensor] = {}

    def compute(self, places: Sequence[int], experts: Sequence[Tensors]) -> None:
        self._rows.update(zip(places, self._maths.rows(self._hidden, experts), strict=True))

    def total(self, places: Sequence[int]) -> torch.Tensor:
        weighted = torch.stack([self._rows[place] for place in places]) * self._weights[0, list(places), None]
        return weighted.sum(0, keepdim=True, dtype=torch.float32).to(self._hidden.dtype)
