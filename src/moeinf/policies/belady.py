"""The clairvoyant bound: evict what is used again last of all (Belady 1966). It needs the future, so only a replay of a
recorded trace can have it."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

__all__ = ["BeladyPolicy"]


class BeladyPolicy:
    """Args:
    events: all that will be asked for, in order: one list of experts per event, which `observe` counts.
    counts: whether hits of an event count; those that do not are no reason to keep an expert for. None: all do.
    """

    def __init__(self, events: Sequence[Sequence[int]], counts: Sequence[bool] | None = None) -> None:
        self._next: list[dict[int, int]] = [{} for _ in events]
        self._never = len(events)
        upcoming: dict[int, int] = {}
        for number in range(len(events) - 1, -1, -1):
            self._next[number] = {expert: upcoming.get(expert, self._never) for expert in events[number]}
            if counts is None or counts[number]:
                upcoming |= dict.fromkeys(events[number], number)
        self._event = -1
        self._due: dict[int, int] = {}
        self._heap: list[tuple[int, int]] = []

    def begin_request(self) -> None:
        pass

    def observe(self, layer: int, choices: Sequence[Sequence[int]]) -> None:
        self._event += 1

    def insert(self, expert: int, *, keep: bool) -> None:
        self._due[expert] = self._next[self._event][expert]
        heapq.heappush(self._heap, (-self._due[expert], expert))

    def use(self, expert: int) -> None:
        self.insert(expert, keep=True)

    def victim(self, is_leased: Callable[[int], bool]) -> int | None:
        passed: list[tuple[int, int]] = []
        found = None
        while self._heap and found is None:
            due, expert = self._heap[0]
            if self._due.get(expert) != -due:  # used again since, or gone
                heapq.heappop(self._heap)
            elif is_leased(expert):
                passed.append(heapq.heappop(self._heap))
            else:
                found = expert
        for entry in passed:
            heapq.heappush(self._heap, entry)
        return found

    def remove(self, expert: int) -> None:
        del self._due[expert]
