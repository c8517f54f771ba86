"""Policies that know nothing of layers: the yardsticks of caching."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

__all__ = ["LruPolicy", "RandomPolicy"]


class LruPolicy:
    """Least recently used first. The cold end of the order is its front."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()

    def begin_request(self) -> None:
        pass

    def observe(self, layer: int, choices: Sequence[Sequence[int]]) -> None:
        pass

    def insert(self, expert: int, *, keep: bool) -> None:
        self._order[expert] = None
        if not keep:
            self._order.move_to_end(expert, last=False)

    def use(self, expert: int) -> None:
        self._order.move_to_end(expert)

    def victim(self, is_leased: Callable[[int], bool]) -> int | None:
        # Leased experts sit at the hot end, or are the few that pass through: the scan is as long as there are leases.
        return next((expert for expert in self._order if not is_leased(expert)), None)

    def remove(self, expert: int) -> None:
        del self._order[expert]


class RandomPolicy:
    """Any of them, all equally likely, by a fixed seed: what knowing nothing is worth."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._chance = random.Random(0)
        self._experts: list[int] = []
        self._place: dict[int, int] = {}

    def begin_request(self) -> None:
        pass

    def observe(self, layer: int, choices: Sequence[Sequence[int]]) -> None:
        pass

    def insert(self, expert: int, *, keep: bool) -> None:
        self._place[expert] = len(self._experts)
        self._experts.append(expert)

    def use(self, expert: int) -> None:
        pass

    def victim(self, is_leased: Callable[[int], bool]) -> int | None:
        return next((expert for expert in self._in_random_order() if not is_leased(expert)), None)

    def remove(self, expert: int) -> None:
        place, last = self._place.pop(expert), self._experts.pop()
        if last != expert:
            self._experts[place] = last
            self._place[last] = place

    def _in_random_order(self) -> Iterator[int]:
        """All of them in the end, the first at once."""
        for _ in range(8):
            if self._experts:
                yield self._chance.choice(self._experts)
        yield from self._chance.sample(self._experts, len(self._experts))
