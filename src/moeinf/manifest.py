"""The manifest of a stored model, `moeinf.json`: what is in the store, where, and how to tell that it is whole.

Pure data: knows JSON and arithmetic, and nothing of the file system. docs/store-format.md is its specification.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any

from .errors import IntegrityError, UnsupportedError
from .typedjson import FieldError, reader_of, unfit

__all__ = [
    "AS_RELEASED",
    "DENSE_SCHEMA",
    "DTYPE_BYTES",
    "EXCEPTION_SHARE",
    "EXPERT_ALIGNMENT",
    "GROUPS",
    "LOSSLESS",
    "MANIFEST_NAME",
    "MOST_INPUTS",
    "NUMBER_BITS",
    "PANEL_BYTES",
    "PANEL_INPUTS",
    "PANEL_ROWS",
    "QUANTIZED_SCHEMA",
    "RELEASED_BITS",
    "RELEASED_GROUPS",
    "SCHEMA",
    "TABLE_WORDS",
    "ExpertLayout",
    "FileRecord",
    "Manifest",
    "MoeLayer",
    "Quantization",
    "Source",
    "TensorSpec",
    "are_whole_panels",
    "expert_path",
    "lossless_bytes",
    "lossless_gain",
    "lossless_shapes",
    "scales_name",
    "uppers_name",
]

SCHEMA = 1
QUANTIZED_SCHEMA = 2
"""Of a model with quantised experts, which a program that knows schema 1 alone would take for something else."""
DENSE_SCHEMA = 3
"""Of one whose dense weights are packed too."""
MANIFEST_NAME = "moeinf.json"
EXPERT_ALIGNMENT = 4096
"""The data of an expert file starts at a multiple of this, so that one direct read fills a slot."""

DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
DTYPE_BYTES |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}
"""Bytes per element of each dtype, under the names that safetensors uses."""

_Size = Annotated[int, range(1 << 63)]
_Count = Annotated[int, range(1, 1 << 63)]
_Dtype = Annotated[str, tuple(DTYPE_BYTES)]
"""What `from_json` lets a field hold: a value of the type that is one of those behind it."""

NUMBER_BITS = {"int8": 8, "int4": 4}
GROUPS = {"int8": (64, 32), "int4": (16,)}
"""Weights of a row that share a factor, the usual number of them first."""
RELEASED_BITS = {"fp8": 8, "mxfp4": 4}
"""Packed weights that are kept as they were released, so that they stand for what they always did."""
RELEASED_GROUPS = {"fp8": 128, "mxfp4": 32}
LOSSLESS = "lossless"
"""bfloat16 whose upper bytes are indices of 4 bits into a table, so that a weight takes 12 bits and is what it was."""
PANEL_ROWS, PANEL_INPUTS = 16, 8
"""Of a lossless weight, so many rows and columns lie together, in PANEL_BYTES."""
PANEL_BYTES = 192
MOST_INPUTS = 1 << 15
"""Columns of a lossless weight: the library unpacks four rows into a thread's stack."""
TABLE_WORDS = 4
EXCEPTION_SHARE = 256
"""A lossless weight has room for one exception, whose upper byte the table lacks, among so many weights."""
AS_RELEASED = "as released"
_NUMBER_DTYPES = {"fp8": "F8_E4M3"}
_SCALE_DTYPES = {"fp8": "F32", "mxfp4": "U8", "int4": "U8"}
_QUANTIZATION_VERSION = 1
_FORMER_GROUPS = (32, 64)
"""Of int4 as it once was: whole numbers from -8 to 7, each group with a float16."""


def expert_path(layer: int, expert: int) -> str:
    """Where an expert lies, relative to the model's folder. `layer` counts the MoE layers from 0, in forward order."""
    return f"experts/L{layer:03d}/E{expert:03d}.safetensors"


def scales_name(weight: str) -> str:
    """The tensor that holds the factors of a quantised weight."""
    return f"{weight}_scales"


