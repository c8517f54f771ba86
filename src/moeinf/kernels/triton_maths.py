"""Experts computed on a GPU, all that are there in one launch per projection: Triton kernels that find their weights by
slot, one for a token, one for the many of a prompt.

What lies between the projections is the module's own, on all rows at once, so gates, activations and norms are as
transformers has them. Rounds where torch rounds, and adds the products of a row in another order. The experts' rows are
added up in ascending order of expert, by one program per token, so a result depends on nothing but the input: a token's
in float32, a prompt's with torch's roundings. Quantised experts are left to torch. Block sizes are not tuned: this has
not yet run on a GPU.

A prompt's rows are sorted by expert and cut into blocks, each of one expert, of which the last may be short; so vLLM
and MegaBlocks (Gale et al., arXiv 2211.15841) group theirs, too. Here a block comes with the slot of its weights.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import nn

from .torch_maths import DeviceSlots, ExpertMaths, PromptMaths, Tensors, TokenMaths

__all__ = ["TritonMaths", "add_up", "blocks_of", "grouped_linear", "slot_linear"]

_BLOCK_OUT = 32
_BLOCK_IN = 128
_GROUPED_OUT, _GROUPED_IN = 64, 32
_GROUPED_ROWS = (16, 32, 64)
"""Rows of a block: the fewest that tensor cores multiply, to as many as experts of long prompts have."""
_SUMMED = 1024


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
    _launch(
        kernel,
        (triton.cdiv(num_out, _BLOCK_OUT), len(slots)),
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


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _grouped_linear(  # type: ignore[no-untyped-def]
    rows, weights, biases, sources, blocks, output, row_stride, slot_stride, out_stride, in_stride, bias_stride,
    num_out: tl.constexpr, num_in: tl.constexpr, has_bias: tl.constexpr, as_float32: tl.constexpr,
    block_rows: tl.constexpr, block_out: tl.constexpr, block_in: tl.constexpr,
):  # fmt: skip
    """One block of outputs for one block of rows, all of one expert, rounded as in `_slot_linear`."""
    number = tl.program_id(0) // tl.cdiv(num_out, block_out)
    slot = tl.load(blocks + 3 * number)
    place = tl.load(blocks + 3 * number + 1) + tl.arange(0, block_rows)
    is_row = place < tl.load(blocks + 3 * number + 2)
    row = tl.load(sources + place, mask=is_row, other=0)
    out = tl.program_id(0) % tl.cdiv(num_out, block_out) * block_out + tl.arange(0, block_out)
    is_out = out < num_out
    total = tl.zeros((block_rows, block_out), dtype=tl.float32)
    for begin in range(0, num_in, block_in):
        into = begin + tl.arange(0, block_in)
        is_in = into < num_in
        values = tl.load(
            rows + row[:, None] * row_stride + into[None, :], mask=is_row[:, None] & is_in[None, :], other=0.0
        )
        places = slot * slot_stride + into[:, None] * in_stride + out[None, :].to(tl.int64) * out_stride
        weight = tl.load(weights + places, mask=is_in[:, None] & is_out[None, :], other=0.0)
        if as_float32:
            values = values.to(tl.float32)
            weight = weight.to(tl.float32)
        total = tl.dot(values, weight, total, input_precision="ieee")
    kind = output.dtype.element_ty
    if has_bias:
        bias = tl.load(biases + slot * bias_stride + out, mask=is_out, other=0.0).to(tl.float32)
        total = total.to(kind).to(tl.float32) + bias[None, :]
    tl.store(output + place[:, None] * num_out + out[None, :], total.to(kind), mask=is_row[:, None] & is_out[None, :])


def grouped_linear(
    rows: torch.Tensor,
    weights: torch.Tensor,
    biases: torch.Tensor | None,
    sources: torch.Tensor,
    blocks: torch.Tensor,
    *,
    block_rows: int,
    is_transposed: bool,
) -> torch.Tensor:
    """The projections [n, out] of `rows` [m, in], of which `sources` [n] says which, the rows of an expert side by
    side: `blocks` [b, 3] has (slot, begin, end) of up to `block_rows` among them. `weights` are as for `slot_linear`.
    """
    out, into = (2, 1) if is_transposed else (1, 2)
    num_out, num_in = weights.shape[out], weights.shape[into]
    output = torch.empty(len(sources), num_out, dtype=rows.dtype, device=rows.device)
    kernel: Any = _grouped_linear
    _launch(
        kernel,
        (len(blocks) * triton.cdiv(num_out, _GROUPED_OUT),),
        rows,
        weights,
        weights if biases is None else biases,
        sources,
        blocks,
        output,
        rows.stride(0),
        weights.stride(0),
        weights.stride(out),
        weights.stride(into),
        0 if biases is None else biases.stride(0),
        num_out=num_out,
        num_in=num_in,
        has_bias=biases is not None,
        # the interpreter has no bfloat16, and would multiply its bits
        as_float32=rows.dtype != weights.dtype or not isinstance(kernel, triton.JITFunction),
        block_rows=block_rows,
        block_out=_GROUPED_OUT,
        block_in=_GROUPED_IN,
    )
    return output


def blocks_of(slots: Iterable[int], sizes: Iterable[int], block_rows: int) -> list[tuple[int, int, int]]:
    """(slot, begin, end) of the blocks of experts in `slots` that have so many rows each, one behind the other."""
    blocks, begin = [], 0
    for slot, size in zip(slots, sizes, strict=True):
        end = begin + size
        blocks += [(slot, start, min(start + block_rows, end)) for start in range(begin, end, block_rows)]
        begin = end
    return blocks


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _add_up(  # type: ignore[no-untyped-def]
    rows, places, output, num_places: tl.constexpr, num_columns: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    """One block of one token's sums, rounded after each addition."""
    token = tl.program_id(0) // tl.cdiv(num_columns, block)
    column = tl.program_id(0) % tl.cdiv(num_columns, block) * block + tl.arange(0, block)
    kind = output.dtype.element_ty
    total = tl.zeros((block,), dtype=tl.float32)
    for number in range(num_places):
        place = tl.load(places + token * num_places + number)
        is_there = column < tl.where(place < 0, 0, num_columns)
        row = tl.load(rows + place * num_columns + column, mask=is_there, other=0.0).to(tl.float32)
        total = (total + row).to(kind).to(tl.float32)
    tl.store(output + token.to(tl.int64) * num_columns + column, total.to(kind), mask=column < num_columns)


