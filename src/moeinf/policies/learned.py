"""What followed, when the router chose like this before: a policy that learns from the tokens it has seen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moeinf.routing_memory import AHEAD, RoutingMemory

from .layered import Floats, LayeredPolicy

__all__ = ["NeighbourUsePolicy"]


class NeighbourUsePolicy(LayeredPolicy):
    """Expected use, where the next few tokens are foreseen from what followed the past tokens most like this one.

    Chance. `q_h` is what `RoutingMemory` expects for the h-th visit ahead of the expert's layer, h = 1 … 4. `b` is the
    mean of two averages of past choices, with half-lives of 4 and 32 tokens. The chance of a use h visits ahead is
    `p_h = (1 - a_h) · b + a_h · q_h` with a_h = 0.8 · 0.9 ** (h - 1), and of one on any later visit
    `p = 0.6 · b + 0.4 · (q_1 + … + q_4) / 4`.

    Rank. The visits that are expected to pass without a use, `S_1 + S_2 + S_3 + S_4 / p` with S_h the product of
    1 - p_1 … 1 - p_h, each worth as many layers as there are. Were all chances p, that would be `expected-use`. Layers
    that have run are ranked two at a time at least, which is one search for both (docs/experiments.md).

    `memory` is there for others to ask too.
    """

    _SHARES = 0.8 * 0.9 ** np.arange(AHEAD)
    _LAST_SHARE = 0.4
    _LEAST = 1e-4
    _TOGETHER = 2
    _OF_SHARES = np.vstack([np.diag(_SHARES), np.full(AHEAD, _LAST_SHARE / AHEAD)])
    _OF_AVERAGES = (1 - np.append(_SHARES, _LAST_SHARE))[:, None] / 2 * np.ones(2)
    _MIXTURE = np.hstack([_OF_SHARES, _OF_AVERAGES])
    """How much of q_1 … q_4, and of the two averages, is in p_1 … p_4 and in p."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__(sizes)
        self.memory = RoutingMemory(sizes)

    def learn(self, layer: int, tokens: list[list[int]]) -> None:
        self.memory.observe(layer, tokens)

    def ranks(self, layers: list[int]) -> Floats:
        """Visits of its layer expected to pass before an expert is used, in layers."""
        averages = self.memory.averages(layers)
        if not self.memory.has_past:
            first: Floats = self._layers / np.maximum(averages.mean(axis=0), self._LEAST) - self._layers
            return first[:, : self._shape[1]]
        chances = np.concatenate((self.memory.followed(layers), averages))
        mixed = self._MIXTURE @ chances.reshape(len(chances), -1)
        unused = 1 - mixed[:-1]
        visits = unused[-1] / np.maximum(mixed[-1], self._LEAST)
        for share in unused[-2::-1]:
            visits += 1
            visits *= share
        ranks: Floats = self._layers * visits
        return ranks.reshape(len(layers), -1)[:, : self._shape[1]]
