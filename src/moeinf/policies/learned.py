"""What followed, when the router chose like this before: a policy that learns from the tokens it has seen.

Routing follows the text, and text repeats itself in part: a token whose layers chose much the same experts as a past
token is likely to be followed by much the same choices. Averages over time cannot see that; a search can.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .layered import Floats, LayeredPolicy

__all__ = ["NeighbourUsePolicy"]


class NeighbourUsePolicy(LayeredPolicy):
    """Expected use, where the next few tokens are foreseen from what followed the past tokens most like this one.

    Likeness. `s(j)` compares the newest token t with the past token j, and the layers before with those before: for
    every layer that runs, `s(j) ← f · s(j) + (experts that both chose)`, with f = 0.1 ** (1 / layers), so the layers of
    one token ago count a tenth. From one token to the next, s(j) is what s(j - 1) was. The most that s can be, `m`,
    grows alike by the number of experts chosen. The 16 of the last 512 tokens with the largest s are the neighbours; a
    neighbour weighs exp(10 · s(j) / m).

    Chance. `q_h` is the weighted share of the neighbours whose token at the h-th visit ahead chose the expert in this
    layer, h = 1 … 4: that is token j + h, or j + h - 1 if the layer has yet to run for t, and the layer's last one if
    that is not yet known. `b` is the mean of two averages of past choices, with half-lives of 4 and 32 tokens. The
    chance of a use h visits ahead is `p_h = (1 - a_h) · b + a_h · q_h` with a_h = 0.8 · 0.9 ** (h - 1), and of one on
    any later visit `p = 0.6 · b + 0.4 · (q_1 + … + q_4) / 4`.

    Every token is taken to choose as many experts; where one chooses fewer, "nobody" is one more expert that tokens may
    have in common. A prompt counts as one step: only its last token is compared, and is the newest for every layer.

    Rank. The visits that are expected to pass without a use, `S_1 + S_2 + S_3 + S_4 / p` with S_h the product of
    1 - p_1 … 1 - p_h, each worth as many layers as there are. Were all chances p, that would be `expected-use`.
    """

    _MEMORY = 512
    """A power of two: places of tokens are numbers modulo this."""
    _NEIGHBOURS = 16
    _AHEAD = 4
    _SHARPNESS = 10.0
    _FADE = 0.1
    _SHARES = 0.8 * 0.9 ** np.arange(_AHEAD)
    _LAST_SHARE = 0.4
    _KEEP = tuple(0.5 ** (1 / half_life) for half_life in (4, 32))
    _LEAST = 1e-4
    _LAGS = np.maximum(np.arange(_MEMORY)[:, None] - np.arange(1, _AHEAD + 1), 0)
    """How long before its newest token a layer ran for the one that followed, by the neighbour's age and the step."""
    _OF_SHARES = np.vstack([np.diag(_SHARES), np.full(_AHEAD, _LAST_SHARE / _AHEAD)])
    _OF_AVERAGES = (1 - np.append(_SHARES, _LAST_SHARE))[:, None] / len(_KEEP) * np.ones(len(_KEEP))
    """How much of q_1 … q_4, and of the averages, is in p_1 … p_4 and in p."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__(sizes)
        self._nobody = max(sizes)
        """Where there is no expert: fills lists that are too short."""
        bins = self._nobody + 1
        self._averages = np.zeros((self._layers, len(self._KEEP), bins))
        self._chosen = np.zeros((self._layers, bins, self._MEMORY), dtype=np.uint8)
        self._lists = np.full((self._layers, self._MEMORY, 1), self._nobody)
        self._offsets = bins * np.arange(self._AHEAD)[:, None]
        self._ranks = np.zeros((self._layers, self._nobody))
        self._is_ranked = [False] * self._layers
        self._likeness: Floats = np.zeros(self._MEMORY)
        self._most_likeness = 0.0
        self._fade = self._FADE ** (1 / self._layers)
        self._step = -1
        """Tokens are counted from the first ever: this is the last before this step, those are the layers' newest."""
        self._newest = [-1] * self._layers
        self._token = -1

    def observe(self, layer: int, choices: Sequence[Sequence[int]]) -> None:
        if not choices:
            return
        choices = choices[-self._MEMORY // 2 :]
        if layer <= self._now:  # the layers start over: a new step
            self._step = self._token
            self._likeness = np.roll(self._likeness, len(choices))
        self._newest[layer] = self._step
        super().observe(layer, choices)
        self._token = self._newest[layer]
        self._compare(layer)
        self._is_ranked[layer] = False

    def learn(self, layer: int, experts: list[int]) -> None:
        self._newest[layer] += 1
        place = self._newest[layer] % self._MEMORY
        missing = len(experts) - self._lists.shape[2]
        if missing > 0:
            self._lists = np.pad(self._lists, ((0, 0), (0, 0), (0, missing)), constant_values=self._nobody)
        listed = self._lists[layer, place]
        listed[: len(experts)] = experts
        listed[len(experts) :] = self._nobody
        chosen = self._chosen[layer]
        chosen[:, place] = 0
        chosen[listed, place] = 1
        for average, keep in zip(self._averages[layer], self._KEEP, strict=True):
            average *= keep
            average[listed] += 1 - keep

    def ranks(self, layer: int) -> Floats:
        ranks: Floats = self._ranks[layer]
        if not self._is_ranked[layer]:
            ranks[:] = self._layers * self._wait(layer)
            self._is_ranked[layer] = True
        return ranks

    def _compare(self, layer: int) -> None:
        """`layer` ran for the newest token too: how like is it now to those remembered?"""
        place = self._token % self._MEMORY
        listed = self._lists[layer, place]
        self._likeness *= self._fade
        self._likeness += np.add.reduce(self._chosen[layer][listed], axis=0, dtype=np.uint8)
        self._likeness[place] = -1.0  # itself
        self._most_likeness = self._most_likeness * self._fade + len(listed)

    def _wait(self, layer: int) -> Floats:
        """Visits of `layer` expected to pass before each of its experts is used."""
        if self._token <= 0:  # nothing to compare with
            wait: Floats = 1 / np.maximum(self._averages[layer].mean(axis=0)[:-1], self._LEAST) - 1
            return wait
        chances = self._OF_SHARES @ self._followed(layer)
        chances += self._OF_AVERAGES @ self._averages[layer]
        chances = chances[:, :-1]
        unused = 1 - chances
        wait = unused[-2] / np.maximum(chances[-1], self._LEAST)
        for step in range(self._AHEAD - 2, -1, -1):
            wait += 1
            wait *= unused[step]
        return wait

    def _followed(self, layer: int) -> Floats:
        """The weighted share of the neighbours that chose each expert of `layer` when it ran next, and next but one,
        and so on [visits ahead, experts and nobody].
        """
        likeness = self._likeness[: self._token + 1]
        count = min(self._NEIGHBOURS, len(likeness) - 1)
        near = likeness.argpartition(-count)[-count:]
        weights = np.exp(likeness[near] * (self._SHARPNESS / max(self._most_likeness, 1.0)))
        weights /= np.add.reduce(weights)
        ages = (self._token - near) & (self._MEMORY - 1)
        places = (self._newest[layer] - self._LAGS[ages]) & (self._MEMORY - 1)
        bins = self._lists[layer][places] + self._offsets
        size = self._AHEAD * (self._nobody + 1)
        shares = np.bincount(bins.ravel(), weights.repeat(bins[0].size), size).astype(np.float64, copy=False)
        return shares.reshape(self._AHEAD, -1)
