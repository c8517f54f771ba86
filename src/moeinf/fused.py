"""A stored model as a checkpoint that transformers loads as it lies: the experts of a layer fused into one tensor.

Programs that moeinf is measured against read this form best: they can map it into memory and convert nothing. The dense
part and all small files are links into the store, but for a dense part that is packed. Holds one expert in memory at a
time, or one matrix.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from .checkpoint import INDEX_NAME, Checkpoint
from .errors import CapacityError, MoeinfError
from .files import explained
from .manifest import Manifest, expert_path
from .progress import NO_PROGRESS, Progress
from .store import StoredModel
from .tensorfile import TensorFile, encode_header
from .units import format_bytes

__all__ = ["find_fused", "write_fused"]


def find_fused(manifest: Manifest) -> Path | None:
    """The folder that the model came from, if it is still there and has this form, in the store's dtypes."""
    folder = Path(manifest.source.repo)
    try:
        checkpoint = Checkpoint.from_folder(folder) if folder.is_absolute() else None
    except MoeinfError:
        return None
    if checkpoint is None:
        return None
    for file in checkpoint.weight_files:
        with TensorFile.open(folder / file) as opened:
            found = {name: (entry.dtype, entry.shape) for name, entry in opened.entries.items()}
        for layer in manifest.layers:
            for tensor in manifest.layout.unpacked.tensors:
                name = f"{layer.module}.{tensor.name}"
                wanted = (tensor.dtype, (layer.num_experts, *tensor.shape))
                if name not in checkpoint.tensor_files or found.get(name, wanted) != wanted:
                    return None
    return folder


def write_fused(stored: StoredModel, folder: Path, progress: Progress = NO_PROGRESS) -> None:
    """Write the checkpoint into `folder`, which is empty. Raises CapacityError, before anything is written, if the disk
    has no room for all experts once more.
    """
    manifest = stored.manifest
    with explained(folder):
        space = os.statvfs(folder)
        free = space.f_bavail * space.f_frsize
        needed = manifest.num_experts * manifest.layout.unpacked.nbytes
        if manifest.packed_dense:
            needed += manifest.unpacked.dense_bytes
        if free < needed:
            raise CapacityError(
                f"the weights take {format_bytes(needed)} once more, for the programs to compare with,"
                f" and {folder} has {format_bytes(free)} left",
                hint="free some space, or leave out --against",
            )
        weight_map = _link_others(stored, folder)
        with progress.task(f"write {stored.name} as transformers reads it", manifest.num_experts, "experts") as task:
            for number in range(len(manifest.layers)):
                file = f"experts-{number:05d}.safetensors"
                weight_map |= dict.fromkeys(_write_layer(stored, number, folder / file), file)
                task.advance(manifest.layers[number].num_experts)
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / INDEX_NAME).write_text(index, encoding="utf-8")


def _link_others(stored: StoredModel, folder: Path) -> dict[str, str]:
    """Link everything but experts, and write a dense part that is packed. Returns the file of each dense tensor."""
    from .densefile import DenseFiles, plain_chunks
    from .sharding import DENSE_NAME

    manifest = stored.manifest
    weight_map: dict[str, str] = {}
    for name in manifest.files:
        if "/" not in name and not (manifest.packed_dense and name in manifest.dense_files):
            (folder / name).symlink_to(stored.path / name)
    with DenseFiles(stored.path, manifest) as files:
        if manifest.packed_dense:
            with (folder / DENSE_NAME).open("wb") as file:
                file.writelines(plain_chunks(files))
            return dict.fromkeys((name for name, _, _ in files.tensors), DENSE_NAME)
    for name in manifest.dense_files:
        with TensorFile.open(stored.path / name) as dense:
            weight_map |= dict.fromkeys(dense.entries, name)
    return weight_map


def _write_layer(stored: StoredModel, number: int, path: Path) -> list[str]:
    """Write one layer's experts; returns the names of its tensors."""
    from .dtypes import bytes_of
    from .lossless import read_expert

    layer, stored_layout = stored.manifest.layers[number], stored.manifest.layout
    layout = stored_layout.unpacked
    names = [f"{layer.module}.{tensor.name}" for tensor in layout.tensors]
    shapes = [(layer.num_experts, *tensor.shape) for tensor in layout.tensors]
    dtypes = [tensor.dtype for tensor in layout.tensors]
    header = encode_header(list(zip(names, dtypes, shapes, strict=True)), {"format": "pt"})
    begins = [len(header)]
    for tensor in layout.tensors:
        begins.append(begins[-1] + layer.num_experts * tensor.nbytes)
    with path.open("wb") as file:
        file.write(header)
        for expert in range(layer.num_experts):
            made = read_expert(stored.path / expert_path(number, expert), stored_layout)
            for begin, tensor in zip(begins, layout.tensors, strict=False):
                file.seek(begin + expert * tensor.nbytes)
                file.write(bytes_of(made[tensor.name]))
    return names
