"""Safetensors files: a strict reader of headers, plain reads of bytes, and the header of a file to be written.

Owns the rules of the format (https://github.com/huggingface/safetensors#format). Knows nothing of torch, of what
tensors mean, or of who made a file: everything in it is checked before it is believed. Reads are plain reads and never
maps, so what is not asked for costs no memory.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from .errors import IntegrityError
from .manifest import DTYPE_BYTES, EXPERT_ALIGNMENT, TensorSpec
from .units import MIB, align_up

__all__ = ["MAX_HEADER_BYTES", "TensorEntry", "TensorFile", "encode_expert_header", "encode_header"]

MAX_HEADER_BYTES = 100_000_000
"""Longer headers are refused, as the reference implementation does."""

_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"
_MAX_DIMENSIONS = 32
_MAX_EXTENT = 1 << 48
_READ_BYTES = 16 * MIB


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file, row-major; `begin` and `end` count from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class TensorFile:
    """An open safetensors file whose header is known to be sound. Any number of threads may read from it."""

    def __init__(self, path: Path, descriptor: int, entries: dict[str, TensorEntry], metadata: dict[str, str]) -> None:
        self.path = path
        self.entries = entries
        self.metadata = metadata
        self._descriptor: int | None = descriptor

    @classmethod
    def open(cls, path: Path) -> TensorFile:
        """Open `path` and check its header in full. Raises IntegrityError, which says what is wrong with which file."""
        try:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise IntegrityError(f"{path} cannot be read: {error.strerror}") from error
        try:
            entries, metadata = _read_header(descriptor)
        except _FormatError as error:
            os.close(descriptor)
            raise IntegrityError(f"{path} is not a sound safetensors file: {error}") from error
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, descriptor, entries, metadata)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the descriptor back. Closing twice is harmless."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def read(self, name: str, row_begin: int | None = None, row_end: int | None = None) -> bytearray:
        """The bytes of a tensor, or of its rows (slices of the first dimension) from `row_begin` to before `row_end`.

        Raises KeyError for a name that is not there, ValueError for rows that are not, IntegrityError if reading fails.
        """
        entry = self.entries[name]
        begin, end = entry.begin, entry.end
        if row_begin is not None or row_end is not None:
            rows = entry.shape[0] if entry.shape else 0
            first, last = row_begin or 0, rows if row_end is None else row_end
            if not 0 <= first <= last <= rows:
                raise ValueError(f"{name} has {rows} rows, not {first} to {last}")
            row_bytes = entry.nbytes // rows if rows else 0
            begin, end = begin + first * row_bytes, begin + last * row_bytes
        data = bytearray(end - begin)
        self.pread_into(data, begin)
        return data

    def pread_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        """Fill `buffer` with the file's bytes from `offset` on. Raises IntegrityError if there are not as many."""
        if self._descriptor is None:
            raise ValueError(f"{self.path} is closed")
        try:
            _fill(self._descriptor, memoryview(buffer).cast("B"), offset)
        except (OSError, _FormatError) as error:
            raise IntegrityError(f"{self.path} cannot be read: {error}") from error

    def will_read(self, offset: int, size: int) -> None:
        """Have the system read these bytes into its page cache, if it can, without waiting for it."""
        if self._descriptor is not None and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, offset, size, os.POSIX_FADV_WILLNEED)


def encode_header(
    tensors: Sequence[tuple[str, str, Sequence[int]]],
    metadata: Mapping[str, str] | None = None,
    alignment: int = 1,
) -> bytes:
    """The start of a safetensors file that holds `tensors` (name, dtype, shape) one after another, without a gap.

    Spaces at the end of the header, which the format allows, let the data start at a multiple of `alignment`.
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * DTYPE_BYTES[dtype]
        if name in header or name == _METADATA:
            raise ValueError(f"two tensors are called {name!r}")
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    data_begin = align_up(_LENGTH.size + len(text), alignment)
    return _LENGTH.pack(data_begin - _LENGTH.size) + text.ljust(data_begin - _LENGTH.size)


def encode_expert_header(tensors: Iterable[TensorSpec]) -> bytes:
    """The header of an expert's file, the same for all experts of a model."""
    return encode_header([(spec.name, spec.dtype, spec.shape) for spec in tensors], alignment=EXPERT_ALIGNMENT)


