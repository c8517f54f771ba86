"""Replays: they go through the cache as the engine does, and find what the engine finds."""

from __future__ import annotations

import itertools
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import moeinf
from moeinf import cli
from moeinf.errors import UsageError
from moeinf.manifest import Source
from moeinf.policies import POLICIES
from moeinf.simulate import BELADY, Event, events, replay, replay_all
from moeinf.trace import ModelIdentity, Trace
from moeinf.tracefile import write_trace

PROMPT = torch.randint(5, 100, (12,), generator=torch.Generator().manual_seed(3)).tolist()


def make_trace(rows: list[list[list[int]]], is_prefill: list[bool], sequences: list[int]) -> Trace:
    """`rows`: per token and layer the experts, of a model of 2 layers of 6 experts, 2 per token."""
    identity = ModelIdentity("tiny", "", Source(""), (6, 6), (2, 2))
    positions = [sequences[:place].count(sequence) for place, sequence in enumerate(sequences)]
    return Trace(
        identity,
        np.array(rows, np.int16),
        None,
        np.array(sequences, np.int32),
        np.array(positions, np.int32),
        np.array(is_prefill),
    )


def test_a_prompt_is_one_step_and_every_other_token_one_of_its_own() -> None:
    rows = [[[0, 1], [2, 3]], [[1, 4], [3, 5]], [[0, 5], [1, 2]], [[2, 3], [0, 1]]]
    trace = make_trace(rows, [True, True, False, False], [0, 0, 0, 1])
    assert list(events(trace)) == [
        Event(0, ((0, 1), (1, 4)), True, True),
        Event(1, ((8, 9), (9, 11)), True, False),
        Event(0, ((0, 5),), False, False),
        Event(1, ((7, 8),), False, False),
        Event(0, ((2, 3),), False, True),
        Event(1, ((6, 7),), False, False),
    ]


def test_only_decoding_counts_and_the_experts_of_one_token_do_not_meet_each_other() -> None:
    rows = [[[0, 1], [0, 1]], [[0, 1], [0, 2]], [[0, 1], [2, 3]]]
    trace = make_trace(rows, [True, False, False], [0, 0, 0])
    found = replay(list(events(trace)), trace.identity.layer_sizes, "lru", 12)
    assert (found.requests, found.hits, found.hit_rate) == (8, 6, 0.75)
    assert (found.slots, found.fraction, found.evictions) == (12, 1.0, 0)


def decoded(*chosen: tuple[int, ...]) -> list[Event]:
    """Tokens of a model of one layer."""
    return [Event(0, (experts,), is_prefill=False, begins=False) for experts in chosen]


def test_no_expert_makes_room_for_another_of_its_own_token() -> None:
    assert replay(decoded((0, 1), (2, 0), (1, 2)), (6,), "lru", 2).hit_rate == pytest.approx(2 / 6)
    assert replay(decoded(*[(0, 1)] * 4), (6,), "lru", 2).hit_rate == 0.75


@pytest.mark.parametrize("seed", range(20))
def test_belady_is_the_best_that_any_victims_give(seed: int) -> None:
    chance = np.random.default_rng(seed)
    chosen = [tuple(chance.choice(6, 2, replace=False).tolist()) for _ in range(14)]
    best = best_hits(tuple(chosen), slots=3)
    assert replay(decoded(*chosen), (6,), BELADY, 3).hits == best
    assert replay(decoded(*chosen), (6,), "lru", 3).hits <= best


def best_hits(chosen: tuple[tuple[int, ...], ...], slots: int) -> int:
    """Most hits that any choice of victims gives, by trying all."""

    @cache
    def best(number: int, resident: frozenset[int]) -> int:
        if number == len(chosen):
            return 0
        asked = frozenset(chosen[number])
        others = sorted(resident - asked)
        kept = min(len(others), slots - len(asked))
        after = (asked | frozenset(some) for some in itertools.combinations(others, kept))
        return len(asked & resident) + max(best(number + 1, held) for held in after)

    return best(0, frozenset())


