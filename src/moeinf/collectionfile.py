"""The file of an activation collection: what requests asked of a model, beside the model, from one start to the next.

Owns the format (docs/trace-format.md), and believes nothing that a file says before it is checked. Processes that use
one model at a time keep what all of them learned. Knows nothing of what the numbers are good for.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .collection import CAPACITY, PHASES, ActivationCollection
from .errors import IntegrityError, MoeinfError, UsageError
from .files import FileSystem, explained, publish
from .locks import exclusive_lock
from .tensorfile import TensorFile, encode_header
from .trace import ModelIdentity
from .tracefile import decode_fields, decode_metadata, encode_fields, encode_metadata

__all__ = ["COLLECTION_FILE", "FORMAT", "FORMAT_VERSION", "CollectionFile", "read_collection", "write_collection"]

COLLECTION_FILE = "collection.safetensors"
"""Its name in the folder of what was learned about a model."""
FORMAT = "moeinf-collection"
FORMAT_VERSION = 1
_NAME = "matrices"
_TEXTS = "texts"
_PATIENCE_S = 1.0
"""While another process saves, which takes some milliseconds; nobody should have to wait longer to leave."""
_HINT = "remove the file: it is learned anew, from use or by `moeinf trace`"


class CollectionFile:
    """The file of one model's collection, which other processes may write, too.

    Args:
        path: where it is, or will be.
        identity: the model.
    """

    def __init__(self, path: Path, identity: ModelIdentity) -> None:
        self._path = path
        self._identity = identity
        self._seen: tuple[int, int, int] | None = None

    def read(self) -> ActivationCollection:
        """As `read_collection`."""
        self._seen = self._version()
        return read_collection(self._path, self._identity)

    def save(self, collection: ActivationCollection) -> ActivationCollection:
        """Write `collection`, which this process has read and added to. If another process has written the file
        meanwhile, the requests that are fresh join what lies there instead. Returns what the file now has, none fresh.

        Raises what `write_collection` raises, and MoeinfError when another process is at it for more than a second.
        """
        lock = self._path.with_suffix(".lock")
        with explained(lock), exclusive_lock(lock, "saving", patience_s=_PATIENCE_S):
            if self._version() != self._seen:
                collection = self._join(collection)
            write_collection(collection, self._identity, self._path)
            self._seen = self._version()
        collection.fresh.clear()
        return collection

    def _version(self) -> tuple[int, int, int] | None:
        """Another one for every file that is published there; None if there is none."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns

    def _join(self, collection: ActivationCollection) -> ActivationCollection:
        try:
            known = read_collection(self._path, self._identity)
        except MoeinfError:  # what cannot be used is replaced
            return collection
        for place in sorted(collection.fresh):
            known.add(collection.matrices[place])
        known.texts |= collection.texts
        return known


def read_collection(path: Path, identity: ModelIdentity) -> ActivationCollection:
    """The collection in `path`, of the model `identity`; an empty one where there is no file.

    Raises IntegrityError for a file that is damaged or none, UsageError for one of another model, UnsupportedError for
    one of a later version.
    """
    if not path.exists():
        return ActivationCollection(identity.layer_sizes)
    with TensorFile.open(path) as file:
        fields = decode_metadata(file.metadata)
        if fields.get("format") != FORMAT:
            raise IntegrityError(f"{path} is no collection of activation matrices", hint=_HINT)
        difference = identity.difference(decode_fields(fields, FORMAT_VERSION, "collection"))
        if difference is not None:
            raise UsageError(f"{path} was learned about another model: {difference}", hint=_HINT)
        shape = (PHASES, len(identity.layer_sizes), max(identity.layer_sizes))
        entry = file.entries.get(_NAME)
        if entry is None or entry.dtype != "I32" or entry.shape[1:] != shape or entry.shape[0] > CAPACITY:
            raise IntegrityError(f"{path} has no tensor {_NAME!r} of at most {CAPACITY} x {list(shape)}", hint=_HINT)
        texts = fields.get(_TEXTS, "").split()
        matrices = np.frombuffer(file.read(_NAME), "<i4").astype(np.int32).reshape(entry.shape)
    if np.any(matrices < 0) or np.any(matrices[..., _is_nobody(identity)]):
        raise IntegrityError(f"{path} counts what cannot be", hint=_HINT)
    collection = ActivationCollection(identity.layer_sizes, matrices)
    collection.texts.update(texts)
    return collection


def write_collection(
    collection: ActivationCollection, identity: ModelIdentity, path: Path, *, disk: FileSystem | None = None
) -> None:
    """Write the collection of the model `identity`. Whatever happens, `path` is then the old file, the new one, or
    none.

    Raises CapacityError when the disk is full, UsageError when the place cannot be written to.
    """
    fields = {**encode_fields(identity, FORMAT, FORMAT_VERSION), _TEXTS: " ".join(sorted(collection.texts))}
    header = encode_header([(_NAME, "I32", collection.matrices.shape)], encode_metadata(fields), alignment=8)
    data = np.ascontiguousarray(collection.matrices, "<i4").reshape(-1).view(np.uint8).data
    publish(path, [header, data], disk=disk)


def _is_nobody(identity: ModelIdentity) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Places [layers, experts] behind the last expert of a layer."""
    places: np.ndarray[tuple[int, ...], np.dtype[np.bool_]] = (
        np.arange(max(identity.layer_sizes)) >= np.array(identity.layer_sizes)[:, None]
    )
    return places
