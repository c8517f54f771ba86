"""Trace files: one safetensors file, JSON lines to exchange it, and .npz files that others made.

Owns these formats (docs/trace-format.md), and believes nothing that a file says before it is checked. What a sound
trace is, `Trace` knows. Knows nothing of torch, or of what traces are good for.
"""

from __future__ import annotations

import itertools
import json
import re
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import numpy.typing as npt

from .errors import IntegrityError, MoeinfError, UnsupportedError, UsageError
from .files import FileSystem, publish
from .manifest import Source
from .tensorfile import TensorFile, encode_header
from .trace import MAX_EXPERTS, NO_EXPERT, ModelIdentity, Trace, check_shapes
from .units import MIB

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "decode_fields",
    "decode_metadata",
    "encode_fields",
    "encode_metadata",
    "read_trace",
    "write_json_lines",
    "write_trace",
]

FORMAT = "moeinf-trace"
FORMAT_VERSION = 1

_DTYPES = {
    "sequence_id": "I32",
    "position": "I32",
    "experts": "I16",
    "weights": "F16",
    "foreseen": "I16",
    "is_prefill": "BOOL",
}
"""The tensors in the order of their bytes: the widest elements first, so that none is misaligned."""
_OPTIONAL = frozenset({"weights", "foreseen"})
_NUMBERS = frozenset({"version", "layer_sizes", "top_k"})
"""The fields of the metadata that are no texts."""
_STORED = {"I32": "<i4", "I16": "<i2", "F16": "<f2", "BOOL": "|u1"}

