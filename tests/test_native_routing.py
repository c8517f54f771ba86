"""The routing memory in C against the one in numpy, and who the neighbours are where tokens are equally like."""

from __future__ import annotations

import random

import numpy as np
import pytest

from moeinf import shared_library
from moeinf.native_routing import NativeRoutingMemory, make_routing_memory
from moeinf.policies.learned import NeighbourUsePolicy
from moeinf.routing_memory import AHEAD, RoutingMemory
from test_native import LIBRARY
from test_policies import SIZES, routing, run

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the native library is not built")


@pytest.fixture(autouse=True)
def _the_library_to_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_library, "built_library", lambda: LIBRARY)


@pytest.mark.parametrize("memory", [16, 40, 512])
@pytest.mark.parametrize("sizes", [(1,), (8, 8, 5, 8), (32,) * 3, (33, 128, 7), (300, 64)], ids=str)
def test_both_say_the_same(sizes: tuple[int, ...], memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts among single tokens, longer than the memory too; steps that break off; old tokens make room, often."""
    monkeypatch.setattr(RoutingMemory, "_MEMORY", memory)
    chance = random.Random(f"{sizes} {memory}")
    pools = [[chance.sample(range(size), chance.randint(0, min(size, 4))) for _ in range(20)] for size in sizes]
    native, plain = NativeRoutingMemory(sizes), RoutingMemory(sizes)
    asked = 0
    while plain._token < 10 * memory:
        length = chance.choice([1] * 20 + [2, 7, 2 * memory])
        for layer, pool in enumerate(pools[: chance.choice([1, *[len(sizes)] * 9])]):
            tokens = chance.choices(pool, k=length)
            native.observe(layer, tokens)
            plain.observe(layer, tokens)
            layers = chance.sample(range(len(sizes)), chance.randint(1, len(sizes)))
            if chance.random() < 0.8:
                continue
            asked += 1
            np.testing.assert_allclose(native.visits(layers), plain.visits(layers), rtol=1e-9)
            np.testing.assert_allclose(native.averages(layers), plain.averages(layers), rtol=1e-9)
            assert (native._likeness == plain._likeness).all()
            if plain.has_past:
                np.testing.assert_allclose(native.followed(layers), plain.followed(layers), rtol=1e-9)
                assert native.followed(layers).shape == (AHEAD, len(layers), plain.width)
    assert asked > 10
    assert plain._begin > 0


@pytest.mark.parametrize("kind", [NativeRoutingMemory, RoutingMemory])
def test_of_those_equally_like_the_newer_ones_are_neighbours(kind: type[RoutingMemory]) -> None:
    memory = kind([40])
    for expert in range(40):
        memory.observe(0, [[expert]])
    followers = [1 / 16 if expert >= 24 else 0 for expert in range(40)]
    assert memory.followed([0])[0, 0, :40].tolist() == pytest.approx(followers)


@pytest.mark.parametrize("slots", [3, 9, 20])
def test_both_find_as_much(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    history = routing(300, seed=slots)
    native = NeighbourUsePolicy(SIZES)
    assert isinstance(native.memory, NativeRoutingMemory)
    monkeypatch.setattr(shared_library, "built_library", lambda: None)
    plain = NeighbourUsePolicy(SIZES)
    assert type(plain.memory) is type(make_routing_memory(SIZES)) is RoutingMemory
    assert run(native, history, slots).counters == run(plain, history, slots).counters


def test_an_answer_is_not_changed_by_the_next_one() -> None:
    memory = NativeRoutingMemory([8])
    for expert in (1, 2, 1):
        memory.observe(0, [[expert]])
    answers = [memory.followed([0]), memory.visits([0]), memory.averages([0])]
    copies = [answer.copy() for answer in answers]
    memory.observe(0, [[3]])
    memory.visits([0])
    assert all((answer == copy).all() for answer, copy in zip(answers, copies, strict=True))
