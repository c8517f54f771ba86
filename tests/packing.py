"""Checkpoints in the forms that experts are released in, packed, made of the tiny families' weights; and stored models
with other bytes, as if these had been pulled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from moeinf.manifest import MANIFEST_NAME, FileRecord
from moeinf.store import StoredModel

__all__ = ["FLOAT8_CONFIG", "edit", "edit_config", "pack_float8", "pack_mxfp4", "rewrite"]

BLOCK = 128
FLOAT8_CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Write other tensors into a checkpoint of one file, and return them."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return tensors


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def pack_mxfp4(folder: Path, exponents: tuple[int, int] = (118, 124)) -> dict[str, torch.Tensor]:
    """Make a gpt_oss checkpoint one as it is released, with random numbers: two 4-bit floats a byte, one exponent for
    32, rows and columns exchanged. Returns all tensors.
    """
    generator = torch.Generator().manual_seed(0)

    def pack(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        packed: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                packed[name] = tensor
                continue
            experts, columns, rows = tensor.shape
            blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator)
            scales = torch.randint(*exponents, (experts, rows, columns // 32), generator=generator)
            packed |= {f"{name}_blocks": blocks.to(torch.uint8), f"{name}_scales": scales.to(torch.uint8)}
        return packed

    edit_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens"]})
    return edit(folder, pack)


def pack_float8(folder: Path, scales_dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Make a checkpoint one as DeepSeek-V3 is released: the weights of experts and of projections in float8, with a
    scale for each block of 128 x 128. Returns all tensors.
    """

    def pack(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        packed: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            is_linear = ".experts." in name or "_proj" in name
            if tensor.dim() != 2 or not is_linear or not name.endswith("weight"):
                packed[name] = tensor
                continue
            grid = [-(-size // BLOCK) for size in tensor.shape]
            rows, columns = (size // count for size, count in zip(tensor.shape, grid, strict=True))
            blocks = tensor.float().view(grid[0], rows, grid[1], columns)
            scales = (blocks.abs().amax(dim=(1, 3)) / 448).to(scales_dtype)
            values = (blocks / scales.float()[:, None, :, None]).clamp(-448, 448).view(tensor.shape)
            packed |= {name: values.to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}
        return packed

    edit_config(folder, quantization_config=FLOAT8_CONFIG)
    return edit(folder, pack)


def rewrite(model: StoredModel, path: str, data: bytes) -> StoredModel:
    """The model with other bytes in one of its files, which are what its manifest says."""
    (model.path / path).write_bytes(data)
    files = {**model.manifest.files, path: FileRecord(len(data), hashlib.sha256(data).hexdigest())}
    manifest = dataclasses.replace(model.manifest, files=files)
    (model.path / MANIFEST_NAME).write_text(manifest.to_json())
    return dataclasses.replace(model, manifest=manifest)
