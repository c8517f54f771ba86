"""Turns weight files into the store's files, one expert at a time, as the weight files become available.

Owns which output waits for which file. Reads a bounded number of bytes at a time, by plain reads: an expert needs
memory for itself about twice, a dense tensor for a slice of it, however large the model is and whatever it came in.
Knows nothing of where files come from, and of the store only the `Sink`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch

from .conversion import DenseTensor, ExpertPart, Plan, Recipe, Source
from .dtypes import TORCH_DTYPES, bytes_of
from .errors import IntegrityError, UnsupportedError
from .manifest import DTYPE_BYTES, EXPERT_ALIGNMENT, expert_path, scales_name
from .quantized import Encoder, Packer
from .tensorfile import TensorEntry, TensorFile, encode_expert_header, encode_header
from .units import MIB

__all__ = ["DENSE_NAME", "DenseWriter", "Sharder", "Sink"]

DENSE_NAME = "dense.safetensors"

_CHUNK_BYTES = 16 * MIB
"""How much of a dense tensor is made at a time; converting it takes up to six times as much for a moment."""
_FLOATS = ("F64", "F32", "F16", "BF16")

Bytes = bytes | bytearray | memoryview


class DenseWriter(Protocol):
    """One file in the making, its tensors in any order. Offsets count from the start of the file, header included."""

    def is_done(self, tensor: str) -> bool:
        """Whether `mark_done` was called for it, now or before a crash."""

    def write_at(self, offset: int, data: Bytes) -> None:
        """Write all of `data` at `offset`."""

    def mark_done(self, tensor: str) -> None:
        """Say that every byte of the tensor is written."""

    def close(self) -> None:
        """Say that the file is whole."""


class Sink(Protocol):
    """Where the store's files go. What it says is done stays done."""

    def is_done(self, path: str) -> bool:
        """Whether the file was written in full, now or before a crash."""

    def write(self, path: str, chunks: Iterable[Bytes]) -> None:
        """Write a whole file from its parts, in order."""

    def dense(self, path: str, header: bytes, size: int) -> DenseWriter:
        """Begin, or go on with, a file of `size` bytes that starts with `header`."""


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """One step of the work: an expert of a layer, or a recipe of the dense part; and the weight files it needs."""

    output: tuple[int, int] | Recipe
    files: frozenset[str]


