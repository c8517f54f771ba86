"""The file of a collection: what is written is read, and whatever is wrong with it is said."""

from __future__ import annotations

import errno
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from faults import CountingDisk, FailingDisk
from moeinf import collectionfile
from moeinf.collection import CAPACITY, ActivationCollection
from moeinf.collectionfile import CollectionFile, read_collection, write_collection
from moeinf.errors import CapacityError, IntegrityError, MoeinfError, UnsupportedError, UsageError
from moeinf.locks import exclusive_lock
from moeinf.prompts import text_digest
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
    written = make(count)
    written.texts.update([text_digest(f"{number}") for number in range(count)])
    write_collection(written, IDENTITY, path)
    found = read_collection(path, IDENTITY)
    assert np.array_equal(found.matrices, make(count).matrices)
    assert found.texts == written.texts


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


# Two processes of one model


def sums(collection: ActivationCollection) -> list[int]:
    return sorted(matrix.sum() for matrix in collection.matrices)


def learn(path: Path, seeds: range) -> None:
    """What a process does: it reads, and now and then saves what it has learned."""
    file = CollectionFile(path, IDENTITY)
    collection = file.read()
    for seed in seeds:
        collection.add(make(1, seed).matrices[0])
        collection = file.save(collection)


def test_what_others_wrote_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectionfile, "_PATIENCE_S", 60.0)
    path = tmp_path / "collection.safetensors"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: learn(path, range(9 * number, 9 * number + 9)), range(4)))
    assert sums(read_collection(path, IDENTITY)) == sorted(make(1, seed).matrices.sum() for seed in range(36))


def test_only_what_is_fresh_joins_what_others_wrote(tmp_path: Path) -> None:
    path = tmp_path / "collection.safetensors"
    write_collection(make(2), IDENTITY, path)
    file = CollectionFile(path, IDENTITY)
    collection = file.read()
    collection.add(make(1, seed=1).matrices[0])
    collection.texts.add("mine")
    others = make(3, seed=2)
    others.texts.add("theirs")
    write_collection(others, IDENTITY, path)
    saved = file.save(collection)
    assert saved.matrices.tolist() == [*make(3, seed=2).matrices.tolist(), *make(1, seed=1).matrices.tolist()]
    assert not saved.fresh
    assert saved.texts == {"mine", "theirs"}
    assert np.array_equal(read_collection(path, IDENTITY).matrices, saved.matrices)


def test_a_file_of_others_that_cannot_be_used_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "collection.safetensors"
    write_collection(make(2), IDENTITY, path)
    file = CollectionFile(path, IDENTITY)
    collection = file.read()
    collection.add(make(1, seed=1).matrices[0])
    path.write_bytes(b"nonsense")
    assert len(file.save(collection)) == len(read_collection(path, IDENTITY)) == 3


def test_a_file_that_nobody_else_wrote_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = CollectionFile(tmp_path / "collection.safetensors", IDENTITY)
    collection = file.read()
    monkeypatch.setattr(collectionfile, "read_collection", None)
    for seed in range(2):
        collection.add(make(1, seed).matrices[0])
        assert file.save(collection) is collection


@pytest.mark.parametrize(("free_at", "is_saved"), [(0.5, True), (1.5, False)])
def test_saving_waits_for_another_process_and_not_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_at: float, is_saved: bool
) -> None:
    path, now = tmp_path / "collection.safetensors", 0.0
    file, collection = CollectionFile(path, IDENTITY), make(0)
    collection.add(make(1).matrices[0])

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        if now > free_at:
            holder.close()

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with ExitStack() as holder:
        holder.enter_context(exclusive_lock(tmp_path / "collection.lock", "saving"))
        if is_saved:
            file.save(collection)
        else:
            with pytest.raises(MoeinfError, match="collection is busy: this process is saving it"):
                file.save(collection)
    assert (len(read_collection(path, IDENTITY)), collection.fresh) == ((1, set()) if is_saved else (0, {0}))
