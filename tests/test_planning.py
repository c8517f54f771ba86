"""What a forecast needs, gathered: of models here, of folders, of the hub; and what `show_plan` makes of it."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest
import torch

from fakehub import FakeHub
from families import make_checkpoint
from machine_fakes import make_gpu
from machines import make_machine
from moeinf import demo, hub, memory, planning
from moeinf.cli.output import Mode, Output
from moeinf.cli.planning import show_plan
from moeinf.errors import CapacityError, ModelNotFoundError, MoeinfError, UnsupportedError
from moeinf.evidence import CURVE_FILE, add_runs, owner
from moeinf.forecast import PUBLISHED
from moeinf.machine import Machine
from moeinf.manifest import Manifest
from moeinf.planning import Subject, find_curve, find_subject
from moeinf.pull import pull
from moeinf.settings import EngineOptions
from moeinf.simulate import events, replay
from moeinf.store import TRACES_FOLDER, Store
from moeinf.trace import NO_EXPERT, ModelIdentity
from moeinf.tracefile import write_trace
from standin import StandIn, use_device
from test_forecast import run
from traces import make_trace

GIB = 1 << 30
MACHINE = make_machine()
TINY_SETTING = {"host_memory": "200MiB", "context": 64}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model in several weight files and in one."""
    folder = tmp_path_factory.mktemp("checkpoints")
    make_checkpoint("mixtral", folder / "sharded", max_shard_size="25KB")
    make_checkpoint("mixtral", folder / "single")
    return {"org/sharded": folder / "sharded", "org/single": folder / "single"}