def add_up(rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The sums [tokens, H] of those of `rows` [n, H] that `places` [tokens, k] names, from left to right, rounded to
    their dtype after each addition. A place below 0 stands for none.
    """
    output = torch.empty(len(places), rows.shape[1], dtype=rows.dtype, device=rows.device)
    kernel: Any = _add_up
    _launch(
        kernel,
        (len(places) * triton.cdiv(rows.shape[1], _SUMMED),),
        rows,
        places,
        output,
        num_places=places.shape[1],
        num_columns=rows.shape[1],
        block=_SUMMED,
    )
    return output


def _launch(kernel: Any, grid: tuple[int, ...], rows: torch.Tensor, *arguments: Any, **constants: Any) -> None:
    """Launch it where `rows`, its first argument, is: Triton goes by the thread's current device."""
    with torch.cuda.device(rows.device) if rows.is_cuda else nullcontext():
        kernel[grid](rows, *arguments, **constants)


class TritonMaths(ExpertMaths):
    """The experts of one MoE layer, which are in some of `slots`."""

    most_at_once = sys.maxsize

    def __init__(self, module: nn.Module, slots: DeviceSlots) -> None:
        super().__init__(module)
        self.computed_by = "triton"
        self._slots = slots

    def token(self, hidden: torch.Tensor, weights: torch.Tensor) -> TokenMaths:
        return _TritonToken(self, hidden.contiguous(), weights)

    def prompt(
        self, hidden: torch.Tensor, top_k_index: torch.Tensor, weights: torch.Tensor, num_experts: int
    ) -> PromptMaths:
        return _TritonPrompt(self, hidden.contiguous(), top_k_index, weights, num_experts)

    def slots_of(self, experts: Iterable[Tensors]) -> list[int]:
        """The slots that these tensors are views of."""
        stride = self._slots.weights["down_proj"].stride(0)
        return [tensors["down_proj"].storage_offset() // stride for tensors in experts]

    def rows(self, hidden: torch.Tensor, experts: Sequence[Tensors]) -> torch.Tensor:
        slots = torch.tensor(self.slots_of(experts), dtype=torch.int32).to(hidden.device, non_blocking=True)
        outer = self._linear(self._activate(self._linear(hidden, self.up, slots)), "down_proj", slots)
        return outer if self._norm is None else self._norm(outer)

    def grouped_rows(
        self, hidden: torch.Tensor, tokens: torch.Tensor, blocks: torch.Tensor, block_rows: int
    ) -> torch.Tensor:
        """The rows [n, H], not yet weighted, of `tokens` [n] of `hidden` [tokens, H], by the experts of `blocks`."""
        each = torch.arange(len(tokens), device=tokens.device)
        inner = self._activate(self._grouped(hidden, self.up, tokens, blocks, block_rows))
        outer = self._grouped(inner, "down_proj", each, blocks, block_rows)
        return outer if self._norm is None else self._norm(outer)

    def _linear(self, rows: torch.Tensor, name: str, slots: torch.Tensor) -> torch.Tensor:
        weights = self._slots.weights
        biases = weights.get(f"{name}_bias")
        return slot_linear(rows.contiguous(), weights[name], biases, slots, is_transposed=self._is_transposed)

    def _grouped(
        self, rows: torch.Tensor, name: str, sources: torch.Tensor, blocks: torch.Tensor, block_rows: int
    ) -> torch.Tensor:
        weights, biases = self._slots.weights[name], self._slots.weights.get(f"{name}_bias")
        return grouped_linear(
            rows.contiguous(),
            weights,
            biases,
            sources,
            blocks,
            block_rows=block_rows,
            is_transposed=self._is_transposed,
        )


class _TritonToken:
    """A token's experts, as many in a launch as are there."""

    def __init__(self, maths: TritonMaths, hidden: torch.Tensor, weights: torch.Tensor) -> None:
        self._maths, self._hidden, self._weights = maths, hidden, weights
        self._rows: dict[int, torch.Tensor] = {}

    def compute(self, places: Sequence[int], experts: Sequence[Tensors]) -> None:
        self.receive(places, self._maths.rows(self._hidden, experts))

    def receive(self, places: Sequence[int], rows: torch.Tensor) -> None:
        self._rows.update(zip(places, rows, strict=True))

    def total(self, places: Sequence[int]) -> torch.Tensor:
        shares = torch.stack([self._weights[0, place] for place in places])  # a list would be an index, to wait for
        weighted = torch.stack([self._rows[place] for place in places]) * shares[:, None]
        return weighted.sum(0, keepdim=True, dtype=torch.float32).to(self._hidden.dtype)


class _TritonPrompt:
    """Many tokens' experts, as many in a launch as are there. Their weighted rows are kept as they come, and added up
    when all are there.

    A request is one token's of one expert, numbered as in the flat index. Blocks have as many rows in every launch, so
    that a row's sums do not depend on what was there with it.
    """

    def __init__(
        self, maths: TritonMaths, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, num_experts: int
    ) -> None:
        self._maths, self._hidden, self._index, self._weights = maths, hidden, index, weights.reshape(-1, 1)
        chosen, order = index.reshape(-1).sort(stable=True)
        experts, counts = torch.unique_consecutive(chosen, return_counts=True)
        requests = zip(experts.tolist(), torch.split(order, counts.tolist()), strict=True)
        self._requests = {expert: those for expert, those in requests if expert < num_experts}
        self.experts: Collection[int] = self._requests.keys()
        asked = sum(map(len, self._requests.values()))
        average = asked / max(1, len(self._requests))
        self._block_rows = next((rows for rows in _GROUPED_ROWS if average <= rows), _GROUPED_ROWS[-1])
        dtype = maths.sum_dtype(hidden.dtype, weights.dtype)
        self._rows = torch.empty(asked, hidden.shape[1], dtype=dtype, device=hidden.device)
        self._places = torch.full((index.numel(),), -1)
        self._computed = 0

    def compute(self, experts: Sequence[int], tensors: Sequence[Tensors]) -> None:
        groups = [self._requests[expert] for expert in experts]
        requests = torch.cat(groups)
        begin, self._computed = self._computed, self._computed + len(requests)
        self._places[requests] = torch.arange(begin, self._computed)
        blocks = torch.tensor(blocks_of(self._maths.slots_of(tensors), map(len, groups), self._block_rows))
        both = torch.cat([requests, blocks.flatten()]).to(self._hidden.device, non_blocking=True)
        there, table = torch.split(both, [len(requests), blocks.numel()])
        tokens = there // self._index.shape[1]
        rows = self._maths.grouped_rows(self._hidden, tokens, table.view(-1, 3), self._block_rows)
        self._rows[begin : self._computed] = rows * self._weights[there]

    def total(self) -> torch.Tensor:
        ascending = self._index.argsort(dim=1)
        places = self._places.view(self._index.shape).gather(1, ascending)
        return add_up(self._rows, places.to(self._hidden.device)).to(self._hidden.dtype)
