"""The table of input embeddings, where it lies in its file: of a token one row is needed, and no more is read.

With models of today that is half a gigabyte, and experts have its room. Rows come through the system's page cache,
which keeps those of common tokens.
"""

from __future__ import annotations

import copy
import math
import mmap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .dtypes import TORCH_DTYPES
from .errors import IntegrityError
from .manifest import Manifest
from .tensorfile import TensorEntry, TensorFile

__all__ = ["EmbeddingTable", "left_behind"]


class EmbeddingTable:
    """The table [V, H] of this name in one of the dense files in `folder`, as a context manager.

    Raises IntegrityError where no file has it.
    """

    def __init__(self, folder: Path, manifest: Manifest, name: str) -> None:
        with ExitStack() as stack:
            files = [stack.enter_context(TensorFile.open(folder / each)) for each in manifest.dense_files]
            file = next((each for each in files if name in each.entries), None)
            if file is None:
                raise IntegrityError(
                    f"{folder} has no table of embeddings {name}",
                    hint="`moeinf verify MODEL` says what is damaged, and how to mend it",
                )
            self._file, entry = file, file.entries[name]
            self._dtype, (self._words, self._width) = TORCH_DTYPES[entry.dtype], entry.shape
            self._begin, self._row_bytes = entry.begin, entry.nbytes // max(1, self._words)
            self.weight = torch.frombuffer(_map(file.path, entry), dtype=self._dtype).view(entry.shape)
            """All of it, mapped: what somebody looks at is read then."""
            self._stack = stack.pop_all()

    def __enter__(self) -> EmbeddingTable:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def serve(self, embedding: nn.Module) -> None:
        """Let `embedding`, whose weight this is, find rows here, and do with them whatever its class does. (Pages of
        the mapped table would count as this process's memory, up to sixteen for each row.)
        """
        shallow: Any = copy.copy(embedding)
        shallow._parameters, shallow.padding_idx = {}, None

        def forward(ids: torch.Tensor) -> torch.Tensor:
            shallow._parameters["weight"] = self.rows(ids)
            found: torch.Tensor = shallow.forward(torch.arange(ids.numel(), device=ids.device).view(ids.shape))
            return found

        embedding.forward = forward  # of this one alone

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows of `ids` [...], flattened, as a tensor [tokens, H] beside them. Raises IndexError for a token that
        there is not, and IntegrityError where reading fails.
        """
        tokens = ids.flatten().tolist()
        if tokens and not 0 <= min(tokens) <= max(tokens) < self._words:
            raise IndexError(f"there is no token {min(tokens) if min(tokens) < 0 else max(tokens)} of {self._words}")
        places = [self._begin + token * self._row_bytes for token in tokens]
        if len(places) > 1:  # all are read at once
            for place in sorted(set(places)):
                self._file.will_read(place, self._row_bytes)
        rows = torch.empty(len(tokens), self._width, dtype=self._dtype)
        for row, place in zip(rows.view(torch.uint8).numpy(), places, strict=True):
            self._file.pread_into(row.data, place)
        return rows.to(ids.device)


@contextmanager
def left_behind(embedding: nn.Module) -> Iterator[None]:
    """While this is open, a model may be moved to a device without the weight of `embedding`, which has none of its own
    there afterwards: what stands for it has its shape, takes no memory, and is no number.
    """
    weight: Any = embedding.weight
    embedding.weight = _as_weight(weight.new_empty(0))
    yield
    place: Any = embedding.weight.device
    embedding.weight = _as_weight(torch.full((1, 1), math.nan, dtype=weight.dtype, device=place).expand(weight.shape))


def _as_weight(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _map(path: Path, entry: TensorEntry) -> memoryview:
    """The bytes of a tensor, mapped into memory as this process's own, since torch takes no other."""
    begin = entry.begin - entry.begin % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), entry.end - begin, access=mmap.ACCESS_COPY, offset=begin)
    if hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)
    return memoryview(mapped)[entry.begin - begin :]
