"""What followed past tokens, found again the slow way: `neighbour-use` against its definition, over the full history.

Who the neighbours are is open if the last of them and the first that is none are equally like. The definition here
insists that they differ: seeds are chosen such that they do.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from moeinf import shared_library
from moeinf.policies import make_policy
from moeinf.policies.learned import NeighbourUsePolicy as Neighbours
from moeinf.routing_memory import AHEAD, RoutingMemory
from test_native import LIBRARY
from test_policies import LAYER_OF, LAYERS, SIZES, TOP_K, routing, run

FIRST = [sum(SIZES[:layer]) for layer in range(LAYERS)]
KEEP = [float(keep) for keep in RoutingMemory._KEEP.ravel()]


@pytest.fixture(autouse=True, params=["native", "numpy"])
def _computed_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "native" and LIBRARY is None:
        pytest.skip("the native library is not built")
    monkeypatch.setattr(shared_library, "built_library", lambda: LIBRARY if request.param == "native" else None)


class History:
    """Every run of a layer so far, kept in full, and what is to be expected after it by the definition."""

    def __init__(self) -> None:
        self.chosen: list[list[Sequence[int]]] = [[] for _ in SIZES]
        """Of every layer, for one token after the other."""
        self.runs: list[tuple[int, int]] = []
        """Layers in the order in which they ran, each with the newest token it then ran for."""
        self.outdated = set(range(LAYERS))
        self.in_use: list[list[float]] = [[] for _ in SIZES]

    def observe(self, layer: int, choices: Sequence[Sequence[int]]) -> None:
        self.chosen[layer].extend(choices)
        self.runs.append((layer, len(self.chosen[layer]) - 1))
        self.outdated.add(layer)

    def average(self, expert: int) -> float:
        """b: the mean of the averages of past choices."""
        values = [0.0 for _ in KEEP]
        for chosen in self.chosen[LAYER_OF[expert]]:
            for number, keep in enumerate(KEEP):
                values[number] = values[number] * keep + (1 - keep) * (expert in chosen)
        return sum(values) / len(values)

    def likeness(self, age: int) -> float:
        """s(t - age) / m: what each layer chose for what was then its newest token, and `age` tokens before."""
        same, most = 0.0, 0.0
        for layer, token in self.runs:
            now, then = self.chosen[layer][token], self.chosen[layer][token - age] if token >= age else []
            same = same * RoutingMemory._FADE ** (1 / LAYERS) + sum(expert in then for expert in now)
            most = most * RoutingMemory._FADE ** (1 / LAYERS) + len(now)
        return same / most

    def neighbours(self) -> list[tuple[int, float]]:
        """Tokens and their weights. The newest is itself one of those remembered, but it is not compared."""
        newest = self.runs[-1][1]
        ages = range(1, min(newest, RoutingMemory._MEMORY - 1) + 1)
        ranked = sorted(((self.likeness(age), newest - age) for age in ages), reverse=True)
        near, others = ranked[: RoutingMemory._NEIGHBOURS], ranked[RoutingMemory._NEIGHBOURS :]
        assert not others or near[-1][0] - others[0][0] > 1e-9, "here it is open who the neighbours are"
        return [(token, math.exp(RoutingMemory._SHARPNESS * likeness)) for likeness, token in near]

    def ranks(self, layer: int) -> list[float]:
        near = self.neighbours()
        experts = range(FIRST[layer], FIRST[layer] + SIZES[layer])
        return [LAYERS * self.visits_without(expert, near) for expert in experts]

    def ranks_in_use(self) -> list[float]:
        """Of all experts, when somebody asks for a victim: layers that have run are ranked anew two at a time at
        least.
        """
        if len(self.outdated) >= 2:
            for layer in self.outdated:
                self.in_use[layer] = self.ranks(layer)
            self.outdated.clear()
        return [rank for ranks in self.in_use for rank in ranks]

    def visits_without(self, expert: int, near: list[tuple[int, float]]) -> float:
        average = self.average(expert)
        if not near:
            return 1 / max(average, RoutingMemory._LEAST) - 1
        chosen, newest = self.chosen[LAYER_OF[expert]], self.runs[-1][1]
        last = len(chosen) - 1
        unused, wait, shares = 1.0, 0.0, []
        for ahead in range(1, AHEAD + 1):
            hits = 0.0
            for token, weight in near:
                follower = token + ahead if last == newest else token + ahead - 1
                hits += weight * (expert in chosen[min(follower, last)])
            shares.append(hits / sum(weight for _, weight in near))
            trust = float(RoutingMemory._TRUST.ravel()[ahead - 1])
            unused *= 1 - ((1 - trust) * average + trust * shares[-1])
            wait += unused if ahead < AHEAD else 0.0
        later = (1 - RoutingMemory._LATER_TRUST) * average + RoutingMemory._LATER_TRUST * sum(shares) / len(shares)
        return wait + unused / max(later, RoutingMemory._LEAST)


def remember(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RoutingMemory, "_MEMORY", tokens)


def ranks(policy: Neighbours, layer: int) -> list[float]:
    return [float(rank) for rank in policy.ranks([layer])[0, : SIZES[layer]]]


@pytest.mark.parametrize("memory", [16, 32, 512])
def test_ranks_are_what_the_definition_gives(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 remembered tokens all are neighbours, of 32 the likest, and 512 are more than there are."""
    remember(memory, monkeypatch)
    policy, history, chance = Neighbours(SIZES), History(), random.Random(memory)
    at_once = later = 0
    for layer, chosen in routing(50, seed=memory):
        policy.observe(layer, [chosen])
        history.observe(layer, [chosen])
        for other in range(LAYERS):
            if chance.random() < 0.4:
                at_once += other == layer
                later += other != layer
                assert ranks(policy, other) == pytest.approx(history.ranks(other), rel=1e-9)
    assert min(at_once, later) > 50


