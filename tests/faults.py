"""Disks that fail: file systems for the store that break at a chosen operation, as real ones break."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from moeinf.files import FileSystem

__all__ = ["CountingDisk", "FailingDisk", "PowerLossDisk", "RefusingDisk"]

P = ParamSpec("P")
R = TypeVar("R")


class CountingDisk(FileSystem):
    """A disk that works, and counts the operations."""

    def __init__(self) -> None:
        self.operations = 0
        self._lock = threading.Lock()

    def perform(self, operation: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._lock:
            self.operations += 1
            return self.at(self.operations, lambda: operation(*args, **kwargs), operation, args)

    def at(self, number: int, run: Callable[[], R], operation: object, args: tuple[object, ...]) -> R:
        """Do, or do not do, operation `number`."""
        return run()


class FailingDisk(CountingDisk):
    """Operation `fail_at` fails with `code`, once or from then on; a write that fails has written half."""

    def __init__(self, fail_at: int, code: int = errno.EIO, *, for_ever: bool = False) -> None:
        super().__init__()
        self.fail_at, self.code, self.for_ever = fail_at, code, for_ever

    @property
    def has_failed(self) -> bool:
        return self.operations >= self.fail_at

    def at(self, number: int, run: Callable[[], R], operation: object, args: tuple[object, ...]) -> R:
        if number == self.fail_at or (self.for_ever and number > self.fail_at):
            if operation is os.pwrite:
                descriptor, data, offset = args
                os.pwrite(descriptor, data[: len(data) // 2], offset)  # type: ignore[arg-type, index]
            raise OSError(self.code, os.strerror(self.code))
        return run()


class RefusingDisk(FileSystem):
    """Operations on these `paths` fail with `code`, every time; all others work."""

    def __init__(self, code: int, *paths: Path) -> None:
        self.code, self.paths = code, paths

    def perform(self, operation: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        if args[0] in self.paths:
            raise OSError(self.code, os.strerror(self.code), str(args[0]))
        return operation(*args, **kwargs)


class PowerLossDisk(CountingDisk):
    """The power fails at operation `fail_at`: files keep what was synced last, with zeros for what came after."""

    def __init__(self, fail_at: int) -> None:
        super().__init__()
        self.fail_at = fail_at
        self._paths: dict[int, Path] = {}
        self._synced: dict[Path, bytes] = {}

    @property
    def has_failed(self) -> bool:
        return self.operations >= self.fail_at

    def at(self, number: int, run: Callable[[], R], operation: object, args: tuple[object, ...]) -> R:
        if number == self.fail_at:
            self._lose()
        if number >= self.fail_at:
            raise OSError(errno.EIO, "the power is gone")
        result = run()
        if operation is os.open:
            path, flags = args[0], args[1]
            assert isinstance(result, int)
            assert isinstance(path, Path)
            assert isinstance(flags, int)
            self._paths[result] = path
            self._synced[path] = b"" if flags & os.O_TRUNC else path.read_bytes()
        elif operation is os.fsync:
            self._note_synced(args[0])
        elif operation is os.rename:
            self._move(Path(str(args[0])), Path(str(args[1])))
        return result

    def _note_synced(self, descriptor: object) -> None:
        assert isinstance(descriptor, int)
        path = self._paths.get(descriptor)
        if path and path.is_file() and os.path.samestat(path.stat(), os.fstat(descriptor)):
            self._synced[path] = path.read_bytes()

    def _move(self, source: Path, target: Path) -> None:
        moved = {path: target / path.relative_to(source) for path in self._synced if path.is_relative_to(source)}
        for old, new in moved.items():
            self._synced[new] = self._synced.pop(old)

    def _lose(self) -> None:
        for path, content in self._synced.items():
            if path.is_file():
                size = path.stat().st_size
                path.write_bytes(content[:size] + bytes(max(0, size - len(content))))
