"""What a trace says about a model's routing: how much of it a request uses, what comes back, which requests are alike.

Pure arithmetic on recorded choices. An Expert Activation Matrix (EAM; MoE-Infinity, arXiv 2401.14361) counts, per layer
and expert, the tokens that were routed there. Knows nothing of models that run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .trace import NO_EXPERT, Trace

__all__ = ["Likeness", "Routing", "activation_matrix", "describe", "distance", "likeness", "reuse"]

Floats = NDArray[np.float64]
_WINDOWS = (1, 4, 16)


@dataclass(frozen=True, slots=True)
class Likeness:
    """Mean distance of requests' matrices within a domain and between domains, from 0 (alike) to 1."""

    within: float
    between: float


@dataclass(frozen=True, slots=True)
class Routing:
    """`used_share`: of all experts, what one request asks for, on average. `reuse`: (tokens, chance that an expert is
    asked for again within so many of the next tokens of its request), and beside it what even use would give.
    `likeness` is None without domains.
    """

    requests: int
    tokens: int
    used_share: float
    reuse: tuple[tuple[int, float], ...]
    even_reuse: tuple[tuple[int, float], ...]
    likeness: Likeness | None


def activation_matrix(trace: Trace) -> Floats:
    """Tokens of `trace` per layer and expert [layers, most experts of a layer]."""
    layers, widest = len(trace.layer_sizes), max(trace.layer_sizes)
    matrix = np.zeros((layers, widest))
    for layer in range(layers):
        chosen = trace.experts[:, layer]
        matrix[layer] = np.bincount(chosen[chosen != NO_EXPERT], minlength=widest)
    return matrix


def distance(one: Floats, other: Floats) -> float:
    """1 - the mean over layers of the cosine between the rows of two activation matrices [layers, experts]."""
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    cosines = (one * other).sum(1) / np.where(norms > 0, norms, 1)
    return float(1 - cosines.mean())


def reuse(requests: Sequence[Trace], window: int) -> float:
    """The chance that an expert which a token asks for is asked for again by one of the next `window` tokens."""
    again = asked = 0
    for request in requests:
        for layer, size in enumerate(request.layer_sizes):
            uses = np.zeros((request.num_tokens, size + 1), bool)
            np.put_along_axis(uses, request.experts[:, layer].astype(np.int64), True, axis=1)
            uses = uses[:, :size]  # NO_EXPERT marks the last column, which is nobody's
            counts = np.cumsum(np.vstack([np.zeros((1, size), np.int64), uses]), axis=0)
            last = len(uses) - window
            if last > 0:
                soon = counts[1 + window : 1 + window + last] > counts[1 : 1 + last]
                again += int((uses[:last] & soon).sum())
                asked += int(uses[:last].sum())
    return again / asked if asked else 0.0


def likeness(requests: Sequence[Trace], domains: Sequence[str]) -> Likeness | None:
    """How alike requests of one and of different `domains` (one name per request) are; None if there are no pairs of
    both kinds.
    """
    matrices = [activation_matrix(request) for request in requests]
    within: list[float] = []
    between: list[float] = []
    for place, (matrix, domain) in enumerate(zip(matrices, domains, strict=True)):
        for other, its in zip(matrices[:place], domains[:place], strict=True):
            (within if its == domain else between).append(distance(matrix, other))
    return Likeness(float(np.mean(within)), float(np.mean(between))) if within and between else None


def describe(trace: Trace, domains: Sequence[str] = ()) -> Routing:
    """All of it, for a trace of at least one token; `domains` names the kind of each request, in order, or is empty."""
    requests = list(trace.sequences())
    total = sum(trace.layer_sizes)
    used = [np.count_nonzero(activation_matrix(request)) / total for request in requests]
    chosen = np.mean([k / size for k, size in zip(trace.identity.top_k, trace.layer_sizes, strict=True)])
    return Routing(
        requests=len(requests),
        tokens=trace.num_tokens,
        used_share=float(np.mean(used)),
        reuse=tuple((window, reuse(requests, window)) for window in _WINDOWS),
        even_reuse=tuple((window, float(1 - (1 - chosen) ** window)) for window in _WINDOWS),
        likeness=likeness(requests, domains) if domains else None,
    )
