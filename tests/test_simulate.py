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
    with moeinf.load(tiny, policy=policy, experts=experts, prefetch="off") as engine:
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
    assert cli.main(["simulate", str(trace_file), "--policy", "lru,belady", "--experts", "50%,12"]) == 0
    found = capsys.readouterr()
    assert found.out == "POLICY  50% (6)  12 (12)\nlru     50.0%    50.0%\nbelady  50.0%    50.0%\n"


def test_the_command_prints_json(trace_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulate", str(trace_file), "--policy", "lru", "--experts", "3", "--json"]) == 0
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
    ("arguments", "code", "message"),
    [
        (["--policy", "psychic"], 2, "policy 'psychic' is not known"),
        (["--experts", "many"], 2, "--experts 'many' is neither a number nor a share"),
        (["--experts", "1"], 5, "--experts 1 is below what one layer asks for at once"),
    ],
)
def test_the_command_refuses_what_cannot_be(
    trace_file: Path, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["simulate", str(trace_file), *arguments]) == code
    assert message in capsys.readouterr().err


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("hello", encoding="utf-8")
    assert cli.main(["simulate", str(tmp_path / "notes.txt")]) in (2, 4)
    assert "notes.txt" in capsys.readouterr().err
