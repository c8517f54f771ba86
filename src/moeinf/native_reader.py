"""The reader with its threads in C (kernels/csrc/reader.c): the same order, in half the processor's time, and without
the interpreter's lock (docs/experiments.md).
"""

from __future__ import annotations

import ctypes
import os
import weakref
from ctypes import c_char_p, c_int, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

from .errors import MoeinfError
from .shared_library import NotNativeError, Signature, load_library
from .steps import Arrival
from .transfer import FileReader, Reader, Urgency, ends_early, is_closed, piece_size, read_error

__all__ = ["NativeReader", "open_reader"]

_PATIENCE_MS = 100
"""So long a wait keeps Python from its signals."""
_ENDS_EARLY = -1
"""`MOE_ENDS_EARLY` of moe.h."""


class _Arrival(ctypes.Structure):
    """`moe_arrival` of moe.h."""

    _fields_ = (
        ("key", c_int64),
        ("read_bytes", c_int64),
        ("file_bytes", c_int64),
        ("error", c_int32),
        ("is_cancelled", c_int32),
    )


_FUNCTIONS: tuple[Signature, ...] = (
    ("moe_open_reader", c_void_p, (c_int32, c_int32, c_int32)),
    ("moe_close_reader", None, (c_void_p,)),
    ("moe_fetch_file", c_int, (c_void_p, c_int64, c_char_p, c_int64, c_int64, c_int64, c_void_p, c_int32)),
    ("moe_promote", None, (c_void_p, c_int64)),
    ("moe_cancel", None, (c_void_p, c_int64)),
    ("moe_await", c_int, (c_void_p, c_int32, ctypes.POINTER(_Arrival))),
    ("moe_forget", None, (c_void_p,)),
)


def open_reader(*, threads: int, direct: bool, piece_bytes: int | None = None) -> FileReader:
    """A reader with the arguments of `transfer.Reader`: native, if the library can be had."""
    try:
        return NativeReader(threads=threads, direct=direct, piece_bytes=piece_bytes)
    except NotNativeError:
        return Reader(threads=threads, direct=direct, piece_bytes=piece_bytes)


class NativeReader:
    """A `transfer.Reader`, but for who reads. Raises NotNativeError when the library cannot be had, or no thread.

    With `started` threads, fewer than `threads`, whoever wants more has to read himself.
    """

    def __init__(
        self, *, threads: int, direct: bool, piece_bytes: int | None = None, started: int | None = None
    ) -> None:
        self._reader: int | None = None
        self._library = load_library(_FUNCTIONS)
        self._piece_bytes = piece_bytes
        self._fetches: dict[int, tuple[Path, int, ctypes.Array[ctypes.c_char]]] = {}
        """By key, what is under way: the file, the bytes that it has to have, the memory."""
        self._arrival = _Arrival()
        self._reader = self._library.moe_open_reader(threads, threads if started is None else started, direct)
        if self._reader is None:
            raise NotNativeError("memory or threads are lacking to read with")
        self._end = weakref.finalize(self, _end, self._library, self._reader, self._fetches)

    def fetch(
        self, key: int, path: Path, begin: int, end: int, memory: memoryview, urgency: Urgency = Urgency.DEMAND
    ) -> None:
        if self._reader is None:
            raise is_closed()
        into = (ctypes.c_char * len(memory)).from_buffer(memory)
        size = piece_size(end - begin, self._piece_bytes)
        place = ctypes.addressof(into)
        self._fetches[key] = path, end, into
        if self._library.moe_fetch_file(self._reader, key, os.fsencode(path), begin, end, size, place, urgency):
            del self._fetches[key]
            raise MemoryError

    def promote(self, key: int) -> None:
        assert self._reader is not None, "the reader is closed"
        self._library.moe_promote(self._reader, key)

    def cancel(self, key: int) -> None:
        assert self._reader is not None, "the reader is closed"
        self._library.moe_cancel(self._reader, key)

    def wait(self) -> Arrival:
        while (arrival := self._await(_PATIENCE_MS)) is None:
            assert self._reader is not None, "the reader is closed"
        return arrival

    def poll(self) -> Arrival | None:
        return self._await(0)

    def close(self) -> None:
        self._reader = None
        self._end()

    def _await(self, milliseconds: int) -> Arrival | None:
        arrival = self._arrival
        if self._reader is None or not self._library.moe_await(self._reader, milliseconds, arrival):
            return None
        path, end, _ = self._fetches[arrival.key]
        error = _error_of(path, end, arrival) if arrival.error else None
        told = Arrival(arrival.key, arrival.read_bytes, error, bool(arrival.is_cancelled))
        self._library.moe_forget(self._reader)
        del self._fetches[told.key]
        return told


def _end(library: ctypes.CDLL, reader: int, fetches: dict[int, Any]) -> None:
    """End a reader, if nobody has closed it: before the memory that its threads read into is anybody else's."""
    library.moe_close_reader(reader)
    fetches.clear()


def _error_of(path: Path, end: int, arrival: _Arrival) -> MoeinfError:
    if arrival.error == _ENDS_EARLY:
        return ends_early(path, arrival.file_bytes, end)
    return read_error(path, OSError(arrival.error, os.strerror(arrival.error)))
