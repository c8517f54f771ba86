"""What the runs of `bench` say together: medians with their spread, the bounds on the time per token and on the hit
rate, how near they are.

Pure arithmetic on what `worker` and `rates` measured. Times in seconds, sizes in bytes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from .rates import Rates
from .simulate import BELADY, events, replay
from .systems import Counts, Run
from .trace import Trace

__all__ = ["Bound", "Measured", "Score", "Spread", "belady_hit_rate", "bound_of", "mark_same_tokens"]


@dataclass(frozen=True, slots=True)
class Spread:
    """Of the repetitions."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        found = sorted(values)
        return cls(statistics.median(found), found[0], found[-1])


@dataclass(frozen=True, slots=True)
class Bound:
    """No engine can decode a token faster: what it has to read, at the rate at which that can be read."""

    tpot_s: float
    by: Literal["disk", "host"]


@dataclass(frozen=True, slots=True)
class Measured:
    """One run, the rates around it, and the hit rate of Belady's rule for what it asked for."""

    run: Run
    rates: Rates = field(default_factory=Rates)
    belady: float | None = None

    @property
    def tpot_s(self) -> float:
        return statistics.mean(self.run.token_s)


@dataclass(slots=True)
class Score:
    """All repetitions of one system in one setting. `error` is why there are none, or no more.

    `start` is `cold` (nothing was answered before) or `warm` (as many other prompts were). `limit` bounds all that the
    process holds; `budget` is what of that moeinf divides.
    """

    system: str
    label: str
    start: str
    experts: str | None
    policy: str | None
    prefetch: str | None
    budget: int
    limit: int
    expert_bytes: int
    runs: list[Measured] = field(default_factory=list)
    error: str = ""
    same_tokens: bool | None = None

    def spread(self, of: Callable[[Measured], float]) -> Spread | None:
        return Spread.of(map(of, self.runs)) if self.runs else None

    @property
    def ttft_s(self) -> Spread | None:
        return self.spread(lambda one: statistics.median(one.run.ttft_s))

    @property
    def tpot_s(self) -> Spread | None:
        return self.spread(lambda one: one.tpot_s)

    @property
    def decode_tokens_per_s(self) -> Spread | None:
        return self.spread(lambda one: 1 / one.tpot_s)

    @property
    def prefill_tokens_per_s(self) -> Spread | None:
        return self.spread(lambda one: one.run.prompt_tokens / sum(one.run.ttft_s))

    @property
    def peak_rss(self) -> int:
        return max((one.run.peak_rss for one in self.runs), default=0)

    def token_s(self, share: float) -> float | None:
        """The time within which this share of all tokens came."""
        times = sorted(time for one in self.runs for time in one.run.token_s)
        return times[max(0, math.ceil(share * len(times)) - 1)] if times else None

    def per_token(self, name: str) -> float | None:
        """One of `systems.Counts` per decoded token: the median of the repetitions."""
        values = [
            getattr(one.run.counts, name) / len(one.run.token_s) for one in self.runs if one.run.counts is not None
        ]
        return statistics.median(values) if values else None

    @property
    def hit_rate(self) -> float | None:
        counts = [one.run.counts for one in self.runs if one.run.counts is not None]
        return statistics.median(one.hits / one.requests for one in counts) if counts else None

    @property
    def belady_hit_rate(self) -> float | None:
        """That of a cache as large that knows the future."""
        found = [one.belady for one in self.runs if one.belady is not None]
        return statistics.median(found) if found else None

    @property
    def belady_share(self) -> float | None:
        """The hit rate over Belady's: 1 for a cache that evicts as well as can be."""
        return self.hit_rate / self.belady_hit_rate if self.hit_rate is not None and self.belady_hit_rate else None

    def bounds(self) -> list[tuple[Bound, float]]:
        """Of each repetition, where it is known: the bound, and its share of what was measured."""
        found = [(bound_of(one, self.expert_bytes), one.tpot_s) for one in self.runs]
        return [(bound, bound.tpot_s / tpot_s) for bound, tpot_s in found if bound is not None]

    @property
    def bound(self) -> Bound | None:
        """That of the repetition in the middle."""
        found = sorted((bound for bound, _ in self.bounds()), key=lambda bound: bound.tpot_s)
        return found[len(found) // 2] if found else None

    @property
    def eta(self) -> float | None:
        found = [share for _, share in self.bounds()]
        return statistics.median(found) if found else None

    def to_dict(self) -> dict[str, Any]:
        """As JSON shows it; what a system does not tell is None."""
        spreads = ("ttft_s", "tpot_s", "decode_tokens_per_s", "prefill_tokens_per_s")
        last = self.runs[-1].run.counts if self.runs else None
        return {
            **{name: getattr(self, name) for name in ("system", "label", "start", "experts", "policy", "prefetch")},
            **{name: getattr(self, name) for name in ("budget", "limit", "error", "same_tokens")},
            "repetitions": len(self.runs),
            **{name: asdict(spread) if (spread := getattr(self, name)) else None for name in spreads},
            "token_s": {"p50": self.token_s(0.5), "p95": self.token_s(0.95)},
            **{name: getattr(self, name) for name in ("hit_rate", "belady_hit_rate", "belady_share")},
            "bytes_per_token": {"missed": self.per_token("missed_bytes"), "read": self.per_token("read_bytes")},
            "stall_s_per_token": self.per_token("stall_s"),
            "peak_rss": self.peak_rss or None,
            "bound": asdict(self.bound) if self.bound else None,
            "eta": self.eta,
            "rates": [asdict(one.rates) for one in self.runs],
            "last": asdict(last) if last else None,
        }


def belady_hit_rate(routing: Trace, warm_up: int, counts: Counts) -> float | None:
    """The hit rate of `counts.slots` slots that begin empty and evict by Belady's rule, over the requests of `routing`
    behind the first `warm_up`, which fill the cache and do not count. None if these are not what was counted.
    """
    history, begun = [], 0
    for event in events(routing):
        begun += event.begins
        history.append(event._replace(is_prefill=event.is_prefill or begun <= warm_up))  # its hits do not count then
    found = replay(history, routing.layer_sizes, BELADY, counts.slots)
    return found.hit_rate if found.requests == counts.requests else None


def bound_of(one: Measured, expert_bytes: int) -> Bound | None:
    """max((dense + hits) / memory rate, missed / disk rate), per token; None if a rate that counts is not known."""
    counts, steps = one.run.counts, len(one.run.token_s)
    if counts is None or one.rates.memory is None or (counts.missed_bytes and one.rates.disk is None):
        return None
    host_s = (counts.token_bytes + counts.hits * expert_bytes / steps) / one.rates.memory
    disk_s = counts.missed_bytes / steps / one.rates.disk if one.rates.disk else 0.0
    return Bound(disk_s, "disk") if disk_s > host_s else Bound(host_s, "host")


def mark_same_tokens(scores: Sequence[Score]) -> bool:
    """Say of each score whether all its repetitions gave the tokens of transformers, or of the first system if
    transformers alone was not run; and of all together.
    """
    measured = [score for score in scores if score.runs]
    others = [score for score in measured if score.system in ("transformers", "mmap", "accelerate")]
    reference = (others or measured)[0].runs[0].run.tokens if measured else []
    for score in measured:
        score.same_tokens = all(one.run.tokens == reference for one in score.runs)
    return all(score.same_tokens for score in measured)
