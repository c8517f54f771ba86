"""A model on its way into the store: its folder, its journal, and how it becomes whole.

    models/.incoming/<name>/
      journal.jsonl    one JSON object a line, appended; what it does not say did not happen
      source/          downloads, each removed when its tensors are written
      model/           the folder that becomes models/<name>; its manifest is written last and is the commit point

Owns the order of writes and syncs. Knows nothing of tensors, networks, locks, or of the models beside this one.

A file counts when the journal has its size and hash, and the journal is written after the file's bytes are durable. So
files need no temporary names here, and a kill costs what the journal does not have yet: at most one batch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import IntegrityError, UsageError
from .files import Bytes, FileSystem
from .manifest import MANIFEST_NAME, FileRecord, Manifest
from .units import MIB

__all__ = ["DenseWriter", "Incoming", "is_safe_path"]

_BATCH_FILES = 64
_BATCH_BYTES = 64 * MIB
_SYNC_THREADS = 8
_COPY_BYTES = 4 * MIB


def is_safe_path(path: str) -> bool:
    """Whether `path` is relative, plain, and stays below the folder that it is joined to."""
    parts = path.split("/")
    return not any(part in ("", ".", "..") for part in parts) and not any(mark in path for mark in "\\:\0")


@dataclass(slots=True)
class _State:
    """What a journal says: whole files; of dense files in the making the header's hash, the size, the tensors done."""

    key: dict[str, Any] | None = None
    files: dict[str, FileRecord] = dataclasses.field(default_factory=dict)
    dense: dict[str, tuple[str, int]] = dataclasses.field(default_factory=dict)
    tensors: dict[str, set[str]] = dataclasses.field(default_factory=dict)

    def apply(self, line: Mapping[str, Any]) -> None:
        """Raises ValueError, KeyError or TypeError for a line that no journal has."""
        match line:
            case {"key": key}:
                self.key = dict(key)
            case {"path": str(path), "size": int(size), "sha256": str(sha256)}:
                self.files[path] = FileRecord(size, sha256)
            case {"removed": str(path)}:
                del self.files[path]
            case {"dense": str(path), "header": str(header), "size": int(size)}:
                self.dense[path] = (header, size)
                self.tensors[path] = set()
            case {"dense": str(path), "tensor": str(tensor)}:
                self.tensors[path].add(tensor)
            case _:
                raise ValueError("unknown line")


