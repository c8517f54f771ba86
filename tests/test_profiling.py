"""Measuring: small sizes, the real code. What goes wrong on the way, what is kept, and when it is measured again."""

from __future__ import annotations

import dataclasses
import errno
import json
import mmap
import os
import stat
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from faults import FailingDisk
from machine_fakes import FakeGpus, make_gpu, make_machine
from moeinf import profiling, timing
from moeinf.errors import CapacityError, MoeinfError, UsageError
from moeinf.evidence import MACHINE_FILE
from moeinf.files import FileSystem
from moeinf.locks import exclusive_lock
from moeinf.machine import Machine
from moeinf.profiling import Effort, load_or_measure, measure_machine
from moeinf.profiling import disk as disk_module
from moeinf.profiling.disk import SCRATCH_NAME, DiskRates, measure_disk
from moeinf.profiling.gpu import measure_gpus
from moeinf.profiling.maths import measure_maths
from moeinf.progress import NO_PROGRESS
from moeinf.shared_library import NotNativeError, built_library
from moeinf.transfer import Reader, allocate_buffer
from moeinf.units import GIB, MIB

SMALL = Effort(
    sizes=(MIB, 3 * MIB),
    depths=(2, 1),
    scratch=12 * MIB,
    working_set=MIB,
    memory=4 * MIB,
    disk_s=20.0,
    read_s=5.0,
    maths_s=0.01,
    layer_s=0.05,
    link=MIB,
)
NO_GPUS = FakeGpus(0)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _tiny_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeinf.profiling.maths.HIDDEN", 128)
    monkeypatch.setattr("moeinf.profiling.maths.INNER", 64)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# The whole.


def test_a_machine_is_measured(tmp_path: Path) -> None:
    machine = measure_machine(tmp_path / "home", effort=SMALL, accelerator=FakeGpus(1))
    assert Machine.from_json(json.dumps(machine.to_dict())) == machine
    kinds = {(rate.kernels, rate.weights, rate.tokens) for rate in machine.maths}
    assert {("torch", weights, tokens) for weights in ("bfloat16", "float32") for tokens in (1, 16, 256)} <= kinds
    if built_library():
        assert {("native", weights, 1) for weights in ("bfloat16", "float32", "int8", "int4")} <= kinds
    assert machine.layer_s > 0
    assert machine.fetch_s >= 0  # what is left when something else is taken off
    assert machine.foresee_s > 0
    assert machine.program_s >= 0
    assert machine.gpus[0].name == "A GPU 0"
    assert machine.disk.rate(3 * MIB, direct=machine.disk.reads_direct) > 0
    assert files(tmp_path / "home") == {"profile.lock"}


def test_without_the_library_torch_does_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> Any:
        raise NotNativeError("the native library is not built")

    monkeypatch.setattr(timing, "NativePool", missing)
    monkeypatch.setattr(profiling, "best_variant", missing)
    machine = measure_machine(tmp_path, effort=SMALL, accelerator=NO_GPUS)
    assert (machine.processor.kernels, machine.processor.no_kernels) == ("", "the native library is not built")
    assert {rate.kernels for rate in machine.maths} == {"torch"}
    assert machine.memory.bytes_per_s > 0


def test_only_one_process_measures_at_a_time(tmp_path: Path) -> None:
    with exclusive_lock(tmp_path / "profile.lock", "measuring"), pytest.raises(MoeinfError, match="measuring it"):
        measure_machine(tmp_path, effort=SMALL, accelerator=NO_GPUS)


# The disk.


def measure(
    folder: Path, effort: Effort = SMALL, *, free: int = GIB, buffer: int = GIB, disk: FileSystem | None = None
) -> DiskRates:
    return measure_disk(folder, free, buffer, effort, NO_PROGRESS, disk)


def test_every_size_is_read_at_every_depth_directly_and_not(tmp_path: Path) -> None:
    found = measure(tmp_path)
    ways = {True, False} if found.reads_direct else {False}
    points = {(rate.size, rate.depth, rate.direct) for rate in found.rates}
    assert points == {(size, depth, way) for size in SMALL.sizes for depth in SMALL.depths for way in ways}
    assert files(tmp_path) == set()


