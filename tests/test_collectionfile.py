"""The file of a collection: what is written is read, and whatever is wrong with it is said."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest

from faults import CountingDisk, FailingDisk
from moeinf.collection import CAPACITY, ActivationCollection
from moeinf.collectionfile import read_collection, write_collection
from moeinf.errors import CapacityError, IntegrityError, UnsupportedError, UsageError
from moeinf.tensorfile import encode_header
from moeinf.tracefile import encode_fields, encode_metadata, write_trace
from traces import make_identity, make_trace

IDENTITY = make_identity((8, 4))


def make(count: int, seed: int = 0) -> ActivationCollection:
    matrices = np.random.default_rng(seed).integers(0, 9, (count, 2, 2, 8), np.int32)
    matrices[:, :, 1, 4:] = 0
    return ActivationCollection((8, 4), matrices)


@pytest.mark.parametrize("count", [0, 1, CAPACITY])
def test_what_is_written_is_read(tmp_path: Path, count: int) -> None:
    path = tmp_path / "traces" / "collection.safetensors"
    assert len(read_collection(path, IDENTITY)) == 0
    write_collection(make(count), IDENTITY, path)
    assert np.array_equal(read_collection(path, IDENTITY).matrices, make(count).matrices)


def write(path: Path, tensors: list[tuple[str, str, tuple[int, ...]]], data: bytes, **fields: object) -> None:
    metadata = encode_metadata({**encode_fields(IDENTITY, "moeinf-collection", 1), **fields})
    path.write_bytes(encode_header(tensors, metadata, alignment=8) + data)


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    path = tmp_path / "collection.safetensors"
    write_collection(make(3), IDENTITY, path)
    with pytest.raises(UsageError, match=r"learned about another model: its number of experts per layer is .*, not 9"):
        read_collection(path, make_identity((9, 9)))
    whole = path.read_bytes()
    for length in (0, 7, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(IntegrityError, match="not a sound safetensors file"):
            read_collection(path, IDENTITY)
    write_trace(make_trace(IDENTITY), path)
    with pytest.raises(IntegrityError, match="is no collection"):
        read_collection(path, IDENTITY)
    write(path, [("matrices", "I32", (1, 2, 2, 8))], make(1).matrices.tobytes(), version=2)
    with pytest.raises(UnsupportedError, match="a collection of version 2"):
        read_collection(path, IDENTITY)
    for name, dtype, shape in (
        ("other", "I32", (1, 2, 2, 8)),
        ("matrices", "F32", (1, 2, 2, 8)),
        ("matrices", "I32", (1, 2, 2, 9)),
        ("matrices", "I32", (CAPACITY + 1, 2, 2, 8)),
        ("matrices", "I32", (2, 2, 8)),
    ):
        write(path, [(name, dtype, shape)], bytes(4 * int(np.prod(shape))))
        with pytest.raises(IntegrityError, match="has no tensor 'matrices'"):
            read_collection(path, IDENTITY)
    for expert, count in ((0, -1), (7, 1)):
        matrices = make(1).matrices
        matrices[0, 0, 1, expert] = count
        write(path, [("matrices", "I32", (1, 2, 2, 8))], matrices.tobytes())
        with pytest.raises(IntegrityError, match="counts what cannot be"):
            read_collection(path, IDENTITY)


def test_a_full_disk_leaves_the_old_collection(tmp_path: Path) -> None:
    path, steps = tmp_path / "collection.safetensors", CountingDisk()
    write_collection(make(2), IDENTITY, path, disk=steps)
    assert steps.operations > 3
    for step in range(1, steps.operations - 1):  # the last two are the renaming and making it durable
        with pytest.raises(CapacityError, match="no room left"):
            write_collection(make(5), IDENTITY, path, disk=FailingDisk(step, errno.ENOSPC))
        assert np.array_equal(read_collection(path, IDENTITY).matrices, make(2).matrices)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
