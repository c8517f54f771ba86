"""How fast this machine is at this moment at what bounds a token: whole experts off the disk, weights out of memory.

Measured around the runs that they are compared with, since a disk that others use is another disk a minute later.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from .engine import READERS
from .errors import MoeinfError
from .kernels.native import NativePool, NotNativeError
from .machine import Machine
from .manifest import expert_path
from .settings import home_path
from .store import StoredModel
from .transfer import Reader, SlotPool, can_read_direct
from .units import KIB, MIB

__all__ = ["MACHINE_FILE", "Rates", "disk_rate", "measure_rates", "memory_rate", "read_ahead"]

MACHINE_FILE = "machine.json"
"""What `moeinf profile` found out about this machine, in the home."""

_DISK_S = 1.0
_MEMORY_S = 0.3
_MEMORY_BYTES = 256 * MIB


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
    """Bytes per second of reads of whole experts in random order, as many in flight as the engine has, in one request
    each; past the page cache where the file system lets them.
    """
    layout, layers = stored.manifest.layout, stored.manifest.layers
    paths = [stored.path / expert_path(layer, e) for layer, its in enumerate(layers) for e in range(its.num_experts)]
    random.Random(time.time_ns()).shuffle(paths)
    pool = SlotPool(layout, READERS)
    reader = Reader(threads=READERS, direct=can_read_direct(paths[0]), piece_bytes=layout.file_bytes)
    try:
        begin, done = time.perf_counter(), 0
        for slot in range(READERS):
            reader.fetch(slot, paths[slot % len(paths)], layout.data_offset, layout.file_bytes, pool.memory(slot))
        while time.perf_counter() - begin < (seconds or _DISK_S):
            arrival = reader.wait()
            if arrival.error is not None:
                raise arrival.error
            done += 1
            path = paths[(done + READERS) % len(paths)]
            reader.fetch(arrival.key, path, layout.data_offset, layout.file_bytes, pool.memory(arrival.key))
        return done * layout.nbytes / (time.perf_counter() - begin)
    finally:
        reader.close()


def memory_rate(threads: int | None, seconds: float = _MEMORY_S) -> float | None:
    """Bytes per second of plain reads of far more than the caches hold: by the native library, or where there is none,
    what `moeinf profile` measured; None where neither is there.
    """
    try:
        pool = NativePool(threads or torch.get_num_threads())
    except NotNativeError:
        return _profiled_memory_rate()
    try:
        memory = torch.ones(_MEMORY_BYTES, dtype=torch.uint8)
        pool.read(memory)
        times: list[float] = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or not times:
            begin = time.perf_counter()
            pool.read(memory)
            times.append(time.perf_counter() - begin)
        return _MEMORY_BYTES / statistics.median(times)
    finally:
        pool.close()


def read_ahead(folder: Path) -> tuple[Path, int] | None:
    """Where the read-ahead of the block device that holds `folder` is set, and its bytes; None where that is unknown.

    It decides how fast mapped weights are read.
    """
    device = folder.stat().st_dev
    base = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    for place in (base / "queue/read_ahead_kb", base.resolve().parent / "queue/read_ahead_kb"):
        if place.exists():
            return place, int(place.read_text(encoding="ascii")) * KIB
    return None


def _profiled_memory_rate() -> float | None:
    try:
        return Machine.from_json((home_path() / MACHINE_FILE).read_text(encoding="utf-8")).memory.bytes_per_s
    except (OSError, MoeinfError):
        return None


def _harmonic(one: float | None, other: float | None) -> float | None:
    return statistics.harmonic_mean([one, other]) if one and other else one or other
