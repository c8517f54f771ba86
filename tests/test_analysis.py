"""What a trace says, on traces whose answers can be counted by hand, and against slow definitions."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from moeinf import analysis
from moeinf.analysis import (
    Floats,
    Predictability,
    activation_matrix,
    compare_domains,
    describe,
    distance,
    predictability,
    reuse,
    shares,
)
from moeinf.trace import NO_EXPERT, Trace
from test_simulate import make_trace
from traces import make_identity, random_trace
from traces import make_trace as make_sequence

ROWS = [[[0, 1], [2, 3]], [[0, 4], [2, 5]], [[1, 5], [0, 1]], [[0, 1], [2, 3]]]


def test_a_matrix_counts_tokens_per_layer_and_expert() -> None:
    trace = make_trace(ROWS, [False] * 4, [0] * 4)
    assert activation_matrix(trace).tolist() == [[3, 3, 0, 0, 1, 1], [1, 1, 3, 2, 0, 1]]


@pytest.mark.parametrize("seed", range(10))
def test_a_matrix_of_uneven_layers_counts_what_is_there(seed: int) -> None:
    trace = random_trace(seed)
    counted = np.zeros((len(trace.layer_sizes), max(trace.layer_sizes)))
    for token, layer, place in np.argwhere(trace.experts != NO_EXPERT):
        counted[layer, trace.experts[token, layer, place]] += 1
    assert np.array_equal(activation_matrix(trace), counted)


def test_shares_add_up_where_there_was_a_choice() -> None:
    found = shares(np.array([[[3.0, 1, 0], [0, 0, 0]]]))
    assert found.tolist() == [[[0.75, 0.25, 0], [0, 0, 0]]]


def test_reuse_looks_as_many_tokens_ahead_as_it_says() -> None:
    trace = make_trace(ROWS, [False] * 4, [0] * 4)
    # by layer, of the experts of tokens 0, 1 and 2: {0} {} {1}, and {2} {} {}
    assert reuse([trace], 1) == pytest.approx(3 / 12)
    # within 2 of tokens 0 and 1: {0, 1} {0}, and {2} {2}
    assert reuse([trace], 2) == pytest.approx(5 / 8)
    assert reuse([trace], 4) == 0.0


def test_requests_do_not_reuse_each_other_s_experts() -> None:
    trace = make_trace(ROWS, [False] * 4, [0, 1, 2, 3])
    assert reuse(list(trace.sequences()), 1) == 0.0


def test_predictions_by_hand() -> None:
    found = predictability([make_trace(ROWS, [False] * 4, [0] * 4)])
    # named for tokens 1, 2 and 3 by use so far, the lower number first: {0,1} {0,1} {0,1}, and {2,3} {2,3} {0,2}
    # by the token before: {0,1} {0,4} {1,5}, and {2,3} {2,5} {0,1}
    assert found == Predictability(own=6 / 12, previous=3 / 12, chance=4 / 12, tokens=3)


def slow_predictability(requests: list[Trace], judged: set[int]) -> tuple[float, float]:
    """(own, previous), token by token; `judged` numbers tokens over all requests."""
    own = previous = asked = number = 0
    for request in requests:
        for token in range(request.num_tokens):
            number += 1
            if token == 0 or number - 1 not in judged:
                continue
            for layer, k in enumerate(request.identity.top_k):
                rows = [set(row.tolist()) - {NO_EXPERT} for row in request.experts[: token + 1, layer]]
                counts = {expert: sum(expert in row for row in rows[:-1]) for expert in range(300)}
                size = request.layer_sizes[layer]
                named = sorted(range(size), key=lambda expert: (-counts[expert], expert))[:k]
                own += len(rows[-1] & set(named))
                previous += len(rows[-1] & rows[-2])
                asked += len(rows[-1])
    return own / asked, previous / asked


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("most", [20_000, 9])
def test_predictions_are_those_of_the_slow_definition(seed: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analysis, "_JUDGED_TOKENS", most)
    trace = random_trace(seed)
    requests = list(trace.sequences())
    spacing = max(1, -(-trace.num_tokens // most))
    found = predictability(requests)
    if all(request.num_tokens < 2 for request in requests):
        assert found is None
    else:
        assert found is not None
        slow = slow_predictability(requests, set(range(0, trace.num_tokens, spacing)))
        assert (found.own, found.previous) == pytest.approx(slow)
        assert found.tokens <= most


def test_a_request_that_repeats_itself_can_be_foreseen_whole() -> None:
    found = predictability([make_trace([ROWS[0]] * 5, [False] * 5, [0] * 5)])
    assert found is not None
    assert (found.own, found.previous, found.tokens) == (1, 1, 4)


def test_distance_is_none_for_the_same_and_all_for_nothing_in_common() -> None:
    one = np.array([[2.0, 0, 1], [0, 1, 1]])
    assert distance(one, 3 * one) == pytest.approx(0)
    assert distance(one, np.array([[0.0, 5, 0], [4, 0, 0]])) == pytest.approx(1)
    assert distance(one, np.zeros((2, 3))) == pytest.approx(1)


def test_domains_are_told_apart() -> None:
    same, other = [[0, 1], [2, 3]], [[4, 5], [0, 1]]
    requests = list(make_trace([same, same, other, other], [False] * 4, [0, 1, 2, 3]).sequences())
    found = compare_domains(requests, ["b", "b", "a", "a"])
    assert (found.names, found.requests) == (("a", "b"), (2, 2))
    assert found.distances == pytest.approx(np.array([[0, 1], [1, 0]]))
    assert found.activation[1].tolist() == [[0.5, 0.5, 0, 0, 0, 0], [0, 0, 0.5, 0.5, 0, 0]]
    assert found.others == pytest.approx((1, 1))
    assert found.likeness is not None
    assert (found.likeness.within, found.likeness.between) == pytest.approx((0, 1))


def test_what_has_no_pairs_has_no_distance() -> None:
    requests = list(make_trace(ROWS, [False] * 4, [0, 1, 2, 3]).sequences())
    one = compare_domains(requests, ["a"] * 4)
    assert one.likeness is None
    assert np.isnan(one.others[0])
    lonely = compare_domains(requests[:2], ["a", "b"])
    assert lonely.likeness is None
    assert np.isnan(np.diag(lonely.distances)).all()


def slow_distances(matrices: list[Floats], domains: list[str]) -> tuple[Floats, list[float], list[float]]:
    """(mean over pairs, all distances within domains, all between), pair by pair."""
    names = sorted(set(domains))
    pairs: dict[tuple[str, str], list[float]] = {}
    within: list[float] = []
    between: list[float] = []
    for (one, mine), (other, yours) in itertools.combinations(zip(matrices, domains, strict=True), 2):
        apart = distance(one, other)
        (within if mine == yours else between).append(apart)
        for pair in {(mine, yours), (yours, mine)}:
            pairs.setdefault(pair, []).append(apart)
    means = [[np.mean(pairs.get((one, other), [np.nan])) for other in names] for one in names]
    return np.array(means), within, between


@pytest.mark.parametrize("seed", range(5))
def test_sums_of_directions_stand_for_all_pairs(seed: int) -> None:
    identity = make_identity((8, 4, 1), (3, 2, 1))
    requests = [make_sequence(identity, tokens, seed=10 * seed + tokens) for tokens in range(1, 12)]
    domains = list("abcabbabcbd")
    found = compare_domains(requests, domains)
    slow, within, between = slow_distances([activation_matrix(request) for request in requests], domains)
    assert found.distances == pytest.approx(slow, nan_ok=True)
    assert found.likeness is not None
    assert found.likeness.within == pytest.approx(np.mean(within))
    assert found.likeness.between == pytest.approx(np.mean(between))
    to_others = [slow[0, other] * number for other, number in ((1, 5), (2, 2), (3, 1))]
    assert found.others[0] == pytest.approx(sum(to_others) / 8)


def test_the_largest_domains_are_those_of_most_requests() -> None:
    requests = [make_sequence(seed=seed) for seed in range(6)]
    found = compare_domains(requests, list("abbccc")).largest(2)
    assert (found.names, found.requests) == (("b", "c"), (2, 3))
    assert found.distances.shape == (2, 2)
    assert found.activation.shape == (2, 2, 8)


def test_describe_puts_it_together() -> None:
    found = describe(make_trace(ROWS * 5, [True] * 20, [0] * 18 + [1] * 2), ["a", "b"])
    assert (found.requests, found.tokens, found.likeness) == (2, 20, None)
    assert found.used_share == pytest.approx((4 + 5 + 3 + 4) / 2 / 12)
    assert [window for window, _ in found.even_reuse] == [1, 4, 16]
    assert [chance for _, chance in found.even_reuse] == pytest.approx([1 / 3, 65 / 81, 0.99848], abs=1e-5)


def test_nothing_is_said_of_windows_that_no_request_fills() -> None:
    found = describe(make_trace(ROWS, [True, False, False, False], [0, 0, 0, 0]))
    assert [window for window, _ in found.reuse] == [1]
    alone = describe(make_trace(ROWS, [False] * 4, [0, 1, 2, 3]))
    assert (alone.reuse, alone.predictability) == ((), None)


def test_what_routers_foresaw_is_judged_where_they_were_asked() -> None:
    trace = make_sequence(foreseen=True)
    assert trace.foreseen is not None
    asked = trace.foreseen.copy()
    asked[:2] = NO_EXPERT  # the prompt
    asked[:, 0] = trace.experts[:, 0]  # the first layer, which does not count
    asked[2, 1, :2] = trace.experts[2, 1, [1, 0]]  # all right, in another order
    asked[3, 1] = [trace.experts[3, 1, 0], NO_EXPERT, NO_EXPERT]  # half of them
    asked[4, 1, :2] = sorted(set(range(4)) - set(trace.experts[4, 1].tolist()))  # none
    (request,) = dataclasses.replace(trace, foreseen=asked).sequences()
    found = predictability([request, make_sequence()])
    assert found is not None
    assert found.router == 3 / 6
    assert predictability([make_sequence()]).router is None  # type: ignore[union-attr]
