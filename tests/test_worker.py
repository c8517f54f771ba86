"""The process of one run, in this process: every system answers, and says the same."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moeinf import worker
from moeinf.fused import write_fused
from moeinf.recorder import Recorder
from moeinf.runtime import ExpertRuntime
from moeinf.scores import belady_hit_rate
from moeinf.store import Store
from moeinf.systems import Job, Request, Run
from moeinf.trace import ModelIdentity
from moeinf.tracefile import read_trace, write_trace

REQUESTS = [Request([5, 6, 7, 8], 6), Request([9, 10], 6)]
WARM_UP = [Request([5, 6], 2)]


def make_job(system: str, folder: Path, **fields: Any) -> Job:
    stored = Store().open("tiny")
    if not list(folder.iterdir()):
        write_fused(stored, folder)
    return Job(
        system,
        "tiny",
        warm_up=WARM_UP,
        requests=fields.pop("requests", REQUESTS),
        engine={"experts": "50%", "prefetch": "off", "context": 64},
        folder=str(folder),
        scratch=str(folder),
        modules=[layer.module for layer in stored.manifest.layers],
        **fields,
    )


def check(run: Run) -> None:
    assert [len(tokens) for tokens in run.tokens] == [6, 6]
    assert (len(run.ttft_s), len(run.token_s), run.prompt_tokens) == (2, 10, 6)
    assert min(*run.ttft_s, *run.token_s) > 0
    assert run.peak_rss > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_all_say_the_same(tiny: str, tmp_path: Path, temperature: float) -> None:
    ours = worker.run(make_job("moeinf", tmp_path, temperature=temperature))
    check(ours)
    for system in ("transformers", "mmap", "accelerate"):
        theirs = worker.run(make_job(system, tmp_path, temperature=temperature, resident_layers=1))
        check(theirs)
        assert theirs.tokens == ours.tokens, system
        assert theirs.counts is None


def test_moeinf_counts_what_is_measured_alone(tiny: str, tmp_path: Path) -> None:
    counts = worker.run(make_job("moeinf", tmp_path)).counts
    assert counts is not None
    assert counts.requests == 10 * 2 * 2  # tokens, layers, experts per token
    size = Store().open(tiny).manifest.layout.nbytes
    assert counts.missed_bytes == counts.read_bytes == (counts.requests - counts.hits) * size
    assert not (Store().path(tiny) / "traces").exists(), "a measurement is nothing to learn from"


def test_moeinf_leaves_its_routing(tiny: str, tmp_path: Path) -> None:
    (tmp_path / "fused").mkdir()
    path = tmp_path / "routing.safetensors"
    run = worker.run(make_job("moeinf", tmp_path / "fused", routing=str(path)))
    routing = read_trace(path)
    lengths = [len(each.prompt) + each.tokens - 1 for each in (*WARM_UP, *REQUESTS)]
    assert [sequence.num_tokens for sequence in routing.sequences()] == lengths
    assert run.counts is not None
    belady = belady_hit_rate(routing, len(WARM_UP), run.counts)
    assert belady is not None
    assert run.counts.hits / run.counts.requests <= belady <= 1
    assert run.tokens == worker.run(make_job("moeinf", tmp_path / "fused")).tokens


def test_a_replay_has_the_recorded_hits(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import moeinf
    from moeinf.generation import Sampling

    left_out: list[str] = []
    monkeypatch.setattr(ExpertRuntime, "leave_out", lambda _, predictor: left_out.append(predictor))

    with moeinf.load(tiny, experts="100%", context=64) as engine:
        engine.learns = False
        engine.runtime.recorder = recorder = Recorder(ModelIdentity.of(tiny, engine.manifest))
        for request in REQUESTS:
            engine.session().generate(request.prompt, Sampling(max_tokens=6, temperature=0.0))
    write_trace(recorder.trace(), tmp_path / "trace.safetensors")
    (tmp_path / "fused").mkdir()
    replayed = [Request([50] * len(r.prompt), 6, number) for number, r in enumerate(REQUESTS)]
    fields = {"requests": replayed, "trace": str(tmp_path / "trace.safetensors")}
    itself = worker.run(make_job("moeinf", tmp_path / "fused")).counts
    found = worker.run(make_job("moeinf", tmp_path / "fused", **fields))
    assert found.counts is not None
    assert itself is not None
    assert found.counts.hits == itself.hits
    assert left_out == ["gate"]  # what routers foresee was not recorded
    theirs = worker.run(make_job("mmap", tmp_path / "fused", **fields))
    assert found.tokens == theirs.tokens
    assert found.tokens != worker.run(make_job("mmap", tmp_path / "fused", requests=replayed)).tokens


@pytest.fixture
def llama_cpp(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A stand-in for llama-cpp-python, which notes what it is asked."""
    asked: list[Any] = []

    class Llama:
        def __init__(self, **options: Any) -> None:
            asked.append(options)

        def reset(self) -> None:
            pass

        def set_seed(self, seed: int) -> None:
            self.seed = seed

        def generate(self, tokens: list[int], **options: Any) -> Iterator[int]:
            asked.append((tokens, options["temp"], self.seed))
            while True:
                yield tokens[0]

    module = ModuleType("llama_cpp")
    module.Llama = Llama  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    return asked


def test_llama_cpp(llama_cpp: list[Any]) -> None:
    run = worker.run(Job("llama.cpp", "tiny", WARM_UP, REQUESTS, 0.5, threads=1, folder="x.gguf"))
    check(run)
    assert run.tokens == [[5] * 6, [9] * 6]
    options, *calls = llama_cpp
    assert (options["model_path"], options["n_ctx"], options["n_threads"]) == ("x.gguf", 10, 1)
    assert calls == [([5, 6], 0.5, 2), ([5, 6, 7, 8], 0.5, 0), ([9, 10], 0.5, 1)]


def test_survey(tiny: str) -> None:
    found = worker.survey(Job("moeinf", tiny, engine={"experts": "50%", "context": 64}), ["abc", "x" * 99], 5)
    assert (found.slots, found.context, found.regime, found.random) == (8, 64, "streaming", "")
    assert [len(prompt) for prompt in found.prompts] == [3, 5]
    assert found.total <= found.budget


def test_slots_in_the_room_of_tokens_to_come_count_against_thrashing(tiny: str) -> None:
    few = worker.survey(Job("moeinf", tiny, engine={"experts": "3", "context": 256}), ["abc"], 5)
    more = worker.survey(Job("moeinf", tiny, engine={"host_memory": str(few.total), "context": 256}), ["abc"], 5)
    assert few.token_experts == 4 <= more.slots
    assert (few.thrashes, more.thrashes) == (True, False)


def test_a_process_answers_in_one_line(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for engine, expected in (({"experts": "50%", "context": 64}, "answer"), ({"experts": "1"}, "error")):
        job = Job("moeinf", tiny, WARM_UP, REQUESTS, engine=engine)
        monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps({"job": job.to_json()})))
        worker.main()
        assert expected in json.loads(capsys.readouterr().out)


def test_jobs_and_runs_survive_json(tiny: str, tmp_path: Path) -> None:
    job = make_job("moeinf", tmp_path)
    assert Job.from_json(job.to_json()) == job
