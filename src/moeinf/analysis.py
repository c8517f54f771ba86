"""What a trace says about a model's routing: how much of it a request uses, what comes back, what can be foreseen, and
which requests and domains are alike.

Pure arithmetic on recorded choices. An Expert Activation Matrix (EAM; MoE-Infinity, arXiv 2401.14361) counts, per layer
and expert, the tokens that were routed there. Knows nothing of models that run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .trace import NO_EXPERT, Trace

__all__ = [
    "Domains",
    "Likeness",
    "Predictability",
    "Routing",
    "activation_matrix",
    "compare_domains",
    "describe",
    "distance",
    "foreseen_share",
    "predictability",
    "reuse",
    "shares",
]

Floats = NDArray[np.float64]
_WINDOWS = (1, 4, 16)
_JUDGED_TOKENS = 20_000
"""Predictions are made for so many tokens, evenly spaced, where there are more: enough for three digits."""


@dataclass(frozen=True, slots=True)
class Likeness:
    """Mean distance of requests' matrices within a domain and between domains, from 0 (alike) to 1."""

    within: float
    between: float


@dataclass(frozen=True, slots=True)
class Predictability:
    """Of the experts that a layer chooses for a token, the share that is among the k that somebody named, k being what
    the layer asks for per token (recall at k).

    `own` names those that the request used most so far, `previous` those of the token before, and `chance` any;
    `tokens` were judged so. `router` is the layer's own, asked one MoE layer early, where that was recorded.
    """

    own: float
    previous: float
    chance: float
    tokens: int
    router: float | None = None


@dataclass(frozen=True, slots=True)
class Routing:
    """`used_share`: of all experts, what one request asks for, on average. `reuse`: (tokens, chance that an expert is
    asked for again within so many of the next tokens of its request), and beside it what even use would give, for as
    many tokens as some request has. `predictability` is None if no request has two tokens, `likeness` if no two
    requests of a domain and of different ones can be compared.
    """

    requests: int
    tokens: int
    used_share: float
    reuse: tuple[tuple[int, float], ...]
    even_reuse: tuple[tuple[int, float], ...]
    predictability: Predictability | None
    likeness: Likeness | None


@dataclass(frozen=True, slots=True, eq=False)
class Domains:
    """What tells domains apart, sorted by name.

    `requests` of each; `activation` [domains, layers, most experts of a layer], the share of a layer's choices that an
    expert has; `distances` [domains, domains], the mean over pairs of requests, a request never being paired with
    itself, and nan where there is no pair.
    """

    names: tuple[str, ...]
    requests: tuple[int, ...]
    activation: Floats
    distances: Floats

    @property
    def likeness(self) -> Likeness | None:
        """The mean over all pairs of one domain, and of two; None if there are none of either kind."""
        pairs = np.outer(self.requests, self.requests) - np.diag(self.requests)
        is_same = np.eye(len(self.names), dtype=bool)
        if not pairs[is_same].any() or not pairs[~is_same].any():
            return None
        weighted = np.nan_to_num(self.distances) * pairs
        means = [float(weighted[which].sum() / pairs[which].sum()) for which in (is_same, ~is_same)]
        return Likeness(*means)

    @property
    def others(self) -> tuple[float, ...]:
        """Of each, the mean distance of its requests from those of all other domains; nan if there is one domain."""
        weights = np.where(np.eye(len(self.names)), 0.0, np.array(self.requests))
        distances = np.where(weights > 0, self.distances, 0)
        totals = weights.sum(1)
        means = np.where(totals > 0, _over((distances * weights).sum(1), totals), np.nan)
        return tuple(means.tolist())

    def largest(self, count: int) -> Domains:
        """Those `count` domains that have the most requests."""
        kept = sorted(np.argsort(-np.array(self.requests), kind="stable")[:count].tolist())
        return Domains(
            tuple(self.names[place] for place in kept),
            tuple(self.requests[place] for place in kept),
            self.activation[kept],
            self.distances[np.ix_(kept, kept)],
        )


def activation_matrix(trace: Trace) -> Floats:
    """Tokens of `trace` per layer and expert [layers, most experts of a layer]."""
    layers, widest = len(trace.layer_sizes), max(trace.layer_sizes)
    numbered = trace.experts + np.arange(layers, dtype=np.int64)[:, None] * widest
    counts = np.bincount(numbered[trace.experts != NO_EXPERT], minlength=layers * widest)
    return counts.reshape(layers, widest).astype(np.float64)


def shares(matrices: Floats) -> Floats:
    """Of each layer's choices, those that fell on each expert; activation matrices [..., layers, experts]."""
    return _over(matrices, matrices.sum(-1, keepdims=True))


def distance(one: Floats, other: Floats) -> float:
    """1 - the mean over layers of the cosine between the rows of two activation matrices [layers, experts]."""
    return float(1 - (_directions(one) * _directions(other)).sum(1).mean())


