"""Policies that know which layer an expert belongs to, and when that layer runs next.

The layers of a model run in a circle, so it is known how long each must wait for its turn. A policy here gives every
expert of a layer a rank, the higher the sooner it goes; an expert's score is its rank plus the layers until its own
layer runs. Ranks of a layer change only when that layer runs, so they are kept, and what is resident of a layer is kept
in their order; a victim is the best of the layers' first: a few operations, whatever the number of experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from moeinf.collection import ActivationCollection, RequestCounter

__all__ = [
    "ActivationPolicy",
    "CollectionPolicy",
    "ExpectedUsePolicy",
    "LayerLruPolicy",
    "LayeredLruPolicy",
    "LayeredPolicy",
    "LeastStalePolicy",
    "LfruPolicy",
    "LfuPolicy",
]

Floats = NDArray[np.float64]

_NEVER = -np.inf
_FAR = 1e6
"""More layers than anything waits for: ranks in these steps are told apart before the wait is."""


class LayeredPolicy(ABC):
    """What is resident of each layer, in the order of its ranks. `sizes`: experts per MoE layer.

    A layer is `_outdated` from when it runs until somebody asks for a victim: then its experts are ranked anew, as soon
    as there are `_TOGETHER` such layers.
    """

    _TOGETHER = 1

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = sizes
        self._layers = len(sizes)
        self._first = [sum(sizes[:layer]) for layer in range(self._layers)]
        self._layer_of = [layer for layer, size in enumerate(sizes) for _ in range(size)]
        self._shape = (self._layers, max(sizes))
        self._ranks = [0.0] * sum(sizes)
        self._residents: list[list[tuple[float, int]]] = [[] for _ in sizes]
        """(-rank, expert) of what is resident of each layer, the first to go first."""
        self._passing: dict[int, None] = {}
        self._turns = list(range(self._layers))
        """When each layer runs next, counted in layers from the beginning of the present token."""
        self._scores = [_NEVER] * self._layers
        """The rank of the first to go of each layer, and its turn: more than its wait by the same for all of them."""
        self._outdated = set(range(self._layers))
        self._now = 0

    @abstractmethod
    def ranks(self, layers: list[int]) -> Floats:
        """Rank of every expert of `layers` [layers, experts], in layers: the higher, the sooner it goes."""

    @abstractmethod
    def learn(self, layer: int, tokens: list[list[int]]) -> None:
        """`layer` ran for one token or more, and chose these experts (numbers within the layer) for each of them."""

    def begin_request(self) -> None:  # noqa: B027  # most policies learn on
        pass

    def observe(self, layer: int, choices: Sequence[Sequence[int]]) -> None:
        first = self._first[layer]
        self._take_turn(layer)
        self.learn(layer, [[expert - first for expert in experts] for experts in choices])
        self._outdated.add(layer)

    def insert(self, expert: int, *, keep: bool) -> None:
        if keep:
            self._set_resident(expert, True)
        else:
            self._passing[expert] = None

    def use(self, expert: int) -> None:
        if expert in self._passing:
            del self._passing[expert]
            self._set_resident(expert, True)

    def remove(self, expert: int) -> None:
        if expert in self._passing:
            del self._passing[expert]
        else:
            self._set_resident(expert, False)

    def victim(self, is_leased: Callable[[int], bool]) -> int | None:
        for expert in self._passing:
            if not is_leased(expert):
                return expert
        if len(self._outdated) >= min(self._TOGETHER, self._layers):
            self._rank_anew(sorted(self._outdated))
            self._outdated.clear()
        scores = self._scores
        free: dict[int, int] = {}
        while (best := max(scores)) > _NEVER:
            layer = scores.index(best)
            if layer in free:
                return free[layer]
            residents = self._residents[layer]
            if not is_leased(residents[0][1]):
                return residents[0][1]
            if not free:
                scores = scores.copy()
            order, free[layer] = next((each for each in residents if not is_leased(each[1])), (-_NEVER, -1))
            scores[layer] = self._turns[layer] - order
        return None

    def _take_turn(self, layer: int) -> None:
        """`layer` runs, and next time only after all others."""
        moved = range(layer, layer + 1)
        if layer != self._now + 1:  # the layers start over
            self._turns = [other + self._layers * (other < layer) for other in range(self._layers)]
            moved = range(self._layers)
        self._now = layer
        self._turns[layer] = layer + self._layers
        for other in moved:
            self._score_first(other)

    def _rank_anew(self, layers: list[int]) -> None:
        for layer, ranks in zip(layers, self.ranks(layers).tolist(), strict=True):
            first = self._first[layer]
            self._ranks[first : first + self._sizes[layer]] = ranks[: self._sizes[layer]]
            self._residents[layer] = sorted([(-ranks[expert - first], expert) for _, expert in self._residents[layer]])
            self._score_first(layer)

    def _set_resident(self, expert: int, is_resident: bool) -> None:
        layer = self._layer_of[expert]
        residents, entry = self._residents[layer], (-self._ranks[expert], expert)
        place = bisect_left(residents, entry)
        if is_resident:
            residents.insert(place, entry)
        else:
            del residents[place]
        if place == 0:
            self._score_first(layer)

    def _score_first(self, layer: int) -> None:
        residents = self._residents[layer]
        self._scores[layer] = self._turns[layer] - residents[0][0] if residents else _NEVER


class _Recency(LayeredPolicy):
    """Remembers for every expert when it was last chosen, on one of two clocks: visits of its own layer, or tokens."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__(sizes)
        self._token = 0
        self._visits: Floats = np.zeros(self._layers)
        self._last_token = np.zeros(self._shape)
        self._last_visit = np.zeros(self._shape)

    def observe(self, layer: int, choices: Sequence[Sequence[int]]) -> None:
        if layer <= self._now:  # the layers start over: a new token
            self._token += 1
        super().observe(layer, choices)

    def learn(self, layer: int, tokens: list[list[int]]) -> None:
        for experts in tokens:
            self._visits[layer] += 1
            self._last_token[layer, experts] = self._token
            self._last_visit[layer, experts] = self._visits[layer]


