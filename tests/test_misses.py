"""What is fetched and what the processor computes: the arithmetic, and choosing by what simulated machines take."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count as count_from
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moeinf import misses
from moeinf.misses import Costs, HostMisses, MissChoice, Way, share


def random_costs(chance: random.Random) -> Costs:
    link_s, host_s = chance.uniform(0.1, 4), chance.uniform(0.1, 4)
    slower = chance.choice([1.0, 1.0, chance.uniform(1, 3)])
    return Costs(link_s, host_s, link_s * slower, host_s * slower, chance.choice([0.0, chance.uniform(0, 1)]))


def test_a_step_is_never_slower_than_the_better_of_the_two() -> None:
    chance = random.Random(0)
    ways = set()
    for _ in range(2000):
        costs, count = random_costs(chance), chance.randint(1, 16)
        on_host = share(count, costs)
        better = min(costs.step_s(count, 0), costs.step_s(count, count))
        assert costs.step_s(count, on_host) == min(costs.step_s(count, each) for each in range(count + 1)) <= better
        ways.add(Way.of(count, on_host))
    assert ways == set(Way)


def test_both_ways_end_together_where_whole_experts_let_them() -> None:
    """Neither ends later than the other by more than one expert; of many, the link's share is W_link / (W_link +
    W_host).
    """
    chance, mixed = random.Random(1), 0
    for _ in range(2000):
        costs, count = random_costs(chance), chance.randint(2, 16)
        on_host = share(count, costs)
        if Way.of(count, on_host) is not Way.BOTH:
            continue
        mixed += 1
        link_s, host_s = (count - on_host) * costs.link_beside_s, costs.trip_s + on_host * costs.host_beside_s
        assert -costs.link_beside_s <= link_s - host_s <= costs.host_beside_s
    assert mixed > 500
    fast_link = Costs(link_s=1, host_s=3, link_beside_s=1, host_beside_s=3)
    assert share(4000, fast_link) == 1000


def test_of_ways_alike_the_link_is_gone() -> None:
    """What was copied stays for the next token."""
    assert share(1, Costs(1, 1, 1, 1)) == 0
    assert share(1, Costs(1, 1 - 1e-9, 1, 1)) == 1


@dataclass
class Machine:
    """Experts per second over the link and by the processor; both together no more than memory gives, which is
    `memory` times what the one that is alone takes from it. `trip_s` is the way there and back.
    """

    link: float
    host: float
    memory: float = float("inf")
    trip_s: float = 0.0

    def rates(self) -> tuple[float, float]:
        """Of both while both are gone."""
        fits = min(1.0, self.memory / (self.link + self.host))
        return self.link * fits, self.host * fits

    def step(self, count: int, on_host: int) -> tuple[float, float, float]:
        """(seconds, those of the link, those of the processor's maths)."""
        left, waiting = float(count - on_host), float(on_host)
        link, host = self.rates()
        together = min(left / link, waiting / host)
        left, waiting = left - together * link, waiting - together * host
        link_s, host_s = together + left / self.link, together + waiting / self.host
        return max(link_s, host_s + (self.trip_s if on_host else 0.0)), link_s, host_s


def run(choice: MissChoice | None, machine: Machine, counts: list[int], always: int | None = None) -> float:
    """Seconds of steps that lack `counts` experts; without a choice `always` is the share of the processor."""
    total_s = 0.0
    for count in counts:
        on_host = count * (always or 0) if choice is None else choice.on_host(count)
        assert 0 <= on_host <= count
        step_s, link_s, host_s = machine.step(count, on_host)
        total_s += step_s
        if choice is not None:
            way = Way.of(count, on_host)
            if on_host < count:
                choice.copied(way, link_s / (count - on_host))
            if on_host:
                choice.computed(way, host_s / on_host, machine.trip_s)
    return total_s


MACHINES = {
    "a fast link": Machine(link=10, host=1),
    "a fast processor": Machine(link=1, host=10, trip_s=0.05),
    "alike": Machine(link=4, host=4, trip_s=0.01),
    "memory that bounds both": Machine(link=5, host=5, memory=6),
    "memory that one alone fills": Machine(link=5, host=6, memory=6),
    "each in the other's way": Machine(link=5, host=5, memory=3),
    "a hopeless processor": Machine(link=100, host=0.5),
}


def counts(number: int) -> list[int]:
    return random.Random(number).choices(range(1, 9), k=number)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_choosing_costs_next_to_nothing_over_the_better_of_the_two(machine: Machine) -> None:
    """Whatever the machine: after the first steps, in which both ways are tried, about two hundredths at most."""
    choice = MissChoice()
    run(choice, machine, [4] * 20)
    steps = counts(5000)
    taken_s, fetched_s, computed_s = (
        run(*way) for way in ((choice, machine, steps), (None, machine, steps, 0), (None, machine, steps, 1))
    )
    assert taken_s <= 1.025 * min(fetched_s, computed_s)


@pytest.mark.parametrize("name", ["alike", "memory that bounds both"])
def test_both_at_once_are_faster_than_either(name: str) -> None:
    machine, choice, steps = MACHINES[name], MissChoice(), counts(3000)
    best_s = sum(min(machine.step(count, on_host)[0] for on_host in range(count + 1)) for count in steps)
    taken_s = run(choice, machine, steps)
    assert taken_s <= 1.05 * best_s
    assert taken_s < 0.9 * run(None, machine, steps, 0)


def test_a_machine_that_changes_is_followed() -> None:
    choice = MissChoice()
    for machine in (MACHINES["a fast link"], MACHINES["a fast processor"], MACHINES["a fast link"]):
        run(choice, machine, counts(2000))
        steps = counts(1000)
        better_s = min(run(None, machine, steps, always) for always in (0, 1))
        assert run(choice, machine, steps) <= 1.025 * better_s


def test_the_first_and_slowest_time_decides_nothing() -> None:
    choice = MissChoice()
    assert choice.on_host(3) == 0
    choice.copied(Way.LINK, 1.0)
    assert choice.on_host(3) == 3
    choice.computed(Way.HOST, 1000.0, 5.0)
    assert choice.costs is None
    assert choice.on_host(3) == 3
    choice.computed(Way.HOST, 0.1, 0.0)
    assert choice.costs == Costs(1.0, 0.1, 1.0, 0.1, 2.5)


def test_a_step_that_was_disturbed_moves_little() -> None:
    choice = MissChoice()
    for copy_s in (1.0, 1.0, 9.0):
        choice.copied(Way.LINK, copy_s)
    for _ in range(2):
        choice.computed(Way.HOST, 1.0, 0.0)
    assert choice.costs is not None
    assert choice.costs.link_s == 2.0
    choice.copied(Way.LINK, 1.0)
    assert choice.costs.link_s == 1.5


class Tier:
    """Host memory that has the experts `here`, and a link that copies when the test says so."""

    def __init__(self, *here: int) -> None:
        self.cache = SimpleNamespace(is_resident=here.__contains__)
        self.held: list[int] = []
        self.copies, self.copying_s = 0, 0.0

    def hold(self, key: int) -> int:
        self.held.append(key)
        return key

    def let_go(self, key: int) -> None:
        self.held.remove(key)

    def copy(self, *seconds: float) -> None:
        self.copies += len(seconds)
        self.copying_s += sum(seconds)


class Maths:
    """Rows that say of which layer and expert they are."""

    def __init__(self, layer: int, tier: Tier) -> None:
        self.layer, self.tier = layer, tier

    def rows(self, hidden: torch.Tensor, keys: list[int]) -> torch.Tensor:
        assert self.tier.held == keys
        return torch.tensor([[100 * self.layer + key] for key in keys])


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Time goes on by a second whenever somebody asks for it."""
    seconds = count_from(1.0)
    with monkeypatch.context() as patch:
        patch.setattr(misses, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
        yield


def make_misses(tier: Any, choice: MissChoice | None) -> HostMisses:
    maths: Any = [Maths(layer, tier) for layer in range(2)]
    return HostMisses(tier, maths, choice)


HIDDEN = torch.zeros(1, 1)


def test_what_the_router_prefers_least_is_computed_and_leased_until_then(monkeypatch: pytest.MonkeyPatch) -> None:
    tier, choice = Tier(1, 2, 3, 4), MissChoice()
    monkeypatch.setattr(choice, "on_host", lambda count: count // 2)
    with make_misses(tier, choice).step(1, HIDDEN, [4, 5, 2, 1, 3]) as step:
        assert step is not None
        assert (step.keys, tier.held, step.behind) == ([1, 3], [1, 3], None)
        assert step.rows().tolist() == [[101], [103]]
        assert tier.held == []  # so that whoever waits for the others gets a slot
    with make_misses(tier, choice).step(0, HIDDEN, [2, 1]) as step:
        assert tier.held == [1]
    assert tier.held == []


def test_an_idle_link_should_bring_what_the_router_prefers_most(monkeypatch: pytest.MonkeyPatch) -> None:
    tier, choice = Tier(1, 2, 3), MissChoice()
    monkeypatch.setattr(choice, "on_host", lambda count: count)
    for chosen, behind in ((choice, 3), (None, None)):
        with make_misses(tier, chosen).step(0, HIDDEN, [3, 1]) as step:
            assert step is not None
            assert (step.keys, step.behind) == ([3, 1], behind)


def test_what_nobody_has_in_host_memory_is_not_computed() -> None:
    with make_misses(Tier(1), None).step(0, HIDDEN, [2, 3]) as step:
        assert step is None


def test_copies_count_for_the_way_in_which_they_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between steps the processor is idle; beside what it computes they share memory with it."""
    tier, choice = Tier(1, 2), MissChoice()
    on_host = 1
    monkeypatch.setattr(choice, "on_host", lambda _: on_host)
    lacking = make_misses(tier, choice)
    tier.copy(0.5, 1.5)
    with lacking.step(0, HIDDEN, [1, 2]):
        tier.copy(4.0)
    assert choice._link_s == {Way.LINK: 1.0, Way.BOTH: 4.0}
    on_host = 2
    with lacking.step(0, HIDDEN, [1, 2]):
        tier.copy(2.0)
    assert choice._link_s == {Way.LINK: 1.0, Way.BOTH: 3.0}
    on_host = 0
    with lacking.step(0, HIDDEN, [1, 2]):
        tier.copy(0.5)
    assert choice._link_s == {Way.LINK: 0.75, Way.BOTH: 3.0}


@pytest.mark.usefixtures("ticking")
def test_the_way_there_and_back_and_each_expert_are_timed() -> None:
    """A second each, for the state, the rows of both experts, and what is sent back."""
    choice = MissChoice()
    choice.copied(Way.LINK, 1.0)
    lacking = make_misses(Tier(1, 2), choice)
    for _ in range(2):
        with lacking.step(0, HIDDEN, [1, 2]) as step:
            assert step is not None
            step.rows()
    assert choice.costs == Costs(1.0, 0.5, 1.0, 0.5, trip_s=2.0)