def test_no_byte_is_read_twice_and_all_reads_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    class Watched(Reader):
        def fetch(self, key: int, path: Path, begin: int, end: int, memory: memoryview, *rest: Any) -> None:
            assert path.stat().st_size == 12 * MIB
            assert len(memory) == end - begin
            asked.append((begin, end))
            super().fetch(key, path, begin, end, memory, *rest)

    monkeypatch.setattr(disk_module, "open_reader", Watched)
    measure(tmp_path, dataclasses.replace(SMALL, sizes=(3 * MIB,), depths=(2,), read_s=30))
    pieces = [(start, start + 3 * MIB) for start in range(0, 12 * MIB, 3 * MIB)]
    assert sorted(asked) in (sorted(pieces * 2), sorted(pieces * 3))  # one way twice, and the other where it can be


def test_the_file_holds_nothing_that_a_file_system_could_leave_out(tmp_path: Path) -> None:
    chunks: list[bytes] = []

    class Watching(FileSystem):
        def write_at(self, descriptor: int, data: Any, offset: int) -> None:
            chunks.append(bytes(data[:4096]))
            super().write_at(descriptor, data, offset)

    measure(tmp_path, dataclasses.replace(SMALL, scratch=129 * MIB), disk=Watching())
    assert len(chunks) == len(set(chunks)) == 3
    assert all(len(set(chunk)) > 200 for chunk in chunks)


def test_a_file_system_without_direct_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_module, "can_read_direct", lambda _: False)
    found = measure(tmp_path)
    assert not found.reads_direct
    assert "direct reads: the file system refuses them" in found.left_out
    assert {rate.direct for rate in found.rates} == {False}


@pytest.mark.parametrize("reads_direct", [True, False])
def test_a_page_cache_that_cannot_be_emptied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads_direct: bool
) -> None:
    monkeypatch.setattr(disk_module, "can_read_direct", lambda _: reads_direct)
    monkeypatch.setattr(disk_module, "_is_cached", lambda *_: True)
    found = measure(tmp_path)
    assert {rate.direct for rate in found.rates} == {reads_direct}
    assert any("page cache cannot be emptied" in what for what in found.left_out)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="nobody can empty the page cache here")
def test_what_the_page_cache_has_is_known_without_reading(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(MIB))
    with path.open("r+b") as file:
        os.fsync(file)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        before = [disk_module._is_cached(file.fileno(), MIB) for _ in range(20)]
        os.pread(file.fileno(), 1, MIB // 2)
        assert disk_module._is_cached(file.fileno(), MIB)
    assert len(set(before)) == 1, "asking brings nothing"
    if before[0]:
        pytest.skip("the file system lies in memory")


def test_what_there_is_no_room_for_is_left_out(tmp_path: Path) -> None:
    assert {rate.size for rate in measure(tmp_path, free=10 * MIB).rates} == {MIB, 3 * MIB}
    no_memory = measure(tmp_path, buffer=4 * MIB)
    assert {rate.size for rate in no_memory.rates} == {MIB}
    assert no_memory.left_out[-1] == "reads of 3.00 MiB: no room for them"


def test_a_slow_disk_gets_no_more_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    late = measure(tmp_path, dataclasses.replace(SMALL, disk_s=0.0))
    ways = 2 if late.reads_direct else 1
    assert len(late.rates) == ways  # the first of each way, or nothing would be known
    assert late.left_out[-1] == f"{3 * ways} of {4 * ways} sizes and depths of reads: there was no time for them"
    monkeypatch.setattr(disk_module._Disk, "_read", lambda *_: 1e6)
    slow = measure(tmp_path, dataclasses.replace(SMALL, read_s=0.02))
    assert {rate.size for rate in slow.rates} == {MIB}


def test_a_full_disk_is_not_measured(tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match=r"has 6\.00 MiB free"):
        measure(tmp_path, free=6 * MIB)
    assert files(tmp_path) == set()


@pytest.mark.parametrize(("code", "error"), [(errno.ENOSPC, CapacityError), (errno.EACCES, UsageError)])
def test_a_disk_that_fails_leaves_nothing_behind(tmp_path: Path, code: int, error: type[MoeinfError]) -> None:
    """Creating the file, writing it, making it durable: whichever fails."""
    for number in (1, 2, 3):
        with pytest.raises(error):
            measure(tmp_path, disk=FailingDisk(number, code))
        assert files(tmp_path) == set()


def test_a_file_that_cannot_be_removed_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no access"):
        measure(tmp_path, disk=FailingDisk(4, errno.EACCES))


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> float:
        assert SCRATCH_NAME in files(tmp_path)
        raise KeyboardInterrupt

    monkeypatch.setattr(disk_module._Disk, "_read", interrupt)
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path)
    assert files(tmp_path) == set()


