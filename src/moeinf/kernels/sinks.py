"""Attention whose heads have sinks (gpt-oss and families after it), which transformers computes step by step, by the
native library.

There torch repeats keys and values for all heads that share them, multiplies head after head, and computes what is
hidden as well: a layer of gpt-oss-20b's takes it some ten times as long (docs/kernels.md). What the library gives is
torch's to the last bit where torch multiplies matrices of bfloat16 by loops of its own, which is tried.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from .attention import AttentionCall, order_trials
from .native import DTYPES, LANES, WANTS_MORE, NativePool

__all__ = ["NativeSinks"]

_ROWS, _COUNT = 16_000, 75
"""Chances by which the lanes are told apart: another order changes one of some 50,000."""
_FEW_PRODUCTS = 400
"""Matrices of fewer are multiplied by another loop (bmm_out_or_baddbmm_ in aten/src/ATen/native/LinearAlgebra.cpp)."""
_PROMPTS = (3, 9, None), (17, 17, None), (40, 300, None), (40, 300, 128), (130, 130, 33)
"""Queries, tokens and windows of prompts that are tried."""
_MASKS = 2
"""A step has so many: of layers that see all tokens, and of those that see the last ones."""
_MEANT_FOR_OTHERS = {"sliding_window", "s_aux", "position_ids", "cache_position", "use_cache"}
"""What attention modules hand on, and this function has from elsewhere or does not look at."""

Spans = tuple[torch.Tensor, torch.Tensor]
"""From which token to before which each query sees."""
States = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class NativeSinks:
    """A family's `eager_attention_forward`, where the library gives its results to the last bit. That is tried once for
    each number and size of heads, when they are first met. Else it is the `function` itself.
    """

    def __init__(self, function: Callable[..., Any], pool: NativePool) -> None:
        self._function = function
        self._pool = pool
        self._lanes: dict[tuple[int, int, int, bool], int] = {}
        """By heads, KV heads, size, and whether there are several queries; 0 where the library's results are others."""
        self._spans: list[tuple[weakref.ref[torch.Tensor], Spans | None]] = []
        """What the last masks show."""

    def __call__(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        **named: Any,
    ) -> Any:
        sinks, scale = getattr(module, "sinks", None), named.get("scaling")
        if not args and isinstance(sinks, torch.Tensor) and isinstance(scale, float) and not module._forward_hooks:
            others = (value for name, value in named.items() if name != "scaling" and name not in _MEANT_FOR_OTHERS)
            if not any(map(_matters, others)) and self._takes(query, key, value, sinks):
                spans = self._find_spans(attention_mask, query.shape[2], key.shape[2])
                if spans is not None:
                    return self._compute(query, key, value, sinks, scale, spans), None
        return self._function(module, query, key, value, attention_mask, *args, **named)

    def _takes(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor) -> bool:
        """Whether these are queries [1, heads, queries, size], keys and values [1, KV heads, tokens, size] whose rows
        follow each other, and sinks [heads], for which the library's results are known to be the same.
        """
        batch, heads, queries, size = query.shape
        if batch > 1 or self._pool.handle is None or key.shape != value.shape or heads % key.shape[1]:
            return False
        if {each.dtype for each in (query, key, value, sinks)} != {torch.bfloat16} or sinks.shape != (heads,):
            return False
        if any(states.stride()[2:] != (size, 1) for states in (key, value)) or not sinks.is_contiguous():
            return False
        if queries * key.shape[2] * size < _FEW_PRODUCTS:
            return False
        shape = heads, key.shape[1], size, queries > 1
        if shape not in self._lanes:
            self._lanes[shape] = self._find_lanes(*shape)
        return self._lanes[shape] > 0

    def _find_spans(self, mask: torch.Tensor | None, queries: int, tokens: int) -> Spans | None:
        """What each query sees; None if that is more than a span of tokens, or is weighed."""
        if mask is None:
            return torch.zeros(queries, dtype=torch.int64), torch.full((queries,), tokens)
        for seen, spans in self._spans:
            if seen() is mask:
                return spans
        spans = _spans_of(mask[0, 0]) if mask.shape == (1, 1, queries, tokens) else None
        self._spans = [(weakref.ref(mask), spans), *self._spans[: _MASKS - 1]]
        return spans

    def _compute(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor,
        scale: float,
        spans: Spans,
    ) -> torch.Tensor:
        """What weighs the values [1, queries, heads, size]."""
        _, heads, queries, size = query.shape
        query = query.contiguous()
        output = query.new_empty(1, queries, heads, size)
        what = AttentionCall(heads, key.shape[1], size, query=query.data_ptr(), scale=scale)
        what.point_to(key, value)
        failed = self._pool.lib.moe_attend_with_sinks(
            self._pool.handle,
            ctypes.addressof(what),
            sinks.data_ptr(),
            self._lanes[heads, key.shape[1], size, queries > 1],
            queries,
            *(each.data_ptr() for each in spans),
            output.data_ptr(),
        )
        if failed:
            raise MemoryError("no memory for the scores of attention")
        return output

    def _find_lanes(self, heads: int, kv_heads: int, size: int, is_prompt: bool) -> int:
        """Those by which the library attends as the function does; 0 if there are none."""
        lanes = next((lanes for lanes in LANES if _softens_alike(self._pool, lanes)), 0)
        if not lanes or not self._pool.adds_as_torch_does:
            return 0
        trials = _prompts(heads, kv_heads, size) if is_prompt else _tokens(heads, kv_heads, size)
        for (query, key, value), sinks, mask in trials:
            self._lanes[query.shape[1], key.shape[1], size, is_prompt] = lanes
            groups = query.shape[1] // key.shape[1]
            module = SimpleNamespace(num_key_value_groups=groups, sinks=sinks, training=False)
            spans = self._find_spans(mask, query.shape[2], key.shape[2])
            assert spans is not None
            try:
                wanted, _ = self._function(module, query, key, value, mask, scaling=1.0)
            except WANTS_MORE:
                return 0
            if not torch.equal(self._compute(query, key, value, sinks, 1.0, spans), wanted):
                return 0
        return lanes