class Incoming:
    """The sink of the sharder: files go in one after another, in any order, until `publish`.

    One thread writes. `begin` comes before all else, `close` after everything, and after an error nothing but `close`:
    the next run's `begin` finds what the journal has. A file is synced as soon as it is written, by threads behind the
    writer's back, and the journal once for up to 64 files or 64 MiB. Measured on ext4: 10,000 files of
    32 KiB take 2.5 s this way and 8.0 s with the journal synced for each; with files of 3 MiB the disk is the limit.
    """

    def __init__(self, folder: Path, disk: FileSystem) -> None:
        self.folder = folder
        self.model = folder / "model"
        self.source = folder / "source"
        self.disk = disk
        self._state = _State()
        self._journal: int | None = None
        self._journal_bytes = 0
        self._lines: list[dict[str, Any]] = []
        self._syncing: list[tuple[int, Future[None]]] = []
        self._unsynced_bytes = 0
        self._dense: dict[str, int] = {}
        self._pool = ThreadPoolExecutor(_SYNC_THREADS, thread_name_prefix="moeinf-sync")

    def require_same(self, part: str, key: Mapping[str, Any]) -> None:
        """Raise UsageError if what is here of an earlier run was made of something else: `part` of its key, which says
        of what, is not that of `key`.
        """
        state, _ = _read_journal(self._journal_path)
        is_any_here = state.files or state.dense or (self.source.is_dir() and any(self.source.iterdir()))
        if is_any_here and state.key is not None and state.key.get(part) != key[part]:
            name, made_of = self.folder.name, state.key.get("source", "another model that is here")
            raise UsageError(
                f"{name} is unfinished, and made of {made_of}",
                hint=f"choose another --name, remove it with `moeinf rm {name}`, or add --force to replace it",
            )

    def begin(self, key: Mapping[str, Any]) -> bool:
        """Continue what was begun under the same `key`, or start afresh. Returns whether something is continued.

        `key` says what is being made, in JSON; the same key must lead to the same bytes.
        """
        self._state, self._journal_bytes = _read_journal(self._journal_path)
        is_continued = self._state.key == dict(key)
        if not is_continued:
            self.disk.remove_tree(self.folder)
            self._state, self._journal_bytes = _State(), 0
        self.disk.make_folder(self.model)
        self.disk.make_folder(self.source)
        if is_continued:
            self._journal = self.disk.reopen(self._journal_path)
            self.disk.resize(self._journal, self._journal_bytes)
            self._forget_lost_files()
        else:
            self._journal = self.disk.create(self._journal_path)
            self._note({"key": dict(key)})
            self.sync()
        return is_continued

    def give_up(self) -> None:
        """Let the next run start afresh: what is written is of no use."""
        self.disk.remove(self._journal_path)

    @property
    def written_bytes(self) -> int:
        """Bytes of the files that are done."""
        return sum(record.size for record in self._state.files.values())

    def is_done(self, path: str) -> bool:
        """Whether the file is written. It is durable after the next `sync`."""
        return path in self._state.files

    def size(self, path: str) -> int | None:
        """Bytes of a file that is done, or None."""
        return self._state.files[path].size if self.is_done(path) else None

    def has_tensor(self, path: str, tensor: str) -> bool:
        """Whether a tensor of a dense file in the making is written. It is durable after the next `sync`."""
        return path in self._state.dense and tensor in self._state.tensors[path]

    def write(self, path: str, chunks: Iterable[Bytes]) -> None:
        """Write a whole file from its parts, in order."""
        descriptor = self.disk.create(self._place(path))
        digest, size = hashlib.sha256(), 0
        try:
            for chunk in chunks:
                self.disk.write_at(descriptor, chunk, size)
                digest.update(chunk)
                size += memoryview(chunk).nbytes
        except BaseException:
            os.close(descriptor)
            raise
        self._syncing.append((descriptor, self._pool.submit(self.disk.sync, descriptor)))
        self._note({"path": path, "size": size, "sha256": digest.hexdigest()})
        self._count(size)

    def link(self, path: str, source: Path, record: FileRecord) -> None:
        """Let a file of another model be one of this one too, or copy it where the disk cannot. `record` is what its
        manifest says of it, and is believed.
        """
        place = self._place(path)
        self.disk.remove(place)  # never written into: the other model's file may be what lies there
        if self.disk.link(source, place):
            self._note({"path": path, "size": record.size, "sha256": record.sha256})
        else:
            with source.open("rb") as stream:
                self.write(path, iter(lambda: stream.read(_COPY_BYTES), b""))
            if self._state.files[path] != record:
                raise IntegrityError(f"{source} has other bytes than were written", hint="check it with moeinf verify")

    def remove(self, path: str) -> None:
        """Take a file that is done away again, once all others that are done are durable."""
        self._note({"removed": path})
        self.sync()
        self.disk.remove(self._place(path))

    def dense(self, path: str, header: bytes, size: int) -> DenseWriter:
        """A writer of one file of `size` bytes that starts with `header`, whose tensors may come in any order.

        Tensors that were done in an earlier run still are, if it wrote the same header.
        """
        place, mark = self._place(path), (hashlib.sha256(header).hexdigest(), size)
        if self._state.dense.get(path) == mark:
            self._dense[path] = self.disk.reopen(place)
        else:
            self._dense[path] = self.disk.create(place)
            self.disk.resize(self._dense[path], size)
            self.disk.write_at(self._dense[path], header, 0)
            self._note({"dense": path, "header": mark[0], "size": size})
        return DenseWriter(self, path)

    def sync(self) -> None:
        """Return when everything that is done is durable, and the journal says so."""
        syncing, self._syncing = self._syncing, []
        lines, self._lines = self._lines, []
        self._unsynced_bytes = 0
        try:
            for _, future in syncing:
                future.result()
        finally:
            _close_all(syncing)
        for descriptor in self._dense.values():
            self.disk.sync(descriptor)
        if lines:
            self._append("".join(json.dumps(line) + "\n" for line in lines).encode())

    def publish(self, manifest: Manifest) -> Manifest:
        """Make the model whole: complete `manifest.files`, sync every folder, write the manifest, and return it."""
        self.sync()
        manifest = dataclasses.replace(manifest, files=dict(sorted(self._state.files.items())))
        for folder, _, names in os.walk(self.model, topdown=False):
            for path in (Path(folder, name) for name in names):
                if path.relative_to(self.model).as_posix() not in manifest.files:
                    self.disk.remove(path)
            self.disk.sync_folder(Path(folder))
        draft = self.model / f"{MANIFEST_NAME}.part"
        descriptor = self.disk.create(draft)
        try:
            self.disk.write_at(descriptor, manifest.to_json().encode(), 0)
            self.disk.commit(descriptor)
        finally:
            os.close(descriptor)
        self.disk.rename(draft, self.model / MANIFEST_NAME)
        self.disk.sync_folder(self.model)
        return manifest

    def close(self) -> None:
        """Give back threads and descriptors. What is not synced counts as not written."""
        _close_all(self._syncing)
        self._pool.shutdown()
        for descriptor in (*self._dense.values(), *([] if self._journal is None else [self._journal])):
            os.close(descriptor)
        self._syncing, self._dense, self._journal = [], {}, None

    @property
    def _journal_path(self) -> Path:
        return self.folder / "journal.jsonl"

    def _place(self, path: str) -> Path:
        """Where a file of the model lies, its folder made."""
        if not is_safe_path(path):
            raise IntegrityError(f"{path!r} is no path inside a model")
        place = self.model / path
        self.disk.make_folder(place.parent)
        return place

    def _forget_lost_files(self) -> None:
        """Drop what the journal has and the disk has not."""
        state = self._state
        state.files = {path: record for path, record in state.files.items() if _size(self.model / path) == record.size}
        state.dense = {path: mark for path, mark in state.dense.items() if _size(self.model / path) == mark[1]}

    def _note(self, line: dict[str, Any]) -> None:
        self._state.apply(line)
        self._lines.append(line)

    def _count(self, new_bytes: int) -> None:
        self._unsynced_bytes += new_bytes
        if len(self._syncing) >= _BATCH_FILES or self._unsynced_bytes >= _BATCH_BYTES:
            self.sync()

    def _append(self, data: bytes) -> None:
        assert self._journal is not None, "begin comes first"
        self.disk.write_at(self._journal, data, self._journal_bytes)
        self.disk.commit(self._journal)
        self._journal_bytes += len(data)

    def _write_dense(self, path: str, data: Bytes, offset: int) -> None:
        self.disk.write_at(self._dense[path], data, offset)
        self._count(memoryview(data).nbytes)

    def _note_tensor(self, path: str, tensor: str) -> None:
        self._note({"dense": path, "tensor": tensor})

    def _finish_dense(self, path: str) -> None:
        self.sync()
        os.close(self._dense.pop(path))
        place = self.model / path
        self._note({"path": path, "size": place.stat().st_size, "sha256": _hash(place)})
        self.sync()


