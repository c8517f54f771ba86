"""Trying ways in turn: who is tried for how long, who wins, and when it is all done again."""

from __future__ import annotations

import pytest

from moeinf.trials import _GLANCE_TOKENS, _LEAST_ASKS, _SETTLED_TOKENS, _TRIAL_TOKENS, _WORTH, Trials

LAYERS = 3


def run(trials: Trials, tokens: int, costs: dict[str, tuple[float, float]]) -> list[str]:
    """The ways of so many tokens, of which a layer spends (seconds foreseeing, seconds stalled)."""
    ways = []
    for _ in range(tokens):
        ways.append(trials.way)
        for _ in range(LAYERS):
            trials.record(*costs[trials.way])
        trials.token_ended()
    return ways


@pytest.mark.parametrize("best", ["off", "eam", "gate"])
def test_the_way_that_costs_least_is_found_and_kept(best: str) -> None:
    trials = Trials(["off", "eam", "gate"])
    stalls = {"off": 1.2, "eam": 1.1, "gate": 1.1, best: 0.9 if best == "off" else 0.75}
    costs = {way: (0.0 if way == "off" else 0.1, stalls[way]) for way in ("off", "eam", "gate")}
    tried = run(trials, 3 * _TRIAL_TOKENS, costs)
    assert [tried.count(way) for way in costs] == [_TRIAL_TOKENS] * 3
    assert tried[:6] == ["off", "eam", "gate"] * 2  # in turn
    assert trials.is_settled
    assert run(trials, _SETTLED_TOKENS, costs) == [best] * _SETTLED_TOKENS
    assert run(trials, 3, costs) == ["off", "eam", "gate"]  # from the beginning


def test_what_wins_again_stays_longer() -> None:
    trials = Trials(["off", "gate"])
    costs = {"off": (0.0, 1.0), "gate": (0.1, 0.6)}
    for expected in (_SETTLED_TOKENS, 2 * _SETTLED_TOKENS, 4 * _SETTLED_TOKENS):
        run(trials, 2 * _TRIAL_TOKENS, costs)
        assert run(trials, expected, costs) == ["gate"] * expected
    run(trials, 2 * _TRIAL_TOKENS, {"off": (0.0, 1.0), "gate": (0.1, 1.2)})
    assert run(trials, _SETTLED_TOKENS, costs) == ["off"] * _SETTLED_TOKENS
    assert not trials.is_settled


def test_a_small_gain_is_not_worth_it() -> None:
    for stall_s, chosen in ((_WORTH - 0.11, "gate"), (_WORTH - 0.09, "off")):
        trials = Trials(["off", "gate"])
        run(trials, 2 * _TRIAL_TOKENS, {"off": (0.0, 1.0), "gate": (0.1, stall_s)})
        assert trials.way == chosen


def test_what_cannot_win_is_out_at_once() -> None:
    """Foreseeing that takes longer than all the waiting without it."""
    trials = Trials(["off", "eam", "gate"])
    costs = {"off": (0.0, 1.0), "eam": (0.1, 0.7), "gate": (1.5, 0.0)}
    tried = run(trials, 4 * _TRIAL_TOKENS, costs)
    assert tried.count("gate") == -(-_LEAST_ASKS // LAYERS)
    assert tried[-_TRIAL_TOKENS:] == ["eam"] * _TRIAL_TOKENS


def test_what_is_far_behind_is_out_soon() -> None:
    trials = Trials(["off", "eam", "gate"])
    costs = {"off": (0.0, 5.0), "eam": (0.1, 1.2), "gate": (0.1, 0.9)}
    tried = run(trials, 2 * _TRIAL_TOKENS + _GLANCE_TOKENS, costs)
    assert [tried.count(way) for way in costs] == [_GLANCE_TOKENS, _TRIAL_TOKENS, _TRIAL_TOKENS]
    assert trials.way == "gate"


def test_a_slow_first_ask_decides_nothing() -> None:
    trials = Trials(["off", "gate"])
    run(trials, 1, {"off": (0.0, 1.0)})
    trials.record(50.0, 0.0)
    for _ in range(LAYERS - 1):
        trials.record(0.1, 0.0)
    trials.token_ended()
    assert run(trials, 2, {"off": (0.0, 1.0), "gate": (0.1, 0.0)}) == ["off", "gate"]


def test_where_there_is_one_way_it_is_gone() -> None:
    trials = Trials(["gate"])
    assert run(trials, 600, {"gate": (9.0, 9.0)}) == ["gate"] * 600