def test_what_a_killed_process_left_is_used_up(tmp_path: Path) -> None:
    (tmp_path / SCRATCH_NAME).write_bytes(b"old" * MIB * 20)
    measure(tmp_path)
    assert files(tmp_path) == set()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_home_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(UsageError, match="no access"):
        measure_machine(tmp_path / "home", effort=SMALL, accelerator=NO_GPUS)


def test_a_home_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="no access"):
        measure_machine(tmp_path / "file/home", effort=SMALL, accelerator=NO_GPUS)


# Maths.


def test_a_busy_machine_leaves_precisions_out_and_never_bfloat16() -> None:
    effort = dataclasses.replace(SMALL, experts_s=0.0)
    rates, left_out = measure_maths(None, MIB, effort, NO_PROGRESS.task("maths", 6, "rates").__enter__())
    assert [(rate.weights, rate.tokens) for rate in rates] == [("bfloat16", tokens) for tokens in (1, 16, 256)]
    assert left_out == ("experts in float32: there was no time for them",)


def test_kinds_that_memory_has_no_room_for_are_left_out_and_never_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeinf.memory.available_bytes", lambda: 0)
    rates, left_out = measure_maths(None, MIB, SMALL, NO_PROGRESS.task("maths", 6, "rates").__enter__())
    assert {rate.weights for rate in rates} == {"bfloat16"}
    assert left_out == ("experts in float32: there was no memory for them",)


def test_experts_of_a_kind_make_room_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    buffers: list[weakref.ref[mmap.mmap]] = []

    def allocate(nbytes: int) -> mmap.mmap:
        assert all(buffer() is None for buffer in buffers)
        buffer = allocate_buffer(nbytes)
        buffers.append(weakref.ref(buffer))
        return buffer

    monkeypatch.setattr("moeinf.profiling.maths.allocate_buffer", allocate)
    measure_maths(None, MIB, SMALL, NO_PROGRESS.task("maths", 6, "rates").__enter__())
    assert len(buffers) == 2


# GPUs.


def test_every_rate_of_a_gpu_is_waited_for() -> None:
    gpus = FakeGpus(2)
    found, left_out = measure_gpus(gpus, SMALL, NO_PROGRESS.task("GPU", 14, "rates").__enter__())
    assert [gpu.index for gpu in found] == [0, 1]
    assert left_out == ()
    assert {rate.tokens for rate in found[0].maths} == {1, 16, 256}
    assert found[0].total == 128 * MIB
    assert gpus.waits >= 2 * 7


def test_a_gpu_that_vanishes_is_named_and_the_others_are_measured() -> None:
    task = NO_PROGRESS.task("GPU", 14, "rates").__enter__()
    found, left_out = measure_gpus(FakeGpus(2, fails_at=3), SMALL, task)
    assert [gpu.index for gpu in found] == [1]
    assert left_out == ("GPU 0: it failed while it was measured: CUDA error: the device is gone",)


# What is kept.


