"""Checkpoints in the forms that experts are released in, packed, made of the tiny families' weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

__all__ = ["edit", "edit_config", "pack_mxfp4"]


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
