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

_BITS = 64


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
    _NEIGHBOURS = 16
    _SHARPNESS = 10.0
    _FADE = 0.1

    def __init__(self, sizes: Sequence[int]) -> None:
        layers = len(sizes)
        words = -(-max(sizes) // _BITS)
        self.width = words * _BITS
        """Experts per layer, with room for the largest."""
        self._past = self._MEMORY - 1
        """Tokens that the newest one is compared with."""
        self._chosen = np.zeros((layers, words, 4 * self._MEMORY), dtype="<u8")
        """What a token chose, a bit per expert, by its place: its number less `_begin`."""
        self._flat = self._chosen.reshape(-1)
        self._rows = self._chosen.shape[2] * np.arange(layers * words).reshape(layers, words)
        self._newest = self._rows.copy()
        """Where in `_flat` the words of each layer's newest token are."""
        self._begin = -self._past
        self._likeness: Floats = np.zeros(self._past)
        """s, of the oldest token first: a token further on, each place is that of the next token, as it should be."""
        self._most_likeness = 0.0
        self._fade = self._FADE ** (1 / layers)
        between = np.arange(self._past)[::-1, None]
        self._before_newest = np.maximum(between - np.arange(AHEAD), 0)
        """How long before the newest choice of a layer stands what followed, by the neighbour's place in `_likeness`;
        the newest one where that is not known yet [past, AHEAD].
        """
        self._now = layers
        self._step = self._token = -1
        """The last token before this step, and the newest of all. Tokens are counted from the first ever."""

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
            self._make_room()
        self._now = layer
        place = self._step - self._begin
        for experts in tokens:
            place += 1
            self._remember(layer, place, experts)
        self._newest[layer] = self._rows[layer] + place
        self._token = place + self._begin
        self._compare(layer, place, len(tokens[-1]))

    def followed(self, layers: Sequence[int]) -> Floats:
        """The weighted share of the neighbours whose tokens chose each expert of `layers`, the h-th time that its layer
        ran after them [AHEAD, layers, width]. Needs `has_past`.

        After neighbour j that is token j + h, or j + h - 1 if the layer has yet to run for t, and the newest one if
        that is not known yet.
        """
        unknown = max(self._past - self._token, 0)
        likeness = self._likeness[unknown:]
        count = min(self._NEIGHBOURS, len(likeness))
        near = likeness.argpartition(-count)[-count:]
        weights = np.exp(likeness[near] * (self._SHARPNESS / max(self._most_likeness, 1.0)))
        before = self._before_newest[unknown:].take(near, axis=0)
        words = self._flat.take(self._newest.take(layers, axis=0) - before[..., None, None], mode="clip")
        bits = np.unpackbits(words.view(np.uint8).reshape(count, -1), axis=1, bitorder="little")
        shares: Floats = (weights / np.add.reduce(weights)) @ bits
        return shares.reshape(AHEAD, len(layers), self.width)

    def _make_room(self) -> None:
        """Forget tokens that are too old, when a step might not find a place behind the newest."""
        begin = self._token - self._past
        if self._token - self._begin + self._MEMORY >= self._chosen.shape[2]:
            kept = self._chosen[:, :, begin - self._begin : self._token - self._begin + 1].copy()
            self._chosen[:] = 0
            self._chosen[:, :, : kept.shape[2]] = kept
            self._newest -= begin - self._begin
            self._begin = begin

    def _remember(self, layer: int, place: int, experts: Sequence[int]) -> None:
        bits = 0
        for expert in experts:
            bits |= 1 << expert
        chosen = self._chosen[layer]
        for number, word in enumerate(chosen):
            word[place] = bits >> _BITS * number & (1 << _BITS) - 1

    def _compare(self, layer: int, place: int, num_chosen: int) -> None:
        """`layer` ran for the newest token too: how like is it now to those remembered?"""
        chosen = self._chosen[layer]
        common = np.bitwise_count(chosen[:, place - self._past : place] & chosen[:, place : place + 1])
        self._likeness *= self._fade
        self._likeness += common[0] if len(common) == 1 else np.add.reduce(common, axis=0, dtype=np.uint8)
        self._most_likeness = self._most_likeness * self._fade + num_chosen
