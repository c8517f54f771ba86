"""Who is asked what comes next, and what is said from what came before."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

import moeinf
from moeinf.collection import ActivationCollection, RequestCounter
from moeinf.gate import GatePredictor
from moeinf.predictors import Added, CombinedPredictor, EamPredictor, NoPredictor
from moeinf.routing_memory import RoutingMemory


@pytest.mark.parametrize("experts", ["50%", "100%"])
@pytest.mark.parametrize("prefetch", ["auto", "eam", "gate", "off"])
def test_who_predicts(tiny: str, prefetch: str, experts: str) -> None:
    expected: dict[str, list[type]] = {
        "gate": [GatePredictor],
        "eam": [EamPredictor],
        "auto": [NoPredictor, CombinedPredictor, EamPredictor] if experts == "50%" else [NoPredictor],
        "off": [NoPredictor],
    }
    with moeinf.load(tiny, experts=experts, prefetch=prefetch) as engine:
        predictors = engine.runtime._prefetcher._predictors
        assert [type(predictor) for predictor in predictors.values()] == expected[prefetch]
    assert NoPredictor().predict(0) == []


SIZES, TOP_K = (6, 4, 5), (2, 1, 2)


def sequence(tokens: int, seed: int) -> list[list[list[int]]]:
    """What each layer chooses, token by token."""
    chance = random.Random(seed)
    return [[chance.sample(range(size), k) for size, k in zip(SIZES, TOP_K, strict=True)] for _ in range(tokens)]


def eam(collection: ActivationCollection | None = None) -> tuple[EamPredictor, RequestCounter]:
    counter = RequestCounter(SIZES, collection or ActivationCollection(SIZES))
    return EamPredictor(SIZES, TOP_K, counter), counter


def test_what_came_before_is_foreseen_when_it_comes_again() -> None:
    """Of a sequence that is played again and again every next choice is named, over the end of a token too."""
    predictor, _ = eam()
    assert predictor.predict(0) == []
    tokens = sequence(12, seed=1)
    for token in tokens * 3:
        for layer, experts in enumerate(token):
            predictor.observe(layer, [experts])
    right = asked = 0
    for place, token in enumerate(tokens):
        for layer, experts in enumerate(token):
            predictor.observe(layer, [experts])
            is_last = layer + 1 == len(SIZES)
            coming = tokens[(place + 1) % len(tokens)][0] if is_last else token[layer + 1]
            right += len(set(coming) & set(predictor.predict(layer)))
            asked += len(coming)
    assert right > 0.9 * asked


def test_requests_count_a_fifth() -> None:
    """Beside what followed tokens like this one; who has a chance of 0.35 and more is named, the likeliest first."""
    one_sided = np.zeros((2, 3, 6), np.int32)
    one_sided[0, :, 3] = 50
    predictor, counter = eam(ActivationCollection(SIZES, one_sided[None]))
    decided = 0
    for token in sequence(40, seed=3):
        for layer, experts in enumerate(token):
            counter.count(layer, experts, 1, is_prefill=False)
            predictor.observe(layer, [experts])
            following = (layer + 1) % 3
            if not predictor._memory.has_past:
                continue
            alike = 0.8 * predictor._memory.followed([following])[0, 0, : SIZES[following]]
            chances = alike + 0.2 * TOP_K[following] * counter.expected_shares(following)
            expected = [place for place in np.argsort(-chances, kind="stable") if chances[place] >= 0.35]
            assert predictor.predict(layer) == expected
            decided += bool(np.any((alike < 0.35) & (chances >= 0.35)))
    assert decided > 5


def test_a_memory_that_others_feed_is_not_fed_twice() -> None:
    memory = RoutingMemory(SIZES)
    predictor = EamPredictor(SIZES, TOP_K, RequestCounter(SIZES, ActivationCollection(SIZES)), memory)
    own, _ = eam()
    for token in sequence(9, seed=5) * 2:
        for layer, experts in enumerate(token):
            memory.observe(layer, [experts])
            predictor.observe(layer, [experts])
            own.observe(layer, [experts])
            assert predictor.predict(layer) == own.predict(layer)


def test_where_one_cannot_tell_the_other_is_asked() -> None:
    class Says:
        def __init__(self, *answers: list[int]) -> None:
            self.answers = answers

        def observe(self, layer: int, tokens: Sequence[Sequence[int]]) -> None:
            pass

        def predict(self, layer: int, added: Added | None = None) -> list[int]:
            return self.answers[layer]

    first, second = Says([1], []), Says([2], [3])
    both = CombinedPredictor(first, second)
    assert (both.predict(0), both.predict(1)) == ([1], [3])
