"""What followed, when the router chose like this before: a policy that learns from the tokens it has seen.

Routing follows the text, and text repeats itself in part: a token whose layers chose much the same experts as a past
token is likely to be followed by much the same choices. Averages over time cannot see that; a search can.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

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

    A prompt counts as one step: only its last token is compared, and is the newest for every layer.

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
    _KEEP = 0.5 ** (1 / np.array([[4.0], [32.0]]))
    _LEAST = 1e-4
    _OF_SHARES = np.vstack([np.diag(_SHARES), np.full(_AHEAD, _LAST_SHARE / _AHEAD)])
    _OF_AVERAGES = (1 - np.append(_SHARES, _LAST_SHARE))[:, None] / 2 * np.ones(2)
    _MIXTURE = np.hstack([_OF_SHARES, _OF_AVERAGES])
    """How much of q_1 … q_4, and of the two averages, is in p_1 … p_4 and in p."""
    _BEFORE, _STEPS = np.array([(before, step) for before in range(4) for step in range(before, 4)]).T
    _ROWS = (np.arange(_MEMORY)[:, None] - _BEFORE) % _MEMORY
    """In whose lists a new token stands, by its place: of each of the last tokens, from its own place among those that
    followed up to the last one, until others are known.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__(sizes)
        self._nobody = max(sizes)
        """Where there is no expert: fills lists that are too short."""
        self._bins = self._nobody + 1
        words = -(-self._nobody // 64)
        self._chosen = np.zeros((self._layers, words, self._MEMORY), dtype=np.uint64)
        """What a token chose, a bit per expert."""
        self._offsets = (self._bins * np.arange(self._AHEAD, dtype=np.int32))[:, None]
        self._following = np.zeros((self._layers, self._MEMORY, self._AHEAD, 0), dtype=np.int32)
        """What a token and the three after it chose: lists, the h-th of them with h · bins added."""
        self._chances = np.zeros((self._layers, self._AHEAD + 2, self._bins))
        """Shares q_1 … q_4, as they were last asked for, and the two averages."""
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
        self._compare(layer, len(choices[-1]))

    def learn(self, layer: int, experts: list[int]) -> None:
        self._newest[layer] += 1
        place = self._newest[layer] % self._MEMORY
        self._chosen[layer, :, place] = self._to_words(experts)
        rows = self._ROWS[place]
        self._following[layer][rows, self._STEPS] = self._to_list(experts) + self._offsets[self._STEPS]
        averages = self._chances[layer, self._AHEAD :]
        averages *= self._KEEP
        averages += (1 - self._KEEP) * np.bincount(experts, minlength=self._bins)

    def ranks(self, layer: int) -> Floats:
        return self._layers * self._wait(layer)

    def _compare(self, layer: int, num_chosen: int) -> None:
        """`layer` ran for the newest token too: how like is it now to those remembered?"""
        place = self._token % self._MEMORY
        chosen = self._chosen[layer]
        common = np.bitwise_count(chosen & chosen[:, place : place + 1])
        self._likeness *= self._fade
        self._likeness += np.add.reduce(common, axis=0, dtype=np.uint8)
        self._likeness[place] = -1.0  # itself
        self._most_likeness = self._most_likeness * self._fade + num_chosen

    def _wait(self, layer: int) -> Floats:
        """Visits of `layer` expected to pass before each of its experts is used."""
        if self._token <= 0:  # nothing to compare with
            average = self._chances[layer, self._AHEAD :].mean(axis=0)[:-1]
            first: Floats = 1 / np.maximum(average, self._LEAST) - 1
            return first
        self._chances[layer, : self._AHEAD] = self._followed(layer)
        chances = self._MIXTURE @ self._chances[layer, :, :-1]
        unused = np.multiply.accumulate(1 - chances[:-1])
        unused[-1] /= np.maximum(chances[-1], self._LEAST)
        wait: Floats = np.add.reduce(unused)
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
        has_run = self._newest[layer] == self._token
        lists = self._following[layer].take(near + has_run, axis=0, mode="wrap")
        shares = np.bincount(lists.ravel(), weights.repeat(lists[0].size), self._AHEAD * self._bins)
        return shares.reshape(self._AHEAD, -1)

    def _to_words(self, experts: list[int]) -> NDArray[np.uint64]:
        bits = 0
        for expert in experts:
            bits |= 1 << expert
        return np.frombuffer(bits.to_bytes(8 * self._chosen.shape[1], "little"), np.uint64)

    def _to_list(self, experts: list[int]) -> NDArray[np.int32]:
        missing = self._following.shape[3] - len(experts)
        if missing < 0:
            self._widen(len(experts))
        return np.array(experts + [self._nobody] * missing, np.int32)

    def _widen(self, width: int) -> None:
        """Make room for lists of so many experts."""
        old = self._following
        self._following = np.empty((*old.shape[:3], width), old.dtype)
        self._following[:] = self._nobody + self._offsets
        self._following[..., : old.shape[3]] = old
