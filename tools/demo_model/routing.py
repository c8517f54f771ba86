"""Statistics of routing, from traces alone: which experts a text uses, and how it is told from others.

A trace is an array [tokens, layers, top-k] of expert numbers. An *EAM* (expert activation matrix) counts, per layer,
how often a text chose each expert. Knows nothing about models; what a cache hits, moeinf.simulate knows.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from moeinf.analysis import distance
from moeinf.simulate import Event

__all__ = [
    "dead_experts",
    "distances",
    "domain_accuracy",
    "eam",
    "events",
    "relative_loads",
    "reuse",
]

Trace = NDArray[np.int64]
Eam = NDArray[np.float64]


def eam(trace: Trace, experts: int) -> Eam:
    """Counts of choices [layers, experts]."""
    return np.stack([np.bincount(layer.ravel(), minlength=experts) for layer in np.moveaxis(trace, 1, 0)]).astype(float)


def _unit_rows(counts: Eam) -> Eam:
    unit: Eam = counts / np.linalg.norm(counts, axis=-1, keepdims=True)
    return unit


def distances(eams: Mapping[str, Sequence[Eam]]) -> tuple[float, float]:
    """Mean EAM distance of two texts of one domain, and of two texts of different domains."""
    within = [distance(*pair) for texts in eams.values() for pair in itertools.combinations(texts, 2)]
    between = [
        distance(one, other)
        for first, second in itertools.combinations(eams.values(), 2)
        for one, other in itertools.product(first, second)
    ]
    return float(np.mean(within)), float(np.mean(between))


def domain_accuracy(calibration: Mapping[str, Sequence[Eam]], evaluation: Mapping[str, Sequence[Eam]]) -> float:
    """Share of evaluation texts that are nearest to the centroid of their own domain's calibration texts."""
    centroids = {name: np.mean([_unit_rows(text) for text in texts], axis=0) for name, texts in calibration.items()}
    told = [
        min(centroids, key=lambda other: distance(text, centroids[other])) == name
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
    """Every token of every trace as if it were decoded: token after token, layer after layer."""
    offsets = np.arange(traces[0].shape[1])[:, None] * experts
    return [
        Event(layer, (tuple(chosen),), is_prefill=False, begins=number == layer == 0)
        for trace in traces
        for number, token in enumerate((trace + offsets).tolist())
        for layer, chosen in enumerate(token)
    ]
