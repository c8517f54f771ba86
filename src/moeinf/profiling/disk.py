"""How fast the disk that holds the models gives whole experts, at several sizes and depths.

Owns a scratch file of random bytes beside the models, for as long as it reads it. The engine's own reader reads it, so
what is measured is what the engine will get. The page cache is emptied of the file before every buffered point, and no
byte is read twice in one. The engine's depth is measured twice, some seconds apart, and the better figure
counts: what else the disk does only ever makes reads slower.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import random
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from ctypes import c_size_t, c_void_p
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moeinf.errors import CapacityError
from moeinf.files import FileSystem, explained
from moeinf.machine import ReadRate
from moeinf.native_reader import open_reader
from moeinf.progress import Progress, Task
from moeinf.transfer import DIRECT_ALIGNMENT, PIECE_BYTES, FileReader, allocate_buffer, can_read_direct
from moeinf.units import MIB, align_up, format_bytes

from .effort import Effort

__all__ = ["SCRATCH_NAME", "DiskRates", "measure_disk"]

SCRATCH_NAME = "profile.scratch"
_CHUNK = 64 * MIB
_SHIFT = 4099
"""Chunks are the same random bytes, each begun so many further on: no file system finds two blocks alike."""
_LEAST_PIECES = 4
_MOST_FREE = 0.5
_WRITING = 0.25
"""Shares of the free bytes, and of the disk's time, that the scratch file may take."""
_MAKE_ROOM = "free some space (`moeinf list` shows the models here), or set MOEINF_HOME to another disk"


@dataclass(frozen=True, slots=True)
class DiskRates:
    """What was measured, and in sentences what was not; `reads_direct`: whether reads can go past the page cache."""

    rates: tuple[ReadRate, ...]
    reads_direct: bool
    left_out: tuple[str, ...]


def measure_disk(
    folder: Path, free_bytes: int, buffer_bytes: int, effort: Effort, progress: Progress, disk: FileSystem | None = None
) -> DiskRates:
    """Read rates of the disk that holds `folder`, which is there and has `free_bytes` free. Reads go to memory of
    `buffer_bytes` at most, or little more.

    Raises CapacityError or UsageError when nothing can be written there. Whatever happens, the scratch file is removed.
    """
    begin = time.perf_counter()
    with _scratch_file(folder, free_bytes, effort, progress, disk or FileSystem()) as (path, size):
        return _Disk(path, size, buffer_bytes, effort).measure(progress, begin + effort.disk_s)


@contextmanager
def _scratch_file(
    folder: Path, free_bytes: int, effort: Effort, progress: Progress, disk: FileSystem
) -> Iterator[tuple[Path, int]]:
    """A durable file of random bytes, and its size: what there is room and time for."""
    path = folder / SCRATCH_NAME
    wanted = min(effort.scratch, int(free_bytes * _MOST_FREE)) // PIECE_BYTES * PIECE_BYTES
    if wanted < _LEAST_PIECES * effort.sizes[0]:
        raise CapacityError(
            f"{folder} has {format_bytes(free_bytes)} free, too little to measure its disk", hint=_MAKE_ROOM
        )
    try:
        try:
            with explained(folder), progress.task("write a scratch file", wanted, "bytes") as task:
                size = _write(path, wanted, effort.disk_s * _WRITING, task, disk)
        except CapacityError as error:
            raise CapacityError(str(error), hint=_MAKE_ROOM) from error.__cause__
        yield path, size
    finally:
        with explained(folder):
            disk.remove(path)


