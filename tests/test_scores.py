"""Scores: medians, bounds, and who said the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moeinf.rates import Rates
from moeinf.scores import Bound, Measured, Score, Spread, belady_hit_rate, bound_of, mark_same_tokens
from moeinf.systems import Counts, Run
from test_replay import make_trace

COUNTS = Counts(
    requests=40,
    hits=30,
    waits=2,
    missed_bytes=1000,
    read_bytes=1200,
    prefill_read_bytes=500,
    stall_s=0.4,
    prefill_stall_s=0.2,
    prefetched=5,
    prefetch_used=2,
    token_bytes=700,
    slots=6,
    memory={"budget": 9000},
    predictor="off",
    kernels="torch",
)
RUN = Run([[1, 2, 3]], [0.5], [0.1, 0.3], 8, 1.0, 5000, COUNTS)

HOST = Bound(pytest.approx(0.05), "host")  # type: ignore[arg-type]  # it compares as a number does


def score(*runs: Measured, system: str = "moeinf") -> Score:
    return Score(system, system, "cold", "25%", "lru", "off", 9000, 12000, 100, list(runs))


def at(*times: float, rates: Rates | None = None, tokens: list[list[int]] | None = None) -> Measured:
    return Measured(replace(RUN, token_s=list(times), tokens=tokens or RUN.tokens), rates or Rates())


def test_spread() -> None:
    assert Spread.of([3, 1, 2]) == Spread(2, 1, 3)


def test_rates_of_a_span_are_means_over_bytes() -> None:
    between = Rates(100, 300).between(Rates(300, None))
    assert between.disk == pytest.approx(150)
    assert between.memory == 300
    assert Rates().between(Rates()) == Rates()


def test_the_slower_of_disk_and_memory_bounds_a_token() -> None:
    # Two tokens: 500 bytes missed each, 700 of dense weights and 15 hits of 100 bytes read.
    assert bound_of(at(0.1, 0.3, rates=Rates(5000, 44000)), 100) == Bound(0.1, "disk")
    assert bound_of(at(0.1, 0.3, rates=Rates(50000, 44000)), 100) == HOST


def test_without_rates_there_is_no_bound() -> None:
    assert bound_of(at(0.1, 0.3), 100) is None
    assert bound_of(at(0.1, 0.3, rates=Rates(None, 44000)), 100) is None
    resident = Measured(replace(RUN, counts=replace(COUNTS, missed_bytes=0)), Rates(None, 44000))
    assert bound_of(resident, 100) == HOST
    assert bound_of(Measured(replace(RUN, counts=None), Rates(1, 1)), 100) is None


def test_medians_of_repetitions() -> None:
    rates = Rates(5000, 44000)
    found = score(at(0.1, 0.3, rates=rates), at(0.2, 0.6, rates=rates), at(0.1, 0.1, rates=rates)).to_dict()
    assert found["tpot_s"] == pytest.approx({"median": 0.2, "min": 0.1, "max": 0.4})
    assert found["decode_tokens_per_s"] == pytest.approx({"median": 5, "min": 2.5, "max": 10})
    assert found["prefill_tokens_per_s"]["median"] == 16
    assert found["token_s"] == {"p50": 0.1, "p95": 0.6}
    assert found["bound"] == {"tpot_s": 0.1, "by": "disk"}
    assert found["eta"] == pytest.approx(0.5)
    assert found["hit_rate"] == 0.75
    assert (found["belady_hit_rate"], found["belady_share"]) == (None, None)
    known = [replace(at(0.1), belady=belady) for belady in (0.9, None, 0.8, 1.0)]
    assert score(*known).belady_hit_rate == 0.9
    assert score(*known).belady_share == pytest.approx(0.75 / 0.9)
    assert found["bytes_per_token"] == {"missed": 500, "read": 600}
    assert found["repetitions"] == 3


def test_belady_has_the_same_requests_and_slots_and_what_warms_up_fills_the_cache() -> None:
    """One layer, one expert a token: warming up asks for 0 1 2, then 0 3 0 1 is measured."""
    rows = [[[expert]] for expert in (0, 1, 2, 0, 3, 0, 1)]
    routing = replace(make_trace(rows, size=4, top_k=1), sequence_id=np.array([0] * 3 + [1] * 4, np.int32))
    counts = replace(COUNTS, requests=4, slots=2)
    assert belady_hit_rate(routing, 1, counts) == 2 / 4  # 0 has stayed; 3 puts 2 out, or 1 when that was kept
    assert belady_hit_rate(routing, 1, replace(counts, slots=3)) == 3 / 4
    assert belady_hit_rate(routing, 0, replace(counts, requests=7)) == 2 / 7
    assert belady_hit_rate(routing, 1, replace(counts, requests=5)) is None


def test_a_system_that_failed_has_no_numbers() -> None:
    found = score().to_dict()
    assert {
        found[name] for name in ("tpot_s", "hit_rate", "belady_share", "bound", "eta", "peak_rss", "same_tokens")
    } == {None}


def test_transformers_says_what_the_right_tokens_are() -> None:
    ours, theirs = score(at(1), at(1, tokens=[[4]])), score(at(1), system="mmap")
    assert not mark_same_tokens([ours, theirs, failed := score(system="accelerate")])
    assert (ours.same_tokens, theirs.same_tokens, failed.same_tokens) == (False, True, None)
    assert mark_same_tokens([score(at(1)), theirs])
    assert mark_same_tokens([score(at(1, tokens=[[4]])), score(at(1, tokens=[[4]]))])