def _matters(value: Any) -> bool:
    return value is not None and value is not False and value != 0


def _spans_of(mask: torch.Tensor) -> Spans | None:
    """What each row of a mask [queries, tokens] shows, where it is 0; None if that is not one span, or is nothing, or
    what is left is not hidden altogether.
    """
    shown = mask == 0
    begins, counts = shown.int().argmax(1), shown.sum(1)
    ends = mask.shape[1] - shown.flip(1).int().argmax(1)
    is_hidden = mask <= torch.finfo(mask.dtype).min
    if not counts.all() or not torch.equal(ends - begins, counts) or not (is_hidden | shown).all():
        return None
    return begins, ends


def _softens_alike(pool: NativePool, lanes: int) -> bool:
    rows = torch.randn(_ROWS, _COUNT, generator=torch.Generator().manual_seed(0)).bfloat16() * 2
    rows -= rows.amax(1, keepdim=True)
    wanted = F.softmax(rows, dim=-1, dtype=torch.bfloat16)
    failed = pool.lib.moe_soften(DTYPES[rows.dtype], _ROWS, _COUNT, lanes, rows.data_ptr())
    return not failed and torch.equal(rows, wanted)


_Trial = tuple[States, torch.Tensor, torch.Tensor | None]
"""Queries, keys and values, for a scale of 1; sinks, and a mask."""


def _tokens(heads: int, kv_heads: int, size: int) -> Iterator[_Trial]:
    for query, key, value in order_trials(heads, kv_heads, size):
        if key.shape[2] * size >= _FEW_PRODUCTS:
            yield (query, key, value), _sinks(query), None


def _prompts(heads: int, kv_heads: int, size: int) -> Iterator[_Trial]:
    """The same with several queries, each of which is made of one, and sees what comes before it."""
    for queries, tokens, window in _PROMPTS:
        last = torch.arange(tokens - queries, tokens)[:, None]
        other = torch.arange(tokens)[None]
        shown = (other <= last) & (other > last - (window or tokens))
        mask = torch.where(shown, 0.0, torch.finfo(torch.bfloat16).min).bfloat16()[None, None]
        for query, key, value in order_trials(heads, kv_heads, size, (tokens,), (tokens,)):
            turns = torch.linspace(1, 2, queries)[:, None]
            several = (query * turns).bfloat16()
            yield (several, key, value), _sinks(several), mask


def _sinks(query: torch.Tensor) -> torch.Tensor:
    """Some, or none that matter where all scores are 0."""
    sinks = torch.randn(query.shape[1], generator=torch.Generator().manual_seed(1)).bfloat16()
    return sinks if query.any() else torch.zeros_like(sinks)
