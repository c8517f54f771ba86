"""Which of several ways to foresee experts costs least, found by trying them in turn.

What a way costs is measured, not assumed: seconds spent foreseeing, and seconds that then pass waiting for bytes. Knows
nothing of what the ways do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Trials"]

_TRIAL_TOKENS = 6
"""So many tokens go each way before the best is chosen."""
_SETTLED_TOKENS = 256
_MOST_SETTLED_TOKENS = 4096
"""So many go the best way before all are tried again, since text, cache and machine may have changed by then; and twice
as many each time that it is the best again.
"""
_GLANCE_TOKENS = 2
_HOPELESS = 1.5
"""A way that after so many tokens costs so many times what the best one does is tried no longer."""
_WORTH = 0.8
"""A way is worth going if it costs at most this share of what foreseeing nothing does: reads of wrong guesses take the
processor and the disk from others, which no account shows."""
_LEAST_ASKS = 4
"""The first asks are slower than those that follow: a way is judged by its fastest after so many."""


@dataclass(slots=True)
class _Account:
    """What one way has cost."""

    tokens: int = 0
    layers: int = 0
    stalled_s: float = 0.0
    foreseeing_s: float = 0.0
    fastest_s: float = float("inf")

    @property
    def layer_s(self) -> float:
        """Seconds per layer."""
        return (self.stalled_s + self.foreseeing_s) / max(self.layers, 1)


class Trials:
    """Chooses among `ways`, of which the first foresees nothing; it changes its mind between tokens only.

    Ways take turns, token by token, so that all of them meet the same text and the same cache. One that spends more on
    foreseeing than all the waiting without it cannot win, and is out at once; so is one that is far behind.
    """

    def __init__(self, ways: Sequence[str]) -> None:
        self.way = ways[0]
        """The one to go now."""
        self._ways = ways
        self._best = ""
        self._patience = _SETTLED_TOKENS
        self._settled_tokens = 0
        self._begin()

    @property
    def is_settled(self) -> bool:
        """Whether the best way was found, and no other is tried now."""
        return self._settled_tokens > 0

    def token_ended(self) -> None:
        """All layers have run for a token."""
        if self._settled_tokens:
            self._settled_tokens -= 1
            if not self._settled_tokens:
                self._begin()
            return
        self._accounts[self.way].tokens += 1
        self._exclude()
        if all(self._accounts[way].tokens >= _TRIAL_TOKENS for way in self._candidates) or len(self._candidates) == 1:
            self._settle(min(self._candidates, key=self._cost_s))
        else:
            self.way = min(self._candidates, key=lambda way: self._accounts[way].tokens)

    def record(self, foreseeing_s: float, stalled_s: float) -> None:
        """A layer has run for one token, and this is what it took beside the maths."""
        account = self._accounts[self.way]
        account.layers += 1
        account.foreseeing_s += foreseeing_s
        account.stalled_s += stalled_s
        account.fastest_s = min(account.fastest_s, foreseeing_s)

    def _begin(self) -> None:
        self._accounts = {way: _Account() for way in self._ways}
        self._candidates = list(self._ways)
        self.way = self._ways[0]

    def _cost_s(self, way: str) -> float:
        """Seconds per layer, and what the accounts do not show."""
        return self._accounts[way].layer_s / (1.0 if way == self._ways[0] else _WORTH)

    def _settle(self, best: str) -> None:
        is_again = best == self._best
        self._patience = min(2 * self._patience, _MOST_SETTLED_TOKENS) if is_again else _SETTLED_TOKENS
        self.way = self._best = best
        self._settled_tokens = self._patience

    def _exclude(self) -> None:
        least = self._accounts[self._ways[0]].layer_s
        for way in self._candidates[1:]:
            account = self._accounts[way]
            if account.layers >= _LEAST_ASKS and account.fastest_s > least:
                self._candidates.remove(way)
        if all(self._accounts[way].tokens >= _GLANCE_TOKENS for way in self._candidates):
            best = min(self._accounts[way].layer_s for way in self._candidates)
            self._candidates = [way for way in self._candidates if self._accounts[way].layer_s <= _HOPELESS * best]
