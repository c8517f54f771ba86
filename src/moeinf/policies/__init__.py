"""Which expert leaves the cache when another needs its slot. Bookkeeping only: no tensors, no clocks, no threads.

An expert is named by one integer, counted over all MoE layers (see `cache.py`). A policy sees what the router chooses
and what the cache does, and answers one question, `victim`. docs/policies.md says what each one is, where it comes
from, and what it is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from moeinf.errors import UsageError

if TYPE_CHECKING:
    from moeinf.collection import ActivationCollection

__all__ = ["POLICIES", "LearnsFromRequests", "Policy", "make_policy"]

POLICIES = {
    "activation": "layered.ActivationPolicy",
    "activation-eamc": "layered.CollectionPolicy",
    "expected-use": "layered.ExpectedUsePolicy",
    "layer-lru": "layered.LayerLruPolicy",
    "least-stale": "layered.LeastStalePolicy",
    "lfru": "layered.LfruPolicy",
    "lfu": "layered.LfuPolicy",
    "llru": "layered.LayeredLruPolicy",
    "lru": "plain.LruPolicy",
    "neighbour-use": "learned.NeighbourUsePolicy",
    "random": "plain.RandomPolicy",
}
"""Names, and the classes behind them: those that keep tables of numbers are imported when they are asked for."""


class Policy(Protocol):
    """What the cache asks of an eviction policy. It knows of exactly the resident experts: inserted and not yet
    removed.
    """

    def begin_request(self) -> None:
        """A person asks for something: what is learned about one request starts afresh."""

    def observe(self, layer: int, choices: Sequence[Sequence[int]]) -> None:
        """MoE layer `layer` runs, and its router has chosen `choices`: one row of experts per token, the last token
        last. Told before any of them is asked for. Of a long prompt only the last tokens are told.
        """

    def insert(self, expert: int, *, keep: bool) -> None:
        """`expert`, not resident before, took a slot. `keep=False`: it only passes through, and is the first to go."""

    def use(self, expert: int) -> None:
        """The resident `expert` was asked for."""

    def victim(self, is_leased: Callable[[int], bool]) -> int | None:
        """The resident expert to evict, none of the leased ones; None if all are leased. Changes nothing."""

    def remove(self, expert: int) -> None:
        """The resident `expert` left its slot."""


@runtime_checkable
class LearnsFromRequests(Protocol):
    """A policy that compares the present request with past ones."""

    def begin_with(self, collection: ActivationCollection) -> None:
        """These are past requests of the model. It keeps a copy, which grows by what it sees."""


def make_policy(name: str, sizes: Sequence[int], collection: ActivationCollection | None = None) -> Policy:
    """A fresh policy called `name`, for a model whose MoE layers have so many experts each. Those that compare requests
    begin with those of `collection`, or with none.

    Raises UsageError, listing the known names, for any other.
    """
    if name not in POLICIES:
        raise UsageError(f"policy {name!r} is not known", hint=f"choose one of: {', '.join(sorted(POLICIES))}")
    module, _, kind = POLICIES[name].rpartition(".")
    policy: Policy = getattr(import_module(f".{module}", __name__), kind)(sizes)
    if collection is not None and isinstance(policy, LearnsFromRequests):
        policy.begin_with(collection)
    return policy