class LayerLruPolicy(_Recency):
    """LRU by token: the expert that was not used for the most tokens; of those, the one whose layer is due latest."""

    def ranks(self, layers: list[int]) -> Floats:
        ranks: Floats = -_FAR * self._last_token[layers]
        return ranks


class LayeredLruPolicy(_Recency):
    """LLRU (Angelopoulos et al., arXiv 2509.02408): the expert that sat out the most visits of its own layer; of those,
    the one whose layer is due latest.
    """

    def ranks(self, layers: list[int]) -> Floats:
        ranks: Floats = _FAR * (self._visits[layers, None] - self._last_visit[layers])
        return ranks


class LeastStalePolicy(_Recency):
    """After SpecMD (arXiv 2602.03921), as we read it: what the present token has used stays; of the others, which are
    stale, the one whose layer is due latest goes first, however long ago it was used.
    """

    def observe(self, layer: int, choices: Sequence[Sequence[int]]) -> None:
        before = self._token
        super().observe(layer, choices)
        if self._token != before:
            self._outdated.update(range(self._layers))

    def ranks(self, layers: list[int]) -> Floats:
        ranks: Floats = np.where(self._last_token[layers] < self._token, _FAR, 0.0)
        return ranks


class LfuPolicy(LayeredPolicy):
    """Least frequently used, with ageing: a use counts half after 256 tokens. Lifetime counts do worse than chance."""

    _KEEP = 0.5 ** (1 / 256)

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__(sizes)
        self._uses = np.zeros(self._shape)

    def learn(self, layer: int, tokens: list[list[int]]) -> None:
        for experts in tokens:
            self._uses[layer] *= self._KEEP
            self._uses[layer, experts] += 1

    def ranks(self, layers: list[int]) -> Floats:
        ranks: Floats = -_FAR * self._uses[layers]
        return ranks


