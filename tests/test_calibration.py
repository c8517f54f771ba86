"""Collecting traces: from prompt sets to a file beside the model, also after an interruption."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import moeinf
from fakehub import FakeHub
from moeinf import cli, datasets
from moeinf.calibration import collect
from moeinf.errors import CapacityError, UsageError
from moeinf.files import FileSystem
from moeinf.policies import POLICIES
from moeinf.prompts import Prompt
from moeinf.runtime import ExpertRuntime
from moeinf.trace import NO_EXPERT, Trace
from moeinf.tracefile import read_trace, write_trace
from test_replay import make_trace


def same(one: Trace, other: Trace) -> bool:
    names = ("experts", "weights", "sequence_id", "position", "is_prefill", "foreseen")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


@pytest.fixture
def own(tiny_home: Path, home: Path) -> str:
    """`tiny`, in a store that the test may change."""
    shutil.copytree(tiny_home / "models/tiny", home / "models/tiny")
    return "tiny"


PROMPTS = [Prompt("", f"<unk> {number}") for number in range(23)]


def tokenize(text: str) -> dict[str, list[int]]:
    number = int(text.split()[-1])
    return {"input_ids": [5 + number, 6 + number, 7 + number][: 1 + number % 3]}


@pytest.fixture
def engine(own: str) -> Iterator[moeinf.Engine]:
    with moeinf.load(own, context=64) as engine:
        engine.tokenizer = tokenize
        engine.generation_config.eos_token_id = None
        yield engine


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def test_an_interrupted_run_goes_on_and_ends_with_the_same_trace(engine: moeinf.Engine, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    expected = collect(engine, "tiny", PROMPTS, whole, max_tokens=4)
    asked = iter([False] * 13 + [True])
    part = collect(engine, "tiny", PROMPTS, cut, max_tokens=4, should_stop=lambda: next(asked))
    assert set(part.sequence_id.tolist()) == set(range(13))
    assert not cut.exists()
    found = collect(engine, "tiny", PROMPTS, cut, max_tokens=4)
    assert engine.runtime.recorder is None
    assert same(found, expected)
    assert cut.read_bytes() == whole.read_bytes()
    assert names(tmp_path) == ["cut.safetensors", "whole.safetensors"]
    assert set(expected.sequence_id.tolist()) == set(range(23))
    assert expected.num_tokens == sum(len(tokenize(prompt.text)["input_ids"]) + 3 for prompt in PROMPTS)


def test_what_the_routers_foresee_is_recorded(engine: moeinf.Engine, tmp_path: Path) -> None:
    trace = collect(engine, "tiny", PROMPTS[1:2], tmp_path / "t.safetensors", max_tokens=4)
    assert trace.foreseen is not None
    assert (trace.foreseen[trace.is_prefill] == NO_EXPERT).all()
    new, chosen = trace.foreseen[~trace.is_prefill], trace.experts[~trace.is_prefill]
    assert len(new) == 3
    assert (new[:, 1:] != NO_EXPERT).any()
    named = (new[..., None, :] == chosen[..., None]).any(axis=3)
    assert named[:, 1:].mean() > 0.5


@pytest.mark.parametrize("error", [OSError(5, "the disk is gone"), KeyboardInterrupt()])
@pytest.mark.parametrize("failing", [0, 4, 9, 10, 17])
def test_a_failure_loses_only_the_prompt_that_failed(
    engine: moeinf.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, failing: int
) -> None:
    expected = collect(engine, "tiny", PROMPTS, tmp_path / "whole.safetensors", max_tokens=4)
    steps, forward = iter(range(10**6)), ExpertRuntime.forward
    per_prompt = 4 * len(engine.manifest.layers)  # the prompt and three of the four new tokens, through every layer

    def fail(*args: object) -> object:
        if next(steps) == failing * per_prompt + 1:
            raise error
        return forward(*args)  # type: ignore[arg-type]

    path = tmp_path / "t.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(ExpertRuntime, "forward", fail)
        with pytest.raises(type(error)):
            collect(engine, "tiny", PROMPTS, path, max_tokens=4)
    drafts = list(tmp_path.glob("t.*.draft.safetensors"))
    assert [len(set(read_trace(draft).sequence_id.tolist())) for draft in drafts] == ([failing] if failing else [])
    assert same(collect(engine, "tiny", PROMPTS, path, max_tokens=4), expected)
    assert names(tmp_path) == ["t.safetensors", "whole.safetensors"]


def test_a_full_disk_keeps_what_was_written_before(
    engine: moeinf.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.safetensors"
    asked = iter([False] * 12 + [True])
    collect(engine, "tiny", PROMPTS, path, max_tokens=4, should_stop=lambda: next(asked))
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(FileSystem, "write_at", full)
        with pytest.raises(CapacityError, match="no room left"):
            collect(engine, "tiny", PROMPTS, path, max_tokens=4)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before
    assert set(collect(engine, "tiny", PROMPTS, path, max_tokens=4).sequence_id.tolist()) == set(range(23))


def test_other_prompts_do_not_go_on_with_a_draft(engine: moeinf.Engine, tmp_path: Path) -> None:
    path, said = tmp_path / "t.safetensors", list[str]()
    asked = iter([False] * 3 + [True])
    collect(engine, "tiny", PROMPTS, path, max_tokens=4, should_stop=lambda: next(asked), notify=said.append)
    assert said == []
    changed = [*PROMPTS[1:], PROMPTS[0]]
    found = collect(engine, "tiny", changed, path, max_tokens=4, notify=said.append)
    assert said == ["an unfinished trace of t was of other prompts or another model, so this one starts afresh"]
    assert same(found, collect(engine, "tiny", changed, tmp_path / "u.safetensors", max_tokens=4))
    assert names(tmp_path) == ["t.safetensors", "u.safetensors"]


@pytest.mark.parametrize("damage", ["cut", "foreign", "later"])
def test_a_draft_that_cannot_be_used_is_set_aside(engine: moeinf.Engine, tmp_path: Path, damage: str) -> None:
    whole, path, said = tmp_path / "whole.safetensors", tmp_path / "t.safetensors", list[str]()
    expected = collect(engine, "tiny", PROMPTS, whole, max_tokens=4)
    asked = iter([False] * 12 + [True])
    collect(engine, "tiny", PROMPTS, path, max_tokens=4, should_stop=lambda: next(asked))
    (draft,) = tmp_path.glob("t.*.draft.safetensors")
    data = draft.read_bytes()
    if damage == "foreign":
        write_trace(make_trace([[[0], [1]]], top_k=1), draft)
    else:
        draft.write_bytes(data[:-1] if damage == "cut" else data.replace(b'"version":"1"', b'"version":"2"'))
    damaged = draft.read_bytes()
    assert damaged != data
    found = collect(engine, "tiny", PROMPTS, path, max_tokens=4, notify=said.append)
    assert same(found, expected)
    assert path.read_bytes() == whole.read_bytes()
    assert [sentence.partition("; ")[2] for sentence in said] == [
        f"it is now called {draft.name}.unusable, and this trace starts afresh"
    ]
    assert names(tmp_path) == [f"{draft.name}.unusable", "t.safetensors", "whole.safetensors"]
    assert (tmp_path / f"{draft.name}.unusable").read_bytes() == damaged


def test_long_prompts_are_cut_and_that_is_said_once(engine: moeinf.Engine, tmp_path: Path) -> None:
    lengths = [60, 61, 100]
    engine.tokenizer = lambda text: {"input_ids": [5] * lengths[int(text)]}
    said: list[str] = []
    prompts = [Prompt("", str(number)) for number in range(3)]
    found = collect(engine, "tiny", prompts, tmp_path / "t.safetensors", max_tokens=4, notify=said.append)
    assert said == ["2 of 3 prompts are cut to 60 tokens: the context holds 64, 4 of them new; --context sets that"]
    assert [int(part.is_prefill.sum()) for part in found.sequences()] == [60, 60, 60]


def test_a_prompt_without_tokens_is_refused_at_once(engine: moeinf.Engine, tmp_path: Path) -> None:
    engine.tokenizer = lambda text: {"input_ids": [5] * (text != "b")}
    with pytest.raises(UsageError, match="prompt 2 has no tokens"):
        collect(engine, "tiny", [Prompt("", "a"), Prompt("", "b")], tmp_path / "t.safetensors", max_tokens=4)
    assert names(tmp_path) == []


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
    (path,) = (home / "models/tiny/traces").glob("two-*-2x5.safetensors")
    assert shown.splitlines()[-1] == str(path)
    assert read_trace(path).identity.model == own
    assert cli.main([*arguments, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["schema"], data["model"], data["routing"]["requests"]) == (1, own, 2)
    assert {replay["policy"] for replay in data["replays"]} == {*POLICIES, "belady"}
    assert data["domains"]["names"] == ["x", "y"]
    files = [data["trace"], data["page"], *data["pictures"]]
    assert sorted(files) == sorted(map(str, path.parent.iterdir()))
    assert cli.main(["verify", own]) == 0  # what lies in traces/ is no stranger
    capsys.readouterr()
    monkeypatch.setattr(datasets, "read_prompts", lambda *_, **__: [])
    assert cli.main(arguments) == 2
    assert "no token went through the model" in capsys.readouterr().err


def test_data_sets_of_one_name_have_traces_of_their_own(
    own: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    traces: list[dict[str, bytes]] = [{}]
    for text in ("one", "other"):
        (tmp_path / text).mkdir()
        (tmp_path / text / "set.txt").write_text(text)
        arguments = ["trace", own, "--dataset", str(tmp_path / text / "set.txt"), "--max-tokens", "5"]
        for _ in range(2):
            assert cli.main([*arguments, "-q"]) == 0
            files = sorted((home / "models/tiny/traces").glob("set-*.safetensors"))
            traces.append({file.name: file.read_bytes() for file in files})
    assert [len(files) for files in traces] == [0, 1, 1, 2, 2]
    assert all(before.items() <= after.items() for before, after in pairwise(traces))


def test_the_command_takes_a_data_set_of_the_hub(
    own: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a b"}\n{"text": "c"}\n{"text": "d"}\n', encoding="utf-8")
    with FakeHub({"datasets/org/talk": tmp_path}) as fake:
        fake.connect(monkeypatch)
        arguments = ["trace", own, "--dataset", "org/talk", "--max-prompts", "2", "--max-tokens", "3"]
        assert cli.main(arguments) == 0
        commit = fake.commit("datasets/org/talk")
    shown = capsys.readouterr()
    (path,) = (home / "models/tiny/traces").glob("org--talk-*-2x3.safetensors")
    assert shown.out.splitlines()[-1] == str(path)
    assert f"org/talk at {commit[:12]}: rows.jsonl (1 of 1 such files)\n" in shown.err
