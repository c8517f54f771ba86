"""Two tiers: every byte in its place whatever comes first, no lease left behind, nothing read twice without need."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moeinf.errors import MoeinfError
from moeinf.steps import Arrival
from moeinf.transfer import Urgency
from standin import StandIn, standing_in
from twotiers import EXPERTS, LAYOUT, TARGETS, Bench

DEMAND, GUESS, WARM_UP = Urgency


@pytest.fixture
def device() -> Iterator[StandIn]:
    with standing_in() as made:
        yield made


def make(tmp_path: Path, device: StandIn, host_slots: int, request: pytest.FixtureRequest) -> Bench:
    bench = Bench(tmp_path, device, host_slots)
    request.addfinalizer(bench.tier.close)
    return bench


def test_an_expert_comes_from_disk_once_and_then_from_host_memory(
    tmp_path: Path, device: StandIn, request: pytest.FixtureRequest
) -> None:
    bench = make(tmp_path, device, EXPERTS, request)
    for slot, read_bytes in ((1, LAYOUT.nbytes), (4, 0)):
        for key in (3, 9):
            assert bench.bring(key, slot) == Arrival(key, read_bytes)
            assert bench.holds(slot, key)
    assert bench.disk.reads == [3, 9]
    tensors = bench.slots.tensors(4)
    numbers = torch.frombuffer(bytearray(bench.data[9]), dtype=torch.int16)[:600].view(6, 100)
    assert torch.equal(tensors["up"].cpu().view(torch.int16), numbers)
    assert tensors["down"].shape == (3, 7)
    assert bench.slots.weights["up"].shape == (TARGETS, 6, 100)


@pytest.mark.parametrize("host_slots", [2, 3, EXPERTS])
def test_whatever_is_asked_for_in_whatever_order_comes_or_is_given_up(
    host_slots: int, tmp_path: Path, device: StandIn, request: pytest.FixtureRequest
) -> None:
    """Random fetches, promotions, cancellations and waits, and one file that cannot be read: in the end every fetch has
    one arrival, and every slot that an expert arrived in has its bytes.
    """
    bench, chance = make(tmp_path, device, host_slots, request), random.Random(host_slots)
    bench.disk.bad = {5}
    under_way: dict[int, int] = {}
    urgencies: dict[int, Urgency] = {}
    cancelled: set[int] = set()
    outcomes = {"come": 0, "given up": 0, "failed": 0}

    def arrived(arrival: Arrival) -> None:
        slot = under_way.pop(arrival.key)
        if arrival.error is not None:
            assert arrival.key in bench.disk.bad
            outcomes["failed"] += 1
        elif arrival.cancelled:
            assert arrival.key in cancelled
            outcomes["given up"] += 1
        else:
            assert bench.holds(slot, arrival.key)
            outcomes["come"] += 1
        cancelled.discard(arrival.key)

    for _ in range(1500):
        free = sorted(set(range(TARGETS)) - set(under_way.values()))
        idle = sorted(set(range(EXPERTS)) - set(under_way))
        guesses = sorted(key for key in under_way if urgencies[key] is not DEMAND and key not in cancelled)
        choice = chance.random()
        if choice < 0.5 and free and idle:
            key = chance.choice(idle)
            under_way[key], urgencies[key] = chance.choice(free), chance.choice(list(Urgency))
            bench.tier.fetch(key, under_way[key], urgencies[key])
        elif choice < 0.65 and guesses:
            key = chance.choice(guesses)
            bench.tier.promote(key)
            urgencies[key] = DEMAND
        elif choice < 0.75 and guesses:
            cancelled.add(key := chance.choice(guesses))
            bench.tier.cancel(key)
        elif choice < 0.9 and under_way:
            arrived(bench.tier.wait())
        elif (arrival := bench.tier.poll()) is not None:
            arrived(arrival)
        bench.tier.check_integrity()
    while under_way:
        arrived(bench.tier.wait())
        bench.tier.check_integrity()
    assert bench.tier.poll() is None
    assert all(count > 10 for count in outcomes.values()), outcomes


def test_what_somebody_waits_for_goes_along_the_link_first(
    tmp_path: Path, device: StandIn, request: pytest.FixtureRequest
) -> None:
    bench = make(tmp_path, device, EXPERTS, request)
    for key in range(6):
        bench.bring(key, key)
    for key in range(4):
        bench.tier.fetch(key, key, WARM_UP if key == 0 else GUESS)
    bench.tier.fetch(4, 4, DEMAND)
    bench.tier.promote(3)
    bench.tier.check_integrity()
    assert [bench.tier.wait().key for _ in range(5)] == [0, 1, 4, 3, 2]  # two guesses were on the link already


def test_a_guess_that_is_given_up_stays_in_host_memory(
    tmp_path: Path, device: StandIn, request: pytest.FixtureRequest
) -> None:
    bench = make(tmp_path, device, EXPERTS, request)
    for key in range(3):
        bench.bring(key, key)
    for key in range(3):
        bench.tier.fetch(key, key, GUESS)
    bench.tier.cancel(2)
    bench.tier.cancel(0)  # it is on the link
    copies = device.copies
    assert [bench.tier.wait() for _ in range(3)] == [Arrival(2, 0, cancelled=True), Arrival(0, 0), Arrival(1, 0)]
    assert device.copies == copies
    assert bench.bring(2, 5) == Arrival(2, 0)
    assert bench.holds(5, 2)


def test_guesses_leave_room_in_host_memory_for_what_is_needed_now(
    tmp_path: Path, device: StandIn, request: pytest.FixtureRequest
) -> None:
    bench = make(tmp_path, device, 4, request)
    bench.disk.is_stuck = True
    for key in range(4):
        bench.tier.fetch(key, key, GUESS)
    assert bench.disk.reads == [0, 1]
    assert bench.bring(7, 5).key == 7
    bench.tier.cancel(3)
    bench.tier.promote(2)
    assert bench.tier.wait() == Arrival(3, 0, cancelled=True)
    assert bench.tier.wait().key == 2
    bench.tier.cancel(0)
    assert bench.tier.wait() == Arrival(0, 0, cancelled=True)
    bench.tier.promote(1)
    assert bench.tier.wait().key == 1
    bench.tier.check_integrity()


def test_a_failed_read_is_told_and_leaves_nothing_behind(
    tmp_path: Path, device: StandIn, request: pytest.FixtureRequest
) -> None:
    bench = make(tmp_path, device, 2, request)
    bench.disk.bad = {5}
    bench.tier.fetch(5, 0, DEMAND)
    bench.tier.fetch(6, 1, DEMAND)
    ends = {arrival.key: arrival.error for arrival in (bench.tier.wait(), bench.tier.wait())}
    assert ends[6] is None
    assert isinstance(ends[5], MoeinfError)
    bench.disk.bad = set()
    assert bench.bring(5, 0).error is None
    assert bench.holds(0, 5)


def test_what_is_held_in_host_memory_stays_there(
    tmp_path: Path, device: StandIn, request: pytest.FixtureRequest
) -> None:
    bench = make(tmp_path, device, 2, request)
    for key in (3, 4):
        bench.bring(key, key)
    held = bench.tier.hold(3), bench.tier.hold(4)
    bench.tier.fetch(7, 0, DEMAND)
    assert bench.tier.poll() is None
    assert bench.disk.reads == [3, 4]
    for key, tensors in zip((3, 4), held, strict=True):
        assert bytes(tensors["down"].flatten().view(torch.uint8).tolist()) == bench.data[key][1200:1284]
    bench.tier.check_integrity()
    bench.tier.let_go(4)
    assert bench.tier.wait().key == 7
    assert bench.tier.cache.is_resident(3)
    assert not bench.tier.cache.is_resident(4)
    bench.tier.let_go(3)
    bench.tier.check_integrity()
    with pytest.raises(AssertionError, match="expert 4 is not in host memory"):
        bench.tier.hold(4)


def test_what_the_link_took_is_added_up(tmp_path: Path, device: StandIn, request: pytest.FixtureRequest) -> None:
    bench = make(tmp_path, device, EXPERTS, request)
    for key, device.link_s in ((0, 1.0), (1, 2.0), (0, 4.0)):
        bench.bring(key, 0)
    assert (bench.tier.copies, bench.tier.copying_s) == (3, 7.0)


def test_closing_waits_for_the_link_and_gives_the_memory_back(tmp_path: Path, device: StandIn) -> None:
    bench = Bench(tmp_path, device, 4)
    bench.bring(1, 1)
    bench.tier.fetch(1, 2, DEMAND)
    assert device.is_pinned
    bench.tier.close()
    bench.tier.close()
    assert not device.is_pinned
    assert bench.holds(2, 1)


def test_memory_that_cannot_be_pinned_is_no_obstacle(tmp_path: Path, device: StandIn) -> None:
    device.can_pin = False
    bench = Bench(tmp_path, device, 4)
    assert not bench.tier.is_pinned
    bench.bring(1, 1)
    assert bench.holds(1, 1)
    bench.tier.close()
