"""`moeinf profile` as transcripts: what is typed, all that comes back, and the exit code."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cli_transcripts import CommandLine
from machine_fakes import FakeGpus, make_gpu, make_machine
from moeinf import profiling
from moeinf.machine import Machine, MathsRate, ReadRate
from moeinf.profiling import Effort, measure_machine
from moeinf.units import MIB

SOURCE = Path(__file__).parents[1] / "src"
RATES = tuple(
    ReadRate(size * MIB, depth, direct, depth * size * 1e8)
    for size in (1, 10)
    for depth in (8, 1)
    for direct in (True, False)
    if (size, depth, direct) != (10, 1, False)
)
MATHS = (
    *(MathsRate("native", "bfloat16", tokens, 38e9 / tokens) for tokens in (1, 16)),
    MathsRate("native", "int8", 1, 39.5e9),
    *(MathsRate("torch", "bfloat16", tokens, 20e9 / tokens) for tokens in (1, 16)),
)

Measured = Callable[..., None]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    return CommandLine(tmp_path / "home", monkeypatch)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measured:
    """Lets `profile` find the machine that it is given, as old as is said."""

    def use(machine: Machine, *, age_s: float = 0.0) -> None:
        def load(home: Path, progress: object, *, refresh: bool, notify: Callable[[str], None]) -> Machine:
            notify(f"refresh: {refresh}")
            then = datetime.now(UTC) - timedelta(seconds=0 if refresh else age_s)
            return dataclasses.replace(machine, measured_at=then.isoformat())

        monkeypatch.setattr(profiling, "load_or_measure", load)

    return use


def typical(**changes: Any) -> Machine:
    machine = make_machine(maths=MATHS, **changes)
    return dataclasses.replace(machine, disk=dataclasses.replace(machine.disk, rates=RATES, read_ahead=8 * MIB))


def test_a_machine_in_tables(cli: CommandLine, measured: Measured) -> None:
    measured(typical(left_out=("direct reads of the moon: too far",), gpus=(make_gpu(),)))
    cli.check("""
        $ moeinf profile
        | processor            A Processor: 8 cores, 8 threads
        | vector instructions  avx2 avx512f avx512_bf16
        | native library       avx512bf16
        | memory               64.0 GiB, 60.0 GiB available
        |                      read at 40.00 GB/s, handed out at 8.00 GB/s
        |                      swap used: there is none
        | disk of the models   /dev/nvme0n1p2: ext4, direct reads
        |                      read-ahead 8.00 MiB, 500 GiB free
        |
        | DIRECT READS OF  1 AT ONCE  8 AT ONCE
        | 1.00 MiB         0.10 GB/s  0.80 GB/s
        | 10.0 MiB         1.00 GB/s  8.00 GB/s
        |
        | BUFFERED READS OF  1 AT ONCE  8 AT ONCE
        | 1.00 MiB           0.10 GB/s  0.80 GB/s
        | 10.0 MiB                      8.00 GB/s
        |
        | EXPERTS COMPUTED WITH  1 TOKEN     16 TOKENS
        | native, bfloat16       38.00 GB/s  2.38 GB/s
        | native, int8           39.50 GB/s
        | torch, bfloat16        20.00 GB/s  1.25 GB/s
        | dense layers, bfloat16, 1 token  20.00 GB/s
        | a layer beside its weights       0.50 ms, 0.30 in one call (all experts in memory)
        | a miss beside its reading        0.10 ms
        | asking a router early            0.20 ms
        | torch's program of a product     1.00 ms
        |
        | GPU 0       A GPU, 24.0 GiB, 23.0 GiB free
        | its memory  900.00 GB/s
        | to it       25.00 GB/s from pinned memory, 6.00 GB/s from other
        | from it     24.00 GB/s to pinned memory
        | EXPERTS COMPUTED ON GPU 0 WITH  1 TOKEN      256 TOKENS
        | torch, bfloat16                 500.00 GB/s  90.00 GB/s
        |
        | not measured: direct reads of the moon: too far
        |
        | 1. the disk's read-ahead is 8.00 MiB
        |    costs: nothing to moeinf, which reads past it; mapped weights come 5 to 8 times slower than at 128 KiB
        |    mend:  sudo blockdev --setra 256 /dev/nvme0n1p2
        |
        | measured just now
        ! refresh: False
        = 0
        """)


def test_a_machine_of_which_little_is_known(cli: CommandLine, measured: Measured) -> None:
    machine = make_machine(maths=MATHS)
    processor = dataclasses.replace(machine.processor, cores=1, threads=1, features=(), kernels="", no_kernels="none")
    memory = dataclasses.replace(machine.memory, limit=40 << 30, swap_total=4 << 30, swap_free=4 << 30)
    rates = (ReadRate(MIB, 8, False, 2e9),)
    disk = dataclasses.replace(machine.disk, device="", filesystem="", reads_direct=False, read_ahead=None, rates=rates)
    measured(dataclasses.replace(machine, processor=processor, memory=memory, disk=disk), age_s=7200)
    stdout, _, code = cli.run("profile")
    lines = [" ".join(line.split()) for line in stdout.splitlines()]
    assert code == 0
    assert lines[:8] == [
        "processor A Processor: 1 core, 1 thread",
        "vector instructions none that are known",
        "native library none: none",
        "memory 64.0 GiB, 40.0 GiB allowed by its cgroup, 60.0 GiB available",
        "read at 40.00 GB/s, handed out at 8.00 GB/s",
        "swap used: 0 B of 4.00 GiB",
        "disk of the models unknown: unknown file system, no direct reads",
        "read-ahead unknown, 500 GiB free",
    ]
    assert "DIRECT READS OF" not in stdout.replace("BUFFERED READS OF", "")
    assert lines[-1] == "measured 2 h 00 min ago; moeinf profile --refresh measures again"


def test_a_machine_with_nothing_in_its_way(cli: CommandLine, measured: Measured) -> None:
    measured(make_machine())
    assert "\nnothing stands in the way\n" in cli.run("profile", "--refresh")[0]


def test_a_machine_for_scripts(cli: CommandLine, measured: Measured) -> None:
    machine = typical()
    measured(machine)
    stdout, _, code = cli.run("profile", "--json")
    data = json.loads(stdout)
    assert (code, set(data), data["schema"]) == (0, {"schema", "machine", "findings"}, 1)
    assert Machine.from_json(json.dumps(data["machine"])).disk == machine.disk
    (finding,) = data["findings"]
    assert set(finding) == {"what", "cost", "command"}


def test_quiet_says_where_the_figures_are(cli: CommandLine, measured: Measured) -> None:
    measured(typical())
    cli.check("""
        $ moeinf profile -q
        | HOME/machine.json
        = 0
        """)


def test_options_of_the_engine_need_a_model(cli: CommandLine, measured: Measured) -> None:
    measured(typical())
    cli.check("""
        $ moeinf profile --host-memory 4GiB
        ! error: --host-memory says how a model is to run
        ! hint: moeinf profile MODEL, or leave it out
        = 2
        """)


@pytest.mark.parametrize("option", ["--miss host", "--compile on"])
def test_what_cannot_be_foretold_is_refused_before_anything_is_measured(option: str, cli: CommandLine) -> None:
    cli.check(f"""
        $ moeinf profile demo {option}
        ! error: what {option.split()[0]} brings is not foretold
        ! hint: leave {option.split()[0]} out
        = 7
    """)


def test_a_model_is_planned_with_the_figures(cli: CommandLine, measured: Measured) -> None:
    measured(typical())
    stdout, _, code = cli.run("profile", "demo", "--host-memory", "200MiB", "--json")
    data = json.loads(stdout)
    assert (code, data["model"], data["plan"]["budget"]) == (0, "demo", 200 * MIB)
    measured(dataclasses.replace(typical(), layer_s=1.0, whole_layer_s=1.0))
    slower = json.loads(cli.run("profile", "demo", "--host-memory", "200MiB", "--json")[0])
    assert slower["expected"]["layers_s"] > 1 > data["expected"]["layers_s"]


def test_a_home_that_cannot_be(cli: CommandLine) -> None:
    cli.home.write_text("")
    cli.check("""
        $ moeinf profile
        ! error: MOEINF_HOME is HOME, which is no folder
        ! hint: set it to one
        = 2
        """)


def test_a_short_run_for_real(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    effort = Effort((MIB,), (2,), 4 * MIB, MIB, MIB, read_s=0.01, maths_s=0.001, layer_s=0.01)
    measure = partial(measure_machine, effort=effort, accelerator=FakeGpus(0))
    load = partial(profiling.load_or_measure, measure=measure, accelerator=FakeGpus(0))
    monkeypatch.setattr(profiling, "load_or_measure", load)
    monkeypatch.setattr("moeinf.profiling.maths.HIDDEN", 128)
    monkeypatch.setattr("moeinf.profiling.maths.INNER", 64)
    stdout, stderr, code = cli.run("profile")
    assert code == 0
    assert stdout.endswith("\nmeasured just now\n")
    assert stderr.splitlines()[0] == "write a scratch file: 4.00 MiB"
    assert sorted(path.name for path in cli.home.iterdir()) == ["machine.json", "profile.lock"]
    again, stderr, code = cli.run("profile")
    assert (stderr, code) == ("", 0)
    assert "EXPERTS COMPUTED WITH" in again


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_leaves_no_scratch_file(cli: CommandLine, number: int, code: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "moeinf", "profile"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE), "MOEINF_HOME": str(cli.home)},
    )
    deadline = time.monotonic() + 60
    while not (cli.home / "profile.scratch").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (code, "")
    assert "Traceback" not in stderr
    assert [path.name for path in cli.home.iterdir()] == ["profile.lock"]
