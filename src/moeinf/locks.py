"""Who may touch a stored model: many users at once, or one process that changes it.

A lock is `flock` on a file that is never removed, so a process that is gone holds nothing, however it went. The file's
text (process id and what it does) is only there for the message. Knows nothing of models or of the store's folders.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import MoeinfError
from .files import DENIED, is_alive

__all__ = ["exclusive_lock", "shared_lock"]

_AGAIN_S = 0.01
"""Between two tries of who has patience."""


@contextmanager
def exclusive_lock(path: Path, doing: str, *, patience_s: float = 0.0) -> Iterator[None]:
    """Hold the lock alone; `doing` is what others are told ("pulling", "removing").

    Raises MoeinfError when anybody else holds it, this process included, and still does after `patience_s`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _held(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), path, fcntl.LOCK_EX, doing, patience_s):
        yield


@contextmanager
def shared_lock(path: Path, doing: str) -> Iterator[None]:
    """Hold the lock beside other shared holders, without waiting for it.

    Raises MoeinfError when somebody holds it alone. In a home that this process may not write to, there is no lock to
    take: nothing is held then.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        if error.errno not in DENIED:
            raise
        try:
            descriptor = os.open(path, os.O_RDONLY)  # who may not write the file may still hold it
        except OSError:
            yield
            return
    with _held(descriptor, path, fcntl.LOCK_SH, doing):
        yield


@contextmanager
def _held(descriptor: int, path: Path, kind: int, doing: str, patience_s: float = 0.0) -> Iterator[None]:
    deadline = time.monotonic() + patience_s
    try:
        while not _is_taken(descriptor, kind):
            if time.monotonic() < deadline:
                time.sleep(_AGAIN_S)
                continue
            raise MoeinfError(
                f"{path.stem} is busy: {_holder(os.pread(descriptor, 200, 0))}",
                hint="try again when it is done, or end it",
            )
        with suppress(OSError):  # a full disk must not keep anybody from removing a model
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()} {doing}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _is_taken(descriptor: int, kind: int) -> bool:
    """Whether this process has the lock now."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(text: bytes) -> str:
    """Who the lock file says it is; of several users it knows the last one, who may be gone."""
    match = re.fullmatch(rb"(\d+) (.+)\n", text)
    if not match or not is_alive(int(match[1])):
        return "another process is using it"
    who = "this process" if int(match[1]) == os.getpid() else f"process {int(match[1])}"
    return f"{who} is {match[2].decode(errors='replace')} it"
