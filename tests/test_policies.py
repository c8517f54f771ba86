"""Eviction policies: each against its definition, computed the slow way, and all against the contract of the cache."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from moeinf.cache import ExpertCache, Outcome
from moeinf.errors import UsageError
from moeinf.policies import POLICIES, Policy, make_policy
from moeinf.policies.belady import BeladyPolicy
from moeinf.policies.plain import LruPolicy, RandomPolicy

SIZES = (8, 8, 5, 8)
"""Experts of the layers of a small model; one layer has fewer."""
TOP_K = 2
LAYERS = len(SIZES)
LAYER_OF = [layer for layer, size in enumerate(SIZES) for _ in range(size)]


def nobody(_: int) -> bool:
    return False


def routing(tokens: int, seed: int) -> list[tuple[int, list[int]]]:
    """(layer, chosen experts) in the order in which a model runs; choices tend to come back."""
    chance = random.Random(seed)
    first = [sum(SIZES[:layer]) for layer in range(LAYERS)]
    last: list[list[int]] = [[] for _ in SIZES]
    history = []
    for _ in range(tokens):
        for layer, size in enumerate(SIZES):
            pool = list(range(first[layer], first[layer] + size))
            if not last[layer] or chance.random() < 0.5:
                last[layer] = chance.sample(pool, TOP_K)
            history.append((layer, last[layer]))
    return history


class Record:
    """What happened so far, kept in full, for definitions to be computed from."""

    def __init__(self) -> None:
        self.history: list[tuple[int, list[int]]] = []
        self.resident: list[int] = []

    def visits(self, layer: int) -> list[list[int]]:
        return [chosen for visited, chosen in self.history if visited == layer]

    def sat_out(self, expert: int) -> int:
        """Visits of its layer since it was chosen."""
        visits = self.visits(LAYER_OF[expert])
        return next(count for count, chosen in enumerate(reversed(visits)) if expert in chosen)

    def tokens_since(self, expert: int) -> int:
        """Tokens begun since the one that chose it."""
        place = max(number for number, (_, chosen) in enumerate(self.history) if expert in chosen)
        return (len(self.history) - 1) // LAYERS - place // LAYERS

    def uses(self, expert: int) -> int:
        return sum(expert in chosen for _, chosen in self.history)

    def wait(self, expert: int) -> int:
        """Layers until its layer runs next: 1 for the next one."""
        return (LAYER_OF[expert] - self.history[-1][0] - 1) % LAYERS + 1

    def average(self, expert: int, half_life: float) -> float:
        keep = 0.5 ** (1 / half_life)
        value = 0.0
        for chosen in self.visits(LAYER_OF[expert]):
            value = value * keep + (1 - keep) * (expert in chosen)
        return value


def layer_lru(record: Record, expert: int) -> tuple[float, ...]:
    return record.tokens_since(expert), record.wait(expert)


def llru(record: Record, expert: int) -> tuple[float, ...]:
    return record.sat_out(expert), record.wait(expert)


def least_stale(record: Record, expert: int) -> tuple[float, ...]:
    return float(record.tokens_since(expert) > 0), record.wait(expert)


def lfu(record: Record, expert: int) -> tuple[float, ...]:
    return -round(record.average(expert, 256), 12), record.wait(expert)


def lfru(record: Record, expert: int) -> tuple[float, ...]:
    return -record.uses(expert) / (record.sat_out(expert) + 1), record.wait(expert)


def activation(record: Record, expert: int) -> tuple[float, ...]:
    layer = LAYER_OF[expert]
    share = record.uses(expert) / (TOP_K * len(record.visits(layer)))
    return -(share + 1e-3) * (1 - layer / LAYERS), record.wait(expert)


def expected_use(record: Record, expert: int) -> tuple[float, ...]:
    chance = 0.7 * record.average(expert, 6) + 0.3 * record.average(expert, 64)
    return (record.wait(expert) + LAYERS * (1 / max(chance, 1e-4) - 1),)


DEFINITIONS: dict[str, Callable[[Record, int], tuple[float, ...]]] = {
    "layer-lru": layer_lru,
    "llru": llru,
    "least-stale": least_stale,
    "lfu": lfu,
    "lfru": lfru,
    "activation": activation,
    "expected-use": expected_use,
}
"""Of the residents that are not leased, the one with the largest value goes."""


@pytest.mark.parametrize("slots", [TOP_K + 1, 9, 20])
@pytest.mark.parametrize("name", sorted(DEFINITIONS))
def test_the_victim_is_the_one_that_the_definition_names(name: str, slots: int) -> None:
    policy, record, define = make_policy(name, SIZES), Record(), DEFINITIONS[name]
    evicted = 0
    for layer, chosen in routing(60, seed=slots):
        record.history.append((layer, chosen))
        policy.observe(layer, [chosen])
        for expert in sorted(chosen, key=lambda expert: expert not in record.resident):
            if expert in record.resident:
                policy.use(expert)
                continue
            if len(record.resident) == slots:
                free = [resident for resident in record.resident if resident not in chosen]
                values = {resident: define(record, resident) for resident in free}
                victim = policy.victim(chosen.__contains__)
                assert victim is not None
                assert values[victim] == pytest.approx(max(values.values()), rel=1e-9)
                policy.remove(victim)
                record.resident.remove(victim)
                evicted += 1
            policy.insert(expert, keep=True)
            record.resident.append(expert)
    assert evicted > 10


def belady_hits(events: Sequence[Sequence[int]], slots: int) -> int:
    """By looking at the whole future at every miss."""
    resident: set[int] = set()
    hits = 0
    for number, wanted in enumerate(events):
        hits += sum(expert in resident for expert in wanted)
        future = events[number + 1 :]

        def due(expert: int, future: Sequence[Sequence[int]] = future) -> int:
            return next((place for place, later in enumerate(future) if expert in later), len(future))

        missing = [expert for expert in wanted if expert not in resident]
        while len(resident) + len(missing) > slots:
            resident.remove(max(resident - set(wanted), key=due))
        resident |= set(missing)
    return hits


def run(policy: Policy, events: Sequence[tuple[int, list[int]]], slots: int, experts: int = sum(SIZES)) -> ExpertCache:
    cache = ExpertCache(experts, slots, policy)
    for layer, chosen in events:
        cache.observe(layer, [chosen])
        for expert in sorted(chosen, key=lambda expert: not cache.is_resident(expert)):
            leased = cache.acquire(expert)
            assert leased is not None
            if leased[1] is Outcome.MISS:
                cache.arrived(expert)
        for expert in chosen:
            cache.release(expert)
        cache.check_integrity()
    return cache


@pytest.mark.parametrize("slots", [TOP_K, 7, 20])
def test_belady_looks_ahead(slots: int) -> None:
    history = routing(40, seed=slots)
    events = [chosen for _, chosen in history]
    assert run(BeladyPolicy(events), history, slots).counters.hits == belady_hits(events, slots)


@pytest.mark.parametrize("slots", [7, 20])
@pytest.mark.parametrize("name", sorted(POLICIES))
def test_nobody_beats_the_clairvoyant(name: str, slots: int) -> None:
    history = routing(80, seed=1)
    bound = run(BeladyPolicy([chosen for _, chosen in history]), history, slots).counters.hits
    assert 0 < run(make_policy(name, SIZES), history, slots).counters.hits <= bound


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_keeps_the_contract(name: str) -> None:
    """Whatever is leased, held or passes through: a victim is resident and free, or there is none."""
    chance = random.Random(name)
    policy = make_policy(name, SIZES)
    resident: set[int] = set()
    for step in range(3000):
        layer = step % LAYERS
        pool = [expert for expert, its in enumerate(LAYER_OF) if its == layer]
        if chance.random() < 0.02:
            policy.begin_request()
        policy.observe(layer, [chance.sample(pool, TOP_K) for _ in range(chance.choice([1, 1, 1, 5]))])
        expert = chance.choice(pool)
        if expert in resident:
            policy.use(expert)
        else:
            policy.insert(expert, keep=chance.random() < 0.7)
            resident.add(expert)
        leased = {expert for expert in resident if chance.random() < 0.4}
        victim = policy.victim(leased.__contains__)
        assert (victim is None) == (resident <= leased)
        if victim is not None:
            assert victim in resident - leased
            if len(resident) > 6:
                policy.remove(victim)
                resident.remove(victim)


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"random"}))
def test_what_only_passes_through_goes_first(name: str) -> None:
    policy = make_policy(name, SIZES)
    policy.observe(0, [[1, 2]])
    policy.insert(1, keep=True)
    policy.insert(2, keep=False)
    assert policy.victim(nobody) == 2
    policy.use(2)
    policy.insert(3, keep=False)
    assert policy.victim(nobody) == 3
    policy.remove(3)
    assert policy.victim(nobody) in (1, 2)


def test_lru_evicts_what_was_used_longest_ago() -> None:
    policy = LruPolicy(SIZES)
    for expert in (1, 2, 3):
        policy.insert(expert, keep=True)
    policy.use(1)
    assert policy.victim(nobody) == 2
    assert policy.victim(lambda expert: expert == 2) == 3
    policy.remove(2)
    assert policy.victim(nobody) == 3
    assert policy.victim(lambda _: True) is None


def test_random_evicts_all_alike_and_the_same_every_time() -> None:
    victims = []
    for _ in range(2):
        policy = RandomPolicy(SIZES)
        for expert in range(4):
            policy.insert(expert, keep=True)
        victims.append([policy.victim(nobody) for _ in range(400)])
    assert victims[0] == victims[1]
    assert all(70 < victims[0].count(expert) < 130 for expert in range(4))


def test_a_request_s_own_matrix_is_forgotten() -> None:
    policy = make_policy("activation", SIZES)
    policy.observe(0, [[0, 1]])
    policy.insert(0, keep=True)
    policy.observe(3, [[25, 26]])
    policy.insert(25, keep=True)
    policy.insert(24, keep=True)
    assert policy.victim(nobody) == 24
    policy.begin_request()
    policy.observe(3, [[24, 26]])
    assert policy.victim(nobody) == 25


def test_an_unknown_policy_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="policy 'psychic' is not known") as caught:
        make_policy("psychic", SIZES)
    assert caught.value.hint == f"choose one of: {', '.join(sorted(POLICIES))}"


@pytest.mark.parametrize("name", ["expected-use", "neighbour-use"])
def test_a_single_layer_is_ranked_too(name: str) -> None:
    """Its hot experts have the lowest numbers, which are evicted first where all rank alike."""
    chance = random.Random(0)
    events = [(0, chance.sample(range(8) if chance.random() < 0.8 else range(8, 32), 2)) for _ in range(1000)]
    hits, others = (run(make_policy(each, (32,)), events, 10, 32).counters.hits for each in (name, "random"))
    assert hits > 1.1 * others
