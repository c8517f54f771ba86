"""Statistics of routing, from traces alone: which experts a text uses, how it is told from others, what a cache hits.

A trace is an array [tokens, layers, top-k] of expert numbers. An *EAM* (expert activation matrix) counts, per layer,
how often a text chose each expert. Knows nothing about models.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "belady_hit_rate",
    "dead_experts",
    "distances",
    "domain_accuracy",
    "eam",
    "eam_distance",
    "events",
    "lru_hit_rate",
    "relative_loads",
    "reuse",
]

Trace = NDArray[np.int64]
Eam = NDArray[np.float64]
Event = tuple[int, ...]
"""The experts that one token asks of one layer, numbered over all layers."""


def eam(trace: Trace, experts: int) -> Eam:
    """Counts of choices [layers, experts]."""
    return np.stack([np.bincount(layer.ravel(), minlength=experts) for layer in np.moveaxis(trace, 1, 0)]).astype(float)


def _unit_rows(counts: Eam) -> Eam:
    unit: Eam = counts / np.linalg.norm(counts, axis=-1, keepdims=True)
    return unit


def eam_distance(one: Eam, other: Eam) -> float:
    """1 - the cosine of two EAMs' rows, averaged over layers."""
    return float(1 - (_unit_rows(one) * _unit_rows(other)).sum(-1).mean())


def distances(eams: Mapping[str, Sequence[Eam]]) -> tuple[float, float]:
    """Mean EAM distance of two texts of one domain, and of two texts of different domains."""
    within = [eam_distance(*pair) for texts in eams.values() for pair in itertools.combinations(texts, 2)]
    between = [
        eam_distance(one, other)
        for first, second in itertools.combinations(eams.values(), 2)
        for one, other in itertools.product(first, second)
    ]
    return float(np.mean(within)), float(np.mean(between))


def domain_accuracy(calibration: Mapping[str, Sequence[Eam]], evaluation: Mapping[str, Sequence[Eam]]) -> float:
    """Share of evaluation texts that are nearest to the centroid of their own domain's calibration texts."""
    centroids = {name: np.mean([_unit_rows(text) for text in texts], axis=0) for name, texts in calibration.items()}
    told = [
        min(centroids, key=lambda other: eam_distance(text, centroids[other])) == name
        for name, texts in evaluation.items()
        for text in texts
    ]
    return float(np.mean(told))


def relative_loads(eams: Mapping[str, Sequence[Eam]]) -> Eam:
    """Load of each expert [layers, experts] over the mean of its layer, every domain with equal weight."""
    shares = np.mean([np.sum(texts, axis=0) / np.sum(texts, axis=(0, 2))[:, None] for texts in eams.values()], axis=0)
    loads: Eam = shares * shares.shape[1]
    return loads


def dead_experts(loads: Eam, threshold: float = 0.05) -> int:
    """Experts with less than `threshold` of the mean load of their layer."""
    return int((loads < threshold).sum())


def reuse(traces: Sequence[Trace]) -> float:
    """Probability that an expert chosen for a token is chosen again, in the same layer, for the next token."""
    shares = [(trace[:-1, :, :, None] == trace[1:, :, None, :]).any(-1).mean() for trace in traces]
    return float(np.mean(shares))


def events(traces: Sequence[Trace], experts: int) -> list[Event]:
    """Requests in the order of decoding: token after token, layer after layer."""
    offsets = np.arange(traces[0].shape[1])[:, None] * experts
    return [tuple(step) for trace in traces for token in trace + offsets for step in token.tolist()]


def lru_hit_rate(requests: Sequence[Event], slots: int) -> float:
    """Share of expert requests that a cache of `slots` experts holds, when the least recently used one is evicted.

    The experts of an event are looked up together, then the missing ones are brought in; none of them is a victim.
    """
    cache: OrderedDict[int, None] = OrderedDict()
    hits = asked = 0
    for event in requests:
        missing = [expert for expert in event if expert not in cache]
        hits += len(event) - len(missing)
        asked += len(event)
        for expert in event:
            if expert in cache:
                cache.move_to_end(expert)
        for expert in missing:
            if len(cache) >= slots:
                cache.popitem(last=False)
            cache[expert] = None
    return hits / asked


def belady_hit_rate(requests: Sequence[Event], slots: int) -> float:
    """The same with the victim whose next use is farthest away, which no policy can know."""
    next_uses: dict[int, int] = {}
    farthest: list[tuple[int, int]] = []  # (-next use, expert); entries that are out of date are skipped
    hits = asked = 0
    for event, upcoming in zip(requests, _next_uses(requests), strict=True):
        missing = [expert for expert in event if expert not in next_uses]
        hits += len(event) - len(missing)
        asked += len(event)
        held = set(event)
        for _ in range(len(next_uses) + len(missing) - slots):
            del next_uses[_farthest(farthest, next_uses, held)]
        for expert, use in zip(event, upcoming, strict=True):
            next_uses[expert] = use
            heapq.heappush(farthest, (-use, expert))
    return hits / asked


def _farthest(heap: list[tuple[int, int]], next_uses: Mapping[int, int], held: set[int]) -> int:
    """Take the resident expert with the farthest next use, none of `held`, from the heap."""
    while True:
        use, expert = heapq.heappop(heap)
        if expert not in held and next_uses.get(expert) == -use:
            return expert


def _next_uses(requests: Sequence[Event]) -> Iterator[tuple[int, ...]]:
    """For each event and expert the number of the event that asks for the expert next."""
    seen: dict[int, int] = {}
    answers: list[tuple[int, ...]] = []
    for number in range(len(requests) - 1, -1, -1):
        answers.append(tuple(seen.get(expert, len(requests)) for expert in requests[number]))
        seen.update(dict.fromkeys(requests[number], number))
    return reversed(answers)
