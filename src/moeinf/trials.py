"""Which of several ways to foresee experts costs least, found by trying them in turn.

What a way costs is measured, not assumed: the time of whole tokens, of which reads of wrong guesses take their part,
too. How many experts a token misses says nearly all of how long it takes (docs/experiments.md), so tokens are compared
as if all had missed as many. Knows nothing of what the ways do.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["Trials"]

_LEAST_TRIAL_TOKENS = 4
_TRIAL_TOKENS = 6
_MOST_TRIAL_TOKENS = 18
"""So many tokens go each of two ways before the better is chosen: the least where each of its tokens took less than any
of the other's, the few where the difference is plain all the same, the most where ways are close.
"""
_FIRST_LOOK_TOKENS = 3
_HOPELESS = 1.2
"""After the first few, a way is out each of whose tokens took so many times as long as the slowest of another."""
_SETTLED_TOKENS = 256
_MOST_SETTLED_TOKENS = 4096
"""So many go the best way before all are tried again, since text, cache and machine may have changed by then; and twice
as many each time that it is the best again.
"""
_LEAST_ASKS = 4
"""The first asks are slower than those that follow: a way is judged by its fastest after so many."""


@dataclass(slots=True)
class _Account:
    """What one way has cost: each of its tokens (seconds, experts missed), the waiting in all their layers, and the
    fastest that it foresaw.
    """

    tokens: list[tuple[float, int]] = field(default_factory=list)
    layers: int = 0
    stalled_s: float = 0.0
    fastest_s: float = float("inf")


class Trials:
    """Chooses among `ways`, of which the first foresees nothing, and the others stand in the order of what is thought
    of them; it changes its mind between tokens only.

    The first way and another take turns, token by token, so that both meet the same text and the same cache. If the
    other loses, it is the next one's turn. One that spends more on foreseeing than all the waiting without it cannot
    win, and is out at once; one that is far behind, after a few tokens.

    Args:
        known: the way that was best before, which is then gone first for as long as one that was found now.
    """

    def __init__(self, ways: Sequence[str], known: str = "") -> None:
        self.way = ways[0]
        """The one to go now."""
        self._ways = ways
        self._best = ""
        self._patience = _SETTLED_TOKENS
        self._settled_tokens = 0
        self._begin()
        if known in ways:
            self._settle(known)

    @property
    def is_settled(self) -> bool:
        """Whether the best way was found, and no other is tried now."""
        return self._settled_tokens > 0

    def record(self, foreseeing_s: float, stalled_s: float) -> None:
        """A layer has run for one token, and this is what it took beside the maths."""
        account = self._accounts[self.way]
        account.layers += 1
        account.stalled_s += stalled_s
        account.fastest_s = min(account.fastest_s, foreseeing_s)

    def token_ended(self, token_s: float, missed: int) -> None:
        """All layers have run for a token, which took so long; `missed` of its experts had to be brought, foreseen or
        not.
        """
        if self._settled_tokens:
            self._settled_tokens -= 1
            if not self._settled_tokens:
                self._begin()
            return
        self._accounts[self.way].tokens.append((token_s, missed))
        self._exclude()
        tried = {way: self._accounts[way].tokens for way in self._candidates}
        if len(tried) == 1:
            self._end(self._candidates[0])
        elif all(len(tokens) >= _LEAST_TRIAL_TOKENS for tokens in tried.values()) and (best := self._find_best(tried)):
            self._end(best)
        else:
            self.way = min(self._candidates, key=lambda way: len(tried[way]))

    def _find_best(self, tried: Mapping[str, Sequence[tuple[float, int]]]) -> str | None:
        """Which of two ways has the tokens that take least; None if more tokens should say. Where they cannot, it is
        the first way.
        """
        seconds = _as_if_alike(tried)
        costs = {way: _typical(its) for way, its in seconds.items()}
        best, other = sorted(costs, key=lambda way: costs[way][0])
        if max(seconds[best]) < min(seconds[other]):
            return best
        if any(len(tokens) < _TRIAL_TOKENS for tokens in tried.values()):
            return None
        first = self._ways[0]
        lead = costs[other][0] - costs[best][0]
        doubt = math.hypot(costs[other][1], costs[best][1])
        if lead > 2 * doubt:
            return best
        if any(len(tokens) < _MOST_TRIAL_TOKENS for tokens in tried.values()):
            return None
        return best if lead > doubt else first

    def _begin(self) -> None:
        self._others = deque(self._ways[1:])
        self._compare()

    def _compare(self) -> None:
        """Let the first way and the next of the others take turns."""
        self._candidates = [self._ways[0], *([self._others.popleft()] if self._others else [])]
        self._accounts = {way: _Account() for way in self._candidates}
        self.way = self._ways[0]

    def _end(self, best: str) -> None:
        """Of two ways this one is better."""
        if best == self._ways[0] and self._others:
            self._compare()
        else:
            self._settle(best)

    def _settle(self, best: str) -> None:
        is_again = best == self._best
        self._patience = min(2 * self._patience, _MOST_SETTLED_TOKENS) if is_again else _SETTLED_TOKENS
        self.way = self._best = best
        self._settled_tokens = self._patience

    def _exclude(self) -> None:
        plain = self._accounts[self._ways[0]]
        least = plain.stalled_s / max(plain.layers, 1)
        for way in [way for way in self._candidates if way != self._ways[0]]:
            account = self._accounts[way]
            if account.layers >= _LEAST_ASKS and account.fastest_s > least:
                self._candidates.remove(way)
        tried = {way: self._accounts[way].tokens for way in self._candidates}
        if all(len(tokens) >= _FIRST_LOOK_TOKENS for tokens in tried.values()):
            seconds = _as_if_alike(tried)
            slowest = min(max(its) for its in seconds.values())
            most = max(slowest, _HOPELESS * slowest)  # either may be below 0
            self._candidates = [way for way in self._candidates if min(seconds[way]) <= most]


def _as_if_alike(tried: Mapping[str, Sequence[tuple[float, int]]]) -> dict[str, list[float]]:
    """Of each way the seconds of its tokens, as if all had missed as many experts: what a miss costs is the slope that
    all ways together have (analysis of covariance).
    """
    count = sum(map(len, tried.values()))
    typical = sum(missed for tokens in tried.values() for _, missed in tokens) / count
    together = spread = 0.0
    for tokens in tried.values():
        mean_s, mean = (statistics.fmean(values) for values in zip(*tokens, strict=True))
        together += sum((missed - mean) * (token_s - mean_s) for token_s, missed in tokens)
        spread += sum((missed - mean) ** 2 for _, missed in tokens)
    slope = together / spread if spread else 0.0
    return {way: [token_s - slope * (missed - typical) for token_s, missed in tokens] for way, tokens in tried.items()}


def _typical(seconds: Sequence[float]) -> tuple[float, float]:
    """The median, and the standard error. One token in a dozen may take many times as long, when another program takes
    a core: medians do not mind.
    """
    middle = statistics.median(seconds)
    deviation = 1.4826 * statistics.median(abs(each - middle) for each in seconds)
    return middle, 1.2533 * deviation / math.sqrt(len(seconds))