class LfruPolicy(_Recency):
    """Frequency over recency: the fewest uses so far per visit of its layer since the last of them."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__(sizes)
        self._uses = np.zeros(self._shape)

    def learn(self, layer: int, tokens: list[list[int]]) -> None:
        super().learn(layer, tokens)
        for experts in tokens:
            self._uses[layer, experts] += 1

    def ranks(self, layers: list[int]) -> Floats:
        ranks: Floats = -_FAR * self._uses[layers] / (self._visits[layers, None] - self._last_visit[layers] + 1)
        return ranks


class ActivationPolicy(LayeredPolicy):
    """MoE-Infinity's eviction (arXiv 2401.14361, section 5) from the request's own activation matrix: the smallest
    (p + ε) · (1 - layer / layers), p being the expert's share of what its layer chose in this request.
    """

    _EPSILON = 1e-3

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__(sizes)
        self._matrix = np.zeros(self._shape)

    def begin_request(self) -> None:
        self._matrix[:] = 0
        self._outdated.update(range(self._layers))

    def learn(self, layer: int, tokens: list[list[int]]) -> None:
        for experts in tokens:
            self._matrix[layer, experts] += 1

    def shares(self, layers: list[int]) -> Floats:
        """p of every expert of `layers` [layers, experts]."""
        rows = self._matrix[layers]
        shares: Floats = rows / np.maximum(rows.sum(axis=1, keepdims=True), 1.0)
        return shares

    def ranks(self, layers: list[int]) -> Floats:
        depth = np.array(layers)[:, None] / self._layers
        ranks: Floats = -_FAR * (self.shares(layers) + self._EPSILON) * (1 - depth)
        return ranks


class CollectionPolicy(ActivationPolicy):
    """MoE-Infinity's eviction with its prediction: p is what the past requests most like this one chose; where none is
    much like it, what this one did.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__(sizes)
        self._sizes = sizes
        self.begin_with(ActivationCollection(sizes))

    def begin_with(self, collection: ActivationCollection) -> None:
        self._counter = RequestCounter(self._sizes, ActivationCollection(self._sizes, collection.matrices.copy()))

    def begin_request(self) -> None:
        super().begin_request()
        self._counter.begin_request()

    def learn(self, layer: int, tokens: list[list[int]]) -> None:
        super().learn(layer, tokens)
        experts = [expert for chosen in tokens for expert in chosen]
        self._counter.count(layer, experts, len(tokens), is_prefill=len(tokens) > 1)

    def shares(self, layers: list[int]) -> Floats:
        shares = np.zeros((len(layers), self._shape[1]))
        for row, layer in zip(shares, layers, strict=True):
            row[: self._sizes[layer]] = self._counter.expected_shares(layer)
        return shares


class ExpectedUsePolicy(LayeredPolicy):
    """Belady's rule with an estimate in place of the future: the expert whose next use is the most layers away.

    It is used when its layer runs with probability p, so that is expected to happen after (layers until its layer runs)
    + layers · (1/p - 1). p is a mixture of two averages of past choices, with half-lives of 6 and 64 tokens.
    """

    _WEIGHTS = np.array((0.7, 0.3))
    _KEEP = 0.5 ** (1 / np.array([[6.0], [64.0]]))
    _LEAST = 1e-4

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__(sizes)
        self._averages = np.zeros((self._layers, len(self._WEIGHTS), max(sizes)))

    def learn(self, layer: int, tokens: list[list[int]]) -> None:
        averages = self._averages[layer]
        for experts in tokens:
            averages *= self._KEEP
            averages[:, experts] += 1 - self._KEEP

    def ranks(self, layers: list[int]) -> Floats:
        chance = self._WEIGHTS @ self._averages[layers]
        ranks: Floats = self._layers / np.maximum(chance, self._LEAST) - self._layers
        return ranks