def uppers_name(weight: str) -> str:
    """The tensor that holds the upper bytes of a lossless weight: the table of them, and the exceptions."""
    return f"{weight}_uppers"


def lossless_shapes(rows: int, width: int) -> tuple[tuple[str, tuple[int, ...]], tuple[str, tuple[int, ...]]]:
    """dtype and shape of what a lossless weight [rows, width] consists of: its panels, and its uppers."""
    panels = rows // PANEL_ROWS
    words = TABLE_WORDS + panels + 1 + rows * width // EXCEPTION_SHARE
    return ("U8", (panels, width // PANEL_INPUTS, PANEL_BYTES)), ("U32", (words,))


def lossless_bytes(rows: int, width: int) -> int:
    """Bytes of a lossless weight [rows, width]."""
    return sum(math.prod(shape) * DTYPE_BYTES[dtype] for dtype, shape in lossless_shapes(rows, width))


def lossless_gain(sides: Iterable[tuple[int, int]]) -> int:
    """Bytes that are saved when weights [rows, width] of these sides are lossless."""
    return sum(rows * width * DTYPE_BYTES["BF16"] - lossless_bytes(rows, width) for rows, width in sides)


def are_whole_panels(rows: int, width: int) -> bool:
    """Whether a weight of these sides can be lossless."""
    return rows % PANEL_ROWS == 0 and width % PANEL_INPUTS == 0 and rows > 0 and 0 < width <= MOST_INPUTS


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the weights of experts are numbers of few bits with a factor for each `group` of a row; `dtype` is what they
    are expanded to. `kind` is one of NUMBER_BITS, numbers that are near what the weights were, or one of
    RELEASED_BITS, which are the weights, or LOSSLESS, which is the weights too. Of "fp8", up to `group` rows have their
    factors in common; of LOSSLESS, `group` rows lie together.

    `widths` has the quantised tensors, and how many weights a row of each has. Rows are outputs, whatever the model's
    module has them as. docs/store-format.md has the layout of each `version`.
    """

    kind: str
    group: _Count
    dtype: _Dtype
    widths: dict[str, _Count]
    version: _Count = _QUANTIZATION_VERSION

    @property
    def bits(self) -> int:
        return (NUMBER_BITS | RELEASED_BITS | {LOSSLESS: 12})[self.kind]

    @property
    def is_released(self) -> bool:
        """Whether the experts lie as they were released."""
        return self.kind in RELEASED_BITS

    @property
    def is_lossless(self) -> bool:
        return self.kind == LOSSLESS

    @property
    def is_exact(self) -> bool:
        """Whether the experts stand for the weights that were released, and the output is theirs, too."""
        return self.is_released or self.is_lossless

    @property
    def text(self) -> str:
        """What people call it."""
        if self.is_lossless:
            return "lossless experts (bfloat16 in 12 bits)"
        about = AS_RELEASED if self.is_released else f"groups of {self.group}"
        return f"{self.kind} experts ({about})"

    def partner(self, weight: str) -> str:
        """The tensor without which the packed `weight` says nothing."""
        return uppers_name(weight) if self.is_lossless else scales_name(weight)

    def rows(self, spec: TensorSpec) -> int:
        """Rows of the packed weight that lies as `spec` says."""
        return spec.shape[0] * (PANEL_ROWS if self.is_lossless else 1)

    @property
    def is_in_blocks(self) -> bool:
        """Whether a factor is that of a block of rows and columns."""
        return self.kind == "fp8"

    @property
    def numbers_dtype(self) -> str:
        """Of numbers, as safetensors calls it: float8, or bytes."""
        return _NUMBER_DTYPES.get(self.kind, "U8")

    @property
    def scales_dtype(self) -> str:
        """Of factors, as safetensors calls it: float16, float32, or bytes."""
        return _SCALE_DTYPES.get(self.kind, "F16")

    def row_bytes(self, weight: str) -> int:
        """Bytes of a row's numbers."""
        return -(-self.widths[weight] * self.bits // 8)

    def row_groups(self, weight: str) -> int:
        """Factors of a row."""
        return -(-self.widths[weight] // self.group)

    def row_scales(self, weight: str) -> int:
        """Elements that a row's factors take: those of int4 have a float16 in common, two bytes before them."""
        return self.row_groups(weight) + (2 if self.kind == "int4" else 0)

    def has_blocks(self, weight: str, rows: int, scale_rows: int) -> bool:
        """Whether so many rows of factors cut `rows` and columns into blocks of one size, as transformers wants them,
        none of which has more than `group` of either.
        """
        has_rows = 0 < scale_rows <= rows <= scale_rows * self.group and rows % scale_rows == 0
        return has_rows and self.widths[weight] % max(1, self.row_groups(weight)) == 0


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of an expert: `offset` bytes after the start of the file's data section, row-major."""

    name: str
    dtype: _Dtype
    shape: tuple[_Count, ...]
    offset: _Size

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """What every expert file of a model looks like: `data_offset` bytes of header, then the tensors without a gap.

    Without `quantization` the tensors are the parameters of the experts module.
    """

    data_offset: _Size
    tensors: tuple[TensorSpec, ...]
    quantization: Quantization | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of one expert's data, which is what a slot holds and what a miss reads."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def file_bytes(self) -> int:
        return self.data_offset + self.nbytes

    @property
    def is_exact(self) -> bool:
        """Whether the experts' weights are those that were released."""
        return self.quantization is None or self.quantization.is_exact

    @property
    def expanded_bytes(self) -> int:
        """Bytes of the largest quantised tensor when it is expanded, as one is at a time; 0 if none is quantised."""
        return max(self._expanded(), default=0)

    @property
    def plain_bytes(self) -> int:
        """Bytes of one expert's weights as the maths has them: of quantised ones when all are expanded."""
        return sum(self._expanded()) or self.nbytes

    @property
    def largest_bytes(self) -> int:
        """Bytes of the largest weight as the maths has it."""
        return self.expanded_bytes or max(spec.nbytes for spec in self.tensors)

    @property
    def unpacked(self) -> ExpertLayout:
        """How lossless experts lie when they are plain; others as they lie."""
        made = self.quantization
        if made is None or not made.is_lossless:
            return self
        specs, offset = [], 0
        for spec in self.tensors:
            if spec.name in map(uppers_name, made.widths):
                continue
            dtype, shape = spec.dtype, spec.shape
            if width := made.widths.get(spec.name):
                dtype, shape = made.dtype, (made.rows(spec), width)
            specs.append(TensorSpec(spec.name, dtype, shape, offset))
            offset += specs[-1].nbytes
        return ExpertLayout(EXPERT_ALIGNMENT, tuple(specs))

    def _expanded(self) -> list[int]:
        made = self.quantization
        if made is None:
            return []
        size = DTYPE_BYTES[made.dtype]
        return [size * made.rows(spec) * made.widths[spec.name] for spec in self.tensors if spec.name in made.widths]


@dataclass(frozen=True, slots=True)
class MoeLayer:
    """One MoE layer: the name of its experts module in the transformers model, its experts, and how many a token asks
    for.
    """

    module: str
    num_experts: _Count
    top_k: _Count


@dataclass(frozen=True, slots=True)
class FileRecord:
    size: _Size
    sha256: str


@dataclass(frozen=True, slots=True)
class Source:
    """Where the model came from: a hub `repo` at `commit`, a folder (`commit` is then None), or `demo`, whose `commit`
    is its version.
    """

    repo: str
    commit: str | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """See docs/store-format.md for every field.

    `dtype` is the dtype of the model's maths; `precision` says what the weights were released in ("bfloat16", "mxfp4
    expanded to bfloat16", …). `kv_token_bytes` and `kv_fixed_bytes` are what one token of context and what a
    conversation of any length add to the KV cache. `files` maps relative paths to sizes and hashes, all files but the
    manifest. `packed_dense` has the dense weights that are packed as those of lossless experts are, whatever form the
    experts are packed in: by their names in the model, and their sides (rows, width).
    """

    source: Source
    architecture: str
    model_type: str
    dtype: Annotated[str, ("bfloat16", "float16", "float32")]
    precision: str
    layers: tuple[MoeLayer, ...]
    layout: ExpertLayout
    dense_files: tuple[str, ...]
    dense_bytes: _Size
    kv_token_bytes: _Size
    kv_fixed_bytes: _Size
    max_context: _Count
    files: dict[str, FileRecord]
    packed_dense: dict[str, tuple[_Count, _Count]] = field(default_factory=dict)

    @property
    def schema(self) -> int:
        if self.packed_dense:
            return DENSE_SCHEMA
        return SCHEMA if self.layout.quantization is None else QUANTIZED_SCHEMA

    @property
    def unpacked(self) -> Manifest:
        """What is held where dense weights are computed as torch has them: all of them plain."""
        dense_bytes = self.dense_bytes + lossless_gain(self.packed_dense.values())
        return dataclasses.replace(self, dense_bytes=dense_bytes, packed_dense={})

    @property
    def num_experts(self) -> int:
        """Experts of all layers together."""
        return sum(layer.num_experts for layer in self.layers)

    @property
    def token_experts(self) -> int:
        """Experts that one token asks for: the sum of k over the layers."""
        return sum(layer.top_k for layer in self.layers)

    @property
    def experts_bytes(self) -> int:
        return self.num_experts * self.layout.nbytes

    @property
    def stored_bytes(self) -> int:
        return sum(record.size for record in self.files.values())

    @property
    def digest(self) -> str:
        """Another one when anything about the model is another, each byte of its files included."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        raw = {**dataclasses.asdict(self), "schema": self.schema}
        if self.layout.quantization is None:
            del raw["layout"]["quantization"]
        if not self.packed_dense:
            del raw["packed_dense"]
        return json.dumps(raw, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read what `to_json` wrote. Raises IntegrityError if it is no manifest, UnsupportedError if it is a newer
        one.
        """
        try:
            schema, raw = _parse(text)
            if schema not in (SCHEMA, QUANTIZED_SCHEMA, DENSE_SCHEMA):
                raise UnsupportedError(
                    f"the store was written in schema {schema}, this program reads schemas {SCHEMA} to {DENSE_SCHEMA}",
                    hint="update moeinf, or pull the model again with --force",
                )
            manifest: Manifest = reader_of(cls)(raw)
            if (schema == SCHEMA) != (manifest.layout.quantization is None):
                raise ValueError(f"schema {schema} does not fit its experts")
            if (schema == DENSE_SCHEMA) != ("packed_dense" in raw):
                raise ValueError(f"schema {schema} does not fit its dense part")
            _check_layers(manifest.layers)
            _check_layout(manifest.layout)
            if schema == DENSE_SCHEMA:
                _check_packed_dense(manifest.packed_dense, manifest.dense_bytes)
        except ValueError as error:
            raise IntegrityError(
                f"{MANIFEST_NAME} is damaged: {error}", hint="pull the model again with --force"
            ) from error
        return manifest


def _parse(text: str) -> tuple[int, dict[str, Any]]:
    """The schema of a manifest, and the fields of `Manifest` as JSON has them."""
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError("it has a number that is too long, or lists too deep, to be read") from error
    if type(raw) is not dict:
        raise unfit(raw, dict)
    if "schema" not in raw:
        raise ValueError("schema is missing")
    try:
        schema: int = reader_of(_Count)(raw.pop("schema"))
    except FieldError as error:
        raise error.within("schema") from None
    return schema, raw


# What fields say together


def _check_layers(layers: tuple[MoeLayer, ...]) -> None:
    if not layers:
        raise ValueError("layers is empty")
    for index, layer in enumerate(layers):
        if layer.top_k > layer.num_experts:
            raise ValueError(f"layers[{index}].top_k is {layer.top_k}, and the layer has {layer.num_experts} experts")


def _check_layout(layout: ExpertLayout) -> None:
    """Raises UnsupportedError for a form of experts that this program does not know."""
    if not layout.tensors:
        raise ValueError("layout.tensors is empty")
    if layout.quantization is not None:
        _check_quantization(layout.quantization, {spec.name: spec for spec in layout.tensors})
    end = 0
    for index, spec in enumerate(layout.tensors):
        if spec.offset != end:
            raise ValueError(f"layout.tensors[{index}].offset is {spec.offset}, and what comes before ends at {end}")
        end += spec.nbytes


def _check_quantization(made: Quantization, specs: dict[str, TensorSpec]) -> None:
    groups = GROUPS | {kind: (group,) for kind, group in RELEASED_GROUPS.items()} | {LOSSLESS: (PANEL_ROWS,)}
    if made.kind == "int4" and made.group in _FORMER_GROUPS:
        raise UnsupportedError(
            f"its experts are int4 in groups of {made.group}, a form that this program does not read any more",
            hint="quantise or pull the model again, with --force if it is to keep its name",
        )
    if made.version != _QUANTIZATION_VERSION or made.group not in groups.get(made.kind, ()):
        raise UnsupportedError(
            f"its experts are {made.kind} in groups of {made.group}, version {made.version}, which this program does"
            " not know",
            hint="update moeinf, or make the model again",
        )
    for name, width in made.widths.items():
        for tensor in (name, made.partner(name)):
            if tensor not in specs or not specs[tensor].shape:
                raise ValueError(f"layout.tensors has no rows of {tensor}")
        if made.is_lossless:
            _check_lossless(made, name, specs)
            continue
        rows, scale_rows = specs[name].shape[0], specs[scales_name(name)].shape[0]
        if made.is_in_blocks:
            if not made.has_blocks(name, rows, scale_rows):
                raise ValueError(f"{scale_rows} rows of scales are no blocks of {name}, which is {rows} x {width}")
        elif made.is_released and width % made.group:
            raise ValueError(f"a row of {name} has {width} weights, which are no groups of {made.group}")
        else:
            scale_rows = rows
        for tensor, dtype, shape in (
            (name, made.numbers_dtype, (rows, made.row_bytes(name))),
            (scales_name(name), made.scales_dtype, (scale_rows, made.row_scales(name))),
        ):
            if (specs[tensor].dtype, specs[tensor].shape) != (dtype, shape):
                raise ValueError(f"{tensor} is not {dtype} of {shape[0]} x {shape[1]}")


def _check_lossless(made: Quantization, name: str, specs: dict[str, TensorSpec]) -> None:
    rows = made.rows(specs[name])
    there = [(specs[tensor].dtype, specs[tensor].shape) for tensor in (name, uppers_name(name))]
    if made.dtype != "BF16" or tuple(there) != lossless_shapes(rows, made.widths[name]):
        raise ValueError(f"{name} is no lossless weight of {rows} x {made.widths[name]} in {made.dtype}")


def _check_packed_dense(packed: dict[str, tuple[int, int]], dense_bytes: int) -> None:
    if not packed:
        raise ValueError(f"schema {DENSE_SCHEMA} has packed dense weights, and there are none")
    for name, sides in packed.items():
        if not name or not are_whole_panels(*sides):
            raise ValueError(f"packed_dense[{json.dumps(name)}] of {sides[0]} x {sides[1]} is no lossless weight")
    if sum(lossless_bytes(*sides) for sides in packed.values()) > dense_bytes:
        raise ValueError("its packed dense weights take more bytes than its dense part")