class DenseWriter:
    """Writes one dense file; made by `Incoming.dense`. Offsets count from the start of the file, header included."""

    def __init__(self, incoming: Incoming, path: str) -> None:
        self._incoming = incoming
        self._path = path

    def is_done(self, tensor: str) -> bool:
        """Whether the tensor is written. It is durable after the next `Incoming.sync`."""
        return self._incoming.has_tensor(self._path, tensor)

    def write_at(self, offset: int, data: Bytes) -> None:
        self._incoming._write_dense(self._path, data, offset)

    def mark_done(self, tensor: str) -> None:
        """Say that all bytes of the tensor are written."""
        self._incoming._note_tensor(self._path, tensor)

    def close(self) -> None:
        """Say that the file is whole: it is hashed and becomes one of the model's files."""
        self._incoming._finish_dense(self._path)


def _close_all(syncing: Iterable[tuple[int, Future[None]]]) -> None:
    """Close the files that are being synced, each after its sync, whatever came of it."""
    for descriptor, future in syncing:
        future.exception()
        os.close(descriptor)


def _read_journal(path: Path) -> tuple[_State, int]:
    """What a journal says, and the bytes of it that can be read: a kill may have torn its end."""
    state, good_bytes = _State(), 0
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return state, 0
    for line in data.split(b"\n")[:-1]:
        try:
            state.apply(json.loads(line))
        except (ValueError, KeyError, TypeError):
            break
        good_bytes += len(line) + 1
    return state, good_bytes


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
