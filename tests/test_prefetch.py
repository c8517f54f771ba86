"""Guesses about the next layer: what they hold, fetch, give up, and when they stop."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from moeinf.cache import ExpertCache, Outcome
from moeinf.errors import MoeinfError
from moeinf.policies.plain import LruPolicy
from moeinf.predictors import Added
from moeinf.prefetch import PrefetchCounters, Prefetcher, WarmUp
from moeinf.steps import Arrival
from moeinf.transfer import Urgency
from moeinf.trials import Trials

PER_LAYER = 8
"""Experts 0 to 7 are those of layer 0, 8 to 15 those of layer 1."""


class Script:
    """Names what the test says."""

    def __init__(self, *named: int) -> None:
        self.named = list(named)
        self.asked = 0

    def observe(self, layer: int, tokens: Sequence[Sequence[int]]) -> None:
        pass

    def predict(self, layer: int, added: Added | None = None) -> list[int]:
        self.asked += 1
        return self.named


class Notes:
    """A disk that only remembers what it was told."""

    def __init__(self) -> None:
        self.fetches: list[tuple[int, int, Urgency]] = []
        self.promoted: list[int] = []
        self.cancelled: list[int] = []

    def fetch(self, key: int, slot: int, urgency: Urgency) -> None:
        self.fetches.append((key, slot, urgency))

    def promote(self, key: int) -> None:
        self.promoted.append(key)

    def cancel(self, key: int) -> None:
        self.cancelled.append(key)

    def wait(self) -> Arrival:
        raise AssertionError("nobody waits here")

    def poll(self) -> None:
        return None

    def close(self) -> None:
        pass


class Bench:
    """A prefetcher with all that it works on."""

    def __init__(self, slots: int, script: Script, *, most: int = 99) -> None:
        self.cache = ExpertCache(2 * PER_LAYER, slots, LruPolicy([]))
        self.reader = Notes()
        self.prefetcher = Prefetcher({"script": script}, self.cache, self.reader, [0, PER_LAYER], most)

    @property
    def fetched(self) -> list[int]:
        return [key for key, _, _ in self.reader.fetches]

    def bring(self, *experts: int) -> None:
        for expert in experts:
            assert self.cache.acquire(expert) is not None
            self.cache.arrived(expert)
            self.cache.release(expert)

    def arrive(self, key: int, *, cancelled: bool = False) -> None:
        self.prefetcher.ended(Arrival(key, 0, cancelled=cancelled))
        if cancelled:
            self.cache.failed(key)
        else:
            self.cache.arrived(key)
        self.cache.check_integrity()


def test_what_is_named_is_fetched_or_held_until_the_layer_has_chosen() -> None:
    bench = Bench(3, Script(1, 5))
    bench.bring(9, 0, 2)
    bench.prefetcher.look_ahead(0)
    assert bench.fetched == [13]  # 9 is here, and held although it is the oldest
    assert bench.cache.slot(0) is None
    bench.prefetcher.settle({9, 13})
    assert bench.reader.promoted == [13]
    assert bench.cache.acquire(13) == (bench.cache.slot(13), Outcome.WAIT)
    assert bench.cache.acquire(9) == (bench.cache.slot(9), Outcome.HIT)
    bench.cache.release(9)
    assert bench.cache._leases[bench.cache._slot_of[9]] == 0
    assert (bench.cache.counters.prefetched, bench.cache.counters.prefetch_used) == (1, 1)


def test_a_guess_that_is_there_in_time_is_a_hit() -> None:
    bench = Bench(3, Script(5))
    bench.prefetcher.look_ahead(0)
    bench.arrive(13)
    bench.prefetcher.settle({13})
    assert bench.reader.promoted == []
    assert bench.cache.acquire(13) == (0, Outcome.HIT)
    assert bench.cache.counters.prefetch_used == 1


def test_wrong_guesses_are_given_up() -> None:
    bench = Bench(4, Script(1, 5))
    bench.prefetcher.look_ahead(0)
    bench.prefetcher.settle({9, 10})
    assert (bench.reader.promoted, bench.reader.cancelled) == ([9], [13])
    assert bench.prefetcher.unsettled == {13}
    bench.prefetcher.look_ahead(0)
    assert bench.fetched == [9, 13]  # not again while its read has not ended
    bench.arrive(13, cancelled=True)
    assert not bench.prefetcher.unsettled
    assert bench.cache.slot(13) is None
    assert bench.cache.counters.prefetch_used == 0


def test_what_is_named_later_takes_the_place_of_what_was_named_before() -> None:
    """Once more is known of what the next layer will be given."""
    script = Script(1, 2, 5)
    bench = Bench(6, script)
    bench.bring(9)
    bench.prefetcher.look_ahead(0)
    assert bench.fetched == [10, 13]
    script.named = [2, 4]
    bench.prefetcher.look_ahead(0)
    assert (bench.fetched, bench.reader.cancelled) == ([10, 13, 12], [13])
    assert bench.cache._leases[bench.cache._slot_of[9]] == 0
    bench.prefetcher.settle({10, 13})
    assert (bench.reader.promoted, bench.reader.cancelled) == ([10], [13, 12])
    assert bench.prefetcher.unsettled == {12, 13}
    assert (bench.prefetcher.counters.named, bench.prefetcher.counters.right) == (2, 1)


def test_what_is_named_twice_is_held_once() -> None:
    """The first layer's experts are named after the last layer, and again when the next token enters the model."""
    bench = Bench(3, Script(1))
    bench.bring(9)
    bench.prefetcher.look_ahead(0)
    bench.prefetcher.look_ahead(0)
    bench.prefetcher.settle({9})
    assert sum(bench.cache._leases) == 0