def _write(path: Path, wanted: int, seconds: float, task: Task, disk: FileSystem) -> int:
    """Write until there are `wanted` bytes or the time is over; how many there are."""
    noise = np.random.default_rng(0).bytes(min(_CHUNK, wanted) + _SHIFT * -(-wanted // _CHUNK))
    end, size = time.perf_counter() + seconds, 0
    descriptor = disk.create(path)
    try:
        for number, begin in enumerate(range(0, wanted, _CHUNK)):
            length = min(_CHUNK, wanted - begin)
            disk.write_at(descriptor, memoryview(noise)[number * _SHIFT :][:length], begin)
            disk.sync(descriptor)
            size += length
            task.advance(length)
            if time.perf_counter() > end:
                break
    finally:
        os.close(descriptor)
    return size


class _Disk:
    """The scratch file, and the memory that it is read into."""

    def __init__(self, path: Path, size: int, buffer_bytes: int, effort: Effort) -> None:
        self._path, self._size, self._effort = path, size, effort
        fitting = [each for each in effort.sizes if each <= min(size, buffer_bytes // 2)]
        self._sizes = fitting or [effort.sizes[0]]
        needed = max(_in_flight(each, depth) * each for each in self._sizes for depth in effort.depths)
        self._buffer = memoryview(allocate_buffer(needed))
        pages = self._buffer[::DIRECT_ALIGNMENT]
        pages[:] = bytes(len(pages))  # the system gives a page when it is touched

    def measure(self, progress: Progress, deadline: float) -> DiskRates:
        direct, cold = can_read_direct(self._path), self._empty_cache()
        left_out = []
        if not direct:
            left_out.append("direct reads: the file system refuses them")
        if direct and not cold:
            left_out.append("buffered reads: the page cache cannot be emptied here, and would answer")
        elif not cold:
            left_out.append("the page cache cannot be emptied here: buffered reads may have come from memory")
        if too_large := [each for each in self._effort.sizes if each not in self._sizes]:
            left_out.append(f"reads of {_sizes(too_large)}: no room for them")
        ways = [way for way in (True, False) if (direct if way else cold or not direct)]
        first, *others = self._effort.depths
        again = itertools.product((first,), ways[:1], self._sizes)
        points = [*itertools.product((first,), ways, self._sizes), *again]
        points += itertools.product(others, ways, self._sizes)
        rates: dict[tuple[int, bool, int], ReadRate] = {}
        with progress.task("read it", len(points), "rates") as task:
            for depth, is_direct, size in points:
                if self._has_time(rates.values(), is_direct, size, depth, deadline):
                    measured = self._measure_point(size, depth, is_direct)
                    before = rates.get((depth, is_direct, size), measured)
                    rates[depth, is_direct, size] = max(measured, before, key=lambda rate: rate.bytes_per_s)
                task.advance(1)
        if late := set(points) - set(rates):
            left_out.append(f"{len(late)} of {len(set(points))} sizes and depths of reads: there was no time for them")
        return DiskRates(tuple(rates.values()), direct, tuple(left_out))

    def _has_time(self, rates: Iterable[ReadRate], direct: bool, size: int, depth: int, deadline: float) -> bool:
        alike = [rate.bytes_per_s for rate in rates if rate.direct == direct]
        if not alike:
            return True
        expected_s = _in_flight(size, depth) * size / alike[-1]
        return expected_s <= 4 * self._effort.read_s and time.perf_counter() + expected_s < deadline

    def _measure_point(self, size: int, depth: int, direct: bool) -> ReadRate:
        if not direct:
            self._empty_cache()
        starts = list(range(0, self._size - size + 1, size))
        random.Random(size * depth).shuffle(starts)
        reader = open_reader(threads=depth, direct=direct)
        try:
            return ReadRate(size, depth, direct, self._read(reader, starts, size, _in_flight(size, depth)))
        finally:
            reader.close()

    def _read(self, reader: FileReader, starts: list[int], size: int, in_flight: int) -> float:
        """Bytes per second of reading from `starts` until they or the time is used up."""
        begin = time.perf_counter()
        end = begin + self._effort.read_s
        waiting, flying, done = iter(starts), 0, 0
        for place, start in enumerate(itertools.islice(waiting, in_flight)):
            self._fetch(reader, place, start, size)
            flying += 1
        while flying:
            arrival = reader.wait()
            if arrival.error is not None:
                raise arrival.error
            flying, done = flying - 1, done + size
            if time.perf_counter() < end and (next_start := next(waiting, None)) is not None:
                self._fetch(reader, arrival.key, next_start, size)
                flying += 1
        return done / (time.perf_counter() - begin)

    def _fetch(self, reader: FileReader, place: int, start: int, size: int) -> None:
        reader.fetch(place, self._path, start, start + size, self._buffer[place * size : (place + 1) * size])

    def _empty_cache(self) -> bool:
        """Let the system forget the file's bytes; whether it does."""
        if not hasattr(os, "posix_fadvise"):
            return False
        descriptor = os.open(self._path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            return not _is_cached(descriptor, self._size)
        finally:
            os.close(descriptor)


def _in_flight(size: int, depth: int) -> int:
    """Fetches under way at once that keep `depth` threads busy when one of them ends."""
    return max(2, align_up(depth * PIECE_BYTES, size) // size + 1)


def _is_cached(descriptor: int, size: int) -> bool:
    """Whether the page cache has any of so many bytes of a file that this user may write. Reads nothing: a read that is
    not to wait (RWF_NOWAIT) begins all the same, and the next one may then find what it brought.
    """
    resident = np.empty(-(-size // mmap.PAGESIZE), np.uint8)
    with mmap.mmap(descriptor, size, prot=mmap.PROT_READ) as mapped:
        address = np.frombuffer(mapped, np.uint8).ctypes.data
        failed = ctypes.CDLL(None).mincore(c_void_p(address), c_size_t(size), c_void_p(resident.ctypes.data))
    return not failed and bool((resident & 1).any())


def _sizes(sizes: list[int]) -> str:
    return ", ".join(format_bytes(size) for size in sizes)
