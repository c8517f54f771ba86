"""What the router chose of late, and what followed when it chose like this before.

Routing follows the text, and text repeats itself in part: a token whose layers chose much the same experts as a past
token is likely to be followed by much the same choices. Averages over time cannot see that; a search can. Pure numbers:
knows nothing of caches, of what its answers are used for, or of torch. `native_routing` computes the
same sooner.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["AHEAD", "RoutingMemory"]

Floats = NDArray[np.float64]

AHEAD = 4
"""Visits of a layer that are foreseen. More of them gain nothing (docs/experiments.md). Like the number of neighbours
and of averages, it stands in moe.h too.
"""

_WORD = 32


class RoutingMemory:
    """The choices of the last 512 tokens, and what followed those that were most like the present one.

    Likeness. `s(j)` compares the newest token t with the past token j, and the layers before with those before: for
    every layer that runs, `s(j) ← f · s(j) + (experts that both chose)`, with f = 0.1 ** (1 / layers), so the layers of
    one token ago count a tenth. From one token to the next, s(j) is what s(j - 1) was. The most that s can be, `m`,
    grows alike by the number of experts chosen. The 16 tokens with the largest s are the neighbours, of those equally
    like the newer ones; a neighbour weighs exp(10 · s(j) / m).

    A prompt counts as one step: only its last token is compared, and is the newest for every layer.

    Averages. Beside that, two averages per expert of whether it was chosen, with half-lives of 4 and 32 visits of its
    layer; every token of a prompt counts. `b` is their mean.

    Chance. `q_h` is the weighted share of the neighbours that were followed by the expert on the h-th visit of its
    layer after them, h = 1 … 4. The chance of a use h visits ahead is `p_h = (1 - a_h) · b + a_h · q_h` with
    a_h = 0.8 · 0.9 ** (h - 1), and of one on any later visit `p = 0.6 · b + 0.4 · (q_1 + … + q_4) / 4`.

    Visits. Those that are expected to pass without a use are `S_1 + S_2 + S_3 + S_4 / p` with S_h the product of
    1 - p_1 … 1 - p_h. Were all chances p, that would be 1 / p - 1, which it is as long as there is no past.

    Args:
        sizes: experts per MoE layer.
    """

    _MEMORY = 512
    _NEIGHBOURS = 16
    _SHARPNESS = 10.0
    _FADE = 0.1
    _KEEP = 0.5 ** (1 / np.array([4.0, 32.0]))
    _TRUST = 0.8 * 0.9 ** np.arange(AHEAD)[:, None, None]
    _LATER_TRUST = 0.4
    _LEAST = 1e-4

    def __init__(self, sizes: Sequence[int]) -> None:
        layers, words = len(sizes), -(-max(sizes) // _WORD)
        self.width = words * _WORD
        """Experts per layer, with room for the largest."""
        self._past = self._MEMORY - 1
        """Tokens that the newest one is compared with."""
        self._chosen = np.zeros((layers, words, 4 * self._MEMORY), dtype=np.uint32)
        """What a token chose, a bit per expert, by its place: its number less `_begin`."""
        self._words = self._chosen.reshape(-1).data
        self._newest = np.zeros(layers, dtype=np.int64)
        """The place of each layer's newest token."""
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
        if not tokens:
            return
        tokens = tokens[-self._MEMORY // 2 :]
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
            self._averages[:, layer] *= self._KEEP[:, None]
            self._averages[:, layer, experts] += 1 - self._KEEP[:, None]
        self._newest[layer] = place
        self._now, self._token = layer, token
        self._most_likeness = self._most_likeness * self._fade + len(tokens[-1])

    def averages(self, layers: Sequence[int]) -> Floats:
        """The averages of the experts of `layers` [2, layers, width], the shorter half-life first."""
        self._learn()
        averages: Floats = self._averages.take(layers, axis=1)
        return averages

    def followed(self, layers: Sequence[int]) -> Floats:
        """q_1 … q_4 of the experts of `layers` [AHEAD, layers, width]. Needs `has_past`.

        After neighbour j stands token j + h, or j + h - 1 if the layer has yet to run for t, and the newest one if
        that is not known yet.
        """
        self._learn()
        likeness = self._likeness[-self._known :]
        count = min(self._NEIGHBOURS, len(likeness))
        near = np.flatnonzero(likeness >= np.partition(likeness, -count)[-count])
        if len(near) > count:  # some are equally like
            near = near[likeness[near].argsort(kind="stable")[-count:]]
        weights = np.exp(likeness[near] * (self._SHARPNESS / max(self._most_likeness, 1.0)))
        before = self._before_newest[-self._known :].take(near, axis=0)
        places = np.maximum(self._newest.take(layers) - before[..., None], 0)
        chosen = self._unpack(self._chosen[layers, :, places].reshape(count, -1))
        shares: Floats = (weights / np.add.reduce(weights)) @ chosen
        return shares.reshape(AHEAD, len(layers), self.width)

    def visits(self, layers: Sequence[int]) -> Floats:
        """Visits of its layer that are expected to pass before an expert of `layers` is used [layers, width]."""
        shorter, longer = self.averages(layers)
        average: Floats = (shorter + longer) / 2
        if not self.has_past:
            visits: Floats = 1 / np.maximum(average, self._LEAST) - 1
            return visits
        over_average = self.followed(layers) - average
        unused = 1 - average - self._TRUST * over_average
        later = average + self._LATER_TRUST / AHEAD * np.add.reduce(over_average)
        visits = unused[-1] / np.maximum(later, self._LEAST)
        for share in unused[-2::-1]:
            visits += 1
            visits *= share
        return visits

    @property
    def _known(self) -> int:
        """Tokens that can be neighbours."""
        return min(self._token, self._past)

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
        _, words, places = self._chosen.shape
        for word in range(layer * words, (layer + 1) * words):
            self._words[word * places + place] = bits & (1 << _WORD) - 1
            bits >>= _WORD

    def _learn(self) -> None:
        """More layers ran for the newest token: how like is it now to those remembered? And what do they choose?"""
        if self._learned < self._now:
            self._learn_from(self._learned + 1, self._now + 1, self._token - self._begin)
            self._learned = self._now

    def _learn_from(self, first: int, end: int, place: int) -> None:
        """The layers from `first` to before `end` ran for the token at `place`."""
        chosen = self._chosen[first:end]
        newest = chosen[:, :, place]
        common = np.bitwise_count(chosen[:, :, place - self._past : place] & newest[:, :, None])
        for words in common:
            self._likeness *= self._fade
            for count in words:
                self._likeness += count
        averages = self._averages[:, first:end]
        averages *= self._KEEP[:, None, None]
        averages += (1 - self._KEEP[:, None, None]) * self._unpack(newest)

    def _unpack(self, words: NDArray[np.unsignedinteger]) -> NDArray[np.uint8]:
        """Words [n, words of a layer] as a 1 for every expert chosen [n, width]."""
        return np.unpackbits(words.astype("<u4").view(np.uint8), axis=1, bitorder="little")
