"""Sizes: what is replayed of a trace, and whether the recommended size is what it is said to be."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from moeinf.policies import POLICIES
from moeinf.settings import DEFAULT_POLICY
from moeinf.simulate import BELADY, Replay, events, replay
from moeinf.sizing import GOOD_HIT_RATE, find_size, ranked, shorten, slots_of
from moeinf.trace import Array, Trace
from traces import make_identity


def skewed_trace(lengths: list[int], *, prompt: int = 2, experts: int = 24, seed: int = 0) -> Trace:
    """Requests of so many tokens through two layers, where a few experts do most of the work."""
    chance = np.random.default_rng(seed)
    weight = 1 / np.arange(1, experts + 1) ** 1.2
    tokens = sum(lengths)
    rows = [chance.choice(experts, 2, replace=False, p=weight / weight.sum()) for _ in range(2 * tokens)]
    position = np.concatenate([np.arange(length) for length in lengths]).astype(np.int32)
    return Trace(
        make_identity((experts, experts), (2, 2)),
        np.array(rows, np.int16).reshape(tokens, 2, 2),
        None,
        np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
        position,
        position < prompt,
    )


def test_the_recommended_size_is_the_smallest_that_is_good() -> None:
    trace = skewed_trace([40] * 4)
    found = find_size(trace, expert_bytes=1000)
    assert found.advice is not None
    history, sizes = list(events(trace)), trace.layer_sizes
    at = found.advice.at
    assert at == replay(history, sizes, DEFAULT_POLICY, at.slots)
    assert at.hit_rate >= GOOD_HIT_RATE
    assert found.advice.is_good
    rates = {slots: replay(history, sizes, DEFAULT_POLICY, slots).hit_rate for slots in range(2, at.slots)}
    assert max(rates.values()) < GOOD_HIT_RATE
    half = found.advice.at_half
    assert half == replay(history, sizes, DEFAULT_POLICY, at.slots // 2)
    assert (found.advice.size_bytes, found.advice.half_bytes) == (1000 * at.slots, 1000 * half.slots)
    decoded = 4 * 38
    assert (found.decoded_tokens, at.requests) == (decoded, decoded * 4)
    assert found.advice.read_bytes_per_token == pytest.approx((at.requests - at.hits) * 1000 / decoded)
    assert found.advice.half_read_bytes_per_token == pytest.approx((half.requests - half.hits) * 1000 / decoded)


def test_every_policy_is_replayed_at_the_same_sizes() -> None:
    found = find_size(skewed_trace([30, 30]), 1)
    sizes = {slots_of(skewed_trace([1]), share) for share in (0.05, 0.1, 0.15, 0.25, 0.35, 0.5, 0.75)}
    assert {(one.policy, one.slots) for one in found.replays} == {
        (policy, slots) for policy in (*POLICIES, BELADY) for slots in sizes
    }
    assert (found.requests, found.all_requests) == (2, 2)


def test_where_no_size_is_good_the_recommended_one_finds_what_all_experts_would() -> None:
    trace = skewed_trace([12])
    history, sizes = list(events(trace)), trace.layer_sizes
    found = find_size(trace, 1)
    assert found.advice is not None
    assert not found.advice.is_good
    at = found.advice.at
    assert at.slots < 48
    assert at.hits == replay(history, sizes, DEFAULT_POLICY, 48).hits
    assert at.hits > replay(history, sizes, DEFAULT_POLICY, at.slots - 1).hits


def test_where_the_smallest_size_is_good_it_is_recommended() -> None:
    trace = skewed_trace([300], experts=2)
    found = find_size(trace, 1)
    assert found.advice is not None
    assert found.advice.at.slots == found.advice.at_half.slots + 2 == 4
    busy = Trace(make_identity((8,), (2,)), np.tile(np.array([0, 1], np.int16), (50, 1, 1)), None, *rows_of(50))
    small = find_size(busy, 1)
    assert small.advice is not None
    assert small.advice.at.slots == small.advice.at_half.slots == 2


def rows_of(tokens: int) -> tuple[Array, Array, Array]:
    return np.zeros(tokens, np.int32), np.arange(tokens, dtype=np.int32), np.zeros(tokens, np.bool_)


def test_where_nothing_is_decoded_there_is_nothing_to_recommend() -> None:
    found = find_size(skewed_trace([2, 2]), 1)
    assert (found.advice, found.decoded_tokens) == (None, 0)


def test_a_short_trace_is_kept_and_a_long_one_thinned_out() -> None:
    trace = skewed_trace([10] * 20)
    assert shorten(trace, 800) is trace
    part = shorten(trace, 200)
    requests = list(part.sequences())
    assert [request.num_tokens for request in requests] == [10] * 5
    expected = list(trace.sequences())[::4]
    for request, whole in zip(requests, expected, strict=True):
        assert np.array_equal(request.experts, whole.experts)
        assert np.array_equal(request.is_prefill, whole.is_prefill)
    found = find_size(trace, 1, most_uses=200)
    assert (found.requests, found.all_requests, found.decoded_tokens) == (5, 20, 40)


@pytest.mark.parametrize(("lengths", "kept"), [([500], [50]), ([10, 10, 400], [10]), ([400, 10, 10], [50])])
def test_of_a_long_request_only_the_beginning_is_replayed(lengths: list[int], kept: list[int]) -> None:
    part = shorten(skewed_trace(lengths), 200)
    assert [request.num_tokens for request in part.sequences()] == kept


def test_what_was_decoded_is_kept_and_what_routers_foresaw() -> None:
    """Of a prompt that has no room, its last tokens."""
    long = skewed_trace([400])
    is_prefill = np.arange(400) < 380
    foreseen = np.where(is_prefill[:, None, None], -1, long.experts).astype(np.int16)
    long = dataclasses.replace(long, is_prefill=is_prefill, foreseen=foreseen)
    part = shorten(long, 200)
    assert part.num_tokens == 50
    assert (part.position[0], int((~part.is_prefill).sum())) == (350, 20)
    assert np.array_equal(part.experts, long.experts[350:])
    assert part.foreseen is not None
    assert np.array_equal(part.foreseen, foreseen[350:])


def test_policies_are_ranked_by_what_they_find() -> None:
    def at(policy: str, slots: int, hits: int) -> Replay:
        return Replay(policy, slots, slots / 10, 100, hits, 0)

    replays = [at("lru", 2, 10), at("lru", 4, 80), at("lfu", 2, 40), at("lfu", 4, 60), at(BELADY, 2, 1), at("a", 2, 50)]
    assert ranked(replays) == [BELADY, "a", "lfu", "lru"]