class _FormatError(Exception):
    """What is wrong with the file, in a few words; the path is added by whoever knows it."""


def _read_header(descriptor: int) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    try:
        file_bytes = os.fstat(descriptor).st_size
        prefix = _read(descriptor, _LENGTH.size, 0)
        (header_bytes,) = _LENGTH.unpack(prefix)
        if header_bytes > MAX_HEADER_BYTES:
            raise _FormatError(f"its header claims {header_bytes} bytes, more than any file needs")
        data_begin = _LENGTH.size + header_bytes
        if data_begin > file_bytes:
            raise _FormatError(f"it ends at byte {file_bytes}, inside its header")
        header = _parse(_read(descriptor, header_bytes, _LENGTH.size))
    except OSError as error:
        raise _FormatError(error.strerror or str(error)) from error
    metadata = _checked_metadata(header.pop(_METADATA, {}))
    return _checked_entries(header, data_begin, file_bytes), metadata


def _parse(data: bytes) -> dict[str, Any]:
    if not data.startswith(b"{"):
        raise _FormatError("its header is not a JSON object")
    try:
        header = json.loads(data.decode(), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _FormatError(f"its header is not JSON ({error})") from error
    assert isinstance(header, dict), "what starts with a brace is an object or an error"
    return header


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name stands there twice")
    return table


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _checked_metadata(metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _FormatError("its metadata is not a table of texts")
    return metadata


def _checked_entries(header: dict[str, Any], data_begin: int, file_bytes: int) -> dict[str, TensorEntry]:
    entries = {name: _checked_entry(name, raw, data_begin) for name, raw in header.items()}
    position = data_begin
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != position:
            raise _FormatError(f"there is a hole or an overlap before tensor {entry.name!r}")
        position = entry.end
    if position != file_bytes:
        raise _FormatError(f"its tensors end at byte {position}, the file at {file_bytes}")
    return entries


def _checked_entry(name: str, raw: object, data_begin: int) -> TensorEntry:
    match raw:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end], **rest} if not rest:
            pass
        case _:
            raise _FormatError(f"tensor {name!r} is not described by dtype, shape and data_offsets")
    if dtype not in DTYPE_BYTES:
        raise _FormatError(f"tensor {name!r} has the unknown dtype {dtype!r}")
    if len(shape) > _MAX_DIMENSIONS or not all(_is_count(extent) and extent <= _MAX_EXTENT for extent in shape):
        raise _FormatError(f"tensor {name!r} has no possible shape")
    if not (_is_count(begin) and _is_count(end)) or end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise _FormatError(f"the offsets of tensor {name!r} do not fit its shape")
    return TensorEntry(name, dtype, tuple(shape), data_begin + begin, data_begin + end)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _read(descriptor: int, count: int, offset: int) -> bytes:
    data = bytearray(count)
    _fill(descriptor, memoryview(data), offset)
    return bytes(data)


def _fill(descriptor: int, view: memoryview, offset: int) -> None:
    for chunk in _pieces(view):
        position = 0
        while position < len(chunk):
            data = os.pread(descriptor, len(chunk) - position, offset + position)
            if not data:
                raise _FormatError(f"it ends at byte {offset + position}, too early")
            chunk[position : position + len(data)] = data
            position += len(data)
        offset += len(chunk)


def _pieces(view: memoryview) -> Iterator[memoryview]:
    """Parts small enough that the copy that a plain read makes of each costs little memory."""
    for begin in range(0, len(view), _READ_BYTES):
        yield view[begin : begin + _READ_BYTES]
