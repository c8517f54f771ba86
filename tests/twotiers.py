"""Two tiers at work on files of a few experts, without an engine; on any device."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from moeinf import transfer
from moeinf.cache import ExpertCache
from moeinf.device import Device
from moeinf.manifest import ExpertLayout, TensorSpec
from moeinf.policies.plain import LruPolicy
from moeinf.steps import Arrival
from moeinf.tiers import DevicePool, HostTier
from moeinf.transfer import ExpertReader, Reader, SlotPool, Urgency

__all__ = ["EXPERTS", "LAYOUT", "TARGETS", "Bench", "Disk"]

EXPERTS, TARGETS = 12, 6
LAYOUT = ExpertLayout(4096, (TensorSpec("up", "BF16", (6, 100), 0), TensorSpec("down", "F32", (3, 7), 1200)))


class Disk(Reader):
    """A disk that fails for the files in `bad`, and does not come to guesses while `is_stuck`."""

    def __init__(self) -> None:
        self.bad: set[int] = set()
        self.is_stuck = False
        self.reads: list[int] = []
        super().__init__(threads=2, direct=False)

    def fetch(
        self, key: int, path: Path, begin: int, end: int, memory: memoryview, urgency: Urgency = Urgency.DEMAND
    ) -> None:
        self.reads.append(key)
        super().fetch(key, path, begin, end, memory, urgency)

    def _read_piece(self, job: transfer._Job, start: int) -> None:
        if job.key in self.bad:
            raise OSError(errno.EIO, "Input/output error")
        super()._read_piece(job, start)

    def promote(self, key: int) -> None:
        super().promote(key)
        with self._work:  # threads that are stuck sleep
            self._work.notify_all()

    def _next_piece(self) -> tuple[transfer._Job, int, Urgency] | None:
        queues = self._queues
        if self.is_stuck:
            self._queues = [queues[0], {}, {}]
        try:
            return super()._next_piece()
        finally:
            self._queues = queues


class Bench:
    """Files of experts, a disk, host memory of some slots, and a device of TARGETS slots."""

    def __init__(self, folder: Path, device: Device, host_slots: int) -> None:
        self.data = [os.urandom(LAYOUT.nbytes) for _ in range(EXPERTS)]
        paths = [folder / f"E{key}" for key in range(EXPERTS)]
        for path, data in zip(paths, self.data, strict=True):
            path.write_bytes(b" " * 4096 + data)
        self.device = device
        self.disk = Disk()
        self.slots = DevicePool(LAYOUT, TARGETS, device)
        pool = SlotPool(LAYOUT, host_slots)
        reader = ExpertReader(self.disk, pool, paths, (LAYOUT.data_offset, LAYOUT.file_bytes))
        cache = ExpertCache(EXPERTS, host_slots, LruPolicy(()))
        self.tier = HostTier(cache, pool, reader, device, self.slots)

    def holds(self, slot: int, key: int) -> bool:
        return bytes(self.slots.memory(slot).tolist()) == self.data[key]

    def bring(self, key: int, slot: int, urgency: Urgency = Urgency.DEMAND) -> Arrival:
        self.tier.fetch(key, slot, urgency)
        arrival = self.tier.wait()
        self.tier.check_integrity()
        return arrival
