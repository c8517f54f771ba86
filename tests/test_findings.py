"""Each finding from a synthetic machine that has it, and none from one that has not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from machine_fakes import make_machine
from moeinf.findings import find
from moeinf.machine import Machine, MathsRate, ReadRate
from moeinf.units import GIB, MIB


def change(part: str, **values: Any) -> Machine:
    machine = make_machine()
    return dataclasses.replace(machine, **{part: dataclasses.replace(getattr(machine, part), **values)})


def read_rates(bytes_per_s: float, *, direct: bool = True) -> tuple[ReadRate, ...]:
    return (ReadRate(10 * MIB, 8, direct, bytes_per_s),)


def test_a_good_machine_has_none() -> None:
    assert find(make_machine()) == []


CASES = {
    "busy": (dataclasses.replace(make_machine(), load=6.0), "took 6.0 of 8 cores", "quiet", "profile --refresh"),
    "read-ahead": (
        change("disk", read_ahead=8 * MIB),
        "read-ahead is 8.00 MiB",
        "nothing to moeinf",
        "sudo blockdev --setra 256 /dev/nvme0n1p2",
    ),
    "no direct reads": (
        change("disk", filesystem="nfs4", reads_direct=False, rates=read_rates(2e9, direct=False)),
        "nfs4 refuses direct reads",
        "page cache",
        "export MOEINF_HOME=",
    ),
    "slow disk": (
        change("disk", rates=read_rates(0.5e9)),
        "the disk is slow: 0.50 GB/s for experts of 10.0 MiB",
        "takes 21 ms",
        "export MOEINF_HOME=",
    ),
    "spinning disk": (
        change("disk", rates=read_rates(0.1e9), rotates=True),
        "the disk spins: 0.10",
        "105 ms",
        "export",
    ),
    "little free disk": (change("disk", free=5 * GIB), "5.00 GiB are free", "55.9 GiB", "moeinf list"),
    "cgroup": (change("memory", limit=8 * GIB), "allows 8.00 GiB of the machine's 64.0", "56.0 GiB", "docker update"),
    "swap": (change("memory", swap_total=8 * GIB, swap_free=7 * GIB), "1.00 GiB are swapped out", "disk", "swapoff"),
    "huge pages": (change("memory", huge_pages="never"), "huge pages are off", "4 KiB", "echo madvise"),
    "threads": (change("processor", threads=2), "2 of 8 cores compute", "25%", "export OMP_NUM_THREADS=8"),
    "governor": (change("processor", governor="powersave"), "powersave", "low clock", "cpupower"),
    "no library": (
        dataclasses.replace(
            change("processor", kernels="", no_kernels="the native library is not built"),
            maths=(MathsRate("torch", "bfloat16", 1, 14e9),),
        ),
        "the native library is not built",
        "14.0 GB/s, and memory gives 40.0",
        "pip install",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_finding_says_what_it_costs_and_what_mends_it(name: str) -> None:
    machine, what, cost, command = CASES[name]
    (found,) = find(machine)
    assert what in found.what
    assert cost in found.cost
    assert command in str(found.command)


def test_no_command_mends_a_processor() -> None:
    old = change("processor", features=("avx2",), kernels="avx2")
    slow = dataclasses.replace(old, maths=(MathsRate("native", "bfloat16", 1, 20e9),))
    (found,) = find(slow)
    assert (found.what, found.command) == ("the processor has no instructions for bfloat16", None)
    fast = dataclasses.replace(old, maths=(MathsRate("native", "bfloat16", 1, 39e9),))
    assert find(fast) == []


@pytest.mark.parametrize(
    "machine",
    [
        change("disk", rotates=True),  # virtual disks say so, and are fast
        change("disk", read_ahead=None, device="", filesystem=""),
        change("processor", governor=None),
        change("memory", huge_pages=None),
        change("memory", limit=60 * GIB),
        change("memory", swap_total=8 * GIB, swap_free=8 * GIB),
        dataclasses.replace(make_machine(), load=1.0),
    ],
)
def test_what_is_no_evidence_is_no_finding(machine: Machine) -> None:
    assert find(machine) == []


def test_what_cannot_be_mended_by_a_command_has_none() -> None:
    full = change("memory", swap_total=80 * GIB, swap_free=0, available=GIB)
    unknown = change("disk", read_ahead=8 * MIB, device="")
    assert [found.command for machine in (full, unknown) for found in find(machine)] == [None, None]