@pytest.fixture
def fake(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr(hub, "_sleep", lambda _: None)
    with FakeHub(checkpoints) as fake:
        fake.connect(monkeypatch)
        yield fake


def without_files(manifest: Manifest) -> Manifest:
    return dataclasses.replace(manifest, files={})


@pytest.mark.parametrize("is_packed", [False, True], ids=["plain", "packed"])
def test_a_folder_is_known_as_if_it_were_pulled(
    is_packed: bool, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moeinf.kernels.computes_from_packed", lambda: is_packed)
    store = Store(tmp_path)
    before = find_subject(str(checkpoints["org/sharded"]), store)
    pull(str(checkpoints["org/sharded"]), store=store, packs=lambda: is_packed)
    after = find_subject("sharded", store)
    assert before.traces is None
    assert after.traces == store.path("sharded") / TRACES_FOLDER
    assert (before.name, before.shape) == (after.name, after.shape)
    assert (before.manifest.layout.quantization is not None) == is_packed
    assert before.manifest == without_files(after.manifest)


def test_of_a_hub_repo_configuration_and_index_are_enough(
    checkpoints: dict[str, Path], fake: FakeHub, tmp_path: Path
) -> None:
    store = Store(tmp_path)
    seen = find_subject("org/sharded", store)
    assert not any(".safetensors" in request.path and "index" not in request.path for request in fake.requests)
    pull("org/sharded", store=store)
    stored = find_subject("sharded", store)
    assert (seen.shape, seen.manifest) == (stored.shape, without_files(stored.manifest))


def test_what_is_here_is_not_asked_for_at_the_hub(fake: FakeHub, tmp_path: Path) -> None:
    store = Store(tmp_path)
    pull("org/sharded", store=store)
    fake.requests.clear()
    find_subject("org/sharded", store)
    assert fake.requests == []


def test_without_an_index_nothing_can_be_said(fake: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="one file without an index") as caught:
        find_subject("org/single", Store(tmp_path))
    assert caught.value.hint == "moeinf pull org/single"


@pytest.mark.parametrize("model", ["mixtrall", "org/nothing"])
@pytest.mark.usefixtures("fake")
def test_what_is_nothing(model: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        find_subject(model, Store(tmp_path))


def test_demo_needs_no_pull(tmp_path: Path) -> None:
    subject = find_subject("demo", Store(tmp_path))
    assert (subject.name, subject.traces) == (demo.NAME, None)
    assert subject.manifest.num_experts == 192
    assert not (tmp_path / "models").exists()


# Curves


@pytest.fixture
def subject(tiny: str, tmp_path: Path) -> Subject:
    """The tiny model, with an empty folder of traces of its own."""
    return dataclasses.replace(find_subject(tiny, Store()), traces=tmp_path)


def keep_trace(subject: Subject, tokens: int, name: str = "trace") -> None:
    assert subject.traces is not None
    identity = ModelIdentity.of("tiny", subject.manifest)
    write_trace(make_trace(identity, tokens), subject.traces / f"{name}.safetensors")


def test_without_traces_the_curve_is_the_published_one(subject: Subject) -> None:
    assert find_curve(subject, "lru") is PUBLISHED
    assert find_curve(dataclasses.replace(subject, traces=None), "lru") is PUBLISHED
    keep_trace(subject, 20)
    assert find_curve(subject, "lru") is PUBLISHED, "20 tokens say nothing"


def test_traces_are_replayed_and_their_curve_is_kept(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    assert subject.traces is not None
    keep_trace(subject, 200)
    curve = find_curve(subject, "lru")
    assert curve.source == "traces of this model: 198 decoded tokens replayed with lru"
    assert (subject.traces / CURVE_FILE).exists()
    monkeypatch.setattr(planning, "_replayed", None)
    assert find_curve(subject, "lru") == curve


def test_what_routers_foresaw_is_kept_with_the_curve(subject: Subject) -> None:
    assert subject.traces is not None
    trace = make_trace(ModelIdentity.of("tiny", subject.manifest), 200)
    half = trace.experts.copy()
    half[:, :, 1:] = NO_EXPERT
    write_trace(dataclasses.replace(trace, foreseen=half), subject.traces / "one.safetensors")
    for _ in range(2):  # made, and read again
        assert find_curve(subject, "lru").foreseen == pytest.approx(1 / max(trace.identity.top_k))


def test_the_curve_is_that_of_a_cache_that_has_been_filled(subject: Subject) -> None:
    keep_trace(subject, 200)
    history = list(events(make_trace(ModelIdentity.of("tiny", subject.manifest), 200)))
    half, whole = (replay(part, (8, 8), "lru", 8) for part in (history[: len(history) // 2], history))
    late = (whole.hits - half.hits) / (whole.requests - half.requests)
    assert dict(find_curve(subject, "lru").points)[0.5] == late


def test_a_new_trace_or_another_policy_makes_a_new_curve(subject: Subject) -> None:
    keep_trace(subject, 200)
    first = find_curve(subject, "lru")
    assert find_curve(subject, "random").source != first.source
    keep_trace(subject, 300, "more")
    assert "496 decoded tokens" in find_curve(subject, "lru").source


def test_what_is_no_trace_of_this_model_is_left_out(subject: Subject) -> None:
    assert subject.traces is not None
    write_trace(make_trace(tokens=200), subject.traces / "other.safetensors")
    (subject.traces / "damaged.safetensors").write_bytes(b"nothing")
    (subject.traces / "a.1.draft.safetensors").write_bytes(b"nothing")
    assert find_curve(subject, "lru") is PUBLISHED
    keep_trace(subject, 100)
    assert find_curve(subject, "lru").source.startswith("traces of this model: 98 decoded")


# What is shown


def show(
    model: str, mode: Mode = Mode.HUMAN, machine: Machine = MACHINE, stderr: TextIO | None = None, **flags: object
) -> tuple[str, int]:
    stdout = io.StringIO()
    output = Output(mode, stdin=io.StringIO(), stdout=stdout, stderr=stderr or io.StringIO())
    code = show_plan(model, machine, EngineOptions(**flags), output)  # type: ignore[arg-type]
    return stdout.getvalue(), code


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a fixed amount of free memory."""
    monkeypatch.setattr(memory, "available_bytes", lambda: GIB)


@pytest.mark.usefixtures("free")
def test_word_sentence_arithmetic_chart_and_advice(tmp_path: Path) -> None:
    text, code = show("demo", experts="25%")
    assert code == 0
    lines = text.splitlines()
    assert lines[0] == "comfortable"
    assert lines[1].endswith(
        "48 of 192 experts (25%) fit in memory, and the system's page cache has room for the files of the others."
    )
    heads = [line.split("  ")[0] for line in lines if line and not line.startswith(" ")]
    assert heads[2:6] == ["MEMORY", "A TOKEN", "FIRST TOKEN", f"Hit rate from {PUBLISHED.source}."]
    assert sum("█" in line for line in lines) == 8
    assert lines[-1].startswith("What would help most: ")


@pytest.mark.usefixtures("free")
def test_as_json() -> None:
    text, _ = show("demo", Mode.JSON, experts="25%")
    data = json.loads(text)
    assert list(data) == [
        "schema",
        "model",
        "device",
        "verdict",
        "regime",
        "reason",
        "plan",
        "expected",
        "curve_source",
        "corrected_by",
        "budgets",
        "host_budgets",
        "advice",
    ]
    assert (data["device"], data["plan"]["host"], data["host_budgets"]) == (None, None, [])
    plan, expected = data["plan"], data["expected"]
    assert plan["total"] == plan["dense"] + plan["kv_cache"] + plan["workspace"] + plan["experts"] <= plan["budget"]
    assert {"ttft_s", "tpot_s", "tokens_per_s", "by", "bound_s", "hit_rate"} <= set(expected)
    assert expected["tokens_per_s"] == pytest.approx(1 / expected["tpot_s"])
    assert data["corrected_by"] == {"factor": 1.0, "runs": 0}
    assert len(data["budgets"]) == 8


@pytest.mark.usefixtures("free")
def test_the_word_alone() -> None:
    assert show("demo", Mode.QUIET) == ("resident\n", 0)


@pytest.mark.parametrize(("mode", "shown"), [(Mode.HUMAN, "no\n"), (Mode.QUIET, "no\n")])
def test_what_cannot_run_is_a_no(mode: Mode, shown: str) -> None:
    stdout = io.StringIO()
    output = Output(mode, stdin=io.StringIO(), stdout=stdout, stderr=io.StringIO())
    with pytest.raises(CapacityError, match="the model needs") as caught:
        show_plan("demo", make_machine(), EngineOptions(host_memory="20MiB"), output)
    assert stdout.getvalue() == shown
    assert caught.value.hint is not None


def test_a_no_as_json() -> None:
    stdout = io.StringIO()
    output = Output(Mode.JSON, stdin=io.StringIO(), stdout=stdout, stderr=io.StringIO())
    with pytest.raises(CapacityError) as caught:
        show_plan("demo", make_machine(), EngineOptions(host_memory="20MiB"), output)
    data = json.loads(stdout.getvalue())
    assert (data["schema"], data["verdict"], data["plan"]) == (1, "no", None)
    assert data["reason"] == str(caught.value)
    assert data["advice"] == [{"what": caught.value.hint, "tokens_per_s": None}]


@pytest.mark.usefixtures("free")
def test_past_runs_are_said_to_correct(tiny: str) -> None:
    traces = Store().path(tiny) / TRACES_FOLDER
    before = json.loads(show(tiny, Mode.JSON, experts="8")[0])
    expected, me = before["expected"], owner(Store().open(tiny).manifest)
    slow = run(8, 2 * expected["tpot_s"], hit_rate=expected["hit_rate"], reads_files=True, model=me)
    traces.mkdir()
    try:
        add_runs(traces, [dataclasses.replace(slow, model="another")] * 2)
        assert "Corrected" not in show(tiny, experts="8")[0]
        add_runs(traces, [slow, slow])
        text, _ = show(tiny, experts="8")
        assert "Corrected by 2 past runs: times 2.00." in text.splitlines()
    finally:
        shutil.rmtree(traces)


# With a GPU


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with use_device(monkeypatch) as found:
        yield found


MEASURED = dataclasses.replace(MACHINE, gpus=(dataclasses.replace(make_gpu(), name=StandIn.name),))


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize(
    ("host_slots", "regime"), [(None, "host-cached"), (40, "streaming")], ids=["host-cached", "streaming"]
)
def test_a_gpu_is_planned_for_with_both_memories(device: StandIn, host_slots: int | None, regime: str) -> None:
    device.host_slots = host_slots
    text, code = show("demo", machine=MEASURED, device="cuda", experts="25%")
    assert code == 0
    lines = text.splitlines()
    assert "48 of 192 experts (25%) fit in the GPU's memory" in lines[1]
    heads = [line.split("  ")[0] for line in lines if line and not line.startswith(" ")]
    assert heads[2:6] == ["MEMORY OF THE GPU", "MEMORY OF THE HOST", "A TOKEN", "FIRST TOKEN"]
    assert "Never compared with a time measured on a GPU (docs/planning.md)." in lines
    assert sum("█" in line for line in lines) == 16
    data = json.loads(show("demo", Mode.JSON, MEASURED, experts="25%")[0])
    assert (data["device"], data["regime"]) == ("a stand-in", regime)
    assert data["plan"]["host"]["slots"] == (host_slots or 192)
    assert data["expected"]["by"] in ("link", "disk", "device", "host")
    assert [len(data[name]) for name in ("budgets", "host_budgets")] == [8, 8]


@pytest.mark.usefixtures("free")
def test_a_gpu_that_holds_everything(device: StandIn) -> None:
    data = json.loads(show("demo", Mode.JSON, MEASURED)[0])
    assert (data["regime"], data["expected"]["by"], data["host_budgets"]) == ("resident", "device", [])
    assert show("demo", machine=MEASURED)[0].splitlines()[-1] == (
        "Neither more memory nor a faster disk or link would help: computing is the limit."
    )


@pytest.mark.usefixtures("free", "device")
def test_the_processor_can_be_asked_for_beside_a_gpu() -> None:
    assert json.loads(show("demo", Mode.JSON, MEASURED, device="cpu")[0])["device"] is None


@pytest.mark.usefixtures("free", "device")
def test_a_gpu_that_was_not_measured() -> None:
    with pytest.raises(MoeinfError, match="a stand-in was not measured") as caught:
        show("demo")
    assert caught.value.hint == "run `moeinf profile --refresh`, or give --device cpu"


@pytest.mark.usefixtures("free")
def test_what_the_engine_would_say_is_said(device: StandIn) -> None:
    device.unsupported = {torch.bfloat16}
    stderr = io.StringIO()
    show("demo", machine=MEASURED, stderr=stderr)
    assert "a stand-in does not compute in bfloat16: in float32, which takes twice the memory" in stderr.getvalue()


@pytest.mark.usefixtures("free", "device")
def test_a_gpu_with_too_little_memory_is_a_no() -> None:
    with pytest.raises(CapacityError, match="the model needs"):
        show("demo", machine=MEASURED, device="cuda", device_memory="20MiB")