class Sharder:
    """Writes all outputs of `plan` to `sink`, but for those that it has. One thread uses it, as a context manager.
    With an `encoder` for the plan's layout, experts are written as that makes them.

    Raises IntegrityError for a weight file that is damaged, or whose tensors are not what the plan was made of.
    """

    def __init__(self, plan: Plan, sink: Sink, encoder: Encoder | None = None) -> None:
        self._plan = plan
        self._sink = sink
        self._encoder = encoder
        layout = encoder.layout if encoder else plan.layout
        self._expert_header = encode_expert_header(layout.tensors)
        self._dense: dict[str, tuple[DenseTensor, int]] = {}
        self._writer = self._open_dense()
        self._files: dict[str, TensorFile] = {}
        self._jobs: dict[str, dict[_Job, None]] = {name: {} for name in sorted(set(plan.tensor_files.values()))}
        self._jobs_left = 0
        for job in self._work():
            self._jobs_left += 1
            for name in job.files:
                self._jobs[name][job] = None

    def __enter__(self) -> Sharder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def add_file(self, path: Path) -> None:
        """Say that the weight file `path` is there in full, and write every output that waited for it alone.

        The file must stay until `finished_files` names it, or the sharder is closed.
        """
        name = path.name
        if not self._jobs.get(name) or name in self._files:
            return
        self._files[name] = TensorFile.open(path)
        for job in list(self._jobs[name]):
            if job.files <= self._files.keys():
                self._run(job)
        for name in self.finished_files():
            if file := self._files.pop(name, None):
                file.close()

    def finished_files(self) -> tuple[str, ...]:
        """The weight files that no unfinished output needs, by name: they may be removed, or need not be fetched."""
        return tuple(name for name, jobs in self._jobs.items() if not jobs)

    def finish(self) -> None:
        """Declare the dense file whole and give everything back. Raises IntegrityError if an output is missing."""
        if self._jobs_left:
            waiting = ", ".join(name for name, jobs in self._jobs.items() if jobs)
            raise IntegrityError(f"{self._jobs_left} outputs were not written: they wait for {waiting}")
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self.close()

    def close(self) -> None:
        """Close the weight files. Closing twice is harmless."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _open_dense(self) -> DenseWriter | None:
        if self._sink.is_done(DENSE_NAME):
            return None
        tensors = self._plan.dense
        described = [(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]
        header = encode_header(described, {"format": "pt"}, EXPERT_ALIGNMENT)
        offset = len(header)
        for tensor in tensors:
            self._dense[tensor.name] = (tensor, offset)
            offset += tensor.nbytes
        return self._sink.dense(DENSE_NAME, header, offset)

    def _work(self) -> Iterator[_Job]:
        """What the sink does not have, dense tensors first."""
        plan, writer = self._plan, self._writer
        if writer is not None:
            for recipe in plan.recipes:
                if not all(writer.is_done(name) for name in recipe.outputs):
                    yield _Job(recipe, self._files_of([recipe]))
        for layer, described in enumerate(plan.layers):
            for expert in range(described.num_experts):
                if not self._sink.is_done(expert_path(layer, expert)):
                    recipes = (part.recipe for part in plan.expert_parts(layer, expert))
                    yield _Job((layer, expert), self._files_of(recipes))

    def _files_of(self, recipes: Iterable[Recipe]) -> frozenset[str]:
        return frozenset(self._plan.tensor_files[source.name] for recipe in recipes for source in recipe.sources)

    def _run(self, job: _Job) -> None:
        if isinstance(job.output, Recipe):
            self._write_dense(job.output)
        else:
            self._write_expert(*job.output)
        self._jobs_left -= 1
        for name in job.files:
            del self._jobs[name][job]

    # Experts

    def _write_expert(self, layer: int, expert: int) -> None:
        self._sink.write(expert_path(layer, expert), self._expert_chunks(layer, expert))

    def _expert_chunks(self, layer: int, expert: int) -> Iterator[Bytes]:
        yield self._expert_header
        parts = self._plan.expert_parts(layer, expert)
        tensors = chain.from_iterable(self._tensors(part, layer, expert) for part in parts)
        if self._encoder is None:
            yield from (bytes_of(tensor) for _, tensor in tensors)
        else:
            yield from self._encoder.encode(dict(tensors), f"expert {expert} of {self._plan.layers[layer].module}")

    def _tensors(self, part: ExpertPart, layer: int, expert: int) -> Iterator[tuple[str, torch.Tensor]]:
        """What is written of a part, by name: itself, or as it was released its numbers and their scales."""
        name = part.spec.name
        if part.packing is None or not isinstance(self._encoder, Packer):
            yield name, self._make(part, layer, expert)
            return
        if part.is_fused:
            self._check_rows(part, self._plan.layers[layer].num_experts)
        for stored, sources in zip((name, scales_name(name)), zip(*part.pieces, strict=True), strict=True):
            yield stored, self._join(sources, expert if part.is_fused else None)

    def _join(self, sources: tuple[Source, ...], expert: int | None) -> torch.Tensor:
        """The sources one below the other, of fused ones what is the expert's."""
        rows = None if expert is None else (expert, expert + 1)
        tensors = [self._read(self._entry(source.name), rows) for source in sources]
        if expert is not None:
            tensors = [tensor[0] for tensor in tensors]
        if len(tensors) == 1:
            return tensors[0]
        if tensors[0].dim() != 2 or len({(tensor.shape, tensor.dtype) for tensor in tensors}) > 1:
            shapes = " and ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in tensors)
            raise IntegrityError(f"{', '.join(source.name for source in sources)} do not fit together: {shapes}")
        return torch.cat(tensors)

    def _make(self, part: ExpertPart, layer: int, expert: int) -> torch.Tensor:
        rows = (expert, expert + 1) if part.is_fused else None
        if part.is_fused:
            self._check_rows(part, self._plan.layers[layer].num_experts)
        (made,) = self._plan.convert(part.recipe, self._sources(part.recipe, part.spec.dtype, rows)).values()
        if tuple(made.shape) != (1, *part.spec.shape):
            shapes = f"{list(made.shape[1:])}, not {list(part.spec.shape)}"
            raise IntegrityError(f"{_names(part.recipe)} give an expert the shape {shapes}")
        return made[0]

    def _check_rows(self, part: ExpertPart, num_experts: int) -> None:
        for source in part.recipe.sources:
            shape = self._entry(source.name).shape
            if not shape or shape[0] != num_experts:
                raise IntegrityError(
                    f"{source.name} of shape {list(shape)} has not one row for each of {num_experts} experts"
                )

    # The dense part

    def _write_dense(self, recipe: Recipe) -> None:
        writer = self._writer
        assert writer is not None, "without a writer there are no dense jobs"
        if recipe.method == "copy":
            chunks = self._copied(recipe)
        elif recipe.method == "rows":
            chunks = self._in_bands(recipe)
        else:
            chunks = self._as_a_whole(recipe)
        for name, position, data in chunks:
            writer.write_at(self._dense[name][1] + position, data)
        for name in recipe.outputs:
            writer.mark_done(name)

    def _copied(self, recipe: Recipe) -> Iterator[tuple[str, int, Bytes]]:
        (name,) = recipe.outputs
        tensor = self._dense[name][0]
        entries = [self._entry(source.name) for source in recipe.sources]
        shapes = {entry.shape[1:] for entry in entries}
        if entries[0].shape != tensor.shape and (
            not (tensor.shape and all(entry.shape for entry in entries))
            or shapes != {tensor.shape[1:]}
            or sum(entry.shape[0] for entry in entries) != tensor.shape[0]
        ):
            raise _misshapen(recipe, entries[0].shape, tensor)
        position = 0
        for entry in entries:
            _check_kind(entry, tensor.dtype)
            for data in self._cast_chunks(entry, tensor.dtype):
                yield name, position, data
                position += memoryview(data).nbytes

    def _cast_chunks(self, entry: TensorEntry, dtype: str) -> Iterator[Bytes]:
        file = self._files[self._plan.tensor_files[entry.name]]
        step = _CHUNK_BYTES // DTYPE_BYTES[dtype] * DTYPE_BYTES[entry.dtype]
        for begin in range(entry.begin, entry.end, step):
            data = bytearray(min(step, entry.end - begin))
            file.pread_into(data, begin)
            if entry.dtype == dtype:
                yield data
            else:
                yield bytes_of(torch.frombuffer(data, dtype=TORCH_DTYPES[entry.dtype]).to(TORCH_DTYPES[dtype]))

    def _in_bands(self, recipe: Recipe) -> Iterator[tuple[str, int, Bytes]]:
        (name,) = recipe.outputs
        tensor = self._dense[name][0]
        band = self._band_rows(recipe, tensor)
        rows, row_bytes = tensor.shape[0], tensor.nbytes // max(1, tensor.shape[0])
        step = max(1, _CHUNK_BYTES // max(1, row_bytes * band)) * band
        for begin, end in _runs(rows, band, step):
            made = self._plan.convert(recipe, self._bands(recipe, rows, band, begin, end))[name]
            if tuple(made.shape) != (end - begin, *tensor.shape[1:]):
                raise _misshapen(recipe, tuple(made.shape), tensor)
            yield name, begin * row_bytes, bytes_of(made)

    def _bands(self, recipe: Recipe, rows: int, band: int, begin: int, end: int) -> Iterator[torch.Tensor]:
        for source in recipe.sources:
            entry = self._entry(source.name)
            if not entry.shape or entry.shape == (1,):
                yield self._read(entry, None)
            elif entry.shape[0] == rows:
                yield self._read(entry, (begin, end))
            else:
                yield self._read(entry, (begin // band, -(-end // band)))

    def _band_rows(self, recipe: Recipe, tensor: DenseTensor) -> int:
        """How many rows of the output share a row of scales. The last band of a tensor may have fewer."""
        rows = tensor.shape[0] if tensor.shape else 1
        shapes = [self._entry(source.name).shape for source in recipe.sources]
        counts = {shape[0] for shape in shapes if shape and shape != (1,)} - {rows}
        if not counts:
            return 1
        if len(counts) == 1:
            count = counts.pop()
            if recipe.band_rows and count == -(-rows // recipe.band_rows):
                return recipe.band_rows
            if count and rows % count == 0:
                return rows // count
        raise _misshapen(recipe, shapes[0], tensor)

    def _as_a_whole(self, recipe: Recipe) -> Iterator[tuple[str, int, Bytes]]:
        dtype = self._dense[recipe.outputs[0]][0].dtype
        made = self._plan.convert(recipe, self._sources(recipe, dtype, None))
        for name in recipe.outputs:
            tensor = self._dense[name][0]
            if tuple(made[name].shape) != tensor.shape:
                raise _misshapen(recipe, tuple(made[name].shape), tensor)
            yield name, 0, bytes_of(made.pop(name))

    # Sources

    def _sources(self, recipe: Recipe, dtype: str, rows: tuple[int, int] | None) -> Iterator[torch.Tensor]:
        for source in recipe.sources:
            entry = self._entry(source.name)
            if recipe.needs_floats(source):
                _check_kind(entry, dtype)
            yield self._read(entry, rows)

    def _entry(self, name: str) -> TensorEntry:
        file = self._files[self._plan.tensor_files[name]]
        if name not in file.entries:
            raise IntegrityError(f"{file.path} lacks the tensor {name}")
        return file.entries[name]

    def _read(self, entry: TensorEntry, rows: tuple[int, int] | None) -> torch.Tensor:
        file = self._files[self._plan.tensor_files[entry.name]]
        data = file.read(entry.name, *(rows or ()))
        shape = entry.shape if rows is None else (rows[1] - rows[0], *entry.shape[1:])
        dtype = TORCH_DTYPES[entry.dtype]
        return torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)


def _runs(rows: int, band: int, step: int) -> Iterator[tuple[int, int]]:
    """Runs of whole bands; a last band that is cut goes alone, for transformers takes all bands it sees for alike."""
    whole = rows - rows % band
    for begin in range(0, whole, step):
        yield begin, min(whole, begin + step)
    if whole < rows:
        yield whole, rows


def _check_kind(entry: TensorEntry, dtype: str) -> None:
    """Numbers that mean something only with a scale beside them are not to be taken for weights."""
    if dtype in _FLOATS and entry.dtype not in _FLOATS:
        raise UnsupportedError(
            f"{entry.name} is packed as {entry.dtype}, and neither config.json nor transformers says how to expand it",
            hint="use the model's original weights",
        )


def _misshapen(recipe: Recipe, shape: tuple[int, ...], tensor: DenseTensor) -> IntegrityError:
    made_of = f"{_names(recipe)} (shape {list(shape)})"
    return IntegrityError(f"{tensor.name} (shape {list(tensor.shape)}) cannot be made of {made_of}")


def _names(recipe: Recipe) -> str:
    return ", ".join(source.name for source in recipe.sources[:3]) + (", …" if len(recipe.sources) > 3 else "")
