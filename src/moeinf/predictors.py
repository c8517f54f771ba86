"""Which experts the next layer will ask for: guesses, for the prefetcher to act on.

A predictor sees what the model does and names experts. It owns no bytes and moves none, and being wrong costs time,
never a different output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from .collection import RequestCounter
from .native_routing import make_routing_memory
from .routing_memory import RoutingMemory

__all__ = ["CombinedPredictor", "EamPredictor", "NoPredictor", "Predictor"]


Added = Callable[[], torch.Tensor]
"""Works out what experts of a layer have added to a token's state."""


class Predictor(Protocol):
    """What the prefetcher asks of a predictor. Experts are numbers within their layer."""

    def observe(self, layer: int, tokens: Sequence[Sequence[int]]) -> None:
        """MoE layer `layer` has chosen experts for `tokens`, a list for each, the last one last. Of a long prompt only
        the last tokens are told.
        """

    def predict(self, layer: int, added: Added | None = None) -> list[int]:
        """Experts that the MoE layer which runs after `layer` may choose for the one token that is in `layer` now, the
        likeliest first; after the last layer, what the first one may choose for the next token, and before the first,
        as layer -1, for the token that has just entered the model. Empty where it cannot tell. `added` gives what
        experts of `layer` have added so far [1, H], if there are any.
        """


class NoPredictor:
    """Names nothing: nothing is prefetched."""

    def observe(self, layer: int, tokens: Sequence[Sequence[int]]) -> None:
        pass

    def predict(self, layer: int, added: Added | None = None) -> list[int]:
        return []


class EamPredictor:
    """Matches activation matrices: what this token and this request have chosen so far, with those of the past.

    The chance of an expert is 0.8 of what followed the past tokens that chose most alike (`RoutingMemory`), whose
    matrices have one token each, and 0.2 of what the past requests most like this one used (`RequestCounter`; after
    MoE-Infinity, arXiv 2401.14361). Experts of a chance of 0.35 and more are named: on recorded routing about 0.6 of
    those that were not in the cache were then asked for (docs/experiments.md).

    Args:
        sizes: experts per MoE layer.
        top_k: experts per token and layer.
        counter: counts the present request; somebody else has it count.
        memory: remembers tokens, and somebody else has it observe them; without, it has its own.
    """

    _LEAST_CHANCE = 0.35
    _MEMORY_SHARE = 0.8

    def __init__(
        self, sizes: Sequence[int], top_k: Sequence[int], counter: RequestCounter, memory: RoutingMemory | None = None
    ) -> None:
        self._memory = memory or make_routing_memory(sizes)
        self._feeds_memory = memory is None
        self._sizes = sizes
        self._top_k = top_k
        self._counter = counter

    def observe(self, layer: int, tokens: Sequence[Sequence[int]]) -> None:
        if self._feeds_memory:
            self._memory.observe(layer, tokens)

    def predict(self, layer: int, added: Added | None = None) -> list[int]:
        if layer < 0 or not self._memory.has_past:
            return []
        following = (layer + 1) % len(self._sizes)
        next_time = self._memory.followed([following])[0, 0, : self._sizes[following]]
        shares = self._counter.expected_shares(following)
        chances = self._MEMORY_SHARE * next_time + (1 - self._MEMORY_SHARE) * self._top_k[following] * shares
        named = np.flatnonzero(chances >= self._LEAST_CHANCE)
        experts: list[int] = named[np.argsort(-chances[named], kind="stable")].tolist()
        return experts


class CombinedPredictor:
    """Asks one predictor, and where it cannot tell, another, which observes what was chosen without its help."""

    def __init__(self, first: Predictor, second: Predictor) -> None:
        self._first = first
        self._second = second

    def observe(self, layer: int, tokens: Sequence[Sequence[int]]) -> None:
        self._first.observe(layer, tokens)

    def predict(self, layer: int, added: Added | None = None) -> list[int]:
        return self._first.predict(layer, added) or self._second.predict(layer)
