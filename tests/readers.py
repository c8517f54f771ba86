"""Stand-ins for the engine's reader: disks that are slow at random, that fail, or that keep a record."""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from moeinf import engine, transfer
from moeinf.transfer import Reader, Urgency

__all__ = ["FailingReader", "RecordingReader", "SlowReader", "StuckReader", "count_threads", "use_reader"]


class SlowReader(Reader):
    """Each read takes up to two milliseconds more, so that experts arrive in an order of their own."""

    def __init__(self, *, threads: int, direct: bool) -> None:
        self._chance = random.Random(threads)
        super().__init__(threads=threads, direct=direct)

    def _read_piece(self, job: transfer._Job, start: int) -> None:
        time.sleep(self._chance.random() * 0.002)
        super()._read_piece(job, start)


class RecordingReader(Reader):
    """Remembers the experts that were asked for, in order."""

    def __init__(self, *, threads: int, direct: bool) -> None:
        self.fetched: list[int] = []
        super().__init__(threads=threads, direct=direct)

    def fetch(
        self, key: int, path: Path, begin: int, end: int, memory: memoryview, urgency: Urgency = Urgency.DEMAND
    ) -> None:
        self.fetched.append(key)
        super().fetch(key, path, begin, end, memory, urgency)


class StuckReader(Reader):
    """Never comes to what nobody waits for."""

    def _next_piece(self) -> tuple[transfer._Job, int, Urgency] | None:
        queues, self._queues = self._queues, [self._queues[0], {}, {}]
        try:
            return super()._next_piece()
        finally:
            self._queues = queues


class FailingReader(Reader):
    """The disk fails for one expert file: the `fail_at`-th that is asked for, counting from 0."""

    fail_at: int | None = None
    failed_path: Path | None = None

    def fetch(
        self, key: int, path: Path, begin: int, end: int, memory: memoryview, urgency: Urgency = Urgency.DEMAND
    ) -> None:
        if path.parent.parent.name == "experts" and self.fail_at is not None:
            if self.fail_at == 0:
                self.failed_path = path
            self.fail_at -= 1
        super().fetch(key, path, begin, end, memory, urgency)

    def _read_piece(self, job: transfer._Job, start: int) -> None:
        if job.path == self.failed_path:
            raise OSError(errno.EIO, "Input/output error")
        super()._read_piece(job, start)


def count_threads(expected: int) -> int:
    """Threads of this process, as the system counts them; those that have ended may take a moment to be gone."""
    deadline = time.monotonic() + 10
    while (count := int(psutil.Process().num_threads())) > expected and time.monotonic() < deadline:
        time.sleep(0.001)
    return count


def use_reader(monkeypatch: pytest.MonkeyPatch, kind: Callable[..., Reader]) -> list[Any]:
    """Let engines that are loaded from now on read through `kind`; returns the readers they make, the experts' one
    last.
    """
    made: list[Any] = []

    def make(*, threads: int, direct: bool) -> Reader:
        made.append(kind(threads=threads, direct=direct))
        return made[-1]  # type: ignore[no-any-return]

    monkeypatch.setattr(engine, "open_reader", make)
    return made
