"""The measured numbers: what lies between two of them, and that what is written comes back."""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from machine_fakes import make_gpu, make_machine
from moeinf.errors import IntegrityError
from moeinf.machine import SCHEMA, Machine, MathsRate, ReadRate

MIB = 1 << 20


def test_rates_lie_between_those_of_the_sizes_measured() -> None:
    rates = (ReadRate(1 * MIB, 8, True, 1e9), ReadRate(4 * MIB, 8, True, 2e9), ReadRate(4 * MIB, 8, False, 7e9))
    disk = dataclasses.replace(make_machine().disk, rates=rates)
    assert disk.rate(1 * MIB) == 1e9
    assert disk.rate(2 * MIB) == pytest.approx(1.5e9)  # halfway, counted in doublings
    assert disk.rate(4 * MIB) == 2e9
    assert (disk.rate(1), disk.rate(400 * MIB)) == (1e9, 2e9)
    assert disk.rate(1 * MIB, direct=False) == 7e9


@pytest.mark.parametrize(("depth", "nearest"), [(1, 1), (2, 1), (3, 4), (7, 4), (8, 4), (9, 16), (100, 16)])
def test_the_nearest_depth_speaks_for_one_that_was_not_measured(depth: int, nearest: int) -> None:
    rates = tuple(ReadRate(MIB, each, True, each * 1e9) for each in (16, 1, 4))
    disk = dataclasses.replace(make_machine().disk, rates=rates)
    assert disk.rate(MIB, depth=depth) == nearest * 1e9


def test_reads_that_were_not_measured_have_no_rate() -> None:
    disk = dataclasses.replace(make_machine().disk, rates=(ReadRate(MIB, 8, True, 1e9),))
    with pytest.raises(ValueError, match="no buffered reads"):
        disk.rate(MIB, direct=False)


def test_torch_computes_where_native_kernels_were_not_measured() -> None:
    maths = (
        MathsRate("torch", "bfloat16", 1, 8e9),
        MathsRate("torch", "bfloat16", 16, 4e9),
        MathsRate("native", "int8", 1, 20e9),
    )
    machine = make_machine(maths=maths)
    assert machine.maths_rate("bfloat16") == 8e9
    assert machine.maths_rate("bfloat16", 4) == pytest.approx(6e9)
    assert machine.maths_rate("int8", 100) == 20e9
    with pytest.raises(ValueError, match="experts of float32 were not measured"):
        machine.maths_rate("float32")


def test_the_cgroup_bounds_what_is_usable() -> None:
    memory = make_machine().memory
    assert memory.usable == memory.total
    assert dataclasses.replace(memory, limit=MIB).usable == MIB


def test_figures_are_as_old_as_the_clock_says_and_never_from_the_future() -> None:
    machine = make_machine(measured_at="2026-03-01T12:00:00+00:00")
    noon = datetime(2026, 3, 1, 12, tzinfo=UTC)
    assert machine.age_s(noon + timedelta(hours=1)) == 3600
    assert machine.age_s(noon - timedelta(hours=1)) == 0


def test_what_is_written_comes_back() -> None:
    machine = make_machine(gpus=(make_gpu(),), left_out=("one thing",), load=0.25)
    assert Machine.from_json(json.dumps(machine.to_dict())) == machine


def damages() -> dict[str, Any]:
    def change(edit: Any) -> str:
        values = make_machine(gpus=(make_gpu(),)).to_dict()
        edit(values)
        return json.dumps(values)

    return {
        "no JSON": "{",
        "no object": "[1]",
        "another version": change(lambda values: values.update(schema=SCHEMA + 1)),
        "no version": change(lambda values: values.pop("schema")),
        "a part missing": change(lambda values: values.pop("disk")),
        "a part unknown": change(lambda values: values.update(colour="blue")),
        "a part of another kind": change(lambda values: values.update(memory=7)),
        "no rates": change(lambda values: values["disk"].update(rates=None)),
        "a rate of nothing": change(lambda values: values["memory"].update(bytes_per_s=0)),
        "a rate of text": change(lambda values: values["maths"][0].update(bytes_per_s="fast")),
        "no number": change(lambda values: values["disk"]["rates"][0].update(bytes_per_s=float("nan"))),
        "endless": change(lambda values: values["gpus"][0].update(pinned_to_device=float("inf"))),
        "time that runs backwards": change(lambda values: values.update(layer_s=-1)),
        "no date": change(lambda values: values.update(measured_at="yesterday")),
        "no time zone": change(lambda values: values.update(measured_at="2026-01-01T00:00:00")),
        "load of text": change(lambda values: values.update(load="x")),
        "load of nothing": change(lambda values: values.update(load=float("nan"))),
        "a disk without rates": change(lambda values: values["disk"].update(rates=[])),
        "reads by nobody": change(lambda values: values["disk"]["rates"][0].update(depth=0)),
        "reads of no size": change(lambda values: values["disk"]["rates"][0].update(size=float("nan"))),
        "reads at no depth": change(lambda values: values["disk"]["rates"][0].update(depth=float("nan"))),
        "no maths": change(lambda values: values.update(maths=[])),
        "maths of no token": change(lambda values: values["maths"][0].update(tokens=0)),
        "maths of no number": change(lambda values: values["maths"][0].update(tokens=float("nan"))),
        "load beyond floats": change(lambda values: values.update(load=10**400)),
        "too deep": "[" * 100_000,
    }


@pytest.mark.parametrize("name", damages())
def test_damaged_figures_are_refused(name: str) -> None:
    with pytest.raises(IntegrityError, match="no measurements of a machine"):
        Machine.from_json(damages()[name])