def test_a_guess_that_has_come_stays_until_its_layer_has_chosen() -> None:
    bench = Bench(2, Script(5))
    bench.bring(0)
    bench.prefetcher.look_ahead(0)
    bench.arrive(13)
    for expert in (1, 2, 3):  # each evicts the last one, although 13 was never used
        bench.bring(expert)
    assert bench.cache.is_resident(13)
    bench.prefetcher.settle({9})
    bench.bring(4)
    bench.bring(6)
    assert not bench.cache.is_resident(13)


def test_a_guess_whose_read_fails_is_let_go() -> None:
    bench = Bench(2, Script(5))
    bench.prefetcher.look_ahead(0)
    bench.prefetcher.ended(Arrival(13, 0, error=MoeinfError("the disk failed")))
    bench.cache.failed(13)
    bench.cache.check_integrity()
    bench.prefetcher.settle({13})
    assert bench.cache.acquire(13) is not None


def test_slots_for_one_layer_are_left() -> None:
    bench = Bench(8, Script(0, 1, 2, 3), most=3)
    bench.prefetcher.look_ahead(0)
    assert bench.fetched == [8, 9, 10]
    bench.prefetcher.settle({11})
    bench.prefetcher.look_ahead(0)
    assert bench.fetched == [8, 9, 10]  # those three are still on their way


def test_no_slot_no_guess() -> None:
    bench = Bench(1, Script(0))
    assert bench.cache.acquire(0) is not None
    bench.prefetcher.look_ahead(0)
    assert bench.fetched == []


def test_what_does_not_pay_is_not_asked() -> None:
    """With two ways it is the caller's stalls that decide: none with the first, so the second is out after a token."""
    bench, script = Bench(8, Script()), Script(3)
    bench.prefetcher = Prefetcher({"off": Script(), "script": script}, bench.cache, bench.reader, [0, PER_LAYER], 99)
    for _ in range(20):
        for layer in (0, 1):
            bench.prefetcher.settle({layer * PER_LAYER})
            bench.prefetcher.look_ahead(layer)
            bench.prefetcher.has_run(layer, stalled_s=0.0)
    assert bench.prefetcher.way == "off"
    assert 0 < script.asked <= 6


def test_a_way_that_is_left_out_is_asked_no_more() -> None:
    scripts = {name: Script() for name in ("off", "gate", "eam")}
    bench = Bench(4, Script())
    bench.prefetcher = Prefetcher(scripts, bench.cache, bench.reader, [0, PER_LAYER], 99)
    bench.prefetcher.leave_out("gate")
    bench.prefetcher.leave_out("nobody")
    for _ in range(30):
        for layer in (0, 1):
            bench.prefetcher.look_ahead(layer)
            bench.prefetcher.has_run(layer, 1.0)
    assert scripts["gate"].asked == 0
    assert scripts["eam"].asked > 0