@pytest.mark.parametrize("experts", ["2", "40%", "100%"])
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_simulated_and_measured_hits_agree(tiny: str, policy: str, experts: str) -> None:
    history: list[Event] = []
    with moeinf.load(tiny, policy=policy, experts=experts, prefetch="off", kernels="torch") as engine:
        engine.generation_config.eos_token_id = None
        forward, begins = engine.runtime.forward, True

        def spy(layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            nonlocal begins
            choices = tuple(tuple(layer * 8 + expert for expert in row) for row in index.tolist())
            history.append(Event(layer, choices, len(choices) > 1, begins))
            begins = False
            return forward(layer, hidden, index, weights)

        engine.runtime.forward = spy  # type: ignore[assignment,method-assign]
        engine.runtime._window = 1  # a replay brings the experts of a prompt one by one
        for prompt in (PROMPT, PROMPT[:5]):
            begins = True
            session = engine.session()
            session.generate(prompt, moeinf.Sampling(max_tokens=30, temperature=0))
        measured = engine.stats().experts
        slots = engine.plan.slots
    half = next(place for place, event in enumerate(history) if event.begins and place)
    both = replay(history, (8, 8), policy, slots)
    first = replay(history[:half], (8, 8), policy, slots)
    assert (both.hits - first.hits, both.requests - first.requests) == (
        measured.decode_hits,
        measured.decode_requests,
    )
    assert measured.decode_hits > 0 or slots == 2


def test_several_processes_find_what_one_finds() -> None:
    chance = np.random.default_rng(0)
    rows = [[chance.choice(6, 2, replace=False).tolist() for _ in range(2)] for _ in range(50)]
    trace = make_trace(rows, [False] * 50, [0] * 50)
    jobs = [(policy, slots) for policy in (*POLICIES, BELADY) for slots in (3, 9)]
    assert list(replay_all(trace, jobs, 2)) == list(replay_all(trace, jobs, 1))


def test_too_few_slots_and_unknown_policies_are_refused() -> None:
    history = [Event(0, ((0, 1),), False, True)]
    with pytest.raises(UsageError, match="1 slots are fewer than the 2 experts"):
        replay(history, (6, 6), "lru", 1)
    with pytest.raises(UsageError, match="policy 'psychic' is not known") as caught:
        replay(history, (6, 6), "psychic", 2)
    assert "belady" in str(caught.value.hint)


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    rows = [[[0, 1], [2, 3]], [[0, 1], [2, 4]], [[0, 5], [2, 3]]]
    path = tmp_path / "some.safetensors"
    write_trace(make_trace(rows, [False] * 3, [0] * 3), path)
    return path


def test_the_command_prints_a_table(trace_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["simulate", str(trace_file), "--policy", "lru,lfu,belady", "--slots", "12,3", "--fraction", "50%"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == (
        "HIT RATE AT  3 (25%)  6 (50%)  12 (100%)\n"
        "belady       33.3%    50.0%    50.0%\n"
        "lfu          16.7%    50.0%    50.0%\n"
        "lru          16.7%    50.0%    50.0%\n"
    )


def test_the_command_prints_json(trace_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulate", str(trace_file), "--policy", "lru", "--slots", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "schema": 1,
        "results": [
            {
                "trace": str(trace_file),
                "policy": "lru",
                "slots": 3,
                "fraction": 0.25,
                "requests": 12,
                "hits": 2,
                "hit_rate": 2 / 12,
                "evictions": 7,
            }
        ],
    }


@pytest.mark.parametrize(
    ("arguments", "slots"),
    [
        ([], [2, 3, 6, 9]),
        (["--fraction", "10,25,50,75%"], [2, 3, 6, 9]),
        (["--fraction", "25%,50%"], [3, 6]),
        (["--fraction", " 0.1% , 100 "], [2, 12]),
        (["--slots", "12,2,5,2"], [2, 5, 12]),
        (["--slots", "3", "--fraction", "25%,33.4%"], [3, 4]),
    ],
)
def test_sizes_are_numbers_or_shares(
    trace_file: Path, arguments: list[str], slots: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """A share is never below what a layer asks for at once."""
    assert cli.main(["simulate", str(trace_file), "--policy", "lru", "--json", *arguments]) == 0
    assert [found["slots"] for found in json.loads(capsys.readouterr().out)["results"]] == slots


def test_all_policies_are_replayed_and_belady_is_on_top(trace_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulate", str(trace_file), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    policies = list(dict.fromkeys(found["policy"] for found in results))
    assert policies[0] == BELADY
    assert sorted(policies) == sorted([*POLICIES, BELADY])
    means = [np.mean([found["hit_rate"] for found in results if found["policy"] == name]) for name in policies]
    assert means[1:] == sorted(means[1:], reverse=True)


def test_several_traces_have_a_table_and_a_panel_each(
    trace_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, plot = tmp_path / "other.safetensors", tmp_path / "rates.svg"
    other.write_bytes(trace_file.read_bytes())
    arguments = ["simulate", str(trace_file), str(other), "--policy", "lru", "--slots", "3", "--plot", str(plot)]
    assert cli.main(arguments) == 0
    table = "HIT RATE AT  3 (25%)\nlru          16.7%\n"
    assert capsys.readouterr().out == f"{trace_file}\n{table}{other}\n{table}{plot}\n"
    assert plot.read_bytes().startswith(b"<?xml")


@pytest.mark.parametrize(("suffix", "begin"), [("png", b"\x89PNG"), ("pdf", b"%PDF-")])
def test_the_plot_is_of_the_kind_that_its_name_says(
    trace_file: Path, tmp_path: Path, suffix: str, begin: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / f"rates.{suffix}"
    arguments = ["simulate", str(trace_file), "--plot", str(plot), "--slots", "2,3"]
    assert cli.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plot"] == str(plot)
    assert plot.read_bytes().startswith(begin)
    assert cli.main([*arguments, "-q"]) == 0
    assert capsys.readouterr().out == f"{plot}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "psychic"], "policy 'psychic' is not known"),
        (["--slots", "many"], "--slots 'many' is no list of numbers"),
        (["--slots", "1"], "--slots 1 experts is below the 2 that a layer asks for at once"),
        (["--slots", "4,13"], "--slots 13 experts is more than all 12"),
        (["--fraction", "some%"], "--fraction 'some%' is no list of shares up to 100%"),
        (["--fraction", "0.25"], "--fraction '0.25' is no list of shares up to 100%"),
        (["--fraction", "0%"], "--fraction '0%' is no list of shares up to 100%"),
        (["--fraction", "50%,101"], "--fraction '50%,101' is no list of shares up to 100%"),
        (["--fraction", "nan%"], "--fraction 'nan%' is no list of shares up to 100%"),
        (["--plot", "rates.jpg"], "--plot rates.jpg: the name does not say which kind of picture"),
        (["--plot", "no/such/folder/rates.png"], "--plot no/such/folder/rates.png cannot be written"),
    ],
)
def test_the_command_refuses_what_cannot_be(
    trace_file: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before anything is replayed."""
    monkeypatch.setattr("moeinf.simulate.replay_all", None)
    assert cli.main(["simulate", str(trace_file), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("hello", encoding="utf-8")
    assert cli.main(["simulate", str(tmp_path / "notes.txt")]) in (2, 4)
    assert "notes.txt" in capsys.readouterr().err
