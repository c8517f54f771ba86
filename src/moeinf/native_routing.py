"""The routing memory with its loops in C (kernels/csrc/routing.c): the same neighbours, and answers that differ in the
last digits, in a tenth of the time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_double, c_int, c_int32, c_int64, c_void_p

import numpy as np

from .routing_memory import AHEAD, Floats, RoutingMemory
from .shared_library import NotNativeError, Signature, load_library

__all__ = ["NativeRoutingMemory", "make_routing_memory"]


class _Routing(ctypes.Structure):
    """`moe_routing` of moe.h."""

    _fields_ = (
        ("layers", c_int32),
        ("width", c_int32),
        ("places", c_int32),
        ("past", c_int32),
        ("chosen", c_void_p),
        ("newest", c_void_p),
        ("likeness", c_void_p),
        ("averages", c_void_p),
        ("fade", c_double),
        ("sharpness", c_double),
        ("least", c_double),
        ("later_trust", c_double),
        ("keep", c_double * len(RoutingMemory._KEEP)),
        ("trust", c_double * AHEAD),
    )


_QUESTION = (POINTER(_Routing), c_int, c_double, c_int, POINTER(c_int32), c_void_p)
_FUNCTIONS: tuple[Signature, ...] = (
    ("moe_learn", None, (POINTER(_Routing), c_int, c_int, c_int64)),
    ("moe_followed", None, _QUESTION),
    ("moe_visits", None, (*_QUESTION, c_void_p)),
)


def make_routing_memory(sizes: Sequence[int]) -> RoutingMemory:
    """A memory for a model whose MoE layers have so many experts each: native, if the library can be had."""
    try:
        return NativeRoutingMemory(sizes)
    except NotNativeError:
        return RoutingMemory(sizes)


class NativeRoutingMemory(RoutingMemory):
    """Raises NotNativeError when the library cannot be had."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._library = load_library(_FUNCTIONS)
        super().__init__(sizes)
        layers = len(sizes)
        self._shares: Floats = np.empty(AHEAD * layers * self.width)
        self._visits: Floats = np.empty((layers, self.width))
        """Where the library writes its answers."""
        self._shares_at, self._visits_at = self._shares.ctypes.data, self._visits.ctypes.data
        self._routing = _Routing(
            layers,
            self.width,
            self._chosen.shape[2],
            self._past,
            self._chosen.ctypes.data,
            self._newest.ctypes.data,
            self._likeness.ctypes.data,
            self._averages.ctypes.data,
            self._fade,
            self._SHARPNESS,
            self._LEAST,
            self._LATER_TRUST,
            tuple(self._KEEP),
            tuple(self._TRUST.ravel()),
        )

    def followed(self, layers: Sequence[int]) -> Floats:
        self._learn()
        self._library.moe_followed(*self._question(layers))
        shares = self._shares[: AHEAD * len(layers) * self.width].copy()
        return shares.reshape(AHEAD, len(layers), self.width)

    def visits(self, layers: Sequence[int]) -> Floats:
        if not self.has_past:
            return super().visits(layers)
        self._learn()
        self._library.moe_visits(*self._question(layers), self._visits_at)
        return self._visits[: len(layers)].copy()

    def _learn_from(self, first: int, end: int, place: int) -> None:
        self._library.moe_learn(self._routing, first, end, place)

    def _question(self, layers: Sequence[int]) -> tuple[object, ...]:
        numbers = (c_int32 * len(layers))(*layers)
        return self._routing, self._known, self._most_likeness, len(layers), numbers, self._shares_at
