"""Weights as whole numbers of 8 or 4 bits with a factor for every group of them within a row: into that form, and back.

Owns how the numbers are chosen (docs/quantization.md), and how an expert of them lies in its file
(docs/store-format.md). Works on some rows at a time, and takes little memory beside what it makes. Knows nothing of
files and models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F

from .errors import IntegrityError, UnsupportedError
from .files import Bytes
from .manifest import DTYPE_BYTES, ExpertLayout, Quantization, TensorSpec, scales_name
from .tensorfile import encode_expert_header

__all__ = ["Quantizer", "dequantize", "quantize"]

_CHUNK_WEIGHTS = 1 << 18
_LARGEST_FLOAT16 = 65504.0
_LARGEST_INT8 = 127
_EXTREMES = tuple(8.0 - 0.25 * step for step in range(-3, 13))
"""The numbers, not all of them whole, that the largest weight of a group is tried as."""


class Quantizer:
    """Brings experts that lie as `plain` says into whole numbers; `layout` says how they lie then.

    `plain` has parameters of an experts module, [out, in] or, if `is_transposed`, [in, out]: matrices become numbers,
    and what has one dimension stays as it is. Raises UnsupportedError for matrices that differ in dtype.
    """

    def __init__(self, plain: ExpertLayout, is_transposed: bool, kind: str, group: int) -> None:
        matrices = {spec.name: spec.shape for spec in plain.tensors if len(spec.shape) == 2}
        dtypes = {spec.dtype for spec in plain.tensors if spec.name in matrices}
        if len(dtypes) != 1:
            raise UnsupportedError(f"experts in {' and '.join(sorted(dtypes)) or 'no matrices'} are not quantised")
        rows = {name: shape[1 if is_transposed else 0] for name, shape in matrices.items()}
        widths = {name: shape[0 if is_transposed else 1] for name, shape in matrices.items()}
        self._is_transposed = is_transposed
        self.quantization = made = Quantization(kind, group, dtypes.pop(), widths)
        others = [(spec.name, spec.dtype, spec.shape) for spec in plain.tensors if spec.name not in widths]
        scales = [(scales_name(name), "F16", (rows[name], made.row_groups(name))) for name in widths]
        numbers = [(name, "U8", (rows[name], made.row_bytes(name))) for name in widths]
        self.layout = _lay_out([*others, *scales, *numbers], made)

    def encode(self, tensors: Mapping[str, torch.Tensor], expert: str) -> Iterator[Bytes]:
        """The data of an expert's file, from its tensors in the plain layout. `expert` is what messages call it.

        Raises IntegrityError for weights that are not finite, or too large for a factor in float16.
        """
        made = dict(tensors)
        for name in self.quantization.widths:
            weight = tensors[name].t() if self._is_transposed else tensors[name]
            made |= zip((name, scales_name(name)), self._quantize(weight, f"{name} of {expert}"), strict=True)
        for spec in self.layout.tensors:
            yield made[spec.name].contiguous().view(-1).view(torch.uint8).numpy().data

    def _quantize(self, weight: torch.Tensor, what: str) -> tuple[torch.Tensor, torch.Tensor]:
        if not weight.isfinite().all():
            raise IntegrityError(
                f"{what} holds NaN or infinity, which no whole number stands for",
                hint="the checkpoint is damaged, or runs without quantised experts only",
            )
        largest = float(weight.abs().max())
        if largest > _LARGEST_FLOAT16:
            raise IntegrityError(f"{what} holds {largest:.1e}, and its factors would be more than float16 has")
        return quantize(weight, self.quantization.bits, self.quantization.group)


def quantize(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` [out, in] as (numbers uint8 [out, bytes], factors float16 [out, groups]).

    Of 8 bits, the largest weight of a group becomes 127 or -127. Of 4 bits it becomes -8, or a little less or more: of
    several factors the one with the least squared error is taken, each fitted to the numbers that it gives; it may be
    below 0. Numbers are two's complement; of 4 bits there are two in a byte, the first one in its lower half. A row's
    last group may be shorter.
    """
    rows = max(1, _CHUNK_WEIGHTS // max(1, weight.shape[1]))
    numbers, factors = zip(*(_quantize_rows(part, bits, group) for part in torch.split(weight, rows)), strict=True)
    return torch.cat(numbers), torch.cat(factors)


def dequantize(
    numbers: torch.Tensor, factors: torch.Tensor, quantization: Quantization, width: int, dtype: torch.dtype
) -> torch.Tensor:
    """What `quantize` made, as weights [out, width] in `dtype`: the products in float32, rounded to it."""
    weights = torch.empty(len(numbers), width, dtype=dtype, device=numbers.device)
    rows = max(1, _CHUNK_WEIGHTS // max(1, width))
    parts = (torch.split(tensor, rows) for tensor in (numbers, factors, weights))
    for some, theirs, into in zip(*parts, strict=True):
        _dequantize_rows(some, theirs.float(), quantization, into)
    return weights


def _dequantize_rows(
    numbers: torch.Tensor, factors: torch.Tensor, quantization: Quantization, into: torch.Tensor
) -> None:
    signed = numbers.view(torch.int8)
    if quantization.bits == 4:
        signed = torch.stack(((numbers << 4).view(torch.int8) >> 4, signed >> 4), -1).flatten(1)
    group = quantization.group
    whole = into.shape[1] // group * group
    for begin, end, size in ((0, whole, group), (whole, into.shape[1], into.shape[1] - whole)):
        if end > begin:
            values = signed[:, begin:end].reshape(len(into), -1, size).float()
            values *= factors[:, begin // group : -(-end // group), None]
            into[:, begin:end] = values.flatten(1)


def _quantize_rows(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    out, width = weight.shape
    groups = -(-width // group)
    padded = F.pad(weight.float(), (0, groups * group - width)).view(out, groups, group)
    factors = _find_factors(padded, bits)
    numbers = _numbers(padded, factors.float(), bits).view(out, -1)[:, : width + width % (8 // bits)]
    flat = numbers.to(torch.int8).view(torch.uint8)
    if bits == 4:
        flat = (flat[:, ::2] & 15) | (flat[:, 1::2] << 4)
    return flat.contiguous(), factors.squeeze(-1)


def _find_factors(weights: torch.Tensor, bits: int) -> torch.Tensor:
    """For groups [..., group], the factors [..., 1] in float16 that lose least.

    With numbers n, weights w lose |w|² - (w·n)² / |n|² at the best factor, w·n / |n|².
    """
    largest = weights.gather(-1, weights.abs().argmax(-1, keepdim=True))
    if bits == 8:
        return (largest.abs() / _LARGEST_INT8).half()
    inverse = torch.where(largest != 0, -1 / largest, 0)
    best, most = torch.zeros_like(largest), torch.zeros_like(largest)
    for extreme in _EXTREMES:
        numbers = (weights * (inverse * extreme)).round_().clamp_(-8, 7)
        product = torch.linalg.vecdot(weights, numbers)[..., None]
        square = torch.linalg.vecdot(numbers, numbers)[..., None]
        kept = product * product / square
        is_better = kept > most
        best, most = torch.where(is_better, product / square, best), torch.where(is_better, kept, most)
    return best.half()


def _numbers(weights: torch.Tensor, factors: torch.Tensor, bits: int) -> torch.Tensor:
    """The whole numbers nearest to weights / factors, as floats; 0 where the factor is."""
    largest = 2.0 ** (bits - 1)
    return torch.where(factors != 0, weights / factors, 0).round_().clamp_(-largest, largest - 1)


def _lay_out(tensors: list[tuple[str, str, tuple[int, ...]]], quantization: Quantization) -> ExpertLayout:
    """Tensors of the widest dtype first, so that each starts at a multiple of its element's size."""
    specs, offset = [], 0
    for name, dtype, shape in sorted(tensors, key=lambda tensor: -DTYPE_BYTES[tensor[1]]):
        specs.append(TensorSpec(name, dtype, shape, offset))
        offset += specs[-1].nbytes
    return ExpertLayout(len(encode_expert_header(specs)), tuple(specs), quantization)
