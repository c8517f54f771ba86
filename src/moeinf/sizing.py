"""How many experts to keep in memory: replays of a trace at several sizes, and the size that they recommend.

Owns the choice of sizes and of how much of a trace is replayed. Knows nothing of terminals, files or pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from .policies import POLICIES
from .progress import NO_PROGRESS, Progress
from .settings import DEFAULT_POLICY
from .simulate import BELADY, Replay, events, replay, replay_all
from .trace import NO_EXPERT, Trace, concatenate

__all__ = ["GOOD_HIT_RATE", "REPLAYED_USES", "Advice", "Sizing", "find_size", "ranked", "shorten", "slots_of"]

GOOD_HIT_RATE = 0.9
"""What the recommended size is to reach: beyond it, each expert more buys little."""
REPLAYED_USES = 200_000
"""A trace that asks for more experts is replayed in part: this much takes a minute or two."""
_SHARES = (0.05, 0.1, 0.15, 0.25, 0.35, 0.5, 0.75)
_TRIES = 6


@dataclass(frozen=True, slots=True)
class Advice:
    """The recommended size: the smallest found at which the default policy reaches GOOD_HIT_RATE, or where none does,
    what all experts would find; and what half of it would give. Both were replayed.

    `size_bytes` and `half_bytes` are of experts; the other two are read from disk per decoded token.
    """

    at: Replay
    at_half: Replay
    size_bytes: int
    half_bytes: int
    read_bytes_per_token: float
    half_read_bytes_per_token: float

    @property
    def is_good(self) -> bool:
        return self.at.hit_rate >= GOOD_HIT_RATE


@dataclass(frozen=True, slots=True)
class Sizing:
    """Replays of every policy at the same sizes, of `requests` of the trace's `all_requests` with `decoded_tokens`.
    `advice` is None where nothing was decoded.
    """

    requests: int
    all_requests: int
    decoded_tokens: int
    replays: tuple[Replay, ...]
    advice: Advice | None


def find_size(
    trace: Trace,
    expert_bytes: int,
    *,
    processes: int = 1,
    progress: Progress = NO_PROGRESS,
    most_uses: int = REPLAYED_USES,
) -> Sizing:
    """Replay `trace`, of at least one token, with every policy, and recommend a size; an expert takes `expert_bytes`.

    Of a trace that asks for more than `most_uses` experts a part is replayed, see `shorten`.
    """
    part = shorten(trace, most_uses)
    sizes = sorted({slots_of(trace, share) for share in _SHARES})
    jobs = [(policy, slots) for policy in (BELADY, *sorted(POLICIES)) for slots in sizes]
    replays = []
    with progress.task(f"replay {trace.identity.model}", len(jobs), "replays") as task:
        for found in replay_all(part, jobs, processes):
            replays.append(found)
            task.advance(1)
    decoded = int((~part.is_prefill).sum())
    return Sizing(
        requests=len(np.unique(part.sequence_id)),
        all_requests=len(np.unique(trace.sequence_id)),
        decoded_tokens=decoded,
        replays=tuple(replays),
        advice=_advise(part, replays, expert_bytes, decoded) if decoded else None,
    )


def slots_of(trace: Trace, share: float) -> int:
    """So much of all experts, though never fewer than one layer asks for at once."""
    return max(trace.identity.width, round(sum(trace.layer_sizes) * share))


def ranked(replays: Sequence[Replay]) -> list[str]:
    """The policies that were replayed: what knows the future first, then by mean hit rate, best first."""
    rates: dict[str, list[float]] = {}
    for found in replays:
        rates.setdefault(found.policy, []).append(found.hit_rate)
    return sorted(rates, key=lambda policy: (policy != BELADY, -float(np.mean(rates[policy])), policy))


def shorten(trace: Trace, most_uses: int) -> Trace:
    """`trace`, or if it asks for more than `most_uses` experts, evenly spaced whole requests that together ask for
    about as many at most; the last one may be cut, its prompt first.
    """
    uses = int(np.count_nonzero(trace.experts != NO_EXPERT))
    if uses <= most_uses:
        return trace
    room = max(1, trace.num_tokens * most_uses // uses)
    kept: list[Trace] = []
    for request in list(trace.sequences())[:: -(-uses // most_uses)]:
        kept.append(_last_tokens(request, room))
        room -= kept[-1].num_tokens
        if not room:
            break
    return concatenate(kept)


def _last_tokens(request: Trace, tokens: int) -> Trace:
    """The answer, or so much of it, behind as much of the prompt as there is room for."""
    prompt = int(np.count_nonzero(request.is_prefill))
    begin = max(0, prompt - max(0, tokens - (request.num_tokens - prompt)))
    part = slice(begin, begin + tokens)
    weights = None if request.weights is None else request.weights[part]
    foreseen = None if request.foreseen is None else request.foreseen[part]
    rows = (request.sequence_id[part], request.position[part], request.is_prefill[part])
    return Trace(request.identity, request.experts[part], weights, *rows, foreseen)


def _advise(part: Trace, replays: Sequence[Replay], expert_bytes: int, tokens: int) -> Advice:
    history, sizes = list(events(part)), part.layer_sizes
    run = partial(replay, history, sizes, DEFAULT_POLICY)
    known = [one for one in replays if one.policy == DEFAULT_POLICY]
    found = _smallest_good(known, run, part.identity.width, sum(sizes))
    half = run(max(part.identity.width, found.slots // 2))
    read, half_read = ((one.requests - one.hits) * expert_bytes / tokens for one in (found, half))
    return Advice(found, half, found.slots * expert_bytes, half.slots * expert_bytes, read, half_read)


def _smallest_good(known: Sequence[Replay], run: Callable[[int], Replay], fewest: int, most: int) -> Replay:
    """The replay at the smallest size from `fewest` to `most` that is good, or finds as much as `most`.

    Between the largest size that is too small and the smallest that is not, a straight line says which to try next, and
    every other time the middle, lest one end never moves.
    """
    everything = run(most)
    goal = min(GOOD_HIT_RATE, everything.hit_rate)
    low = max((one for one in known if one.hit_rate < goal), key=_slots, default=None) or run(fewest)
    if low.hit_rate >= goal:
        return low
    high = min((one for one in known if one.slots > low.slots), key=_slots, default=everything)
    for attempt in range(_TRIES):
        gap = high.slots - low.slots
        if gap <= 1:
            break
        rise = 0.5 if attempt % 2 else (goal - low.hit_rate) / (high.hit_rate - low.hit_rate)
        tried = run(low.slots + min(max(round(gap * rise), 1), gap - 1))
        low, high = (low, tried) if tried.hit_rate >= goal else (tried, high)
    return high


def _slots(found: Replay) -> int:
    return found.slots
