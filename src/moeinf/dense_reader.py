"""The dense part of a stored model into memory, as it lies, at the disk's speed.

Fills page-aligned buffers by the readers that fetch experts. What is packed stays so.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from .densefile import DenseFiles
from .dtypes import TORCH_DTYPES
from .manifest import EXPERT_ALIGNMENT, Manifest, uppers_name
from .native_reader import open_reader
from .tensorfile import TensorEntry, TensorFile
from .transfer import READERS, allocate_buffer
from .units import align_up

__all__ = ["read_dense", "take_packed"]


def read_dense(folder: Path, manifest: Manifest, direct: bool, left_out: str) -> dict[str, torch.Tensor]:
    """The dense tensors by name, but the one of the name `left_out`, as they lie: views of one or two buffers per file,
    filled past the page cache if `direct`. Raises MoeinfError for files that are damaged or cannot be read.
    """
    with DenseFiles(folder, manifest):
        pass  # it has looked at the headers
    reader = open_reader(threads=READERS, direct=direct)
    try:
        tensors: dict[str, torch.Tensor] = {}
        for name in manifest.dense_files:
            with TensorFile.open(folder / name) as file:
                entries = dict(file.entries)
            for begin, end in _around(entries.pop(left_out, None), manifest.files[name].size):
                buffer = allocate_buffer(align_up(end - begin, EXPERT_ALIGNMENT))
                reader.fetch(0, folder / name, begin, end, memoryview(buffer))
                arrival = reader.wait()
                if arrival.error is not None:
                    raise arrival.error
                inside = [entry for entry in entries.values() if begin <= entry.begin and entry.end <= end]
                tensors |= {entry.name: _tensor(entry, buffer, entry.begin - begin) for entry in inside}
        return tensors
    finally:
        reader.close()


def take_packed(tensors: dict[str, torch.Tensor], manifest: Manifest) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Take the packed weights out of `tensors`: panels and uppers, by the names of their layers."""
    return {
        name.removesuffix(".weight"): (tensors.pop(name), tensors.pop(uppers_name(name)))
        for name in manifest.packed_dense
    }


def _around(entry: TensorEntry | None, size: int) -> list[tuple[int, int]]:
    """The parts of a file of `size` bytes before and behind a tensor, which begin and end with pages, or all of it."""
    if entry is None:
        return [(0, size)]
    parts = (0, align_up(entry.begin, EXPERT_ALIGNMENT)), (entry.end - entry.end % EXPERT_ALIGNMENT, size)
    return [(begin, min(end, size)) for begin, end in parts if begin < min(end, size)]


def _tensor(entry: TensorEntry, buffer: Any, offset: int) -> torch.Tensor:
    """The tensor whose bytes are in `buffer` from `offset` on."""
    dtype, count = TORCH_DTYPES[entry.dtype], math.prod(entry.shape)
    flat = torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset) if count else torch.empty(0, dtype=dtype)
    return flat.view(entry.shape)
