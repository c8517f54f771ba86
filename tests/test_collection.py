"""Matrices of past requests: what is alike, what is kept, what is expected of the present one."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from moeinf.collection import PHASES, ActivationCollection, RequestCounter

SIZES = (4, 6, 3)
WIDEST = max(SIZES)


def matrix(seed: int, tokens: int = 50) -> NDArray[np.int32]:
    """A request that prefers experts by its seed, a prompt and an answer."""
    chance = np.random.default_rng(seed)
    counts = np.zeros((PHASES, len(SIZES), WIDEST), np.int32)
    for layer, size in enumerate(SIZES):
        likes = chance.dirichlet(np.full(size, 0.3))
        counts[:, layer, :size] = [chance.multinomial(tokens, likes) for _ in range(PHASES)]
    return counts


def collection(*seeds: int, capacity: int = 9) -> ActivationCollection:
    made = ActivationCollection(SIZES, capacity=capacity)
    for seed in seeds:
        made.add(matrix(seed))
    return made


def cosine(one: NDArray[np.int32], other: NDArray[np.int32]) -> float:
    norms = np.linalg.norm(one) * np.linalg.norm(other)
    return float((one * other).sum() / norms) if norms else 0.0


def test_likeness_is_the_mean_cosine_of_the_layers_that_have_run() -> None:
    others, new = [matrix(seed).sum(axis=0) for seed in range(5)], matrix(9).sum(axis=0)
    for layers_run in (1, 2, 3):
        begun = new.copy()
        begun[layers_run:] = 0
        expected = [np.mean([cosine(begun[layer], other[layer]) for layer in range(layers_run)]) for other in others]
        found = collection(*range(5)).likeness(begun.astype(np.float32))
        assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_a_full_collection_replaces_the_one_most_alike() -> None:
    full = collection(0, 1, 2, capacity=3)
    full.fresh.clear()
    again = matrix(1, tokens=80)
    full.add(again)
    assert full.fresh == {1}
    assert len(full) == 3
    assert np.array_equal(full.matrices[[0, 2]], [matrix(0), matrix(2)])
    assert np.array_equal(full.matrices[1], again)
    renewed = ActivationCollection(SIZES, full.matrices)
    probe = matrix(5).sum(axis=0).astype(np.float32)
    assert np.allclose(renewed.likeness(probe), full.likeness(probe))
    assert np.allclose(renewed.popularity(), full.popularity())


def test_what_is_expected_is_what_the_nearest_requests_did() -> None:
    known = collection(0, 1, 2, 3)
    total = matrix(2).sum(axis=0).astype(np.float32)
    shares = total / total.sum(axis=1, keepdims=True)
    expected = known.expected_shares(total)
    assert expected is not None
    assert np.abs(expected - shares).max() < 0.1
    assert expected.sum(axis=1).tolist() == pytest.approx([1.0] * len(SIZES), abs=1e-5)
    weights = np.exp(20 * (known.likeness(total) - 1))
    mixture = sum(
        weight * matrix(seed).sum(axis=0) / matrix(seed).sum(axis=(0, 2))[:, None]
        for seed, weight in enumerate(weights / weights.sum())
    )
    assert np.allclose(expected, mixture, atol=1e-5)


def test_popularity_is_the_mean_share() -> None:
    shares = [matrix(seed).sum(axis=0) / matrix(seed).sum(axis=(0, 2))[:, None] for seed in range(3)]
    assert np.allclose(collection(0, 1, 2).popularity(), np.mean(shares, axis=0), atol=1e-6)


def test_without_a_good_match_a_request_is_foreseen_from_itself() -> None:
    one_sided = np.zeros((PHASES, len(SIZES), WIDEST), np.int32)
    one_sided[0, :, 0] = 30
    for known in (ActivationCollection(SIZES), ActivationCollection(SIZES, one_sided[None])):
        counter = RequestCounter(SIZES, known)
        counter.count(1, [1, 1, 1, 2], 4, is_prefill=True)
        assert counter.expected_shares(1).tolist() == [0, 0.75, 0.25, 0, 0, 0]
        assert not counter.expected_shares(2).any()
        counter.count(1, [2, 2, 2, 2], 4, is_prefill=True)
        assert counter.expected_shares(1).tolist() == [0, 0.375, 0.625, 0, 0, 0]  # at once
    assert not ActivationCollection(SIZES).popularity().any()


def test_a_request_is_counted_by_phase_and_joins_the_collection_at_its_end() -> None:
    counter = RequestCounter(SIZES, ActivationCollection(SIZES))
    counter.begin_request()
    assert not counter.collection.fresh
    for layer, size in enumerate(SIZES):
        counter.count(layer, np.array([0, 0, 1, size]), 2, is_prefill=True)  # `size` stands for no expert
    for _ in range(7):
        for layer in range(len(SIZES)):
            counter.count(layer, [2, SIZES[layer], 0], 1, is_prefill=False)
    counter.begin_request()
    assert counter.collection.fresh == {0}
    assert counter.collection.matrices.tolist() == [
        [[[2, 1, 0, 0, 0, 0]] * len(SIZES), [[7, 0, 7, 0, 0, 0]] * len(SIZES)],
    ]


def test_short_requests_say_too_little() -> None:
    counter = RequestCounter(SIZES, ActivationCollection(SIZES))
    counter.count(0, [0, 1], 7, is_prefill=True)
    counter.begin_request()
    counter.begin_request()
    assert (len(counter.collection), counter.collection.fresh) == (0, set())


def test_what_is_expected_follows_the_request() -> None:
    known = ActivationCollection(SIZES)
    for expert in (0, 1):
        one_sided = np.zeros((PHASES, len(SIZES), WIDEST), np.int32)
        one_sided[0, :, expert] = 30
        known.add(one_sided)
    for favourite, other in ((0, 1), (1, 0)):
        counter = RequestCounter(SIZES, known)
        counter.count(0, [favourite], 1, is_prefill=False)
        assert counter.expected_shares(2)[favourite] > 0.99
        for _ in range(9):
            counter.count(0, [other], 1, is_prefill=False)
        assert counter.expected_shares(2)[other] > 0.99
