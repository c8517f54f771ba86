"""The dense part of a stored model in its files (docs/store-format.md): what is packed there, and how it gets there.

Owns which dense weights are packed, and the file that has them. Reads plain tensors whatever they lie as, by plain
reads; one matrix at a time is in memory, with what it is packed to.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch

from .dtypes import TORCH_DTYPES, bytes_of
from .errors import IntegrityError, UnpackableError
from .files import Bytes
from .incoming import Incoming
from .lossless import expand, pack
from .manifest import (
    DTYPE_BYTES,
    EXPERT_ALIGNMENT,
    PANEL_INPUTS,
    PANEL_ROWS,
    Manifest,
    lossless_gain,
    lossless_shapes,
    uppers_name,
)
from .progress import NO_PROGRESS, Progress
from .tensorfile import TensorEntry, TensorFile, encode_header

__all__ = ["PACKED_NAME", "DenseFiles", "as_packed", "pack_dense", "plain_chunks", "read_plain"]

PACKED_NAME = "dense-lossless.safetensors"

Described = tuple[str, str, tuple[int, ...]]
"""Name, dtype and shape of a tensor."""


class DenseFiles:
    """The dense tensors of a model in `folder`, as a context manager. Raises IntegrityError for files that are damaged,
    or do not have the packed weights of which the manifest tells.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._packed = manifest.packed_dense
        self._places: dict[str, tuple[TensorFile, TensorEntry]] = {}
        with ExitStack() as stack:
            for name in manifest.dense_files:
                file = stack.enter_context(TensorFile.open(folder / name))
                self._places |= {entry.name: (file, entry) for entry in file.entries.values()}
            for name, sides in self._packed.items():
                there = [self._places.get(part, (None, None))[1] for part in (name, uppers_name(name))]
                if tuple(entry and (entry.dtype, entry.shape) for entry in there) != lossless_shapes(*sides):
                    raise IntegrityError(
                        f"{folder} has no lossless {name} of {sides[0]} x {sides[1]}",
                        hint="`moeinf verify MODEL` says what is damaged, and how to mend it",
                    )
            self._stack = stack.pop_all()

    def __enter__(self) -> DenseFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def tensors(self) -> list[Described]:
        """All of them, in the order of the files, as they are when they are plain."""
        uppers = set(map(uppers_name, self._packed))
        there = ((name, entry) for name, (_, entry) in self._places.items() if name not in uppers)
        return [
            (name, "BF16", self._packed[name]) if name in self._packed else (name, entry.dtype, entry.shape)
            for name, entry in there
        ]

    def read(self, name: str) -> torch.Tensor:
        """A tensor, plain, in memory of its own."""
        if name in self._packed:
            return expand(self._read(name), self._read(uppers_name(name)))
        return self._read(name)

    def has_same_weights(self, other: DenseFiles) -> bool:
        """Whether the other files have the same tensors, to the last bit."""
        return sorted(self.tensors) == sorted(other.tensors) and all(
            torch.equal(_bits(self.read(name)), _bits(other.read(name))) for name, _, _ in self.tensors
        )

    def _read(self, name: str) -> torch.Tensor:
        file, entry = self._places[name]
        dtype = TORCH_DTYPES[entry.dtype]
        data = file.read(name)
        return torch.frombuffer(data, dtype=dtype).view(entry.shape) if data else torch.empty(entry.shape, dtype=dtype)


def read_plain(folder: Path, manifest: Manifest, left_out: str = "") -> dict[str, torch.Tensor]:
    """All of them but the one of the name `left_out`, plain, the largest first: what is packed is then never much
    beside what is unpacked already.
    """
    with DenseFiles(folder, manifest) as files:
        by_size = sorted(files.tensors, key=lambda tensor: -math.prod(tensor[2]) * DTYPE_BYTES[tensor[1]])
        return {name: files.read(name) for name, _, _ in by_size if name != left_out}


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


def pack_dense(
    incoming: Incoming, folder: Path, manifest: Manifest, candidates: Collection[str], progress: Progress = NO_PROGRESS
) -> Manifest:
    """Write the dense part in `folder`, which lies as `manifest` says, with those of `candidates` packed that can be,
    and return the manifest of what is written. Where none can be, nothing is.
    """
    if not candidates:
        return manifest
    if not incoming.is_done(PACKED_NAME):
        with DenseFiles(folder, manifest) as files:
            packable = _packable(files, sorted(candidates), progress)
            if not packable:
                return manifest
            incoming.write(PACKED_NAME, _packed_chunks(files, packable))
    with TensorFile.open(incoming.model / PACKED_NAME) as file:
        entries = file.entries
    sides = {
        name: (entry.shape[0] * PANEL_ROWS, entry.shape[1] * PANEL_INPUTS)
        for name, entry in entries.items()
        if uppers_name(name) in entries
    }
    return as_packed(manifest, sides)


def as_packed(manifest: Manifest, sides: dict[str, tuple[int, int]]) -> Manifest:
    """What the manifest of a plain dense part becomes when these weights are packed, and all lie in one file."""
    dense_bytes = manifest.dense_bytes - lossless_gain(sides.values())
    return dataclasses.replace(manifest, dense_files=(PACKED_NAME,), dense_bytes=dense_bytes, packed_dense=sides)


def plain_chunks(files: DenseFiles) -> Iterator[Bytes]:
    """The file that has all of these tensors plain, the widest dtype first."""
    tensors = sorted(files.tensors, key=lambda each: -DTYPE_BYTES[each[1]])
    yield encode_header(tensors, {"format": "pt"}, EXPERT_ALIGNMENT)
    yield from (bytes_of(files.read(name)) for name, _, _ in tensors)


def _packable(files: DenseFiles, names: list[str], progress: Progress) -> dict[str, tuple[int, int]]:
    """Those of these matrices that have no more exceptions than there is room for, and their sides."""
    packable = {}
    with progress.task("look at dense weights", len(names), "matrices") as task:
        for name in names:
            weight = files.read(name)
            try:
                pack(weight)
            except UnpackableError:
                pass
            else:
                packable[name] = (weight.shape[0], weight.shape[1])
            task.advance(1)
    return packable


def _packed_chunks(files: DenseFiles, packable: Mapping[str, tuple[int, int]]) -> Iterator[Bytes]:
    """Panels come first, whose sizes are multiples of cache lines, so that all begin at such; then wider dtypes."""
    parts = {name: lossless_shapes(*sides) for name, sides in packable.items()}
    others: list[Described] = [(uppers_name(name), *uppers) for name, (_, uppers) in parts.items()]
    others += [tensor for tensor in files.tensors if tensor[0] not in packable]
    others.sort(key=lambda tensor: -DTYPE_BYTES[tensor[1]])
    panels = [(name, *shape) for name, (shape, _) in parts.items()]
    yield encode_header([*panels, *others], {"format": "pt"}, EXPERT_ALIGNMENT)
    uppers = {}
    for name in packable:
        made, uppers[uppers_name(name)] = pack(files.read(name))
        yield bytes_of(made)
    yield from (bytes_of(uppers.pop(name) if name in uppers else files.read(name)) for name, _, _ in others)