@pytest.mark.parametrize("slots", [TOP_K + 1, 9, 20])
def test_the_victim_is_the_one_that_the_definition_names(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    remember(32, monkeypatch)
    policy, history = Neighbours(SIZES), History()
    resident: set[int] = set()
    evicted = 0
    for layer, chosen in routing(45, seed=slots):
        policy.observe(layer, [chosen])
        history.observe(layer, [chosen])
        for expert in sorted(chosen, key=lambda expert: expert not in resident):
            if expert in resident:
                policy.use(expert)
                continue
            if len(resident) == slots:
                victim = policy.victim(chosen.__contains__)
                assert victim is not None
                expected = history.ranks_in_use()
                free = resident.difference(chosen)
                scores = {expert: expected[expert] + (LAYER_OF[expert] - layer - 1) % LAYERS + 1 for expert in free}
                assert scores[victim] == pytest.approx(max(scores.values()), rel=1e-9)
                policy.remove(victim)
                resident.remove(victim)
                evicted += 1
            policy.insert(expert, keep=True)
            resident.add(expert)
    assert evicted > 10


def tokens(count: int, seed: int) -> list[list[list[int]]]:
    """Choices by layer, then by token."""
    events = routing(count, seed)
    return [[chosen for layer, chosen in events if layer == wanted] for wanted in range(LAYERS)]


def test_of_a_prompt_the_last_token_is_compared_and_all_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that runs for many tokens runs once. So s fades once, compares the newest token only, and moves by as
    many tokens as there are; the averages, and what followed past tokens, are as if they had come one by one. Only the
    layer that ran last is read: what is one visit ahead for one that has a whole prompt yet to run is left open here.
    """
    remember(32, monkeypatch)
    policy, history, chance, choices = Neighbours(SIZES), History(), random.Random(10), tokens(100, seed=10)
    begin = 0
    while begin < 100:
        end = begin + chance.choice([1, 1, 2, 7])
        for layer in range(LAYERS):
            policy.observe(layer, choices[layer][begin:end])
            history.observe(layer, choices[layer][begin:end])
            assert ranks(policy, layer) == pytest.approx(history.ranks(layer), rel=1e-9)
        begin = end


def test_how_a_prompt_was_cut_is_forgotten() -> None:
    """Every token leaves a tenth of the difference: after 14 all is as if the prompt had come one by one."""
    at_once, one_by_one, history, choices = Neighbours(SIZES), Neighbours(SIZES), History(), tokens(64, seed=6)
    for token in range(64):
        for layer in range(LAYERS):
            one_by_one.observe(layer, choices[layer][token : token + 1])
            history.observe(layer, choices[layer][token : token + 1])
    for begin, end in [(0, 50), *((token, token + 1) for token in range(50, 64))]:
        for layer in range(LAYERS):
            at_once.observe(layer, choices[layer][begin:end])
    for layer in range(LAYERS):
        assert ranks(at_once, layer) == pytest.approx(history.ranks(layer), rel=1e-9)
        assert ranks(one_by_one, layer) == pytest.approx(history.ranks(layer), rel=1e-9)


def test_without_past_tokens_the_averages_are_all_there_is() -> None:
    policy = Neighbours(SIZES)
    never = LAYERS * (1 / RoutingMemory._LEAST - 1)
    chosen = LAYERS * (1 / (1 - sum(KEEP) / len(KEEP)) - 1)
    for layer in range(LAYERS):
        assert ranks(policy, layer) == pytest.approx([never] * SIZES[layer], rel=1e-9)
        policy.observe(layer, [[FIRST[layer] + 1, FIRST[layer] + 3]])
        expected = [never, chosen, never, chosen, *[never] * (SIZES[layer] - 4)]
        assert ranks(policy, layer) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("slots", [9, 14])
def test_it_finds_more_than_averages_when_a_long_sequence_comes_back(slots: int) -> None:
    chance = random.Random(slots)
    pools = [range(first, first + size) for first, size in zip(FIRST, SIZES, strict=True)]
    sequence = [(layer, chance.sample(pool, TOP_K)) for _ in range(40) for layer, pool in enumerate(pools)]
    averages = run(make_policy("expected-use", SIZES), sequence * 5, slots).counters.hits
    assert run(Neighbours(SIZES), sequence * 5, slots).counters.hits > 1.2 * averages
