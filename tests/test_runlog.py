"""What answers took, beside what was expected: noted while the engine runs, written when it ends."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import moeinf
from machine_fakes import make_gpu
from machines import make_machine
from moeinf.evidence import MACHINE_FILE, RUNS_FILE, owner, read_runs
from moeinf.planning import find_subject
from moeinf.settings import home_path
from moeinf.store import TRACES_FOLDER, Store
from standin import StandIn, use_device


def me() -> str:
    return owner(Store().open("tiny").manifest)


def answer(name: str, tokens: int, **options: object) -> Path:
    """An answer of the model; returns its folder of traces."""
    with moeinf.load(name, **options) as engine:  # type: ignore[arg-type]
        engine.generation_config.eos_token_id = None
        engine.session().generate([5, 6, 7], moeinf.Sampling(max_tokens=tokens))
    return Store().path(name) / TRACES_FOLDER


def test_a_long_answer_is_noted(tiny: str) -> None:
    [run] = read_runs(answer(tiny, 20, experts="4", prefetch="off", threads=1), me())
    assert (run.slots, run.tokens, run.threads, run.prefetch) == (4, 19, 1, "off")
    assert run.predicted_s is None
    assert run.tpot_s > 0
    assert 0 <= run.hit_rate < 1


@pytest.mark.parametrize("reads_files", [False, True])
def test_where_experts_came_from_is_noted(tiny: str, reads_files: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeinf.engine.can_cache_files", lambda *_: reads_files)
    [run] = read_runs(answer(tiny, 20), me())
    assert run.reads_files == reads_files


def test_an_answer_to_which_the_processor_helped_a_gpu_is_not(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with use_device(monkeypatch):
        assert read_runs(answer(tiny, 20, experts="2", prefetch="off", miss="host"), me()) == []
        assert len(read_runs(answer(tiny, 20, experts="2", prefetch="off"), me())) == 1


def test_a_short_answer_is_not(tiny: str) -> None:
    assert read_runs(answer(tiny, 16), me()) == []


def test_what_is_nothing_to_learn_from_is_not(tiny: str) -> None:
    """What is told not to learn, and another dtype than the model's own."""
    with moeinf.load(tiny) as engine:
        engine.learns = False
        engine.generation_config.eos_token_id = None
        engine.session().generate([5, 6, 7], moeinf.Sampling(max_tokens=20))
    assert not (Store().path(tiny) / TRACES_FOLDER).exists()
    assert not answer(tiny, 20, dtype="float32").exists()


def test_what_was_expected_stands_beside_it(tiny: str) -> None:
    (home_path() / MACHINE_FILE).write_text(json.dumps(make_machine().to_dict()))
    try:
        answer(tiny, 20)
        [run] = read_runs(answer(tiny, 3), me())
        assert run.predicted_s is not None
        assert run.predicted_s > 0
    finally:
        (home_path() / MACHINE_FILE).unlink()


def test_the_hit_rate_leaves_out_what_was_foreseen(tiny: str) -> None:
    """With `gate` nearly everything is a hit or a wait; what was read was no find of the cache."""
    [run] = read_runs(answer(tiny, 40, experts="4", prefetch="gate"), me())
    assert run.hit_rate < 0.9


def test_an_answer_on_a_gpu_says_so(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = dataclasses.replace(make_gpu(), name=StandIn.name)
    with use_device(monkeypatch) as device:
        device.host_slots = 5
        [unknown] = read_runs(answer(tiny, 20, experts="4"), me())
        assert (unknown.device, unknown.slots, unknown.host_slots, unknown.predicted_s) == (device.name, 4, 5, None)
        machine = dataclasses.replace(make_machine(), gpus=(gpu,))
        (home_path() / MACHINE_FILE).write_text(json.dumps(machine.to_dict()))
        try:
            known = read_runs(answer(tiny, 20, experts="4"), me())[-1]
            assert known.predicted_s is not None
            assert known.predicted_s > 0
        finally:
            (home_path() / MACHINE_FILE).unlink()


def test_an_answer_in_which_memory_ran_out_is_not(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with use_device(monkeypatch), moeinf.load(tiny, experts="8") as engine:
        engine.generation_config.eos_token_id = None
        engine.make_room()
        for _ in range(2):
            engine.session().generate([5, 6, 7], moeinf.Sampling(max_tokens=20))
    [run] = read_runs(Store().path(tiny) / TRACES_FOLDER, me())
    assert run.slots == 4


def test_the_way_that_was_best_is_gone_first_by_the_next_engine(tiny: str) -> None:
    answer(tiny, 90, experts="4")  # 18 tokens each way, if they are close, and the same again
    folder = Store().path(tiny) / TRACES_FOLDER
    [run] = read_runs(folder, me())
    assert run.best in ("off", "gate", "eam")
    for other in ("gate", "off"):
        (folder / RUNS_FILE).write_text(json.dumps({**dataclasses.asdict(run), "best": other}) + "\n")
        with moeinf.load(tiny, experts="4") as engine:
            assert (engine.runtime.predictor, engine.runtime.best_predictor) == (other, other)
        with moeinf.load(tiny, experts="5") as engine:  # that is another matter
            assert (engine.runtime.predictor, engine.runtime.best_predictor) == ("off", "")
        with moeinf.load(tiny, experts="4", prefetch="eam") as engine:
            assert (engine.runtime.predictor, engine.runtime.best_predictor) == ("eam", "")


def test_a_run_never_fails_for_its_log(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise moeinf.MoeinfError("the disk is full")

    monkeypatch.setattr("moeinf.evidence.add_runs", fail)
    assert not (answer(tiny, 20) / RUNS_FILE).exists()


def test_the_engine_and_a_forecast_divide_memory_alike(tiny: str) -> None:
    from moeinf.placement import place
    from moeinf.settings import EngineOptions

    options = EngineOptions(host_memory="200MiB", context=64)
    subject = find_subject(tiny, Store())
    with moeinf.load(tiny, host_memory="200MiB", context=64) as engine:
        assert engine.plan == place(subject.manifest, subject.shape, options).plan
