"""Bytes on their way: slots that experts are read into, and the threads that read them.

Owns the memory of the slots and the reader threads. Knows nothing of policies, of who asked, or of what the bytes
mean: the cache decides which expert goes into which slot, the kernels see the slots as tensors. `Pool` and `Fetcher`
are what the slots of any tier are, and what fills them; here they are of host memory, filled from disk.
"""

from __future__ import annotations

import errno
import fcntl
import math
import mmap
import os
import sys
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol

import torch

from .dtypes import TORCH_DTYPES
from .errors import IntegrityError, MoeinfError
from .ledger import slot_bytes
from .manifest import ExpertLayout
from .steps import Arrival
from .units import MIB, align_up

__all__ = [
    "READERS",
    "ExpertReader",
    "Fetcher",
    "FileReader",
    "Pool",
    "Reader",
    "SlotPool",
    "SlotTensors",
    "Urgency",
    "allocate_buffer",
    "can_read_direct",
    "ends_early",
    "is_closed",
    "piece_size",
    "read_error",
]

READERS = 8
"""Reads in flight. More gains nothing on the disks measured (docs/experiments.md)."""
DIRECT_ALIGNMENT = 4096
PIECE_BYTES = 1 * MIB
"""An expert is read in pieces of about this size, all alike, so that all readers work on the one that is needed first
(docs/experiments.md).
"""
_GIVE_BACK = mmap.MADV_FREE if sys.platform == "darwin" else mmap.MADV_DONTNEED
"""What macOS is told not to need soon it keeps, in its swap if it must."""

SlotTensors = dict[str, torch.Tensor]


