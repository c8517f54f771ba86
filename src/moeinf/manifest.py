"""The manifest of a stored model, `moeinf.json`: what is in the store, where, and how to tell that it is whole.

Pure data: knows JSON and arithmetic, and nothing of the file system. docs/store-format.md is its specification.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from .errors import IntegrityError, UnsupportedError

__all__ = [
    "DTYPE_BYTES",
    "EXPERT_ALIGNMENT",
    "MANIFEST_NAME",
    "SCHEMA",
    "ExpertLayout",
    "FileRecord",
    "Manifest",
    "MoeLayer",
    "Source",
    "TensorSpec",
    "expert_path",
]

SCHEMA = 1
MANIFEST_NAME = "moeinf.json"
EXPERT_ALIGNMENT = 4096
"""The data of an expert file starts at a multiple of this, so that one direct read fills a slot."""

DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
DTYPE_BYTES |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}
"""Bytes per element of each dtype, under the names that safetensors uses."""


def expert_path(layer: int, expert: int) -> str:
    """Where an expert lies, relative to the model's folder. `layer` counts the MoE layers from 0, in forward order."""
    return f"experts/L{layer:03d}/E{expert:03d}.safetensors"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of an expert: `offset` bytes after the start of the file's data section, row-major."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """What every expert file of a model looks like: `data_offset` bytes of header, then the tensors without a gap."""

    data_offset: int
    tensors: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of one expert's data, which is what a slot holds and what a miss reads."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def file_bytes(self) -> int:
        return self.data_offset + self.nbytes


@dataclass(frozen=True, slots=True)
class MoeLayer:
    """One MoE layer: the name of its experts module in the transformers model, its experts, and how many a token asks
    for.
    """

    module: str
    num_experts: int
    top_k: int


@dataclass(frozen=True, slots=True)
class FileRecord:
    size: int
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
    manifest.
    """

    source: Source
    architecture: str
    model_type: str
    dtype: str
    precision: str
    layers: tuple[MoeLayer, ...]
    layout: ExpertLayout
    dense_files: tuple[str, ...]
    dense_bytes: int
    kv_token_bytes: int
    kv_fixed_bytes: int
    max_context: int
    files: dict[str, FileRecord]
    schema: int = SCHEMA

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

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read what `to_json` wrote. Raises IntegrityError if it is no manifest, UnsupportedError if it is a newer
        one.
        """
        try:
            raw = json.loads(text)
            if raw["schema"] != SCHEMA:
                raise UnsupportedError(
                    f"the store was written in schema {raw['schema']}, this program reads schema {SCHEMA}",
                    hint="update moeinf, or pull the model again",
                )
            return cls(
                **{
                    **raw,
                    "source": Source(**raw["source"]),
                    "layers": tuple(MoeLayer(**layer) for layer in raw["layers"]),
                    "layout": _layout(raw["layout"]),
                    "dense_files": tuple(raw["dense_files"]),
                    "files": {path: FileRecord(**record) for path, record in raw["files"].items()},
                }
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(f"{MANIFEST_NAME} is damaged: {error}", hint="pull the model again") from error


def _layout(raw: dict[str, Any]) -> ExpertLayout:
    tensors = tuple(TensorSpec(**{**tensor, "shape": tuple(tensor["shape"])}) for tensor in raw["tensors"])
    return ExpertLayout(data_offset=raw["data_offset"], tensors=tensors)
