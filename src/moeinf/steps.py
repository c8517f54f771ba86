"""The order in which one step leases its experts and waits for them: one token, or many.

Decides when, and leaves the moving to others, so the engine and a replay of a recorded trace go through the same steps.
Owns the leases of a step. Knows nothing of bytes or tensors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from typing import NamedTuple, Protocol

from .cache import ExpertCache, Outcome
from .errors import MoeinfError

__all__ = ["OBSERVED_TOKENS", "Arrival", "Mover", "Step"]

OBSERVED_TOKENS = 64
"""Of a prompt, the policy is told what so many tokens chose, the last ones: what was before says little about what
comes."""


class Arrival(NamedTuple):
    """A fetch that ended: well, or with `error`, or `cancelled` before all of it was there. `read_bytes` came off the
    disk.
    """

    key: int
    read_bytes: int
    error: MoeinfError | None = None
    cancelled: bool = False


class Mover(Protocol):
    """What brings experts to their slots."""

    @property
    def cache(self) -> ExpertCache:
        """The books of who is where."""

    def lease(self, key: int, *, keep: bool) -> Outcome | None:
        """Lease an expert, and fetch it on a miss; None if no slot can be had now."""

    def wait(self) -> Arrival:
        """The next fetch that ended, entered in the cache."""


class Step:
    """The leases of one step. Whatever happens, `end` leaves none of them, and nothing under way."""

    def __init__(self, mover: Mover) -> None:
        self._mover = mover
        self._leased: set[int] = set()
        self._awaited: set[int] = set()

    def lease(self, keys: Collection[int]) -> list[int]:
        """Lease all `keys`, for which there are slots, fetching what is not here; returns those that are.

        What is here comes first, so that it does not make room for the others.
        """
        here = self._mover.cache.acquire_residents(keys)
        self._leased.update(here)
        for key in keys if len(here) < len(keys) else ():
            if key not in self._leased and self._try(key, keep=True) and key not in self._awaited:
                here.append(key)  # it was on its way, and is here now
        assert len(here) + len(self._awaited) == len(self._leased) == len(keys)
        return here

    def arriving(self) -> Iterable[int]:
        """The leased experts that were not here, as they arrive."""
        while self._awaited:
            yield self._next_arrival()

    def stream(self, keys: list[int], kept: set[int], window: int, most: int = 1) -> Iterable[list[int]]:
        """All `keys`, the resident ones first, as many as `most` of them at a time, leased until the next ones are
        asked for; then the others, each as it arrives, at most `window` on their way.
        """
        absent = deque(key for key in keys if not self._mover.cache.is_resident(key))
        resident = set(keys) - set(absent)
        here = deque(key for key in keys if key in resident and self._is_here(key, keep=key in kept))
        while True:
            while absent and len(self._awaited) < window and self._try(absent[0], keep=absent[0] in kept):
                key = absent.popleft()
                if key not in self._awaited:
                    here.append(key)  # it was on its way, and is here now
            if here:
                group = [here.popleft() for _ in range(min(most, len(here)))]
            elif self._awaited:
                group = [self._next_arrival()]
            else:
                assert not absent, "no slot for an expert although none is leased"
                return
            yield group
            for key in group:
                self._release(key)

    def end(self) -> None:
        """Release what is still leased, after what is under way has arrived."""
        while self._awaited:
            arrival = self._mover.wait()
            if arrival.cancelled:
                continue
            if arrival.key in self._awaited and arrival.error is not None:
                self._leased.discard(arrival.key)
            self._awaited.discard(arrival.key)
        for key in sorted(self._leased):
            self._mover.cache.release(key)
        self._leased.clear()

    def _is_here(self, key: int, *, keep: bool) -> bool:
        return self._try(key, keep=keep) and key not in self._awaited

    def _try(self, key: int, *, keep: bool) -> bool:
        outcome = self._mover.lease(key, keep=keep)
        if outcome is None:
            return False
        self._leased.add(key)
        if outcome is not Outcome.HIT:
            self._awaited.add(key)
        return True

    def _next_arrival(self) -> int:
        while True:
            arrival = self._mover.wait()
            if arrival.key not in self._awaited or arrival.cancelled:
                continue  # a guess that nobody asked for
            self._awaited.remove(arrival.key)
            if arrival.error is not None:
                self._leased.discard(arrival.key)
                raise arrival.error
            return arrival.key

    def _release(self, key: int) -> None:
        self._leased.remove(key)
        self._mover.cache.release(key)
