"""A checkpoint in Hugging Face form: which files of a folder hold which tensors, and which others belong to the model.

Owns the names of those files and what is allowed in a name. Knows nothing of networks, and of tensors only their names.
Never opens a pickle, and never names code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import IntegrityError, ModelNotFoundError, UnsupportedError
from .tensorfile import TensorFile

__all__ = ["CONFIG_NAME", "INDEX_NAME", "SINGLE_NAME", "Checkpoint", "is_companion"]

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_MAX_INDEX_BYTES = 256_000_000
_SHARDS = "model*.safetensors"
_FOREIGN = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".h5", ".msgpack", ".npz")
_COMPANIONS = frozenset(
    {
        CONFIG_NAME,
        "generation_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "chat_template.json",
        "chat_template.jinja",
    }
)
_UNSAFE = re.compile(r"[\x00-\x1f\x7f/\\:]|^\.*$")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The files of one checkpoint in `folder`. All names are plain names of files directly in it.

    `weight_files` are in order; `tensor_files` says in which of them each tensor is. `other_files` is what the store
    copies: configuration, tokenizer, chat template.
    """

    folder: Path
    weight_files: tuple[str, ...]
    tensor_files: dict[str, str]
    other_files: tuple[str, ...]

    @classmethod
    def from_folder(cls, folder: Path) -> Checkpoint:
        """The whole checkpoint in a local folder, every header of it checked.

        As transformers does, `model.safetensors` goes before an index, and an index before files found by their names.

        Raises ModelNotFoundError if the folder holds no model, UnsupportedError if its weights are not in safetensors
        or a name is unsafe, IntegrityError if a file is missing or damaged.
        """
        _require_config(folder)
        if (folder / SINGLE_NAME).is_file():
            return cls(folder, (SINGLE_NAME,), _tensors_of(folder, [SINGLE_NAME]), _companions(folder))
        if (folder / INDEX_NAME).is_file():
            checkpoint = cls.from_index(folder)
            checkpoint._check_shards()
            return checkpoint
        shards = sorted(path.name for path in folder.glob(_SHARDS) if path.is_file())
        if not shards:
            raise _no_weights(folder)
        return cls(folder, tuple(shards), _tensors_of(folder, shards), _companions(folder))

    @classmethod
    def from_index(cls, folder: Path) -> Checkpoint:
        """The checkpoint that config and index in `folder` describe. Its shards need not be there yet.

        Raises ModelNotFoundError, UnsupportedError or IntegrityError, as `from_folder` does.
        """
        _require_config(folder)
        tensor_files = _read_index(folder / INDEX_NAME)
        return cls(folder, tuple(sorted(set(tensor_files.values()))), tensor_files, _companions(folder))

    def _check_shards(self) -> None:
        absent = [name for name in self.weight_files if not (self.folder / name).is_file()]
        if absent:
            raise IntegrityError(
                f"{self.folder} lacks {_some(absent)}, named by {INDEX_NAME}", hint="download the missing files"
            )
        found: dict[str, set[str]] = {}
        for name in self.weight_files:
            with TensorFile.open(self.folder / name) as file:
                found[name] = set(file.entries)
        missing = [tensor for tensor, name in self.tensor_files.items() if tensor not in found[name]]
        if missing:
            path = self.folder / self.tensor_files[missing[0]]
            raise IntegrityError(f"{path} lacks {_some(missing)}, which {INDEX_NAME} says it holds")


def is_companion(name: str) -> bool:
    """Whether a file of this name goes with the weights into the store: configuration, tokenizer or chat template."""
    is_tokenizer = name.endswith((".model", ".tiktoken")) or (name.startswith("tokenizer") and name.endswith(".json"))
    return not _UNSAFE.search(name) and (is_tokenizer or name in _COMPANIONS)


def _companions(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in folder.iterdir() if is_companion(path.name) and path.is_file()))


def _require_config(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelNotFoundError(f"there is no folder {folder}")
    if not (folder / CONFIG_NAME).is_file():
        raise ModelNotFoundError(f"{folder} holds no model: it has no {CONFIG_NAME}")


def _no_weights(folder: Path) -> ModelNotFoundError | UnsupportedError:
    foreign = sorted(path.name for path in folder.iterdir() if path.name.endswith(_FOREIGN))
    if foreign:
        return UnsupportedError(
            f"{folder} has its weights in {_some(foreign)}, and moeinf reads safetensors only",
            hint="use a safetensors version of the model; pickles can run code and are never opened",
        )
    return ModelNotFoundError(f"{folder} holds no weights: there is neither {SINGLE_NAME} nor {INDEX_NAME}")


def _tensors_of(folder: Path, names: Iterable[str]) -> dict[str, str]:
    holders: dict[str, str] = {}
    for name in names:
        with TensorFile.open(folder / name) as file:
            for tensor in file.entries:
                if holders.setdefault(tensor, name) != name:
                    raise IntegrityError(f"tensor {tensor!r} is both in {folder / holders[tensor]} and in {name}")
    return holders


def _read_index(path: Path) -> dict[str, str]:
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise IntegrityError(f"{path} is too large to be an index of tensors")
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _no_weights(path.parent) from error
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} is not JSON: {error}") from error
    return _checked_weight_map(path, index)


def _checked_weight_map(path: Path, index: Any) -> dict[str, str]:
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise IntegrityError(f"{path} has no table weight_map of tensors and files")
    for name in weight_map.values():
        if not isinstance(name, str):
            raise IntegrityError(f"{path} names {name!r} as a file")
        if _UNSAFE.search(name):
            raise UnsupportedError(f"{path} names the file {name!r}, which is no plain name of a file beside it")
        if not name.endswith(".safetensors"):
            raise UnsupportedError(f"{path} names {name!r}, and moeinf reads safetensors only")
    return weight_map


def _some(names: list[str]) -> str:
    """Names for a message: the first few, and how many more."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest
