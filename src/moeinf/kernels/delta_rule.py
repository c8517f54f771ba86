"""The gated delta rule for one token (Yang, Kautz, Hatamizadeh, arXiv 2412.06464), with which layers with a recurrent
state attend in Qwen3-Next's family, by the native library.

torch goes through a state of a megabyte or two once for each of its steps; the library goes through a head's twice, and
adds up in torch's order (csrc/delta_rule.c).
"""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable, Iterator
from ctypes import c_float, c_int64
from typing import Any

import torch

from .native import WANTS_MORE, NativePool

__all__ = ["NativeDeltaRule"]

_TRIALS = 4
_ALWAYS = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
_EPSILON = 1e-6


class _DeltaRuleLayer(ctypes.Structure):
    """`moe_delta_rule_layer` of moe.h."""

    _fields_ = (
        *((name, c_int64) for name in ("key_heads", "heads", "keys", "values")),
        *((name, c_float) for name in ("root", "epsilon")),
    )


class NativeDeltaRule:
    """A family's `function` that applies the rule, where the library gives its results for a token to the last bit.
    That is tried once for each number and size of heads, when they are first met. Else it is the function itself.
    """

    def __init__(self, function: Callable[..., Any], pool: NativePool) -> None:
        self._function = function
        self._asks = set(inspect.signature(function).parameters)
        self._pool = pool
        self._layers: dict[tuple[int, ...], _DeltaRuleLayer | None] = {}

    def __call__(self, *args: Any, **named: Any) -> Any:
        layer = self._find(*args, **named) if len(args) == 3 else None
        return self._function(*args, **named) if layer is None else self._compute(layer, *args, **named)

    def _find(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        g: torch.Tensor | None = None,
        beta: torch.Tensor | None = None,
        initial_state: torch.Tensor | None = None,
        **others: Any,
    ) -> _DeltaRuleLayer | None:
        """How it is computed: query and key [1, 1, key heads, K], value [1, 1, heads, V] and beta [1, 1, heads], all in
        bfloat16, the logarithm of decay g [1, 1, heads], and a state [1, heads, K, V], both in float32. None for
        anything else, and for what comes out otherwise.
        """
        if g is None or beta is None or initial_state is None or self._pool.handle is None:
            return None
        if any(x.dtype != torch.bfloat16 for x in (query, key, value, beta)):
            return None
        if g.dtype != torch.float32 or initial_state.dtype != torch.float32 or not initial_state.is_contiguous():
            return None
        _, _, heads, values = value.shape
        _, _, key_heads, keys = key.shape
        if query.shape != (1, 1, key_heads, keys) or initial_state.shape != (1, heads, keys, values):
            return None
        if heads % key_heads or not beta.shape == g.shape == (1, 1, heads):
            return None
        if any(others.pop(name, False) is not value for name, value in _ALWAYS.items()):
            return None
        if any(value is not None for name, value in others.items() if name in self._asks):
            return None
        kind = key_heads, heads, keys, values
        if kind not in self._layers:
            self._layers[kind] = self._try(*kind)
        return self._layers[kind]

    def _compute(
        self,
        layer: _DeltaRuleLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        g: torch.Tensor,
        beta: torch.Tensor,
        initial_state: torch.Tensor,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the queries find [1, 1, heads, V], and the state after it."""
        given = [x.contiguous() for x in (query, key, value, g.exp(), beta)]
        output, state = torch.empty_like(given[2]), torch.empty_like(initial_state)
        addresses = (x.data_ptr() for x in (*given, initial_state, state, output))
        if self._pool.lib.moe_delta_rule(self._pool.handle, ctypes.addressof(layer), *addresses):
            raise MemoryError("no memory for a step of a recurrent state")
        return output, state

    def _try(self, key_heads: int, heads: int, keys: int, values: int) -> _DeltaRuleLayer | None:
        layer = _DeltaRuleLayer(key_heads, heads, keys, values, keys**0.5, _EPSILON)
        try:
            for args, named in _trials(key_heads, heads, keys, values):
                theirs = self._function(*args, **named, **_ALWAYS)
                if not all(map(torch.equal, self._compute(layer, *args, **named), theirs)):
                    return None
        except WANTS_MORE:
            return None
        return layer


def _trials(
    key_heads: int, heads: int, keys: int, values: int
) -> Iterator[tuple[tuple[torch.Tensor, ...], dict[str, Any]]]:
    """What the function may be given; states whose numbers are of all sizes show each order of adding up."""
    generator = torch.Generator().manual_seed(0)

    def ordinary(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=generator)

    for size in range(_TRIALS):
        query, key, value = (ordinary(1, *shape).bfloat16() for shape in ((key_heads, keys),) * 2 + ((heads, values),))
        decay, beta = (torch.rand(1, 1, heads, generator=generator) for _ in range(2))
        state = ordinary(heads, keys, values) * 10.0 ** (size * ordinary(heads, keys, values))
        yield (query, key, value), {"g": -decay, "beta": beta.bfloat16(), "initial_state": state}