def allocate_buffer(size_bytes: int, *, in_huge_pages: bool = True) -> mmap.mmap:
    """Page-aligned anonymous memory, in huge pages where the system has them, or in small ones. Pages count once they
    are touched.
    """
    buffer = mmap.mmap(-1, max(size_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel that has no huge pages
            buffer.madvise(mmap.MADV_HUGEPAGE if in_huge_pages else mmap.MADV_NOHUGEPAGE)
    return buffer


class Pool(Protocol):
    """The slots of a tier, of `slot_bytes` each."""

    slot_bytes: int

    def tensors(self, slot: int) -> SlotTensors:
        """The slot's bytes as the expert's tensors by name: views, valid for as long as the expert is leased."""

    def release(self, slot: int) -> None:
        """Give the slot's memory back to the system, where that is possible, until it is next written to; its bytes are
        lost.
        """

    def shrink(self, num_slots: int) -> None:
        """Have only the first so many slots from now on, all of them empty. Raises torch.OutOfMemoryError, and has none
        then.
        """

    def close(self) -> None:
        """Give all memory back. Nothing may be read from it, or into it, any more."""


class SlotPool:
    """`num_slots` equal pieces of one buffer, each holding one expert's data and seen as that expert's tensors. `bytes`
    is all of it, [slots, slot_bytes].
    """

    def __init__(self, layout: ExpertLayout, num_slots: int) -> None:
        self.slot_bytes = slot_bytes(layout)
        self._buffer = allocate_buffer(num_slots * self.slot_bytes)
        self.bytes = torch.frombuffer(self._buffer, dtype=torch.uint8).view(num_slots, self.slot_bytes)
        self._memory = memoryview(self._buffer)
        self._tensors = [self._views(layout, slot * self.slot_bytes) for slot in range(num_slots)]

    def memory(self, slot: int) -> memoryview:
        """The slot's bytes, page-aligned and rounded up to whole pages."""
        return self._memory[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    def tensors(self, slot: int) -> SlotTensors:
        """The slot's bytes as the expert's tensors by name: views, valid for as long as the expert is leased."""
        return self._tensors[slot]

    def release(self, slot: int) -> None:
        """Give the slot's memory back to the system until it is next written to; its bytes are lost."""
        self._buffer.madvise(_GIVE_BACK, slot * self.slot_bytes, self.slot_bytes)

    def shrink(self, num_slots: int) -> None:
        self.close()

    def close(self) -> None:
        for slot in range(len(self.bytes)):
            self.release(slot)

    def _views(self, layout: ExpertLayout, start: int) -> SlotTensors:
        return {
            spec.name: torch.frombuffer(
                self._buffer,
                dtype=TORCH_DTYPES[spec.dtype],
                count=spec.nbytes // TORCH_DTYPES[spec.dtype].itemsize,
                offset=start + spec.offset,
            ).view(spec.shape)
            for spec in layout.tensors
        }


def can_read_direct(path: Path) -> bool:
    """Whether the file system that holds `path` lets reads go past its page cache. Raises what reading it would."""
    try:
        os.close(_open(path, direct=True))
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOTSUP):
            return False
        raise read_error(path, error) from error
    return True


def _open(path: Path, *, direct: bool) -> int:
    if direct and sys.platform != "darwin":
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    descriptor = os.open(path, os.O_RDONLY)
    if direct:
        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)  # type: ignore[attr-defined,unused-ignore]  # macOS
    return descriptor


class Urgency(IntEnum):
    """Why bytes are read, and so which come first: somebody waits for them; they are a guess at what the next layer
    asks for; they fill memory that would lie empty.
    """

    DEMAND = 0
    GUESS = 1
    WARM_UP = 2


@dataclass(slots=True)
class _Job:
    """One fetch on its way: bytes `begin` to `end` of `path`, to the start of `memory`."""

    key: int
    path: Path
    begin: int
    end: int
    memory: memoryview
    piece_bytes: int
    pieces: int
    pieces_left: int
    descriptor: int = -1
    read_bytes: int = 0
    error: MoeinfError | None = None
    cancelled: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


_Waiting = tuple[_Job, deque[int]]
"""A fetch, and where the pieces of it begin that nobody reads yet."""


class Fetcher(Protocol):
    """What brings experts into the slots of a tier: the urgent before the others. One thread calls it."""

    def fetch(self, key: int, slot: int, urgency: Urgency) -> None:
        """Bring this expert into this slot; an `Arrival` with its `key` will say how that ended. No key may be under
        way twice.
        """

    def promote(self, key: int) -> None:
        """Somebody waits for this now. Harmless when it is not under way."""

    def cancel(self, key: int) -> None:
        """Nobody wants this any more. Its `Arrival` still comes, cancelled, unless all of it was on its way already."""

    def wait(self) -> Arrival:
        """The next fetch that ended; blocks until there is one. Call it only while one is under way."""

    def poll(self) -> Arrival | None:
        """The next fetch that ended, if there is one already."""

    def close(self) -> None:
        """End what is under way, and whatever serves it."""


class FileReader(Protocol):
    """What reads files into memory: the urgent before the others. One thread calls it."""

    def fetch(
        self, key: int, path: Path, begin: int, end: int, memory: memoryview, urgency: Urgency = Urgency.DEMAND
    ) -> None:
        """Read bytes `begin` to `end` of `path` into `memory`; an `Arrival` with this `key` will say how that ended.

        No key may be under way twice. `promote` and `cancel` are for what nobody waits for, by its key.
        """

    def promote(self, key: int) -> None:
        """Somebody waits for this now. Harmless when all of it is on its way already."""

    def cancel(self, key: int) -> None:
        """Read no more of this. Its `Arrival` still comes, cancelled, unless all of it was on its way already."""

    def wait(self) -> Arrival:
        """The next fetch that ended; blocks until there is one. Call it only while one is under way."""

    def poll(self) -> Arrival | None:
        """The next fetch that ended, if there is one already."""

    def close(self) -> None:
        """Finish the reads in flight, drop those that wait, and end the threads."""


class Reader:
    """A pool of threads that read files into memory: the urgent before the others, those alike in the order in which
    they were asked for, all threads on the first fetch, or half of them on a guess that could keep all of them busy.

    Args:
        threads: how many reads are in flight at most.
        direct: read past the page cache (needs `can_read_direct`); offsets and memory are then page-aligned, and
            memory is as long as the bytes wanted rounded up to whole pages.
        piece_bytes: about what one read brings; PIECE_BYTES if None.
    """

    def __init__(self, *, threads: int, direct: bool, piece_bytes: int | None = None) -> None:
        self._direct = direct
        self._piece_bytes = piece_bytes
        self._queues: list[dict[int, _Waiting]] = [{} for _ in Urgency]
        """By urgency: what nobody reads yet of each fetch, by its key."""
        self._guessing = 0
        """Threads that read for guesses."""
        self._work = threading.Condition()
        self._arrivals: SimpleQueue[Arrival] = SimpleQueue()
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._serve, name=f"moeinf-reader-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def fetch(
        self, key: int, path: Path, begin: int, end: int, memory: memoryview, urgency: Urgency = Urgency.DEMAND
    ) -> None:
        piece_bytes = piece_size(end - begin, self._piece_bytes)
        starts = range(begin, end, piece_bytes)
        if self._is_closed:
            raise is_closed()
        job = _Job(key, path, begin, end, memory, piece_bytes, len(starts), len(starts))
        with self._work:
            self._queues[urgency][key] = (job, deque(starts))
            self._work.notify(len(starts))

    def promote(self, key: int) -> None:
        with self._work:
            waiting = self._take(key)
            if waiting is not None:
                self._queues[Urgency.DEMAND][key] = waiting
                self._work.notify(len(waiting[1]))

    def cancel(self, key: int) -> None:
        with self._work:
            waiting = self._take(key)
        if waiting is not None:
            job, starts = waiting
            job.cancelled = True
            self._end_pieces(job, len(starts))

    def wait(self) -> Arrival:
        return self._arrivals.get()

    def poll(self) -> Arrival | None:
        return None if self._arrivals.empty() else self._arrivals.get()

    def close(self) -> None:
        with self._work:
            self._is_closed = True
            dropped = [waiting for queue in self._queues for waiting in queue.values()]
            self._queues = [{} for _ in Urgency]
            self._work.notify_all()
        for job, starts in dropped:
            self._end_pieces(job, len(starts))
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        while True:
            with self._work:
                while (piece := self._next_piece()) is None and not self._is_closed:
                    self._work.wait()
                if piece is None:
                    return
                job, start, urgency = piece
                self._guessing += urgency is Urgency.GUESS
            try:
                self._read_piece(job, start)
            except MoeinfError as error:
                job.error = error
            except OSError as error:
                job.error = read_error(job.path, error)
            except BaseException as error:  # whatever it is, somebody waits for this fetch
                job.error = MoeinfError(f"{job.path}: reading failed: {error!r}")
            with self._work:
                self._guessing -= urgency is Urgency.GUESS
            self._end_pieces(job, 1)

    def _next_piece(self) -> tuple[_Job, int, Urgency] | None:
        """The most urgent piece that nobody reads and that may be read now; the queues are locked."""
        for urgency, queue in zip(Urgency, self._queues, strict=True):
            for key, (job, starts) in queue.items():
                if urgency is Urgency.GUESS and self._guessing >= self._most_guessing(job):
                    return None
                start = starts.popleft()
                if not starts:
                    del queue[key]
                return job, start, urgency
        return None

    def _most_guessing(self, job: _Job) -> int:
        """Of a fetch that could keep all threads busy, half of them read while it is a guess: what the next layer then
        asks for waits for fewer pieces that nobody wants.
        """
        threads = len(self._threads)
        return threads if job.pieces < threads else (threads + 1) // 2

    def _take(self, key: int) -> _Waiting | None:
        """Take what nobody reads yet of a fetch that nobody waits for out of its queue; the queues are locked."""
        for queue in self._queues[Urgency.GUESS :]:
            if key in queue:
                return queue.pop(key)
        return None

    def _read_piece(self, job: _Job, start: int) -> None:
        with job.lock:
            if job.error is not None:
                return
            if job.descriptor < 0:
                job.descriptor = _open(job.path, direct=self._direct)
        into = start - job.begin
        wanted = min(start + job.piece_bytes, job.end) - start
        length = align_up(wanted, DIRECT_ALIGNMENT) if self._direct else wanted
        _read_exactly(job.descriptor, job.memory[into : into + length], start, wanted, job.path)
        with job.lock:
            job.read_bytes += wanted

    def _end_pieces(self, job: _Job, count: int) -> None:
        with job.lock:
            job.pieces_left -= count
            if job.pieces_left:
                return
        if job.descriptor >= 0:
            os.close(job.descriptor)
        self._arrivals.put(Arrival(job.key, job.read_bytes, job.error, job.cancelled))


