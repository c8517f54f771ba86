"""Files of what was measured: what is written is read, and what cannot be read is as good as none."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from machines import make_machine, make_manifest
from moeinf.evidence import (
    CURVE_FILE,
    MACHINE_FILE,
    RUNS_FILE,
    add_runs,
    owner,
    read_curve,
    read_machine,
    read_runs,
    write_curve,
)
from moeinf.forecast import HitCurve
from test_forecast import run

CURVE = HitCurve(((0.1, 0.3), (0.5, 0.8)), "somewhere", 0.7)
ME = "me"
TRACES = [("a.safetensors", 10, 123)]


def test_a_machine_is_read_back(tmp_path: Path) -> None:
    assert read_machine(tmp_path) is None
    (tmp_path / MACHINE_FILE).write_text(json.dumps(make_machine().to_dict()))
    assert read_machine(tmp_path) == make_machine()


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"schema": 99}', b"\xff"])
def test_what_is_no_machine_is_none(tmp_path: Path, text: bytes) -> None:
    (tmp_path / MACHINE_FILE).write_bytes(text)
    assert read_machine(tmp_path) is None


def test_a_curve_is_read_back_for_the_same_policy_and_traces(tmp_path: Path) -> None:
    assert read_curve(tmp_path, ME, "lru") is None
    write_curve(tmp_path, ME, "lru", TRACES, CURVE)
    assert read_curve(tmp_path, ME, "lru") == CURVE
    assert read_curve(tmp_path, ME, "lru", TRACES) == CURVE
    assert read_curve(tmp_path, ME, "lfu") is None
    assert read_curve(tmp_path, ME, "lru", [("a.safetensors", 11, 123)]) is None


def test_another_model_of_the_same_name_has_neither(tmp_path: Path) -> None:
    write_curve(tmp_path, ME, "lru", TRACES, CURVE)
    add_runs(tmp_path, [run(5, 0.1, model=ME)])
    manifest = make_manifest()
    other = dataclasses.replace(manifest, layers=manifest.layers[:1])
    assert owner(dataclasses.replace(manifest, dense_bytes=1)) == owner(manifest) != owner(other)
    assert read_curve(tmp_path, owner(other), "lru") is None
    assert read_runs(tmp_path, owner(other)) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        '{"model": "me", "policy": "lru", "points": [[1]], "source": "", "foreseen": null}',
        '{"model": "me", "policy": "lru", "points": [[0.5, 2.0]], "source": "", "foreseen": null}',
        '{"model": "me", "policy": "lru", "points": [[0.5, NaN]], "source": "", "foreseen": null}',
        "[" * 100_000,
    ],
    ids=range(7),
)
def test_what_is_no_curve_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / CURVE_FILE).write_text(text)
    assert read_curve(tmp_path, ME, "lru") is None


def test_the_last_hundred_runs_are_kept(tmp_path: Path) -> None:
    assert read_runs(tmp_path, ME) == []
    runs = [run(slots, 0.1, predicted_s=0.2, model=ME) for slots in range(1, 131)]
    add_runs(tmp_path, runs[:60])
    add_runs(tmp_path, runs[60:])
    assert read_runs(tmp_path, ME) == runs[30:]


def test_lines_that_are_no_runs_are_left_out_and_replaced(tmp_path: Path) -> None:
    good = json.dumps(dataclasses.asdict(run(5, 0.1, model=ME)))
    bad = [
        "",
        "{",
        "[]",
        '{"slots": 1}',
        good.replace('"tpot_s": 0.1', '"tpot_s": 0'),
        good.replace('"tpot_s": 0.1', '"tpot_s": "fast"'),
        good.replace('"hit_rate": 0.5', '"hit_rate": 1.5'),
        good.replace('"slots": 5', '"slots": 0'),
        good.replace('"tpot_s": 0.1', '"tpot_s": Infinity'),
        "[" * 100_000,
    ]
    (tmp_path / RUNS_FILE).write_text("\n".join([*bad, good]))
    assert read_runs(tmp_path, ME) == [run(5, 0.1, model=ME)]
    add_runs(tmp_path, [run(6, 0.1, model=ME)])
    assert len((tmp_path / RUNS_FILE).read_text().splitlines()) == 2
