"""How fast this machine is at this moment at what bounds a token: whole experts off the disk, weights out of memory.

Measured around the runs that they are compared with, since a disk that others use is another disk a minute later.
"""

from __future__ import annotations

import random
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle

import torch

from .manifest import EXPERT_ALIGNMENT, expert_path
from .native_reader import open_reader
from .store import StoredModel
from .timing import measure_memory, open_pool
from .transfer import READERS, allocate_buffer, can_read_direct
from .units import MIB

__all__ = ["Rates", "disk_rate", "measure_rates", "memory_rate"]

_DISK_S = 1.0
_MEMORY_S = 0.3
_MEMORY_BYTES = 256 * MIB
_MOST_BYTES = 32 * MIB


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes per second; None where it was not, or cannot be, measured."""

    disk: float | None = None
    memory: float | None = None

    def between(self, other: Rates) -> Rates:
        """The rates of a time that began with these and ended with others: means over bytes."""
        return Rates(_harmonic(self.disk, other.disk), _harmonic(self.memory, other.memory))


def measure_rates(stored: StoredModel, threads: int | None, *, with_disk: bool) -> Rates:
    """What the machine does now; the disk is left alone where nothing is read from it."""
    return Rates(disk_rate(stored) if with_disk else None, memory_rate(threads))


def disk_rate(stored: StoredModel, seconds: float | None = None) -> float:
    """Bytes per second of reads of whole experts, or of as much of a large one as shows the same rate, in random order,
    as many in flight as the engine has, in one request each; past the page cache where the file system lets them.
    """
    layout, layers = stored.manifest.layout, stored.manifest.layers
    paths = [stored.path / expert_path(layer, e) for layer, its in enumerate(layers) for e in range(its.num_experts)]
    random.Random(time.time_ns()).shuffle(paths)
    size = min(layout.nbytes, _MOST_BYTES)
    room = -(-size // EXPERT_ALIGNMENT) * EXPERT_ALIGNMENT
    memory = memoryview(allocate_buffer(READERS * room))
    reader = open_reader(threads=READERS, direct=can_read_direct(paths[0]), piece_bytes=size)
    todo = cycle(paths)

    def ask(slot: int) -> None:
        reader.fetch(slot, next(todo), layout.data_offset, layout.data_offset + size, memory[slot * room :][:room])

    def wait() -> int:
        arrival = reader.wait()
        if arrival.error is not None:
            raise arrival.error
        return arrival.key

    try:
        for slot in range(READERS):
            ask(slot)
        for slot in [wait() for _ in range(READERS)]:  # the system has now found the memory, which may take long
            ask(slot)
        begin, asked, done = time.perf_counter(), READERS, 0
        while done < asked:
            slot = wait()
            done += 1
            if time.perf_counter() - begin < (seconds or _DISK_S):
                ask(slot)
                asked += 1
        return done * size / (time.perf_counter() - begin)
    finally:
        reader.close()


def memory_rate(threads: int | None, seconds: float = _MEMORY_S) -> float:
    """Bytes per second of plain reads of far more than the caches hold."""
    with ExitStack() as stack:
        return measure_memory(open_pool(threads or torch.get_num_threads(), stack), _MEMORY_BYTES, seconds)


def _harmonic(one: float | None, other: float | None) -> float | None:
    return statistics.harmonic_mean([one, other]) if one and other else one or other
