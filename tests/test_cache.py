"""The bookkeeping of the cache, against a plain model of what it should do."""

from __future__ import annotations

import random

import pytest

from moeinf.cache import ExpertCache, Outcome
from moeinf.policies.plain import LruPolicy


def make_cache(slots: int, experts: int = 10) -> ExpertCache:
    return ExpertCache(experts, slots, LruPolicy([]))


def fill(cache: ExpertCache, *experts: int) -> None:
    """Bring experts in, arrived and released."""
    for expert in experts:
        assert cache.acquire(expert) is not None
        cache.arrived(expert)
        cache.release(expert)


def test_a_miss_then_a_wait_then_a_hit() -> None:
    cache = make_cache(2)
    assert cache.acquire(7) == (0, Outcome.MISS)
    assert cache.acquire(7) == (0, Outcome.WAIT)
    assert not cache.is_resident(7)
    cache.arrived(7)
    assert cache.is_resident(7)
    assert cache.acquire(7) == (0, Outcome.HIT)
    counters = cache.counters
    assert (counters.misses, counters.waits, counters.hits, counters.requests) == (1, 1, 1, 3)
    cache.check_integrity()


def test_an_expert_that_is_used_elsewhere_is_a_miss_and_takes_no_slot() -> None:
    cache = make_cache(2)
    fill(cache, 0)
    cache.pass_by(7)
    counters = cache.counters
    assert (counters.misses, counters.passed_by, counters.requests) == (2, 1, 2)
    assert cache.slot(7) is None
    assert (cache.num_free, cache.num_resident) == (1, 1)
    with pytest.raises(AssertionError, match="expert 0 is here"):
        cache.pass_by(0)
    cache.check_integrity()


def test_leased_and_loading_experts_stay() -> None:
    cache = make_cache(2)
    fill(cache, 0)
    assert cache.acquire(1) == (1, Outcome.MISS)
    cache.release(1)  # still loading
    assert cache.acquire(0) == (0, Outcome.HIT)
    assert cache.acquire(2) is None
    cache.check_integrity()
    cache.release(0)
    assert cache.acquire(2) == (0, Outcome.MISS)
    assert cache.slot(0) is None
    assert cache.counters.evictions == 1


def test_a_failed_fetch_gives_its_slot_back() -> None:
    cache = make_cache(1)
    cache.acquire(3)
    cache.failed(3)
    cache.check_integrity()
    assert cache.slot(3) is None
    assert cache.num_free == 1
    assert cache.acquire(4) == (0, Outcome.MISS)


def test_what_passes_through_leaves_the_others_where_they_are() -> None:
    cache = make_cache(4)
    fill(cache, 0, 1, 2, 3)
    for expert in (4, 5, 6, 7):
        assert cache.acquire(expert, keep=False) is not None
        cache.arrived(expert)
        cache.release(expert)
    assert [cache.is_resident(expert) for expert in range(4)] == [False, True, True, True]


def test_what_passes_through_is_no_use_of_what_is_here() -> None:
    cache = make_cache(2)
    fill(cache, 0, 1)
    assert cache.acquire(0, keep=False) == (0, Outcome.HIT)
    cache.release(0)
    fill(cache, 2)
    assert cache.slot(0) is None  # the oldest, as before


def test_lent_slots_are_out_of_use_until_given_back() -> None:
    cache = make_cache(4)
    fill(cache, 0, 1, 2)
    cache.acquire(1)
    assert sorted(cache.lend(9)) == [0, 2, 3]
    cache.check_integrity()
    assert (cache.num_free, cache.num_resident) == (0, 1)
    assert cache.acquire(5) is None
    cache.give_back([0, 2])
    cache.check_integrity()
    assert cache.acquire(5) is not None


def test_what_is_foreseen_counts_when_it_is_asked_for() -> None:
    cache = make_cache(2)
    assert cache.foresee(3) == 0
    assert not cache.is_resident(3)
    assert cache.acquire(3) == (0, Outcome.WAIT)
    cache.arrived(3)
    cache.release(3)
    assert cache.foresee(4) == 1
    cache.arrived(4)
    fill(cache, 5, 6)  # nobody asked for 4, which leaves with 3
    counters = cache.counters
    assert (counters.prefetched, counters.prefetch_used, counters.waits, counters.misses) == (2, 1, 1, 2)
    cache.check_integrity()


def test_residents_are_leased_at_once() -> None:
    cache = make_cache(3)
    fill(cache, 0)
    assert cache.foresee(1) is not None
    cache.arrived(1)
    cache.acquire(2)  # on its way
    assert cache.acquire_residents([3, 1, 0, 2]) == [1, 0]
    assert (cache.counters.hits, cache.counters.prefetch_used) == (2, 1)
    assert cache.acquire_residents([1]) == [1]
    assert cache.counters.prefetch_used == 1
    assert cache.acquire(4) is None  # all are leased
    cache.release(1)
    assert cache.acquire(4) is None
    cache.release(1)
    assert cache.acquire(4) is not None


def test_what_is_held_stays_and_was_not_asked_for() -> None:
    cache = make_cache(1)
    fill(cache, 0)
    cache.hold(0)
    assert cache.foresee(1) is None
    assert cache.counters.requests == 1
    cache.release(0)
    assert cache.foresee(1) == 0


def test_ending_a_lease_that_is_none_is_a_bug() -> None:
    cache = make_cache(1)
    fill(cache, 0)
    with pytest.raises(AssertionError, match="not leased"):
        cache.release(0)


@pytest.mark.parametrize("seed", range(20))
def test_random_histories_keep_the_tables_true(seed: int) -> None:
    chance = random.Random(seed)
    experts, slots = 12, chance.randint(1, 8)
    cache = make_cache(slots, experts)
    leases = [0] * experts
    loading: set[int] = set()
    for _ in range(400):
        expert = chance.randrange(experts)
        match chance.choice(["acquire", "acquire", "residents", "release", "arrive", "fail", "foresee", "hold"]):
            case "acquire":
                was_here, was_loading = cache.slot(expert) is not None, expert in loading
                leased = cache.acquire(expert, keep=chance.random() < 0.7)
                if leased is None:
                    assert not was_here
                    assert cache.num_free == 0
                    continue
                expected = Outcome.WAIT if was_loading else Outcome.HIT if was_here else Outcome.MISS
                assert leased[1] is expected
                leases[expert] += 1
                if leased[1] is Outcome.MISS:
                    loading.add(expert)
            case "residents":
                asked = chance.sample(range(experts), 4)
                here = [each for each in asked if cache.is_resident(each)]
                hits = cache.counters.hits
                assert cache.acquire_residents(asked) == here
                assert cache.counters.hits == hits + len(here)
                for each in here:
                    leases[each] += 1
            case "foresee" if cache.slot(expert) is None:
                if cache.foresee(expert) is not None:
                    loading.add(expert)
            case "hold" if cache.is_resident(expert):
                cache.hold(expert)
                leases[expert] += 1
            case "release" if leases[expert]:
                cache.release(expert)
                leases[expert] -= 1
            case "arrive" if loading:
                cache.arrived(loading.pop())
            case "fail" if loading:
                failed = loading.pop()
                cache.failed(failed)
                leases[failed] = 0
        cache.check_integrity()
        assert all(cache.slot(other) is not None for other in range(experts) if leases[other])
        assert cache.num_resident + cache.num_free + len(loading) == slots
