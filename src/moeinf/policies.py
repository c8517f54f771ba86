"""Which expert leaves the cache when another needs its slot. Bookkeeping only: no tensors, no clocks, no threads.

An expert is named by one integer, counted over all MoE layers (see `cache.py`). A policy sees what the cache does and
answers one question, `victim`. Every method is O(log n) or better: it is called for each expert of each token.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from .errors import UsageError

__all__ = ["POLICIES", "LruPolicy", "Policy", "make_policy"]


class Policy(Protocol):
    """What the cache asks of an eviction policy. It knows of exactly the resident experts: inserted and not yet
    removed.
    """

    def insert(self, expert: int, *, keep: bool) -> None:
        """`expert`, not resident before, took a slot. `keep=False`: it only passes through, and is the first to go."""

    def use(self, expert: int) -> None:
        """The resident `expert` was asked for."""

    def victim(self, is_leased: Callable[[int], bool]) -> int | None:
        """The resident expert to evict, none of the leased ones; None if all are leased. Changes nothing."""

    def remove(self, expert: int) -> None:
        """The resident `expert` left its slot."""


class LruPolicy:
    """Least recently used first. The cold end of the order is its front."""

    def __init__(self) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()

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


POLICIES: dict[str, Callable[[], Policy]] = {"lru": LruPolicy}


def make_policy(name: str) -> Policy:
    """A fresh policy called `name`. Raises UsageError, listing the known names, for any other."""
    if name not in POLICIES:
        raise UsageError(f"policy {name!r} is not known", hint=f"choose one of: {', '.join(sorted(POLICIES))}")
    return POLICIES[name]()
