"""Collecting traces: from prompt sets to a file beside the model, also after an interruption."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import moeinf
from moeinf import calibration, cli
from moeinf.calibration import CalibrationPrompt, collect, read_prompts
from moeinf.errors import IntegrityError, MoeinfError, UsageError
from moeinf.policies import POLICIES
from moeinf.trace import Trace
from moeinf.tracefile import read_trace


def same(one: Trace, other: Trace) -> bool:
    names = ("experts", "weights", "sequence_id", "position", "is_prefill")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


@pytest.fixture
def own(tiny_home: Path, home: Path) -> str:
    """`tiny`, in a store that the test may change."""
    shutil.copytree(tiny_home / "models/tiny", home / "models/tiny")
    return "tiny"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "One.\nStill one.\n\nTwo.\n\n\n", [("One.\nStill one.", ""), ("Two.", "")]),
        ("a.jsonl", '{"text": "One", "domain": "d"}\n\n{"prompt": "Two"}\n', [("One", "d"), ("Two", "")]),
        ("a.csv", 'id,question,domain\n1,"One,\nstill",d\n2,Two,\n', [("One,\nstill", "d"), ("Two", "")]),
    ],
)
def test_prompt_files(tmp_path: Path, name: str, content: str, expected: list[tuple[str, str]]) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert [(prompt.text, prompt.domain) for prompt in read_prompts(str(tmp_path / name))] == expected


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.pdf", "x", UsageError, "is no prompt set"),
        ("a.jsonl", "{", IntegrityError, "is not a valid jsonl file"),
        ("a.jsonl", "[1]", IntegrityError, "a line is no object"),
        ("a.jsonl", '{"other": "x"}', IntegrityError, "holds no prompts"),
        ("a.csv", 'text\n"open', IntegrityError, "is not a valid csv file"),
        ("a.txt", "\n\n", IntegrityError, "holds no prompts"),
        ("a.txt", None, UsageError, "cannot be read"),
    ],
)
def test_what_is_no_prompt_file(
    tmp_path: Path, name: str, content: str | None, error: type[MoeinfError], message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(error, match=message):
        read_prompts(str(tmp_path / name))


def test_the_default_set_has_many_domains() -> None:
    prompts = read_prompts("default")
    assert len(prompts) >= 100
    assert len({prompt.domain for prompt in prompts}) >= 10


PROMPTS = [CalibrationPrompt(f"<unk> {number}") for number in range(23)]


def tokenize(text: str) -> dict[str, list[int]]:
    number = int(text.split()[-1])
    return {"input_ids": [5 + number, 6 + number, 7 + number][: 1 + number % 3]}


def test_an_interrupted_run_goes_on_and_ends_with_the_same_trace(own: str, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    with moeinf.load(own) as engine:
        engine.tokenizer = tokenize
        engine.generation_config.eos_token_id = None
        expected = collect(engine, own, PROMPTS, whole, max_tokens=4)
        asked = iter([False] * 13 + [True] * 2)
        part = collect(engine, own, PROMPTS, cut, max_tokens=4, should_stop=lambda: next(asked))
        assert len(set(part.sequence_id.tolist())) == 12
        assert not cut.exists()
        found = collect(engine, own, PROMPTS, cut, max_tokens=4)
        assert engine.runtime.recorder is None
    assert same(found, expected)
    assert same(read_trace(cut), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.safetensors", "whole.safetensors"]
    assert set(expected.sequence_id.tolist()) == set(range(23))
    assert expected.num_tokens == sum(len(tokenize(prompt.text)["input_ids"]) + 3 for prompt in PROMPTS)


def test_recording_changes_no_token(own: str, tmp_path: Path) -> None:
    sampling = moeinf.Sampling(max_tokens=6, temperature=0)
    with moeinf.load(own) as engine:
        expected = engine.session().generate([5, 6, 7], sampling).tokens
        engine.tokenizer = tokenize
        collect(engine, own, PROMPTS[:1], tmp_path / "t.safetensors", max_tokens=2)
        assert engine.session().generate([5, 6, 7], sampling).tokens == expected


def test_a_prompt_must_leave_room(own: str, tmp_path: Path) -> None:
    with moeinf.load(own, context=16) as engine, pytest.raises(UsageError, match="has no room for 16 new ones"):
        collect(engine, own, PROMPTS, tmp_path / "t.safetensors", max_tokens=16)


def test_the_command_keeps_the_trace_beside_the_model(
    own: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "two.jsonl").write_text(
        '{"text": "a b", "domain": "x"}\n{"text": "c", "domain": "y"}\n', encoding="utf-8"
    )
    arguments = ["trace", own, "--dataset", str(tmp_path / "two.jsonl"), "--max-tokens", "5"]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    path = home / "models/tiny/traces/two-2x5.safetensors"
    assert shown.splitlines()[-1] == str(path)
    assert read_trace(path).identity.model == own
    assert cli.main([*arguments, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["schema"], data["model"], data["routing"]["requests"]) == (1, own, 2)
    assert {replay["policy"] for replay in data["replays"]} == {*POLICIES, "belady"}
    assert data["domains"]["names"] == ["x", "y"]
    learned = str(path.with_name("collection.safetensors"))
    files = [data["trace"], data["page"], *data["pictures"], learned]
    assert sorted(files) == sorted(map(str, path.parent.iterdir()))
    assert cli.main(["verify", own]) == 0  # what lies in traces/ is no stranger
    capsys.readouterr()
    monkeypatch.setattr(calibration, "read_prompts", lambda _: [])
    assert cli.main(arguments) == 2
    assert "no token went through the model" in capsys.readouterr().err