class Measure:
    """Stands for `measure_machine`, and counts."""

    def __init__(self, home: Path, **changes: Any) -> None:
        here = profiling._refreshed(make_machine(**changes), home.absolute(), NO_GPUS)
        self.machine = dataclasses.replace(here, disk=dataclasses.replace(here.disk, free=1))
        self.count = 0

    def __call__(self, home: Path, progress: object) -> Machine:
        self.count += 1
        return self.machine


def load(home: Path, measure: Measure, **options: Any) -> tuple[Machine, list[str]]:
    said: list[str] = []
    options = {"accelerator": NO_GPUS, **options}
    return load_or_measure(home, measure=measure, notify=said.append, **options), said


def test_figures_are_kept_and_live_values_are_not(home: Path) -> None:
    measure = Measure(home)
    first, _ = load(home, measure)
    again, said = load(home, measure)
    assert (measure.count, said) == (1, [])
    assert again.maths == first.maths == make_machine().maths
    assert again.disk.rates == make_machine().disk.rates
    assert again.measured_at == first.measured_at
    assert first.disk.free == 1
    assert again.disk.free > 1
    assert files(home) == {MACHINE_FILE}


def test_refresh_measures_again(home: Path) -> None:
    measure = Measure(home)
    load(home, measure)
    load(home, measure, refresh=True)
    assert measure.count == 2


@pytest.mark.parametrize("text", ["", "{", '{"schema": 99}', "\udc80"])
def test_figures_that_cannot_be_read_are_measured_again(home: Path, text: str) -> None:
    (home / MACHINE_FILE).write_bytes(text.encode(errors="surrogateescape"))
    measure = Measure(home)
    _, said = load(home, measure)
    assert measure.count == 1
    assert "machine.json cannot be used" in said[0]
    assert load(home, measure)[1] == []


@pytest.mark.parametrize(
    ("what", "part", "values"),
    [
        ("processor", "processor", {"name": "Another"}),
        ("cores", "processor", {"cores": 999}),
        ("threads", "processor", {"threads": 999}),
        ("native library", "processor", {"kernels": "another"}),
        ("memory", "memory", {"total": 1}),
        ("memory limit", "memory", {"limit": 1}),
        ("disk", "disk", {"device": "/dev/other"}),
    ],
)
def test_another_machine_is_measured_again(home: Path, what: str, part: str, values: dict[str, Any]) -> None:
    measure = Measure(home)
    here = measure.machine
    measure.machine = dataclasses.replace(here, **{part: dataclasses.replace(getattr(here, part), **values)})
    load(home, measure)
    measure.machine = here
    found, said = load(home, measure)
    assert measure.count == 2
    assert said == [f"machine.json is of another machine ({what}): measuring again"]
    assert found == here


def test_a_gpu_that_came_or_went_is_noticed(home: Path) -> None:
    measure = Measure(home)
    load(home, measure)
    assert load(home, measure, accelerator=FakeGpus(1))[1] == [
        "machine.json is of another machine (GPUs): measuring again"
    ]
    measured = dataclasses.replace(make_gpu(), name="A GPU 0")
    measure.machine = dataclasses.replace(measure.machine, gpus=(measured,), seen_gpus=("A GPU 0",))
    load(home, measure, refresh=True)
    kept, said = load(home, measure, accelerator=FakeGpus(1))
    assert said == []
    assert kept.gpus[0].free == 64 * MIB
    assert load(home, measure)[1] != []


def test_a_gpu_that_cannot_be_measured_is_tried_once(home: Path) -> None:
    machine = dataclasses.replace(Measure(home).machine, seen_gpus=("A GPU 0",), left_out=("A GPU 0: full",))
    (home / MACHINE_FILE).write_text(json.dumps(machine.to_dict()))
    measure = Measure(home)
    assert load(home, measure, accelerator=FakeGpus(1))[1] == []
    assert measure.count == 0


def test_a_result_that_cannot_be_kept_says_so(home: Path) -> None:
    (home / MACHINE_FILE).mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        load(home, Measure(home))