class ExpertReader:
    """Brings experts from their files into the slots of host memory.

    Args:
        reader: reads files; closed with this.
        pool: the slots.
        paths: the file of every expert, by its number over all layers.
        span: where its data begins and ends in a file, in bytes.
    """

    def __init__(self, reader: FileReader, pool: SlotPool, paths: Sequence[Path], span: tuple[int, int]) -> None:
        self._reader = reader
        self._pool = pool
        self._paths = paths
        self._span = span
        self.promote, self.cancel = reader.promote, reader.cancel
        self.wait, self.poll, self.close = reader.wait, reader.poll, reader.close

    def fetch(self, key: int, slot: int, urgency: Urgency) -> None:
        self._reader.fetch(key, self._paths[key], *self._span, self._pool.memory(slot), urgency)


def _read_exactly(descriptor: int, memory: memoryview, offset: int, wanted: int, path: Path) -> None:
    """Fill `memory` with at least `wanted` bytes from `offset`; a direct read may bring up to a page more."""
    done = 0
    while done < wanted:
        count = os.preadv(descriptor, [memory[done:]], offset + done)
        done += count
        if done < wanted and (count == 0 or os.fstat(descriptor).st_size < offset + wanted):
            raise ends_early(path, os.fstat(descriptor).st_size, offset + wanted)


def piece_size(size_bytes: int, about: int | None) -> int:
    """Bytes of each piece in which so many are read: about so many, or PIECE_BYTES; all alike, and whole pages."""
    pieces = max(round(size_bytes / (about or PIECE_BYTES)), 1)
    return max(align_up(math.ceil(size_bytes / pieces), DIRECT_ALIGNMENT), DIRECT_ALIGNMENT)


def ends_early(path: Path, file_bytes: int, wanted: int) -> IntegrityError:
    """What is wrong with a file that has fewer bytes than `wanted`."""
    return IntegrityError(f"{path} ends at byte {file_bytes}, and should hold {wanted}", hint=_VERIFY)


def is_closed() -> MoeinfError:
    """What to say of something that is to be read when the reader is closed."""
    return MoeinfError("this engine is closed", hint="load the model again")


def read_error(path: Path, error: OSError) -> MoeinfError:
    """What to say of a read that failed."""
    if error.errno == errno.ENOENT:
        return IntegrityError(f"{path} is missing", hint=_VERIFY)
    return MoeinfError(f"{path} cannot be read: {error.strerror}", hint=f"check the disk; {_VERIFY}")


_VERIFY = "`moeinf verify MODEL` says what is damaged, and how to mend it"
