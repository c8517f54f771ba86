"""What followed, when the router chose like this before.

Routing follows the text, and text repeats itself in part: a token whose layers chose much the same experts as a past
token is likely to be followed by much the same choices. Averages over time cannot see that; a search can. Pure numbers:
knows nothing of caches, of what its answers are used for, or of torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["AHEAD", "RoutingMemory"]

Floats = NDArray[np.float64]

AHEAD = 4
"""Visits of a layer that are foreseen. More of them gain nothing (docs/experiments.md)."""


class RoutingMemory:
    """The choices of the last 512 tokens, and what followed those that were most like the present one.

    Likeness. `s(j)` compares the newest token t with the past token j, and the layers before with those before: for
    every layer that runs, `s(j) ← f · s(j) + (experts that both chose)`, with f = 0.1 ** (1 / layers), so the layers of
    one token ago count a tenth. From one token to the next, s(j) is what s(j - 1) was. The most that s can be, `m`,
    grows alike by the number of experts chosen. The 16 tokens with the largest s are the neighbours; a neighbour weighs
    exp(10 · s(j) / m).

    A prompt counts as one step: only its last token is compared, and is the newest for every layer.

    Args:
        sizes: experts per MoE layer.
    """

    _MEMORY = 512
    """A power of two: places of tokens are numbers modulo this."""
    _NEIGHBOURS = 16
    _SHARPNESS = 10.0
    _FADE = 0.1
    _BEFORE, _STEPS = np.array([(before, step) for before in range(AHEAD) for step in range(before, AHEAD)]).T
    _ROWS = (np.arange(_MEMORY)[:, None] - _BEFORE) % _MEMORY
    """In whose lists a new token stands, by its place: of each of the last tokens, from its own place among those that
    followed up to the last one, until others are known.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        layers = len(sizes)
        self._nobody = max(sizes)
        """Where there is no expert: fills lists that are too short."""
        self._bins = self._nobody + 1
        words = -(-self._nobody // 64)
        self._chosen = np.zeros((layers, words, self._MEMORY), dtype=np.uint64)
        """What a token chose, a bit per expert."""
        self._offsets = (self._bins * np.arange(AHEAD, dtype=np.int32))[:, None]
        self._following = np.zeros((layers, self._MEMORY, AHEAD, 0), dtype=np.int32)
        """What a token and the three after it chose: lists, the h-th of them with h · bins added."""
        self._likeness: Floats = np.zeros(self._MEMORY)
        self._most_likeness = 0.0
        self._fade = self._FADE ** (1 / layers)
        self._now = layers
        self._step = -1
        """Tokens are counted from the first ever: this is the last before this step, those are the layers' newest."""
        self._newest = [-1] * layers
        self._token = -1

    @property
    def has_past(self) -> bool:
        """Whether there is a token to compare the newest one with."""
        return self._token > 0

    def observe(self, layer: int, tokens: Sequence[Sequence[int]]) -> None:
        """`layer` has chosen for `tokens`: a list of experts (numbers within the layer) for each, the last one last.
        Layers come in order, over and over; of one with more tokens than half of the memory, the last ones are.
        """
        tokens = tokens[-self._MEMORY // 2 :]
        if not tokens:
            return
        if layer <= self._now:  # the layers start over: a new step
            self._step = self._token
            self._likeness = np.roll(self._likeness, len(tokens))
        self._now = layer
        self._newest[layer] = self._step
        for experts in tokens:
            self._remember(layer, experts)
        self._token = self._newest[layer]
        self._compare(layer, len(tokens[-1]))

    def followed(self, layer: int) -> Floats:
        """The weighted share of the neighbours whose tokens chose each expert, the h-th time that `layer` ran after
        them [AHEAD, experts]. Needs `has_past`.

        After neighbour j that is token j + h, or j + h - 1 if the layer has yet to run for t, and the newest one if
        that is not known yet.
        """
        likeness = self._likeness[: self._token + 1]
        count = min(self._NEIGHBOURS, len(likeness) - 1)
        near = likeness.argpartition(-count)[-count:]
        weights = np.exp(likeness[near] * (self._SHARPNESS / max(self._most_likeness, 1.0)))
        weights /= np.add.reduce(weights)
        has_run = self._newest[layer] == self._token
        lists = self._following[layer].take(near + has_run, axis=0, mode="wrap")
        shares = np.bincount(lists.ravel(), weights.repeat(lists[0].size), AHEAD * self._bins)
        return shares.astype(np.float64, copy=False).reshape(AHEAD, -1)[:, :-1]

    def _remember(self, layer: int, experts: Sequence[int]) -> None:
        self._newest[layer] += 1
        place = self._newest[layer] % self._MEMORY
        self._chosen[layer, :, place] = self._to_words(experts)
        listed = self._to_list(experts)
        self._following[layer][self._ROWS[place], self._STEPS] = listed + self._offsets[self._STEPS]

    def _compare(self, layer: int, num_chosen: int) -> None:
        """`layer` ran for the newest token too: how like is it now to those remembered?"""
        place = self._token % self._MEMORY
        chosen = self._chosen[layer]
        common = np.bitwise_count(chosen & chosen[:, place : place + 1])
        self._likeness *= self._fade
        self._likeness += np.add.reduce(common, axis=0, dtype=np.uint8)
        self._likeness[place] = -1.0  # itself
        self._most_likeness = self._most_likeness * self._fade + num_chosen

    def _to_words(self, experts: Sequence[int]) -> NDArray[np.uint64]:
        bits = 0
        for expert in experts:
            bits |= 1 << expert
        return np.frombuffer(bits.to_bytes(8 * self._chosen.shape[1], "little"), np.uint64)

    def _to_list(self, experts: Sequence[int]) -> NDArray[np.int32]:
        missing = self._following.shape[3] - len(experts)
        if missing < 0:
            self._widen(len(experts))
        return np.array([*experts, *[self._nobody] * missing], np.int32)

    def _widen(self, width: int) -> None:
        """Make room for lists of so many experts."""
        old = self._following
        self._following = np.empty((*old.shape[:3], width), old.dtype)
        self._following[:] = self._nobody + self._offsets
        self._following[..., : old.shape[3]] = old