_IMPORTED = {"experts": "iu", "weights": "f", "sequence_id": "iu", "position": "iu", "is_prefill": "b"}
"""The arrays of an .npz file, and the kinds of numbers that they may have."""
_NPZ_ERRORS = (
    EOFError, KeyError, MemoryError, OSError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What zipfile and NumPy raise for a damaged file; OSError when it names a place that cannot be."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_MAX_NPZ_BYTES = 1 << 32
_MAX_LINE_BYTES = 16 * MIB
_MAX_FLOAT16 = 65504

Array = npt.NDArray[Any]


def read_trace(path: Path) -> Trace:
    """The trace in a file: moeinf's own format, JSON lines or .npz, told apart by what is in it, then by its ending.

    An .npz has `experts`, `sequence_id` and `position`, maybe `weights` and `is_prefill`, and maybe a .json beside it
    that says how many experts there are. Raises UsageError for what is no trace or cannot be read, IntegrityError for
    one that is damaged or contradicts itself, UnsupportedError for one of a later version or too large.
    """
    with _reading(path):
        return _reader_of(path)(path)


def write_trace(trace: Trace, path: Path, *, disk: FileSystem | None = None) -> None:
    """Write `trace` as one safetensors file. Whatever happens, `path` is then the old file, the new one, or none.

    Raises CapacityError when the disk is full, UsageError when the place cannot be written to.
    """
    arrays = {name: getattr(trace, name) for name in _DTYPES if getattr(trace, name) is not None}
    tensors = [(name, _DTYPES[name], values.shape) for name, values in arrays.items()]
    metadata = encode_metadata(encode_fields(trace.identity, FORMAT, FORMAT_VERSION))
    header = encode_header(tensors, metadata, alignment=8)
    data = (_raw_bytes(values, _DTYPES[name]) for name, values in arrays.items())
    publish(path, itertools.chain([header], data), disk=disk)


def write_json_lines(trace: Trace, path: Path, *, disk: FileSystem | None = None) -> None:
    """Write `trace` as JSON lines: whose it is, then an object per token. In all else like `write_trace`."""
    whose = {**encode_fields(trace.identity, FORMAT, FORMAT_VERSION), "tokens": trace.num_tokens}
    objects = itertools.chain([whose], _tokens(trace))
    publish(path, _joined(json.dumps(item, separators=(",", ":")) for item in objects), disk=disk)


# Whose trace it is: the same fields in all of our formats. The metadata of safetensors has texts only, so what is no
# text is JSON there.


def encode_fields(identity: ModelIdentity, form: str, version: int) -> dict[str, Any]:
    """What a file of the format `form` says about itself and its model."""
    return {
        "format": form,
        "version": version,
        "model": identity.model,
        "architecture": identity.architecture,
        "source_repo": identity.source.repo,
        "source_commit": identity.source.commit or "",
        "layer_sizes": list(identity.layer_sizes),
        "top_k": list(identity.top_k),
        **({"experts": identity.experts} if identity.experts else {}),
    }


def encode_metadata(fields: Mapping[str, Any]) -> dict[str, str]:
    """`fields` as the metadata of a safetensors file."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in fields.items()}


def decode_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The inverse of `encode_metadata`. Raises IntegrityError for numbers that are none."""
    return {key: _parsed(text, key) if key in _NUMBERS else text for key, text in metadata.items()}


def decode_fields(fields: Mapping[str, Any], version: int, what: str) -> ModelIdentity:
    """The model that `fields` name, if their version is ours. Raises IntegrityError, or UnsupportedError for another
    version; `what` says what they are of.
    """
    found = fields.get("version")
    if not _is_int(found):
        raise IntegrityError("its version is no number")
    if found != version:
        raise UnsupportedError(
            f"it is a {what} of version {found}, this program reads version {version}", hint="update moeinf"
        )
    source = Source(_text(fields, "source_repo"), _text(fields, "source_commit") or None)
    sizes, top_k = _numbers(fields, "layer_sizes"), _numbers(fields, "top_k")
    experts = _text(fields, "experts") if "experts" in fields else ""
    return ModelIdentity(_text(fields, "model"), _text(fields, "architecture"), source, sizes, top_k, experts)


def _identity(fields: Mapping[str, Any]) -> ModelIdentity:
    if fields.get("format") != FORMAT:
        raise _NotATraceError
    return decode_fields(fields, FORMAT_VERSION, "trace")


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise IntegrityError(f"it has no text {name!r}")
    return value


def _numbers(fields: Mapping[str, Any], name: str) -> tuple[int, ...]:
    value = fields.get(name)
    if not isinstance(value, list) or not all(map(_is_int, value)):
        raise IntegrityError(f"it has no list of numbers {name!r}")
    return tuple(value)


def _is_int(value: object) -> bool:
    return type(value) is int  # True is none


def _parsed(text: str | bytes, what: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{what} is not JSON ({error})") from error


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


# Reading: which format it is, and what the errors of all of them say.


class _NotATraceError(Exception):
    """The file is something else, and perhaps sound."""


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except _NotATraceError:
        raise UsageError(
            f"{path} is no trace",
            hint="a trace is a .safetensors or .jsonl file that moeinf wrote, or an .npz file with the arrays experts, "
            "sequence_id and position",
        ) from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    except MoeinfError as error:
        message = str(error)
        raise type(error)(message if str(path) in message else f"{path}: {message}", hint=error.hint) from error


def _reader_of(path: Path) -> Callable[[Path], Trace]:
    with path.open("rb") as stream:
        begin = stream.read(9)
    if begin[4:] == b"\0\0\0\0{":
        return _read_safetensors
    if begin.startswith(b"PK\3\4"):
        return _read_npz
    if begin.lstrip().startswith(b"{"):
        return _read_json_lines
    readers = {".safetensors": _read_safetensors, ".npz": _read_npz, ".jsonl": _read_json_lines}
    if path.suffix not in readers:
        raise _NotATraceError
    return readers[path.suffix]


def _read_safetensors(path: Path) -> Trace:
    with TensorFile.open(path) as file:
        if file.metadata.get("format") != FORMAT:
            raise _NotATraceError
        identity = _identity(decode_metadata(file.metadata))
        for name, entry in file.entries.items():
            if entry.dtype != _DTYPES.get(name):
                raise IntegrityError(f"there is no tensor {name!r} of dtype {entry.dtype} in a trace")
        for name in _DTYPES:
            if name not in file.entries and name not in _OPTIONAL:
                raise IntegrityError(f"tensor {name!r} is missing")
        check_shapes(identity, {name: entry.shape for name, entry in file.entries.items()})
        arrays: dict[str, Any] = {name: _array(file, name) for name in file.entries}
    return Trace(identity, **{"weights": None, **arrays})


def _array(file: TensorFile, name: str) -> Array:
    entry = file.entries[name]
    values: Array = np.frombuffer(file.read(name), _STORED[entry.dtype]).reshape(entry.shape)
    if entry.dtype != "BOOL":
        return values.astype(values.dtype.newbyteorder("="), copy=False)
    if np.any(values > 1):
        raise IntegrityError(f"tensor {name!r} has bytes that are neither 0 nor 1")
    return values.view(np.bool_)


def _raw_bytes(values: Array, dtype: str) -> memoryview:
    """The bytes of an array as a file has them, without a copy where memory has them so already."""
    stored = values.view(np.uint8) if dtype == "BOOL" else values.astype(_STORED[dtype], copy=False)
    return np.ascontiguousarray(stored).reshape(-1).view(np.uint8).data


# JSON lines.


def _tokens(trace: Trace) -> Iterator[dict[str, Any]]:
    top_k = trace.identity.top_k
    for token in range(trace.num_tokens):
        item: dict[str, Any] = {
            "sequence": int(trace.sequence_id[token]),
            "position": int(trace.position[token]),
            "phase": "prefill" if trace.is_prefill[token] else "decode",
            "experts": [row[:k] for row, k in zip(trace.experts[token].tolist(), top_k, strict=True)],
        }
        if trace.weights is not None:
            item["weights"] = [row[:k] for row, k in zip(trace.weights[token].tolist(), top_k, strict=True)]
        if trace.foreseen is not None and (trace.foreseen[token] != NO_EXPERT).any():
            item["foreseen"] = [row[:k] for row, k in zip(trace.foreseen[token].tolist(), top_k, strict=True)]
        yield item


def _joined(lines: Iterable[str]) -> Iterator[bytes]:
    """The lines in pieces that are worth a write."""
    iterator = iter(lines)
    while batch := list(itertools.islice(iterator, 256)):
        yield "".join(f"{line}\n" for line in batch).encode()


def _read_json_lines(path: Path) -> Trace:
    with path.open("rb") as stream:
        lines = _lines(stream)
        header = _header(next(lines, b""))
        identity = _identity(header)
        rows = _Rows(identity)
        for number, line in enumerate(lines, 2):
            try:
                rows.add(_parsed(line, "it"))
            except IntegrityError as error:
                raise IntegrityError(f"line {number}: {error}") from error
    expected = header.get("tokens", len(rows.position))
    if expected != len(rows.position):
        raise IntegrityError(f"it has {len(rows.position)} tokens, and its first line says {expected}")
    return rows.trace()


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    while line := stream.readline(_MAX_LINE_BYTES):
        if len(line) == _MAX_LINE_BYTES:
            raise IntegrityError(f"a line is longer than any of a trace: {_MAX_LINE_BYTES} bytes or more")
        yield line


def _header(line: bytes) -> dict[str, Any]:
    try:
        header = _parsed(line, "its first line")
    except IntegrityError:
        raise _NotATraceError from None
    if not isinstance(header, dict):
        raise _NotATraceError
    return header


class _Rows:
    """A trace in the making, token by token."""

    def __init__(self, identity: ModelIdentity) -> None:
        self.identity = identity
        self.sequence_id, self.position, self.is_prefill = array("i"), array("i"), array("b")
        self.experts, self.weights, self.foreseen = array("h"), array("f"), array("h")
        self.is_foreseen = False

    def add(self, token: object) -> None:
        """Take in the object of one line. Raises IntegrityError if it is not of the right form."""
        if not isinstance(token, dict):
            raise IntegrityError("it is not an object")
        unknown = sorted(token.keys() - {"sequence", "position", "phase", "experts", *_OPTIONAL})
        if unknown:
            raise IntegrityError(f"no token has {unknown[0]!r}")
        if not (_is_count(token.get("sequence")) and _is_count(token.get("position"))):
            raise IntegrityError("its sequence and position are not numbers from 0 to 2147483647")
        if token.get("phase") not in ("prefill", "decode"):
            raise IntegrityError("its phase is neither prefill nor decode")
        experts = self._checked_experts(token, "experts")
        foreseen = self._checked_experts(token, "foreseen") if "foreseen" in token else [[] for _ in experts]
        weights = self._checked_weights(token, experts)
        self.is_foreseen |= "foreseen" in token
        self._pad(self.foreseen, foreseen, NO_EXPERT)
        self._pad(self.experts, experts, NO_EXPERT)
        self._pad(self.weights, weights, 0)
        self.sequence_id.append(token["sequence"])
        self.position.append(token["position"])
        self.is_prefill.append(token["phase"] == "prefill")

    def trace(self) -> Trace:
        shapes = self.identity.shapes(len(self.position))
        return Trace(
            self.identity,
            np.array(self.experts, np.int16).reshape(shapes["experts"]),
            _to_float16(np.array(self.weights, np.float32)).reshape(shapes["weights"]) if self.weights else None,
            np.array(self.sequence_id, np.int32),
            np.array(self.position, np.int32),
            np.array(self.is_prefill, np.bool_),
            np.array(self.foreseen, np.int16).reshape(shapes["foreseen"]) if self.is_foreseen else None,
        )

    def _checked_experts(self, token: dict[str, Any], name: str) -> list[list[int]]:
        experts = self._checked(token.get(name), name, {int})
        if not all(NO_EXPERT <= expert < MAX_EXPERTS for row in experts for expert in row):
            raise IntegrityError("an expert is not a number from 0 on, or -1 for none")
        return experts

    def _checked(self, rows: object, what: str, types: set[type]) -> list[list[Any]]:
        top_k = self.identity.top_k
        if not isinstance(rows, list) or len(rows) != len(top_k):
            raise IntegrityError(f"it has no {what} for each of {len(top_k)} layers")
        for layer, (row, k) in enumerate(zip(rows, top_k, strict=True)):
            if not isinstance(row, list) or len(row) > k or not set(map(type, row)) <= types:
                raise IntegrityError(f"layer {layer}: its {what} are not a list of at most {k} numbers")
        return rows

    def _checked_weights(self, token: dict[str, Any], experts: list[list[int]]) -> list[list[float]]:
        """The weights; none if no token has any."""
        if self.position and ("weights" in token) != bool(self.weights):
            raise IntegrityError("only some tokens have weights")
        if "weights" not in token:
            return []
        weights = self._checked(token["weights"], "weights", {int, float})
        if list(map(len, weights)) != list(map(len, experts)):
            raise IntegrityError("it has not as many weights as experts")
        if not all(abs(weight) <= _MAX_FLOAT16 for row in weights for weight in row):
            raise IntegrityError("a weight is larger than any float16")
        return weights

    def _pad(self, target: array[Any], rows: list[list[Any]], filler: int) -> None:
        padding = [filler] * self.identity.width
        for row in rows:
            target.extend(row)
            target.extend(padding[len(row) :])


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _to_float16(values: Array) -> npt.NDArray[np.float16]:
    with np.errstate(over="ignore"):  # it becomes infinite, which no trace may hold
        return values.astype(np.float16)


# NumPy's .npz, with the numbers of experts in a .json of the same name.


def _read_npz(path: Path) -> Trace:
    try:
        arrays = _load(path)
    except _NPZ_ERRORS as error:
        raise IntegrityError(f"{path} is not a sound .npz file: {error}") from error
    if not {"experts", "sequence_id", "position"} <= arrays.keys():
        raise _NotATraceError
    for name, values in arrays.items():
        if not isinstance(values, np.ndarray) or values.dtype.kind not in _IMPORTED[name]:
            raise IntegrityError(f"{name} is not an array of the right type")
    experts = arrays["experts"]
    if experts.ndim != 3 or 0 in experts.shape[1:]:
        raise IntegrityError(f"experts has shape {list(experts.shape)}, not [tokens, layers, k]")
    experts = _narrowed("experts", experts, NO_EXPERT, MAX_EXPERTS - 1).astype(np.int16)
    identity = _guessed_identity(path, experts)
    experts = experts[..., : identity.width]
    check_shapes(identity, {"experts": experts.shape})
    return Trace(
        identity,
        experts,
        _imported_weights(arrays["weights"], experts) if "weights" in arrays else None,
        _narrowed("sequence_id", arrays["sequence_id"], 0, 2**31 - 1).astype(np.int32),
        _narrowed("position", arrays["position"], 0, 2**31 - 1).astype(np.int32),
        arrays.get("is_prefill", np.zeros(len(experts), np.bool_)),
    )


def _load(path: Path) -> dict[str, Array]:
    with path.open("rb") as stream:
        with zipfile.ZipFile(stream) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > _MAX_NPZ_BYTES:
            raise UnsupportedError(f"{path} would take {size} bytes of memory", hint="split it into several traces")
        stream.seek(0)
        with np.load(stream, allow_pickle=False) as file:
            return {name: file[name] for name in _IMPORTED if name in file}


def _narrowed(name: str, values: Array, least: int, most: int) -> Array:
    """`values`, all of them in bounds. Raises IntegrityError if one is not."""
    if values.size and not (least <= int(values.min()) and int(values.max()) <= most):
        raise IntegrityError(f"{name} has a number that is not between {least} and {most}")
    return values


def _imported_weights(weights: Array, experts: npt.NDArray[np.int16]) -> npt.NDArray[np.float16]:
    if weights.ndim == 3:
        weights = weights[..., : experts.shape[2]]
    if weights.shape != experts.shape:
        raise IntegrityError(f"weights has shape {list(weights.shape)}, not {list(experts.shape)}")
    return np.where(experts >= 0, _to_float16(weights), np.float16(0))


def _guessed_identity(path: Path, experts: npt.NDArray[np.int16]) -> ModelIdentity:
    """What the .json beside an .npz says, and where it is silent, what the numbers say."""
    layers, width = experts.shape[1:]
    top_k = tuple(_last_used(experts)) if len(experts) else (width,) * layers
    notes = _notes(path.with_suffix(".json"))
    if notes.get("num_layers", layers) != layers:
        raise IntegrityError(f"it has {layers} layers, and the .json beside it says {notes['num_layers']}")
    notes = {"model": path.stem, "num_experts": max(int(experts.max(initial=0)) + 1, *top_k), **notes}
    if _is_int(notes["num_experts"]):
        notes["num_experts"] = [notes["num_experts"]] * layers
    model = _text(notes, "model")
    source = Source(model if _HUB_ID.fullmatch(model) else "")
    return ModelIdentity(model, "", source, _numbers(notes, "num_experts"), top_k)


def _last_used(experts: npt.NDArray[np.int16]) -> Iterator[int]:
    """For each layer, the places up to the last one that some token uses."""
    for layer in range(experts.shape[1]):
        used = np.flatnonzero((experts[:, layer] >= 0).any(axis=0))
        yield int(used[-1]) + 1 if len(used) else 1


def _notes(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    notes = _parsed(path.read_bytes(), f"the {path.name} beside it")
    return notes if isinstance(notes, dict) else {}
