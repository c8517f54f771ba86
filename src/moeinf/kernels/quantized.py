"""Weights as whole numbers of 8 or 4 bits, with a common factor for every group of them within a row.

This is the form that the native library computes with (csrc/moe.h). Owns nothing.
"""

from __future__ import annotations

import torch

__all__ = ["GROUPS", "dequantize", "quantize"]

GROUPS = (32, 64)
"""Weights that share a factor."""


def quantize(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` [out, in] as (numbers uint8 [out, bytes], factors float16 [out, groups]).

    The largest weight of a group becomes the largest number, 127 or 7, and the others the nearest. Numbers are two's
    complement; of 4 bits there are two in a byte, the first one in its lower half. A row's last group may be shorter.
    """
    out, width = weight.shape
    groups = -(-width // group)
    largest_number = 2 ** (bits - 1) - 1
    padded = torch.nn.functional.pad(weight.float(), (0, groups * group - width)).view(out, groups, group)
    factors = (padded.abs().amax(-1) / largest_number).half()
    steps = factors.float()[..., None]
    numbers = torch.where(steps > 0, padded / steps, 0).round().clamp(-largest_number - 1, largest_number)
    flat = numbers.view(out, -1)[:, : width + width % (8 // bits)].to(torch.int8).view(torch.uint8)
    if bits == 4:
        flat = (flat[:, ::2] & 15) | (flat[:, 1::2] << 4)
    return flat.contiguous(), factors


def dequantize(numbers: torch.Tensor, factors: torch.Tensor, bits: int, group: int, width: int) -> torch.Tensor:
    """What `quantize` made, as weights float32 [out, width]."""
    if bits == 4:
        numbers = torch.stack((numbers & 15, numbers >> 4), -1).flatten(1)
        signed = ((numbers ^ 8).to(torch.int8) - 8)[:, :width]
    else:
        signed = numbers.view(torch.int8)[:, :width]
    return signed.float() * factors.float().repeat_interleave(group, 1)[:, :width]
