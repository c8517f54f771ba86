"""What the router chose of late, and what followed when it chose like this before.

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

    Averages. Beside that, two averages per expert of whether it was chosen, with half-lives of 4 and 32 visits of its
    layer; every token of a prompt counts.

    Args:
        sizes: experts per MoE layer.
    """

    _MEMORY = 512
    _NEIGHBOURS = 16
    _SHARPNESS = 10.0
    _FADE = 0.1
    _KEEP = 0.5 ** (1 / np.array([[[4.0]], [[32.0]]]))
    _GAIN = 1 - _KEEP

    def __init__(self, sizes: Sequence[int]) -> None:
        layers = len(sizes)
        self._bits = next((bits for bits in (8, 16, 32) if max(sizes) <= bits), 64)
        words = -(-max(sizes) // self._bits)
        self.width = words * self._bits
        """Experts per layer, with room for the largest."""
        self._past = self._MEMORY - 1
        """Tokens that the newest one is compared with."""
        self._chosen = np.zeros((layers, words, 4 * self._MEMORY), dtype=f"<u{self._bits // 8}")
        """What a token chose, a bit per expert, by its place: its number less `_begin`."""
        self._flat = self._chosen.reshape(-1)
        self._rows = self._chosen.shape[2] * np.arange(layers * words).reshape(layers, words)
        self._newest = self._rows.copy()
        """Where in `_flat` the words of each layer's newest token are."""
        self._begin = -self._past
        self._likeness: Floats = np.zeros(self._past)
        """s, of the oldest token first: a token further on, each place is that of the next token, as it should be."""
        self._most_likeness = 0.0
        self._fades: Floats = self._FADE ** (np.arange(layers + 1) / layers)
        """f to the power of 0, 1 … layers."""
        self._fades_of_words = self._fades[:-1][::-1].repeat(words)
        between = np.arange(self._past)[::-1, None]
        self._before_newest = np.maximum(between - np.arange(AHEAD), 0)
        """How long before the newest choice of a layer stands what followed, by the neighbour's place in `_likeness`;
        the newest one where that is not known yet [past, AHEAD].
        """
        self._averages: Floats = np.zeros((len(self._KEEP), layers, self.width))
        self._learned = self._now = layers - 1
        """The last layer whose newest choice is in `_likeness` and `_averages`, and the last one that ran: what some
        layers chose is learned at once.
        """
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
        token = (self._token if layer <= self._now else self._step) + len(tokens)
        if layer != self._now + 1 or token != self._token:
            self._learn()
            self._learned = layer - 1
        if layer <= self._now:  # the layers start over: a new step
            self._step = self._token
            self._make_room()
        place = self._step - self._begin
        for experts in tokens:
            place += 1
            self._remember(layer, place, experts)
        for experts in tokens[:-1]:
            self._averages[:, layer] *= self._KEEP[:, 0]
            self._averages[:, layer, experts] += self._GAIN[:, 0]
        self._newest[layer] = self._rows[layer] + place
        self._now, self._token = layer, token
        self._most_likeness = self._most_likeness * float(self._fades[1]) + len(tokens[-1])

    def averages(self, layers: Sequence[int]) -> Floats:
        """The averages of the experts of `layers` [2, layers, width], the shorter half-life first."""
        self._learn()
        averages: Floats = self._averages.take(layers, axis=1)
        return averages

    def followed(self, layers: Sequence[int]) -> Floats:
        """The weighted share of the neighbours whose tokens chose each expert of `layers`, the h-th time that its layer
        ran after them [AHEAD, layers, width]. Needs `has_past`.

        After neighbour j that is token j + h, or j + h - 1 if the layer has yet to run for t, and the newest one if
        that is not known yet.
        """
        self._learn()
        unknown = max(self._past - self._token, 0)
        likeness = self._likeness[unknown:]
        count = min(self._NEIGHBOURS, len(likeness))
        near = likeness.argpartition(-count)[-count:]
        weights = np.exp(likeness[near] * (self._SHARPNESS / max(self._most_likeness, 1.0)))
        before = self._before_newest[unknown:].take(near, axis=0)
        words = self._flat.take(self._newest.take(layers, axis=0) - before[..., None, None], mode="clip")
        chosen = self._unpack(words.reshape(count, -1))
        shares: Floats = (weights / np.add.reduce(weights)) @ chosen
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
        for number, word in enumerate(self._chosen[layer]):
            word[place] = bits >> self._bits * number & (1 << self._bits) - 1

    def _learn(self) -> None:
        """More layers ran for the newest token: how like is it now to those remembered? And what do they choose?"""
        layers = slice(self._learned + 1, self._now + 1)
        chosen = self._chosen[layers]
        if not len(chosen):
            return
        place = self._token - self._begin
        newest = chosen[:, :, place]
        common = np.bitwise_count(chosen[:, :, place - self._past : place] & newest[:, :, None])
        common = common.reshape(-1, self._past)
        self._likeness *= self._fades[len(chosen)]
        self._likeness += self._fades_of_words[-len(common) :] @ common
        averages = self._averages[:, layers]
        averages *= self._KEEP
        averages += self._GAIN * self._unpack(newest)
        self._learned = self._now

    def _unpack(self, words: NDArray[np.unsignedinteger]) -> NDArray[np.uint8]:
        """Words [n, words of a layer] as a 1 for every expert chosen [n, width]."""
        return np.unpackbits(words.copy().view(np.uint8), axis=1, bitorder="little")
