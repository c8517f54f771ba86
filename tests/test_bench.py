"""The order of the runs, what each is told, and what is made of them; processes are played in this one."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeinf
from cli_transcripts import CommandLine
from moeinf import bench as bench_module
from moeinf import figures, hardware, rates, worker
from moeinf.bench import Report, Wishes, bench
from moeinf.calibration import collect
from moeinf.cgroups import memory_limit
from moeinf.errors import CapacityError, UnsupportedError, UsageError
from moeinf.forms import ExpertForm
from moeinf.prompts import Prompt
from moeinf.quantizing import quantize_model
from moeinf.rates import Rates
from moeinf.scores import Score
from moeinf.settings import EngineOptions
from moeinf.store import Store
from moeinf.systems import Job
from moeinf.trace import Trace
from moeinf.tracefile import read_trace, write_trace
from standin import use_device
from test_replay import make_trace

OURS = EngineOptions(experts="50%", prefetch="off", policy="lru", context=64, threads=1)
TEXTS = ["Call me Ishmael.", "It was a dark night.", "Once upon a time", "All happy families"]


class Processes:
    """Runs what a worker would, in this process. `jobs` are (system, limit) in order; `fail` may raise for a job."""

    def __init__(self) -> None:
        self.jobs: list[tuple[Job, int | None]] = []
        self.fail: Callable[[Job], None] = lambda _: None

    def work(self, asked: dict[str, Any], limit: int | None) -> Any:
        job = Job.from_json(asked["job"])
        if "texts" in asked:
            return json.loads(json.dumps(asdict(worker.survey(job, asked["texts"], asked["prompt_tokens"]))))
        self.jobs.append((job, limit))
        self.fail(job)
        return json.loads(json.dumps(asdict(worker.run(job))))


@pytest.fixture
def processes(tiny: str, monkeypatch: pytest.MonkeyPatch) -> Processes:
    found = Processes()
    monkeypatch.setattr(bench_module, "_work", found.work)
    monkeypatch.setattr(bench_module, "_why_no_limit", lambda: "")
    monkeypatch.setattr(bench_module, "_drop_caches", lambda: True)
    monkeypatch.setattr(bench_module, "measure_rates", lambda *_, **__: Rates(1e9, 1e10))
    return found


def measure(*engines: EngineOptions, said: list[str] | None = None, **wishes: Any) -> Report:
    fields = {"rivals": [], "texts": TEXTS, "prompts": 2, "tokens": 4, "repeat": 2, "prompt_tokens": 8, **wishes}
    notify = (said if said is not None else []).append
    return bench(Store().open("tiny"), Wishes(engines or [OURS], **fields), notify=notify)


def test_systems_take_turns_within_one_limit(processes: Processes) -> None:
    report = measure(rivals=["transformers", "mmap"])
    assert [job.system for job, _ in processes.jobs] == ["moeinf", "transformers", "mmap"] * 2
    assert len({limit for _, limit in processes.jobs}) == 1
    ours, *others = report.scores
    assert processes.jobs[0][1] == ours.limit
    assert ours.limit > ours.budget > 0
    assert report.same_tokens
    assert [len(score.runs) for score in report.scores] == [2, 2, 2]
    assert ours.eta is not None
    assert ours.hit_rate is not None
    assert ours.belady_hit_rate is not None
    assert 0 < ours.hit_rate <= ours.belady_hit_rate <= 1
    assert {score.belady_share for score in others} == {None}
    assert {score.eta for score in others} == {None}
    assert not (Store().home / "bench/tiny").exists()


def test_every_setting_is_measured_and_rivals_once_per_budget(processes: Processes) -> None:
    grid = [replace(OURS, experts=size, policy=name) for size in ("25%", "50%") for name in ("lru", "lfu")]
    report = measure(*grid, rivals=["mmap"], repeat=1)
    assert [(score.experts, score.label) for score in report.scores] == [
        (size, label) for size in ("25%", "50%") for label in ("moeinf, lru", "moeinf, lfu", "mmap")
    ]
    budgets = [score.budget for score in report.scores]
    assert budgets[0] == budgets[1] == budgets[2] < budgets[3]
    assert [job.engine.get("experts") for job, _ in processes.jobs] == ["4", "4", None, "8", "8", None]


def test_a_budget_that_is_asked_for_is_what_all_get(processes: Processes) -> None:
    """Without one, a number of experts has the memory that just these take."""
    asked = measure(replace(OURS, host_memory="400MiB"), rivals=["mmap"], repeat=1)
    assert [score.budget for score in asked.scores] == [400 << 20] * 2
    assert processes.jobs[0][0].engine["host_memory"] == str(400 << 20)
    assert measure(OURS, repeat=1).scores[0].budget < 400 << 20


def test_a_layer_is_whole_from_its_last_expert_on(tiny: str) -> None:
    stored = Store().open(tiny)  # 2 layers of 8
    assert [bench_module._whole_layers(stored, slots) for slots in (7, 8, 15, 16, 99)] == [0, 1, 1, 2, 2]


def test_cold_and_warm(processes: Processes) -> None:
    report = measure(starts=("cold", "warm"), repeat=1)
    cold, warm = (job for job, _ in processes.jobs)
    assert [score.label for score in report.scores] == ["moeinf, cold", "moeinf, warm"]
    assert cold.requests == warm.requests
    assert [request.tokens for request in cold.warm_up] == [4]
    assert [len(request.prompt) for request in warm.warm_up] == [8, 8]
    assert not any(request in warm.requests for request in warm.warm_up)


def test_a_rival_that_fails_is_reported_and_not_tried_again(processes: Processes) -> None:
    def fail(job: Job) -> None:
        if job.system == "transformers":
            raise bench_module._EndedError("killed: it needs more memory")

    processes.fail = fail
    report = measure(rivals=["transformers"])
    assert [job.system for job, _ in processes.jobs] == ["moeinf", "transformers", "moeinf"]
    assert report.scores[1].error == "killed: it needs more memory"
    assert report.same_tokens


def test_quantised_experts_are_named_and_not_given_to_rivals(processes: Processes) -> None:
    stored = quantize_model(Store().open("tiny"), "tiny-int4", ExpertForm.read("int4", None), store=Store())
    try:
        wishes = Wishes([OURS], ["mmap"], TEXTS, prompts=1, tokens=2, repeat=1)
        with pytest.raises(UnsupportedError, match=r"tiny-int4 has int4 experts .*, which mmap cannot read"):
            bench(stored, wishes)
        assert not processes.jobs
        found = bench(stored, replace(wishes, rivals=[])).to_dict()
        assert (found["quantization"], found["quality"]) == ("int4 experts (groups of 16)", None)
    finally:
        Store().remove("tiny-int4")
    assert measure(repeat=1).to_dict()["quantization"] is None


def test_moeinf_s_own_errors_are_errors(processes: Processes) -> None:
    with pytest.raises(CapacityError, match="--experts 1 is below"):
        measure(replace(OURS, experts="1"))


def test_what_is_not_enforced_is_said(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module, "_why_no_limit", lambda: "no memory cgroup can be made: no")
    monkeypatch.setattr(bench_module, "_drop_caches", lambda: False)
    monkeypatch.setattr(hardware, "read_ahead_bytes", lambda _: 8 << 20)
    said: list[str] = []
    report = measure(rivals=["mmap"], repeat=1, said=said)
    assert {limit for _, limit in processes.jobs} == {None}
    assert [sentence[:30] for sentence in said] == [
        "no memory cgroup can be made: ",
        "the page cache cannot be dropp",
        "the disk reads 8.00 MiB ahead;",
    ]
    assert report.to_dict()["limit"] == {"enforced": False, "why_not": "no memory cgroup can be made: no"}


def test_prompts_that_the_model_was_traced_with_are_said(processes: Processes, tmp_path: Path) -> None:
    said: list[str] = []
    with moeinf.load("tiny", context=64) as engine:
        traced = [Prompt("", text) for text in (TEXTS[0], "Of something else", TEXTS[3])]
        collect(engine, "tiny", traced, tmp_path / "t.safetensors", max_tokens=9)
    report = measure(repeat=1, said=said)
    assert (report.known_prompts, report.to_dict()["known_prompts"]) == (1, 1)
    assert [sentence.partition(":")[0] for sentence in said] == ["1 of the prompts were traced with this model"]
    assert measure(repeat=1, texts=TEXTS[1:3]).known_prompts == 0
    (Store().path("tiny") / "traces/collection.safetensors").write_bytes(b"nonsense")
    assert measure(repeat=1).known_prompts == 0


def test_a_home_that_cannot_be_written_is_no_surprise(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").touch()  # root may write to any folder
    monkeypatch.setattr(bench_module, "home_path", lambda: tmp_path / "home")
    with pytest.raises(UsageError, match=r"no access to .*/home/bench"):
        measure(rivals=["mmap"])
    assert measure(repeat=1).same_tokens, "without rivals nothing is written"


def test_no_cgroup_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_limit: int) -> None:
        raise UnsupportedError("no memory cgroup can be made: read-only")

    monkeypatch.setattr(bench_module, "memory_limit", refuse)
    assert bench_module._why_no_limit() == "no memory cgroup can be made: read-only"


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"prompts": 0}, "--prompts 0 measures nothing"),
        ({"tokens": 1}, "--tokens 1 measures nothing"),
        ({"repeat": 0}, "--repeat 0 measures nothing"),
        ({"prompt_tokens": 0}, "--prompt-tokens 0 measures nothing"),
        ({"tokens": 64}, "a context of 64 tokens has no room for 64 new ones"),
        ({"texts": [""]}, "no prompt with tokens"),
    ],
)
def test_what_cannot_be_measured(processes: Processes, fields: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        measure(**fields)


def routed(tmp_path: Path, requests: int = 2, prefilled: int = 3) -> Path:
    """A trace of requests of ten tokens each, of which the first few are a prompt."""
    one = make_trace([[[token % 4, 4], [5, (token + 1) % 4]] for token in range(10 * requests)], size=6)
    sequence, position = np.divmod(np.arange(10 * requests, dtype=np.int32), 10)
    trace = Trace(one.identity, one.experts, None, sequence, position, position < prefilled)
    write_trace(trace, tmp_path / "trace.safetensors")
    return tmp_path / "trace.safetensors"


def test_a_replay_is_one_everywhere(processes: Processes, tmp_path: Path) -> None:
    report = measure(trace=routed(tmp_path), rivals=["mmap"], repeat=1, prompt_tokens=2)
    ours, theirs = (job for job, _ in processes.jobs)
    assert [(len(r.prompt), r.sequence, r.first) for r in ours.requests] == [(2, 0, 1), (2, 1, 1)]
    assert theirs.requests == ours.requests
    assert ours.engine["experts"] == "6", "half of the 12 experts that the trace can name"
    found = report.to_dict()
    assert found["replay"]["shares_are_of"] == 12
    assert [run["label"] for run in found["runs"]] == ["moeinf, replay", "mmap, replay"]
    assert [run["replay"] for run in found["runs"]] == [True, True]


def test_a_model_of_more_layers_repeats_those_of_the_trace(
    cli: CommandLine, processes: Processes, tmp_path: Path
) -> None:
    path = routed(tmp_path)
    asked = ("bench", "tiny", *ASKED, "--repeat", "1", "--against", "mmap", "--replay", str(path))
    whole = "tiny: 1 prompts, 4 new tokens each, 1 times · REPLAY of the routing of other"
    assert cli.run(*asked)[0].splitlines()[0] == whole
    trace = read_trace(path)
    identity = replace(trace.identity, layer_sizes=(6,), top_k=(2,))
    write_trace(replace(trace, identity=identity, experts=trace.experts[:, :1]), path)
    assert cli.run(*asked)[0].splitlines()[0] == f"{whole}, 1 layers repeated to make 2"
    found = json.loads(cli.run(*asked, "--json")[0])
    assert found["same_tokens"]
    shown = {name: found["replay"][name] for name in ("layers", "of_layers", "follows", "experts", "top_k")}
    assert shown == {"layers": 2, "of_layers": 1, "follows": [0, 0], "experts": [6, 6], "top_k": [2, 2]}
    assert found["replay"]["shares_are_of"] == 12
    assert processes.jobs[-2][0].engine["experts"] == "6", "half of them"


def test_shares_count_each_layer_as_recorded(tiny: str) -> None:
    stored = Store().open(tiny)
    first, second = stored.manifest.layers
    deeper = replace(stored, manifest=replace(stored.manifest, layers=(first, second, second, second, second)))
    trace = make_trace([[[0, 1], [2, 3], [4, 1]]])
    trace = replace(trace, identity=replace(trace.identity, layer_sizes=(8, 7, 5), top_k=(2, 2, 2)))
    found = bench_module._describe(trace, deeper, Wishes([OURS], [], TEXTS))
    assert found["follows"] == [0, 1, 2, 1, 2]
    assert found["experts"] == [8, 7, 5, 7, 5]
    assert found["shares_are_of"] == 32
    assert bench_module._slots("50%", deeper, trace) == "16"


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"tokens": 9}, "has 9 tokens behind its prompt, within a context of 64: 8 is the most"),
        ({"starts": ("warm",)}, "no requests left to warm up with"),
        ({"rivals": ["llama.cpp"]}, "llama.cpp cannot replay routing"),
    ],
)
def test_what_cannot_be_replayed(processes: Processes, tmp_path: Path, fields: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        measure(trace=routed(tmp_path), **fields)
    assert processes.jobs == []


def test_a_replay_has_a_gate_if_it_was_recorded(processes: Processes, tmp_path: Path) -> None:
    path = routed(tmp_path)
    with pytest.raises(UsageError, match="does not have what routers foresee") as caught:
        measure(replace(OURS, prefetch="gate"), trace=path)
    assert "moeinf trace records it" in (caught.value.hint or "")
    said: list[str] = []
    measure(replace(OURS, prefetch="auto"), trace=path, repeat=1, said=said)
    trace = read_trace(path)
    write_trace(replace(trace, foreseen=trace.experts), path)
    measure(replace(OURS, prefetch="gate"), trace=path, repeat=1, said=said)
    assert [job.engine["prefetch"] for job, _ in processes.jobs] == ["auto", "gate"]
    assert said == []


def test_a_short_trace_is_said_to_be_short(processes: Processes, tmp_path: Path) -> None:
    said: list[str] = []
    measure(trace=routed(tmp_path, requests=1), repeat=1, said=said)
    assert said == ["the trace has 1 requests of 4 tokens, not 2"]


def test_one_bench_of_a_model_at_a_time(processes: Processes) -> None:
    held = threading.Event()

    def fail(job: Job) -> None:
        held.set()
        with pytest.raises(Exception, match=r"tiny is busy: .*benchmarking"):
            measure(rivals=["mmap"])

    processes.fail = fail
    measure(rivals=["mmap"], repeat=1, tokens=2)
    assert held.is_set()


# A real one, and the command line


@pytest.fixture
def cli(tiny_home: Path, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    return CommandLine(tiny_home, monkeypatch)


ASKED = ("--experts", "50%", "--context", "64", "--prompts", "1", "--prompt-tokens", "8", "--tokens", "4")


def test_processes(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "_DISK_S", 0.05)
    out, err, code = cli.run("bench", "tiny", *ASKED, "--repeat", "1", "--threads", "1", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["schema"] == 1
    (run,) = found["runs"]
    assert run["last"]["memory"]["libraries"] < run["peak_rss"] <= run["limit"]
    assert run["same_tokens"]


def test_files(cli: CommandLine, processes: Processes, tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("x.csv", "x.md", "x.png")]
    options = [*ASKED, "--against", "mmap", "--csv", files[0], "--md", files[1], "--plot", files[2]]
    out, err, code = cli.run("bench", "tiny", *options, "--json")
    assert code == 0, err
    found = json.loads(out)
    ours, theirs = found["runs"]
    assert (ours["system"], theirs["system"]) == ("moeinf", "mmap")
    assert found["same_tokens"], found
    assert (found["csv"], found["md"], found["plot"]) == tuple(files)
    for key in ("ttft_s", "tpot_s", "decode_tokens_per_s"):
        assert ours[key]["min"] <= ours[key]["median"] <= ours[key]["max"]
    assert ours["belady_share"] == pytest.approx(ours["hit_rate"] / ours["belady_hit_rate"])
    assert theirs["belady_share"] is None
    lines = Path(files[0]).read_text().splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("system,label,start,experts,")
    assert ",hit_rate,belady_hit_rate,belady_share," in lines[0]
    assert "| mmap | " in Path(files[1]).read_text()
    assert " | OF BELADY | " in Path(files[1]).read_text()
    assert Path(files[2]).read_bytes().startswith(b"\x89PNG")


def test_a_killed_process_says_so(tiny: str) -> None:
    try:
        with memory_limit(1 << 40):
            pass
    except UnsupportedError as error:
        pytest.skip(str(error))
    job = Job("moeinf", tiny, engine={})
    with pytest.raises(bench_module._EndedError, match=r"killed: it needs more memory than the limit of 40.0 MiB"):
        bench_module._work({"job": job.to_json()}, 40 << 20)


def test_the_table(cli: CommandLine, processes: Processes) -> None:
    def fail(job: Job) -> None:
        if job.system == "transformers":
            raise bench_module._EndedError("killed: too large")

    processes.fail = fail
    out, err, code = cli.run("bench", "tiny", *ASKED, "--against", "transformers,mmap", "--warm", "--cold")
    title, _, budget, head, ours, *rest = out.splitlines()
    assert title == "tiny: 1 prompts, 4 new tokens each, 3 times"
    assert budget.startswith("50% of the experts, ")
    assert head.split()[0] == "SYSTEM"
    assert re.search(r" [0-9.]+%  [01]\.\d\d of [0-9.]+%  ", ours)
    assert ours.startswith("moeinf, cold")
    assert ours.endswith("same")
    assert [line.split("  ")[0] for line in rest[:3]] == ["mmap, cold", "moeinf, warm", "mmap, warm"]
    assert rest[3:] == [
        "transformers, cold: killed: too large",
        "transformers, warm: killed: too large",
        "",
        "all produced the same tokens; the limit was enforced",
    ]
    assert code == 0, err


def test_a_data_set_of_fewer_prompts_is_said_to_be(cli: CommandLine, processes: Processes, tmp_path: Path) -> None:
    (tmp_path / "two.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS[:2]))
    asked = ("bench", "tiny", *ASKED, "--repeat", "1", "--prompts", "9", "--dataset", str(tmp_path / "two.jsonl"))
    assert cli.run(*asked)[0].startswith("tiny: 2 prompts, ")
    assert json.loads(cli.run(*asked, "--json")[0])["prompts"] == 2


def test_moeinf_that_was_killed_is_a_failure(cli: CommandLine, processes: Processes) -> None:
    def fail(job: Job) -> None:
        raise bench_module._EndedError("killed: too large")

    processes.fail = fail
    out, _, code = cli.run("bench", "tiny", *ASKED, "--json")
    assert (json.loads(out)["runs"][0]["error"], code) == ("killed: too large", 1)


@pytest.mark.parametrize(
    ("options", "error", "hint"),
    [
        ("--prompts 0", "--prompts 0 measures nothing", "give 1 or more"),
        ("--against vllm", "--against vllm is not known", "transformers, accelerate, mmap, llama.cpp"),
        ("--against llama.cpp", "--against llama.cpp needs the model as a GGUF file", "--gguf FILE"),
        ("--gguf x.gguf", "--gguf is what llama.cpp reads", "add --against llama.cpp"),
        ("--against llama.cpp --gguf x.gguf", "--gguf x.gguf: there is no such file", ""),
        ("--policy lru,best", "policy 'best' is not known", "lru"),
        ("--prefetch off,best", "--prefetch best is not known", "gate"),
        ("--plot nowhere/x.png", "--plot nowhere/x.png cannot be written", "name a file in a folder"),
        ("--plot x.gif", "--plot x.gif: the name does not say which kind of picture", ".png"),
        ("--csv nowhere/x", "--csv nowhere/x cannot be written", "name a file in a folder"),
        ("--md .", "--md . cannot be written", "name a file in a folder"),
        ("--replay x.safetensors", "x.safetensors", ""),
    ],
)
def test_bad_options(cli: CommandLine, options: str, error: str, hint: str) -> None:
    _, err, code = cli.run("bench", "tiny", *options.split())
    assert code == 2
    assert error in err
    assert hint in err


def test_a_missing_rival_is_named(
    cli: CommandLine, processes: Processes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys.modules["moeinf.cli.bench"], "installed", lambda name: name == "mmap")
    options = [*ASKED, "--repeat", "1"]
    _, err, code = cli.run("bench", "tiny", *options, "--against", "accelerate,mmap", "-q")
    assert (err.splitlines()[0], code) == (
        "warning: accelerate is left out: it is not installed (pip install accelerate)",
        0,
    )
    _, err, code = cli.run("bench", "tiny", *options, "--against", "accelerate")
    assert (err, code) == (
        "error: nothing is left to compare with: accelerate is not installed\nhint: pip install accelerate\n",
        2,
    )


def test_no_model(cli: CommandLine) -> None:
    assert cli.run("bench", "nobody")[2] == 3


def test_scores_without_runs_have_no_picture() -> None:
    empty = Score("moeinf", "moeinf", "cold", None, None, None, 1, 1, 1)
    assert empty.decode_tokens_per_s is None
    assert figures.speeds([("all", [])], "nothing").startswith(b"\x89PNG")


def test_a_gpu_is_measured_beside_what_computes_there(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = replace(OURS, device="cuda", kernels="auto")
    with use_device(monkeypatch):
        report = bench(Store().open("tiny"), Wishes([ours], ["transformers"], TEXTS, prompts=2, tokens=4, repeat=1))
        with pytest.raises(UsageError, match="mmap is measured on the processor, and this on standin:0"):
            bench(Store().open("tiny"), Wishes([ours], ["mmap"], TEXTS, prompts=2, tokens=4, repeat=1))
    assert report.same_tokens
    assert report.unenforced == "a GPU's memory has no limit that could be set"
    (mine, job), (_, other) = [(job.engine, job) for job, _ in processes.jobs]
    assert (job.device, other.device) == ("standin:0", "standin:0")
    assert int(mine["device_memory"]) == report.scores[0].budget
    assert mine["host_memory"] is None
    assert [limit for _, limit in processes.jobs] == [None, None]
    assert report.scores[0].bound is None