def test_a_token_is_judged_by_what_it_missed_foreseen_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, after its last layer."""
    told: list[int] = []
    monkeypatch.setattr(Trials, "token_ended", lambda _, __, missed: told.append(missed))
    bench = Bench(8, Script(3))
    for _ in range(2):
        bench.prefetcher.begin_token()
        bench.cache.acquire(0)
        bench.prefetcher.look_ahead(0)
        bench.prefetcher.has_run(0, 0.0)
        bench.prefetcher.settle({11})
        bench.cache.acquire(11)
        bench.cache.release(11)
        bench.prefetcher.has_run(1, 0.0)
    assert told == [2, 0]


def test_a_layer_without_a_choice_teaches_nothing() -> None:
    """A long prompt gives guesses up before it is known whether they were right."""
    bench = Bench(2, Script(3))
    bench.prefetcher.look_ahead(0)
    bench.prefetcher.settle(())
    assert bench.prefetcher.counters.asked == 0
    assert bench.reader.cancelled == [11]


def test_after_the_last_layer_comes_the_first() -> None:
    bench = Bench(4, Script(1))
    bench.prefetcher.look_ahead(1)
    assert bench.fetched == [1]


def test_recall_and_precision_are_counted() -> None:
    bench = Bench(6, Script(1, 5, 6))
    bench.bring(9)
    bench.prefetcher.look_ahead(0)
    bench.prefetcher.ended(Arrival(13, 700))
    bench.prefetcher.settle({9, 13, 15, 8})  # 9 and 13 of 9, 13, 14
    bench.prefetcher.settle({1, 2})  # nothing was predicted
    bench.prefetcher.ended(Arrival(14, 300, cancelled=True))
    bench.prefetcher.ended(Arrival(2, 1000))  # no guess
    assert bench.prefetcher.counters == PrefetchCounters(asked=4, named=3, right=2, read_bytes=1000)


def warm_up(slots: int, experts: list[int], spare: int) -> tuple[Bench, WarmUp, list[tuple[int, int, Urgency]]]:
    bench = Bench(slots, Script())
    warming = WarmUp(experts, bench.cache, bench.reader, spare)
    return bench, warming, bench.reader.fetches


def test_a_warm_up_leaves_slots_and_is_not_counted() -> None:
    bench, warming, fetched = warm_up(4, [9, 3, 12, 5], spare=1)
    assert [(expert, urgency) for expert, _, urgency in fetched] == [
        (9, Urgency.WARM_UP), (3, Urgency.WARM_UP), (12, Urgency.WARM_UP),
    ]  # fmt: skip
    assert all(bench.cache.slot(expert) == slot for expert, slot, _ in fetched)
    assert bench.cache.num_free == 1
    assert bench.cache.counters.prefetched == 0
    assert not warming.make_room()


def test_a_warm_up_gives_up_the_least_wanted_that_is_not_there() -> None:
    bench, warming, _ = warm_up(3, [9, 3, 12], spare=0)
    warming.ended(Arrival(12, 0))
    assert warming.make_room()
    assert bench.reader.cancelled == [3]
    assert warming.make_room()
    assert bench.reader.cancelled == [3, 9]
    assert not warming.make_room()


def test_a_warm_up_gives_nothing_up_that_somebody_waits_for() -> None:
    bench, warming, _ = warm_up(3, [9, 3, 12], spare=0)
    warming.keep(12)
    assert warming.give_up() == 2
    assert bench.reader.cancelled == [3, 9]


def test_experts_are_added_to_a_warm_up_one_at_a_time() -> None:
    bench, warming, fetched = warm_up(2, [9, 3], spare=0)
    warming.add(5)
    assert len(fetched) == 2  # these are on their way
    for expert in (9, 3):
        bench.cache.arrived(expert)
        warming.ended(Arrival(expert, 8))
    warming.add(3)
    assert len(fetched) == 2  # it is there
    warming.add(5)
    warming.add(6)
    assert [key for key, _, _ in fetched] == [9, 3, 5]
    assert bench.cache.slot(5) is not None
    assert bench.cache.counters.prefetched == 0
    assert warming.give_up() == 1
    warming.add(6)
    assert len(fetched) == 3  # what was given up is on its way still
    bench.cache.failed(5)
    warming.ended(Arrival(5, 0, cancelled=True))
    warming.add(6)
    assert fetched[-1][0] == 6
    bench.cache.check_integrity()


def test_there_may_be_nothing_to_warm_up() -> None:
    bench, warming, fetched = warm_up(2, [9, 3], spare=5)
    assert (fetched, bench.cache.num_free, warming.make_room()) == ([], 2, False)
