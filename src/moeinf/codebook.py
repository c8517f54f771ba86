"""The numbers that there are, of 8 bits and of 4, and the factors of their groups.

Numbers of 8 bits are whole and lie evenly. Those of 4 bits are the 16 that random weights lose least with
(docs/quantization.md says how they were found): numbers that lie as weights do are an old idea (Max, Quantizing for
minimum distortion, 1960; for weights Dettmers et al., QLoRA, arXiv 2305.14314). Their factors are whole multiples of
what a row has in common. Knows nothing of how either is stored.
"""

from __future__ import annotations

import torch

__all__ = ["BOOK", "UNIT", "find_units", "nearest", "round_factors", "to_codes"]

BOOK = (-127, -89, -71, -55, -41, -28, -16, -5, 5, 16, 27, 39, 53, 69, 88, 110)
"""What a code of 4 bits stands for. Without an end of its own for each sign: a factor may be below 0."""
UNIT = 2.0**-12
"""A row's unit, as it is stored, is so many times as large: about as large as its weights, which float16 holds well."""
_LARGEST_FACTOR = 127

_STEPS = 2
"""Cells of a table of what is nearest: no middle of two numbers lies within one."""
_LEAST = -128
_CELLS = torch.arange(_STEPS * 256, dtype=torch.float32) / _STEPS + _LEAST + 0.5 / _STEPS
_CODES = (_CELLS[:, None] - torch.tensor(BOOK)).abs().argmin(1).to(torch.uint8)
_NEAREST = torch.tensor(BOOK).float()[_CODES.int()]


def nearest(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest of those that there are, as floats; any of them for NaN."""
    if bits == 4:
        return _look_up(_NEAREST, numbers)
    most = 2.0 ** (bits - 1)
    return numbers.nan_to_num(0, most, -most).round_().clamp_(-most, most - 1)


def to_codes(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers that there are as uint8: two's complement, or places in BOOK."""
    return _look_up(_CODES, numbers) if bits == 4 else numbers.to(torch.int8).view(torch.uint8)


def find_units(factors: torch.Tensor, bits: int) -> torch.Tensor | None:
    """What the factors [rows, groups] of each row will be multiples of [rows, 1], which float16 holds when divided by
    UNIT; None for 8 bits, whose factors are float16.
    """
    if bits == 8:
        return None
    return (factors.abs().amax(1, keepdim=True) / (_LARGEST_FACTOR * UNIT)).half().float() * UNIT


def round_factors(factors: torch.Tensor, units: torch.Tensor | None) -> torch.Tensor:
    """The nearest factors that there are, as floats; 0 for 0 alone, unless the unit is."""
    if units is None:
        return factors.half().float()
    multiples = (factors / units).round_().clamp_(-_LARGEST_FACTOR, _LARGEST_FACTOR)
    return torch.where(multiples == 0, factors.sign(), multiples).nan_to_num_(0) * units


def _look_up(table: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    cells = numbers.nan_to_num(0).sub_(_LEAST).mul_(_STEPS).clamp_(0, len(table) - 1).int()
    return torch.index_select(table, 0, cells.flatten()).view(numbers.shape)
