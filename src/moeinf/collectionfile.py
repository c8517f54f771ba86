"""The file of an activation collection: what requests asked of a model, beside the model, from one start to the next.

Owns the format (docs/trace-format.md), and believes nothing that a file says before it is checked. Knows nothing of
what the numbers are good for.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .collection import CAPACITY, PHASES, ActivationCollection
from .errors import IntegrityError, UsageError
from .files import FileSystem, publish
from .tensorfile import TensorFile, encode_header
from .trace import ModelIdentity
from .tracefile import decode_fields, decode_metadata, encode_fields, encode_metadata

__all__ = ["COLLECTION_FILE", "FORMAT", "FORMAT_VERSION", "read_collection", "write_collection"]

COLLECTION_FILE = "collection.safetensors"
"""Its name in the folder of what was learned about a model."""
FORMAT = "moeinf-collection"
FORMAT_VERSION = 1
_NAME = "matrices"
_HINT = "remove the file: it is learned anew, from use or by `moeinf trace`"


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
        matrices = np.frombuffer(file.read(_NAME), "<i4").astype(np.int32).reshape(entry.shape)
    if np.any(matrices < 0) or np.any(matrices[..., _is_nobody(identity)]):
        raise IntegrityError(f"{path} counts what cannot be", hint=_HINT)
    return ActivationCollection(identity.layer_sizes, matrices)


def write_collection(
    collection: ActivationCollection, identity: ModelIdentity, path: Path, *, disk: FileSystem | None = None
) -> None:
    """Write the collection of the model `identity`. Whatever happens, `path` is then the old file, the new one, or
    none.

    Raises CapacityError when the disk is full, UsageError when the place cannot be written to.
    """
    metadata = encode_metadata(encode_fields(identity, FORMAT, FORMAT_VERSION))
    header = encode_header([(_NAME, "I32", collection.matrices.shape)], metadata, alignment=8)
    data = np.ascontiguousarray(collection.matrices, "<i4").reshape(-1).view(np.uint8).data
    publish(path, [header, data], disk=disk)


def _is_nobody(identity: ModelIdentity) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Places [layers, experts] behind the last expert of a layer."""
    places: np.ndarray[tuple[int, ...], np.dtype[np.bool_]] = (
        np.arange(max(identity.layer_sizes)) >= np.array(identity.layer_sizes)[:, None]
    )
    return places
