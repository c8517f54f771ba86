"""What a trace says, on traces whose answers can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from moeinf.analysis import activation_matrix, describe, distance, likeness, reuse
from test_simulate import make_trace

ROWS = [[[0, 1], [2, 3]], [[0, 4], [2, 5]], [[1, 5], [0, 1]], [[0, 1], [2, 3]]]


def test_a_matrix_counts_tokens_per_layer_and_expert() -> None:
    trace = make_trace(ROWS, [False] * 4, [0] * 4)
    assert activation_matrix(trace).tolist() == [[3, 3, 0, 0, 1, 1], [1, 1, 3, 2, 0, 1]]


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


def test_distance_is_none_for_the_same_and_all_for_nothing_in_common() -> None:
    one = np.array([[2.0, 0, 1], [0, 1, 1]])
    assert distance(one, 3 * one) == pytest.approx(0)
    assert distance(one, np.array([[0.0, 5, 0], [4, 0, 0]])) == pytest.approx(1)
    assert distance(one, np.zeros((2, 3))) == pytest.approx(1)


def test_likeness_tells_domains_apart() -> None:
    same, other = [[0, 1], [2, 3]], [[4, 5], [0, 1]]
    trace = make_trace([same, same, other, other], [False] * 4, [0, 1, 2, 3])
    found = likeness(list(trace.sequences()), ["a", "a", "b", "b"])
    assert found is not None
    assert found.within == pytest.approx(0)
    assert found.between == pytest.approx(1)
    assert likeness(list(trace.sequences()), ["a"] * 4) is None


def test_describe_puts_it_together() -> None:
    found = describe(make_trace(ROWS, [True, False, False, False], [0, 0, 1, 1]), ["a", "b"])
    assert (found.requests, found.tokens, found.likeness) == (2, 4, None)
    assert found.used_share == pytest.approx((6 + 7) / 2 / 12)
    assert [window for window, _ in found.even_reuse] == [1, 4, 16]
    assert [chance for _, chance in found.even_reuse] == pytest.approx([1 / 3, 65 / 81, 0.99848], abs=1e-5)
