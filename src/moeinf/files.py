"""Everything the store does to the disk that changes it, through one seam, and what a failing disk means to a person.

Owns no path and no policy. `FileSystem.perform` is the seam: every change goes through it, so that a test can let the
Nth one fail. Reading needs no seam: a reader that fails has changed nothing.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ParamSpec, TypeVar

from .errors import CapacityError, MoeinfError, UsageError

__all__ = ["DENIED", "FULL", "Bytes", "FileSystem", "explained", "is_alive", "publish"]

P = ParamSpec("P")
R = TypeVar("R")
Bytes = bytes | bytearray | memoryview

DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
"""What the system says of a file or a whole disk that this process may not write."""
_NO_FOLDER = frozenset({errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG})
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""What it says where no room is left."""
_NO_LINKS = frozenset({errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS})
_FULL_SYNC: int | None = getattr(fcntl, "F_FULLFSYNC", None)


class FileSystem:
    """The mutating operations, each in terms of `perform`."""

    def perform(self, operation: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call `operation`; a fake may count it, refuse it, or do half of it."""
        return operation(*args, **kwargs)

    def make_folder(self, path: Path) -> None:
        """Make `path` and what is missing above it; fine when it is there."""
        if not path.is_dir():
            self.make_folder(path.parent)
            self.perform(_make_folder, path)

    def create(self, path: Path, mode: int = 0o644) -> int:
        """A descriptor of an empty file, whatever lay there before."""
        return self.perform(os.open, path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, mode)

    def reopen(self, path: Path) -> int:
        """A descriptor of a file that is there, its contents kept."""
        return self.perform(os.open, path, os.O_RDWR)

    def write_at(self, descriptor: int, data: Bytes, offset: int) -> None:
        """Write all of `data` at `offset`."""
        view, written = memoryview(data), 0
        while written < view.nbytes:
            written += self.perform(os.pwrite, descriptor, view.cast("B")[written:], offset + written)

    def resize(self, descriptor: int, size_bytes: int) -> None:
        self.perform(os.ftruncate, descriptor, size_bytes)

    def sync(self, descriptor: int) -> None:
        """Return when the operating system has handed the file's bytes to the drive."""
        self.perform(os.fsync, descriptor)

    def commit(self, descriptor: int) -> None:
        """`sync`, and on macOS empty the drive's own cache, which fsync does not do there."""
        if _FULL_SYNC is None:
            self.perform(os.fsync, descriptor)
        else:
            self.perform(fcntl.fcntl, descriptor, _FULL_SYNC)

    def sync_folder(self, path: Path) -> None:
        """Make the names in a folder durable."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            self.commit(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        self.perform(os.rename, source, target)

    def link(self, source: Path, target: Path) -> bool:
        """Let `target` be another name of the file `source`; False where the disk has no such thing."""
        try:
            self.perform(os.link, source, target)
        except OSError as error:
            if error.errno in _NO_LINKS:
                return False
            raise
        return True

    def remove(self, path: Path) -> None:
        """Remove a file or a link; fine when it is gone already."""
        self.perform(_unlink, path)

    def remove_tree(self, path: Path) -> None:
        """Remove `path` and all below it, never following a link; fine when it is gone already."""
        if path.is_dir() and not path.is_symlink():
            with suppress(FileNotFoundError):
                for entry in sorted(path.iterdir()):
                    self.remove_tree(entry)
            self.perform(_remove_folder, path)
        else:
            self.remove(path)


@contextmanager
def explained(place: Path) -> Iterator[None]:
    """Turn an OSError into the error that says what to do about it; `place` is named where the system names no path."""
    try:
        yield
    except OSError as error:
        path = error.filename if isinstance(error.filename, (str, Path)) else place
        if error.errno in FULL:
            raise CapacityError(
                f"no room left to write {path}: {error.strerror}",
                hint="free some space and run the same command again: a pull continues where it stopped",
            ) from error
        if error.errno in DENIED | _NO_FOLDER:
            raise UsageError(
                f"no access to {path}: {error.strerror}",
                hint="change its permissions, or set MOEINF_HOME to a folder that you may write to",
            ) from error
        raise MoeinfError(
            f"the disk failed at {path}: {error.strerror or error}",
            hint="run the same command again; if it fails again, check the disk",
        ) from error


def publish(path: Path, chunks: Iterable[Bytes], *, mode: int = 0o644, disk: FileSystem | None = None) -> None:
    """Write a file, all or nothing: under a name of its own first, which becomes `path` when its bytes are durable.

    Whatever happens, `path` is then the old file, the new one, or none. Raises CapacityError when the disk is full,
    UsageError when the place cannot be written to.
    """
    if os.path.isdir(path):
        raise UsageError(f"{path} is a folder", hint="name a file in it")
    disk = disk or FileSystem()
    draft = path.with_name(f"{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.part")
    with _saving(path):
        disk.make_folder(path.parent)
        _remove_stale_drafts(path, disk)
        try:
            _write(draft, chunks, mode, disk)
            disk.rename(draft, path)
        except BaseException:
            with suppress(OSError):
                disk.remove(draft)
            raise
        disk.sync_folder(path.parent)


def _write(path: Path, chunks: Iterable[Bytes], mode: int, disk: FileSystem) -> None:
    descriptor = disk.create(path, mode)
    try:
        size = 0
        for chunk in chunks:
            disk.write_at(descriptor, chunk, size)
            size += memoryview(chunk).nbytes
        disk.commit(descriptor)
    finally:
        os.close(descriptor)


def _remove_stale_drafts(path: Path, disk: FileSystem) -> None:
    """What killed processes left of this file."""
    pattern = re.compile(re.escape(path.name) + r"\.(\d{1,9})-[0-9a-f]{8}\.part")
    for other in list(path.parent.iterdir()):
        match = pattern.fullmatch(other.name)
        if match and not is_alive(int(match[1])):
            disk.remove(other)


def is_alive(process: int) -> bool:
    """Whether there is a process of this number."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def _saving(path: Path) -> Iterator[None]:
    try:
        with explained(path):
            yield
    except (CapacityError, UsageError) as error:
        hint = "save it in a folder that you may write to and that has room"
        raise type(error)(str(error), hint=hint) from error.__cause__


def _make_folder(path: Path) -> None:
    path.mkdir(exist_ok=True)


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)


def _remove_folder(path: Path) -> None:
    with suppress(FileNotFoundError):
        path.rmdir()