def reuse(requests: Sequence[Trace], window: int) -> float:
    """The chance that an expert which a token asks for is asked for again by one of the next `window` tokens."""
    again = asked = 0
    for request in requests:
        last = request.num_tokens - window
        for layer in range(len(request.layer_sizes) if last > 0 else 0):
            uses = _uses(request, layer)
            counts = np.vstack([np.zeros_like(uses[:1], np.int32), np.cumsum(uses, axis=0, dtype=np.int32)])
            soon = counts[1 + window : 1 + window + last] > counts[1 : 1 + last]
            again += int((uses[:last] & soon).sum())
            asked += int(uses[:last].sum())
    return again / asked if asked else 0.0


def predictability(requests: Sequence[Trace]) -> Predictability | None:
    """How well the experts of a token can be named from what its request used before; None where nothing was before.

    Of experts that were used equally often, the one of the lower number is named.
    """
    spacing = max(1, -(-sum(request.num_tokens for request in requests) // _JUDGED_TOKENS))
    own = previous = asked = tokens = begin = 0
    chance = 0.0
    for request in requests:
        judged = np.arange(-begin % spacing, request.num_tokens, spacing)
        judged = judged[judged > 0]
        begin += request.num_tokens
        tokens += len(judged)
        for layer, (size, k) in enumerate(zip(request.layer_sizes, request.identity.top_k, strict=True)):
            uses = _uses(request, layer)
            before, chosen = judged - 1, uses[judged]
            counts = np.cumsum(uses, axis=0, dtype=np.int32)[before]
            rank = counts.astype(np.int64) * size - np.arange(size)
            named = rank >= np.partition(rank, size - k, axis=1)[:, size - k, None]
            own += int((chosen & named).sum())
            previous += int((chosen & uses[before]).sum())
            asked += int(chosen.sum())
            chance += int(chosen.sum()) * k / size
    if not asked:
        return None
    return Predictability(own / asked, previous / asked, chance / asked, tokens, foreseen_share(requests))


def foreseen_share(requests: Sequence[Trace]) -> float | None:
    """Of the experts that layers chose whose routers were asked a layer early, the share that was named; None if none
    was asked. The first layer, which has none before it, does not count.
    """
    right = asked = 0
    for request in requests:
        if request.foreseen is None:
            continue
        foreseen, chosen = request.foreseen[:, 1:], request.experts[:, 1:]
        was_asked = (foreseen != NO_EXPERT).any(axis=2)
        is_named = (foreseen[..., None, :] == chosen[..., None]).any(axis=3)
        is_chosen = chosen != NO_EXPERT
        right += int((is_named & is_chosen)[was_asked].sum())
        asked += int(is_chosen[was_asked].sum())
    return right / asked if asked else None


def compare_domains(requests: Sequence[Trace], domains: Sequence[str]) -> Domains:
    """What tells the `domains` of requests apart, one name per request; there is at least one request.

    Sums of directions stand for all pairs, so the time grows with the number of requests, not with its square.
    """
    names = tuple(sorted(set(domains)))
    first = activation_matrix(requests[0])
    counts, directions = np.zeros((2, len(names), *first.shape))
    members, with_itself = np.zeros((2, len(names)))
    for request, domain in zip(requests, domains, strict=True):
        place, matrix = names.index(domain), activation_matrix(request)
        direction = _directions(matrix)
        counts[place] += matrix
        directions[place] += direction
        members[place] += 1
        with_itself[place] += (direction**2).sum()
    flat = directions.reshape(len(names), -1)
    cosines = (flat @ flat.T - np.diag(with_itself)) / len(first)
    pairs = np.outer(members, members) - np.diag(members)
    distances = np.where(pairs > 0, np.clip(1 - _over(cosines, pairs), 0, 1), np.nan)
    return Domains(names, tuple(members.astype(int).tolist()), shares(counts), distances)


def describe(trace: Trace, domains: Sequence[str] = ()) -> Routing:
    """The numbers, for a trace of at least one token; `domains` names the kind of each request, in order, or is
    empty.
    """
    requests = list(trace.sequences())
    longest = max(request.num_tokens for request in requests)
    windows = [window for window in _WINDOWS if window < longest]
    total = sum(trace.layer_sizes)
    used = [np.count_nonzero(activation_matrix(request)) / total for request in requests]
    chosen = np.mean([k / size for k, size in zip(trace.identity.top_k, trace.layer_sizes, strict=True)])
    return Routing(
        requests=len(requests),
        tokens=trace.num_tokens,
        used_share=float(np.mean(used)),
        reuse=tuple((window, reuse(requests, window)) for window in windows),
        even_reuse=tuple((window, float(1 - (1 - chosen) ** window)) for window in windows),
        predictability=predictability(requests),
        likeness=compare_domains(requests, domains).likeness if domains else None,
    )


def _uses(request: Trace, layer: int) -> NDArray[np.bool_]:
    """Which tokens asked for which experts of a layer [tokens, experts]."""
    size = request.layer_sizes[layer]
    uses = np.zeros((request.num_tokens, size + 1), bool)
    np.put_along_axis(uses, request.experts[:, layer].astype(np.int64), True, axis=1)
    return uses[:, :size]  # NO_EXPERT marks the last column, which is nobody's


def _directions(matrix: Floats) -> Floats:
    """The rows at length 1; those of zeros stay zeros."""
    return _over(matrix, np.linalg.norm(matrix, axis=-1, keepdims=True))


def _over(values: Floats, by: Floats) -> Floats:
    return values / np.where(by > 0, by, 1)
