"""Replays of recorded routing through the expert cache, without a model: what a policy would find resident.

Drives the classes that the engine drives, in the order in which it drives them, so a simulated hit rate and a measured
one agree as long as nothing is prefetched. (In a prompt the engine has a few experts on their way at once, a replay
one: that may move single experts.) Knows nothing of tensors, files or terminals.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .cache import CacheCounters, ExpertCache, Outcome
from .errors import UsageError
from .policies import POLICIES, Policy, make_policy
from .policies.belady import BeladyPolicy
from .steps import OBSERVED_TOKENS, Arrival, Step
from .trace import NO_EXPERT, Trace

__all__ = ["BELADY", "Event", "Replay", "events", "replay", "replay_all"]

BELADY = "belady"
"""The clairvoyant bound, which only a replay can have."""


class Event(NamedTuple):
    """One MoE layer of one step, experts numbered over all layers: what the tokens of the step chose, the last token
    last. `begins`: with it a request begins.
    """

    layer: int
    choices: tuple[tuple[int, ...], ...]
    is_prefill: bool
    begins: bool

    @property
    def experts(self) -> list[int]:
        """Every expert that is asked for, once, ascending."""
        return sorted(set().union(*self.choices))


@dataclass(frozen=True, slots=True)
class Replay:
    """What a replay found. `requests` and `hits` count decode only, `fraction` is slots over all experts."""

    policy: str
    slots: int
    fraction: float
    requests: int
    hits: int
    evictions: int

    @property
    def hit_rate(self) -> float:
        return self.hits / self.requests if self.requests else 0.0


def events(trace: Trace) -> Iterator[Event]:
    """The trace in the order in which a model runs: the prompt of a sequence as one step, then token by token."""
    sizes = np.array(trace.identity.layer_sizes)
    first = np.cumsum(sizes) - sizes
    for sequence in trace.sequences():
        is_empty = sequence.experts == NO_EXPERT
        experts = np.where(is_empty, NO_EXPERT, sequence.experts + first[:, None]).swapaxes(0, 1)
        has_empty, is_prefill, begins = is_empty.any(), sequence.is_prefill.tolist(), True
        for start, end in _steps(is_prefill):
            for layer, rows in enumerate(experts[:, start:end].tolist()):
                if has_empty:
                    rows = [[expert for expert in row if expert != NO_EXPERT] for row in rows]
                yield Event(layer, tuple(map(tuple, rows)), is_prefill[start], begins)
                begins = False


def replay(history: list[Event], sizes: tuple[int, ...], policy: str, slots: int) -> Replay:
    """Put `history` through a cache of `slots` that begins empty. `sizes`: experts per MoE layer.

    Raises UsageError for an unknown policy, and for fewer slots than one token asks of a layer.
    """
    fewest = max((len(row) for event in history for row in event.choices), default=1)
    if slots < fewest:
        raise UsageError(f"{slots} slots are fewer than the {fewest} experts that a layer asks for at once")
    mover = _Instantly(ExpertCache(sum(sizes), slots, _make_policy(policy, history, sizes)))
    decode, prefill = CacheCounters(), CacheCounters()
    for event in history:
        mover.cache.counters = prefill if event.is_prefill else decode
        _run(event, mover)
    return Replay(policy, slots, slots / sum(sizes), decode.requests, decode.hits, decode.evictions + prefill.evictions)


def replay_all(trace: Trace, jobs: Sequence[tuple[str, int]], processes: int) -> Iterator[Replay]:
    """The replays of `trace` for each (policy, slots) of `jobs`, in this order, some at the same time."""
    if min(processes, len(jobs)) <= 1:
        history = list(events(trace))
        yield from (replay(history, trace.identity.layer_sizes, policy, slots) for policy, slots in jobs)
        return
    with ProcessPoolExecutor(min(processes, len(jobs)), initializer=_remember, initargs=(trace,)) as pool:
        yield from pool.map(_replay_remembered, jobs)


_remembered: list[tuple[list[Event], tuple[int, ...]]] = []
"""In a process that does replays for another one: the trace they are of."""


def _remember(trace: Trace) -> None:
    _remembered[:] = [(list(events(trace)), trace.identity.layer_sizes)]


def _replay_remembered(job: tuple[str, int]) -> Replay:
    return replay(*_remembered[0], *job)


def _run(event: Event, mover: _Instantly) -> None:
    if event.begins:
        mover.cache.begin_request()
    mover.cache.observe(event.layer, event.choices[-OBSERVED_TOKENS:])
    step = Step(mover)
    if len(event.choices) == 1:
        _exhaust(step.lease(event.experts))
        _exhaust(step.arriving())
    else:
        _exhaust(step.stream(event.experts, set(event.choices[-1]), 1))
    step.end()


class _Instantly:
    """A disk that takes no time."""

    def __init__(self, cache: ExpertCache) -> None:
        self.cache = cache
        self._coming: list[int] = []

    def lease(self, key: int, *, keep: bool) -> Outcome | None:
        leased = self.cache.acquire(key, keep=keep)
        if leased is None:
            return None
        if leased[1] is Outcome.MISS:
            self._coming.append(key)
        return leased[1]

    def wait(self) -> Arrival:
        key = self._coming.pop(0)
        self.cache.arrived(key)
        return Arrival(key, 0)


def _make_policy(name: str, history: list[Event], sizes: tuple[int, ...]) -> Policy:
    if name == BELADY:
        return BeladyPolicy([event.experts for event in history], [not event.is_prefill for event in history])
    if name not in POLICIES:
        known = ", ".join(sorted([*POLICIES, BELADY]))
        raise UsageError(f"policy {name!r} is not known", hint=f"choose one of: {known}")
    return make_policy(name, sizes)


def _steps(is_prefill: list[bool]) -> Iterator[tuple[int, int]]:
    """(begin, end) of each step: a run of prompt tokens is one, every other token one of its own."""
    start = 0
    for place, prefill in enumerate(is_prefill):
        if not prefill or not is_prefill[place + 1 : place + 2] or not is_prefill[place + 1]:
            yield start, place + 1
            start = place + 1


def _exhaust(experts: Iterable[object]) -> None:
    for _ in experts:
        pass
