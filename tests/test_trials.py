"""Trying ways in turn: who is tried for how long, who wins, and when it is all done again."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest

from moeinf.trials import (
    _LEAST_ASKS,
    _LEAST_TRIAL_TOKENS,
    _MOST_TRIAL_TOKENS,
    _SETTLED_TOKENS,
    _TRIAL_TOKENS,
    Trials,
)

LAYERS = 3


def run(
    trials: Trials,
    tokens: int,
    costs: dict[str, tuple[float, float]],
    *,
    missed: Callable[[], int] = lambda: 0,
    other_s: Callable[[], float] = lambda: 5.0,
) -> list[str]:
    """The ways of so many tokens, of which a layer spends (seconds foreseeing, seconds stalled); `missed` tells how
    many experts a token misses, each of which stalls it for a second more, `other_s` how long the rest of it takes.
    """
    ways = []
    for _ in range(tokens):
        ways.append(trials.way)
        experts = missed()
        for _ in range(LAYERS):
            foreseeing_s, stalled_s = costs[trials.way]
            trials.record(foreseeing_s, stalled_s + experts / LAYERS)
        trials.token_ended(other_s() + LAYERS * sum(costs[trials.way]) + experts, experts)
    return ways


@pytest.mark.parametrize("best", ["off", "eam", "gate"])
def test_the_way_that_costs_least_is_found_and_kept(best: str) -> None:
    trials = Trials(["off", "gate", "eam"])
    stalls = {"off": 1.2, "gate": 1.2, "eam": 1.2, best: 0.9 if best == "off" else 0.75}
    costs = {way: (0.0 if way == "off" else 0.1, stalls[way]) for way in ("off", "gate", "eam")}
    tried = run(trials, 2 * _LEAST_TRIAL_TOKENS, costs)
    assert tried == ["off", "gate"] * _LEAST_TRIAL_TOKENS  # in turn
    assert trials.is_settled == (best == "gate")
    if best != "gate":
        assert run(trials, 2 * _LEAST_TRIAL_TOKENS, costs) == ["off", "eam"] * _LEAST_TRIAL_TOKENS
    assert trials.is_settled
    assert run(trials, _SETTLED_TOKENS, costs) == [best] * _SETTLED_TOKENS
    assert run(trials, 3, costs) == ["off", "gate", "off"]  # from the beginning


def test_a_disturbed_token_excludes_nobody() -> None:
    """It may make each miss seem to cost so much that what is left of a token is less than nothing."""
    trials = Trials(["off", "gate", "eam"])
    for token_s, missed in [(0.030, 12), (0.020, 9), (0.030, 12), (0.020, 9), (0.030, 12), (0.200, 10)]:
        trials.record(0.0002, 0.001)
        trials.token_ended(token_s, missed)
    assert not trials.is_settled


def test_what_wins_again_stays_longer() -> None:
    trials = Trials(["off", "gate"])
    costs = {"off": (0.0, 1.0), "gate": (0.1, 0.6)}
    for times in (1, 2, 4, 8, 16, 16):
        expected = times * _SETTLED_TOKENS
        run(trials, 2 * _LEAST_TRIAL_TOKENS, costs)
        assert run(trials, expected, costs) == ["gate"] * expected
    run(trials, 2 * _LEAST_TRIAL_TOKENS, {"off": (0.0, 1.0), "gate": (0.1, 1.2)})
    assert run(trials, _SETTLED_TOKENS, costs) == ["off"] * _SETTLED_TOKENS
    assert not trials.is_settled


@pytest.mark.parametrize("better", ["off", "gate"])
def test_what_tokens_miss_is_nobodys_fault(better: str) -> None:
    """Tokens differ by far more than ways do, for they miss more experts or fewer."""
    for seed in range(20):
        chance = random.Random(seed)
        trials = Trials(["off", "gate"])
        costs = {"off": (0.0, 1.0), "gate": (0.1, 1.0 if better == "off" else 0.7)}
        run(trials, 2 * _MOST_TRIAL_TOKENS, costs, missed=lambda c=chance: c.randrange(20))  # type: ignore[misc]
        assert trials.way == better


def test_one_token_in_a_dozen_decides_nothing() -> None:
    """Another program had the core meanwhile."""
    for seed in range(20):
        chance = random.Random(seed)
        trials = Trials(["off", "gate"])
        run(
            trials,
            2 * _MOST_TRIAL_TOKENS,
            {"off": (0.0, 1.0), "gate": (0.1, 0.6)},
            other_s=lambda c=chance: c.choice([5.0] * 11 + [100.0]),  # type: ignore[misc]
        )
        assert trials.way == "gate"


def test_reads_that_slow_the_maths_count() -> None:
    """A way with less waiting loses if its tokens take longer all the same."""
    trials = Trials(["off", "gate"])
    run(
        trials,
        2 * _LEAST_TRIAL_TOKENS,
        {"off": (0.0, 1.0), "gate": (0.1, 0.7)},
        other_s=lambda: 5.0 if trials.way == "off" else 7.0,
    )
    assert trials.is_settled
    assert trials.way == "off"


def test_close_ways_are_tried_for_longer_and_no_longer() -> None:
    chance = random.Random(1)
    trials = Trials(["off", "gate"])
    costs = {"off": (0.0, 1.0), "gate": (0.1, 0.9)}
    run(trials, 2 * _TRIAL_TOKENS, costs, other_s=lambda: chance.uniform(0, 20))
    assert not trials.is_settled
    run(trials, 2 * (_MOST_TRIAL_TOKENS - _TRIAL_TOKENS), costs, other_s=lambda: chance.uniform(0, 20))
    assert trials.is_settled
    assert trials.way == "off"


@pytest.mark.parametrize(("stalled_s", "best"), [(0.9, "gate"), (1.85, "off")])
def test_a_lead_that_may_be_chance_takes_more_tokens_to_see(stalled_s: float, best: str) -> None:
    """Where those do not show it either, nothing is foreseen."""
    trials = Trials(["off", "gate"])
    times = itertools.cycle([5.0, 5.0, 7.0, 7.0, 9.0, 9.0])  # alike for both ways
    costs = {"off": (0.0, 2.0), "gate": (0.1, stalled_s)}
    run(trials, 2 * _TRIAL_TOKENS, costs, other_s=lambda: next(times))
    assert not trials.is_settled
    run(trials, 2 * (_MOST_TRIAL_TOKENS - _TRIAL_TOKENS), costs, other_s=lambda: next(times))
    assert trials.is_settled
    assert trials.way == best


def test_what_cannot_win_is_out_at_once() -> None:
    """Foreseeing that takes longer than all the waiting without it."""
    trials = Trials(["off", "gate", "eam"])
    costs = {"off": (0.0, 1.0), "eam": (0.1, 0.7), "gate": (1.5, 0.0)}
    tried = run(trials, 4 * _TRIAL_TOKENS, costs)
    assert tried.count("gate") == -(-_LEAST_ASKS // LAYERS)
    assert tried[-_TRIAL_TOKENS:] == ["eam"] * _TRIAL_TOKENS


def test_a_slow_first_ask_decides_nothing() -> None:
    trials = Trials(["off", "gate"])
    run(trials, 1, {"off": (0.0, 1.0)})
    trials.record(50.0, 0.0)
    for _ in range(LAYERS - 1):
        trials.record(0.1, 0.0)
    trials.token_ended(50.2, 0)
    assert run(trials, 2, {"off": (0.0, 1.0), "gate": (0.1, 0.0)}) == ["off", "gate"]


def test_where_there_is_one_way_it_is_gone() -> None:
    trials = Trials(["gate"])
    assert run(trials, 600, {"gate": (9.0, 9.0)}) == ["gate"] * 600


def test_what_is_far_behind_is_out_after_a_few_tokens() -> None:
    """Also the way that foresees nothing."""
    chance = random.Random(1)
    for costs, best in (
        ({"off": (0.0, 6.0), "gate": (0.1, 0.6)}, "gate"),
        ({"off": (0.0, 1.0), "gate": (0.9, 4.0), "eam": (0.9, 4.0)}, "off"),
    ):
        trials = Trials(list(costs))
        tried = run(trials, 40, costs, other_s=lambda: 5 + chance.uniform(0, 0.3))
        turns = [way for other in list(costs)[1:] for way in ["off", other] * 3]
        assert tried == turns + [best] * (40 - len(turns))


def test_one_slow_token_of_the_best_keeps_others_in() -> None:
    trials = Trials(["off", "gate"])
    costs = {"off": (0.0, 3.0), "gate": (0.1, 0.6)}
    times = iter([5.0, 5.0, 5.0, 15.0, *[5.0] * 20])
    tried = run(trials, 12, costs, other_s=lambda: next(times))
    assert tried == ["off", "gate"] * 6


def test_what_was_best_before_is_gone_first() -> None:
    trials = Trials(["off", "gate"], "gate")
    costs = {"off": (0.0, 1.0), "gate": (0.1, 0.6)}
    assert trials.is_settled
    assert run(trials, _SETTLED_TOKENS, costs) == ["gate"] * _SETTLED_TOKENS
    assert run(trials, 2 * _LEAST_TRIAL_TOKENS, costs) == ["off", "gate"] * _LEAST_TRIAL_TOKENS
    assert run(trials, 2 * _SETTLED_TOKENS, costs) == ["gate"] * 2 * _SETTLED_TOKENS  # the best again
    assert not Trials(["off", "gate"], "eam").is_settled
