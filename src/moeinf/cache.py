"""The expert cache: which expert is in which slot, who is using it, and what was asked for so far.

Pure bookkeeping. It owns no bytes and no threads and knows nothing of tensors, so the engine and a replay of a
recorded trace drive the same class. An expert is one integer counted over all MoE layers: `first[layer] + index`. The
cache decides, others move: a miss returns a slot that the caller fills and then reports with `arrived` or `failed`.

    absent ──acquire, foresee, preload──▶ loading ──arrived──▶ resident ──evicted by another──▶ absent
                                             └──────failed────▶ absent

Leases count users of a slot; a leased expert is never evicted.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from .policies import Policy

__all__ = ["CacheCounters", "ExpertCache", "Outcome"]


class Outcome(Enum):
    """How the cache met a request: hit (in a slot), wait (already on its way), miss (the caller must fetch it)."""

    HIT = "hit"
    WAIT = "wait"
    MISS = "miss"


@dataclass(slots=True)
class CacheCounters:
    """Requests by outcome, and evictions, since the counters were made. hits + waits + misses = requests.

    Of the misses, `passed_by` got no slot. `prefetched` experts were fetched before they were asked for, and so many of
    them were then asked for (`prefetch_used`) before they were evicted.
    """

    hits: int = 0
    waits: int = 0
    misses: int = 0
    passed_by: int = 0
    evictions: int = 0
    prefetched: int = 0
    prefetch_used: int = 0

    @property
    def requests(self) -> int:
        return self.hits + self.waits + self.misses


class ExpertCache:
    """Slots for experts, filled on demand, emptied by a policy.

    Args:
        num_experts: experts of all layers together.
        num_slots: slots, at least 1.
        policy: chooses victims; owned by this cache from now on.

    `resident` has the slot of each expert whose bytes are there, and else -1, for code that cannot ask.
    """

    def __init__(self, num_experts: int, num_slots: int, policy: Policy) -> None:
        assert num_slots >= 1
        self.num_slots = num_slots
        self.counters = CacheCounters()
        self._policy = policy
        self.resident = array("i", [-1]) * num_experts
        self._slot_of: list[int] = [-1] * num_experts
        self._expert_in: list[int] = [-1] * num_slots
        self._leases: list[int] = [0] * num_slots
        self._loading: set[int] = set()
        self._foreseen: set[int] = set()
        self._free: list[int] = list(range(num_slots - 1, -1, -1))
        self._lent: set[int] = set()

    def slot(self, expert: int) -> int | None:
        """The slot that holds, or is about to hold, `expert`; None if it is absent."""
        slot = self._slot_of[expert]
        return None if slot < 0 else slot

    def is_resident(self, expert: int) -> bool:
        """Whether the bytes of `expert` are in a slot now."""
        return self._slot_of[expert] >= 0 and expert not in self._loading

    @property
    def num_usable(self) -> int:
        """Slots that are not lent."""
        return self.num_slots - len(self._lent)

    @property
    def num_resident(self) -> int:
        return self.num_usable - len(self._free) - len(self._loading)

    @property
    def num_free(self) -> int:
        """Slots that hold nothing."""
        return len(self._free)

    def begin_request(self) -> None:
        """A person asks for something: the policy may forget what it learned of the last request."""
        self._policy.begin_request()

    def observe(self, layer: int, choices: Sequence[Sequence[int]]) -> None:
        """Tell the policy what the router of `layer` has chosen, a row of experts per token, before they are asked
        for.
        """
        self._policy.observe(layer, choices)

    def acquire(self, expert: int, *, keep: bool = True) -> tuple[int, Outcome] | None:
        """Lease `expert`, giving it a slot if it has none.

        Returns (slot, outcome), or None when every slot is leased and nothing changed. On a MISS the caller fetches
        the expert into the slot and reports it. `keep=False` asks for one pass only: it neither counts as a use nor
        holds its place.
        """
        slot = self._slot_of[expert]
        if slot >= 0:
            self._leases[slot] += 1
            if keep:
                self._policy.use(expert)
            if expert in self._foreseen:
                self._foreseen.remove(expert)
                self.counters.prefetch_used += 1
            if expert in self._loading:
                self.counters.waits += 1
                return slot, Outcome.WAIT
            self.counters.hits += 1
            return slot, Outcome.HIT
        taken = self._admit(expert, keep=keep)
        if taken is None:
            return None
        self._leases[taken] = 1
        self.counters.misses += 1
        return taken, Outcome.MISS

    def acquire_residents(self, experts: Iterable[int]) -> list[int]:
        """Lease those of `experts` that are resident, each of them a hit; returns them."""
        slot_of, leases = self._slot_of, self._leases
        residents = [expert for expert in experts if slot_of[expert] >= 0 and expert not in self._loading]
        for expert in residents:
            leases[slot_of[expert]] += 1
        self.use_residents(residents)
        return residents

    def use_residents(self, experts: Sequence[int]) -> None:
        """These are resident, and are asked for by somebody who needs no lease: each of them is a hit."""
        use = self._policy.use
        for expert in experts:
            use(expert)
        if self._foreseen:
            used = self._foreseen.intersection(experts)
            self._foreseen -= used
            self.counters.prefetch_used += len(used)
        self.counters.hits += len(experts)

    def pass_by(self, expert: int) -> None:
        """The absent `expert` was asked for, and will be used where it is: a miss that gives it no slot."""
        assert self._slot_of[expert] < 0, f"expert {expert} is here"
        self.counters.misses += 1
        self.counters.passed_by += 1

    def foresee(self, expert: int) -> int | None:
        """Give the absent `expert` a slot before anybody asks for it; None if there is none to be had.

        The caller fetches it and reports that, as for a MISS. It holds no lease, and may be evicted once it is there.
        """
        slot = self._admit(expert, keep=True)
        if slot is not None:
            self._foreseen.add(expert)
            self.counters.prefetched += 1
        return slot

    def preload(self, expert: int) -> int | None:
        """The same for an expert that nobody is thought to ask for soon: it is not counted."""
        return self._admit(expert, keep=True)

    def hold(self, expert: int) -> None:
        """Lease an expert that is here, or on its way, so that it stays; this is no request."""
        self._leases[self._slot_of[expert]] += 1

    def arrived(self, expert: int) -> None:
        """The bytes of a loading expert are in its slot."""
        self._loading.remove(expert)
        self.resident[expert] = self._slot_of[expert]

    def failed(self, expert: int) -> None:
        """The bytes of a loading expert will not come: its slot is free again, its leases are void."""
        self._loading.remove(expert)
        self._leases[self._slot_of[expert]] = 0
        self._vacate(expert)

    def release(self, expert: int) -> None:
        """End one lease. A released expert that is still loading stays on its way."""
        slot = self._slot_of[expert]
        assert slot >= 0, f"expert {expert} is not here"
        assert self._leases[slot] > 0, f"expert {expert} is not leased"
        self._leases[slot] -= 1

    def lend(self, count: int) -> list[int]:
        """Take up to `count` slots out of use, empty ones first, then those that the policy would evict."""
        slots: list[int] = []
        while len(slots) < count and (slot := self._take_slot()) is not None:
            slots.append(slot)
        self._lent.update(slots)
        return slots

    def give_back(self, slots: list[int]) -> None:
        """Take lent slots into use again, empty."""
        self._lent.difference_update(slots)
        self._free += slots

    def check_integrity(self) -> None:
        """Raise AssertionError if the tables contradict each other. For tests: it walks everything."""
        held = {expert: slot for expert, slot in enumerate(self._slot_of) if slot >= 0}
        assert len(set(held.values())) == len(held), "two experts share a slot"
        assert all(self._expert_in[slot] == expert for expert, slot in held.items()), "a slot forgot its expert"
        empty = [slot for slot, expert in enumerate(self._expert_in) if expert < 0]
        assert sorted([*self._free, *self._lent]) == empty, "free list"
        assert len(held) + len(empty) == self.num_slots, "slots were lost"
        assert self._loading <= held.keys(), "an expert is loading into no slot"
        here = [slot if expert not in self._loading else -1 for expert, slot in enumerate(self._slot_of)]
        assert list(self.resident) == here, "what is resident"
        assert self._foreseen <= held.keys(), "an expert was foreseen and is not here"
        assert all(count >= 0 for count in self._leases), "a lease was ended twice"
        assert all(self._leases[slot] == 0 for slot in self._free), "a free slot is leased"

    def _admit(self, expert: int, *, keep: bool) -> int | None:
        slot = self._take_slot()
        if slot is not None:
            self._loading.add(expert)  # first: nobody may take it for resident
            self._slot_of[expert] = slot
            self._expert_in[slot] = expert
            self._policy.insert(expert, keep=keep)
        return slot

    def _take_slot(self) -> int | None:
        if self._free:
            return self._free.pop()
        victim = self._policy.victim(self._is_busy)
        if victim is None:
            return None
        self._vacate(victim)
        self.counters.evictions += 1
        return self._free.pop()

    def _is_busy(self, expert: int) -> bool:
        return self._leases[self._slot_of[expert]] > 0 or expert in self._loading

    def _vacate(self, expert: int) -> None:
        slot = self._slot_of[expert]
        self._slot_of[expert] = self.resident[expert] = -1
        self._expert_in[slot] = -1
        self._free.append(slot)
        self._foreseen.discard(expert)
        self._policy.remove(expert)
