"""Weights as whole numbers of 8 or 4 bits with a factor for every group of them within a row: into that form, and back.
And weights that were released packed, which are kept as they are, and expanded like the others.

Owns how the numbers are chosen (docs/quantization.md), and how an expert of them lies in its file
(docs/store-format.md). Works on some rows at a time, and takes little memory beside what it makes. Knows nothing of
files and models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F

from .dtypes import TORCH_DTYPES, bytes_of
from .errors import IntegrityError, UnsupportedError
from .files import Bytes
from .gptq import Choice, Feedback
from .lossless import pack, unpack
from .manifest import DTYPE_BYTES, RELEASED_GROUPS, ExpertLayout, Quantization, TensorSpec, scales_name
from .tensorfile import encode_expert_header

__all__ = ["Encoder", "Packer", "Quantizer", "dequantize", "fill_randomly", "quantize"]

_CHUNK_WEIGHTS = 1 << 18
_FEEDBACK_WEIGHTS = 1 << 22
"""Rows together, for choosing input by input takes a few operations per input of each part."""
_LARGEST_FLOAT16 = 65504.0
_LARGEST_INT8 = 127
_EXTREMES = tuple(8.0 - 0.25 * step for step in range(-3, 13))
"""The numbers, not all of them whole, that the largest weight of a group is tried as."""
_FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
_FP4_PAIRS = torch.stack((_FP4.repeat(16), _FP4.repeat_interleave(16)), -1).view(torch.int64).flatten()
"""The two weights of every byte, as one number, so that they are looked up at once."""
_POWERS = torch.ldexp(torch.ones(256), torch.arange(256) - 127)
_DRAWN_WEIGHTS = 1 << 20
_DRAWN_EXPONENTS = (118, 126)
_LARGEST_FLOAT8 = 448.0
_FLOAT8_BITS = -0x7810
"""Sign, exponent and fraction, where an int16 has them after a shift."""
_LARGEST_EXPONENT = 252
"""Six, the largest of _FP4, times the next power of two is infinite."""


class Encoder(Protocol):
    """Brings experts into another form; `layout` says how they lie then. (Here, and in `lossless`.)"""

    @property
    def layout(self) -> ExpertLayout: ...

    def encode(self, tensors: Mapping[str, torch.Tensor], expert: str) -> Iterator[Bytes]:
        """The data of an expert's file. `expert` is what messages call it."""


class Quantizer:
    """Brings experts that lie as `plain` says into whole numbers; `layout` says how they lie then.

    `plain` has parameters of an experts module, [out, in] or, if `is_transposed`, [in, out]: matrices become numbers,
    and what has one dimension stays as it is. Raises UnsupportedError for matrices that differ in dtype.
    """

    def __init__(self, plain: ExpertLayout, is_transposed: bool, kind: str, group: int) -> None:
        self._is_transposed = is_transposed
        self.layout, self.quantization = _lay_out(plain, is_transposed, kind, group)

    def encode(
        self, tensors: Mapping[str, torch.Tensor], expert: str, moments: Mapping[str, torch.Tensor] | None = None
    ) -> Iterator[Bytes]:
        """The data of an expert's file, from its tensors in the plain layout. `expert` is what messages call it.
        Numbers are chosen by the `moments` of what each matrix is multiplied with, where these are given (`gptq`).

        Raises IntegrityError for weights that are not finite, or too large for a factor in float16.
        """
        made, about = dict(tensors), self.quantization
        for name in about.widths:
            weight = tensors[name].t() if self._is_transposed else tensors[name]
            self._check(weight, f"{name} of {expert}")
            numbers = quantize(weight, about.bits, about.group, moments[name] if moments else None)
            made |= zip((name, scales_name(name)), numbers, strict=True)
        for spec in self.layout.tensors:
            yield bytes_of(made[spec.name])

    def _check(self, weight: torch.Tensor, what: str) -> None:
        if not weight.isfinite().all():
            raise IntegrityError(
                f"{what} holds NaN or infinity, which no whole number stands for",
                hint="the checkpoint is damaged, or runs without quantised experts only",
            )
        largest = float(weight.abs().max())
        if largest > _LARGEST_FLOAT16:
            raise IntegrityError(f"{what} holds {largest:.1e}, and its factors would be more than float16 has")


class Packer:
    """Keeps experts that were released packed; `layout` says how they lie then.

    `plain` is how they would lie expanded, and has [out, in] or, if `is_transposed`, [in, out]. `pieces` says of how
    many matrices of the checkpoint, one below the other, each is made; one unless it is named. Raises UnsupportedError
    for rows that are no whole number of groups, and matrices that are no blocks of one size.
    """

    def __init__(
        self, plain: ExpertLayout, is_transposed: bool, kind: str, pieces: Mapping[str, int] | None = None
    ) -> None:
        group = RELEASED_GROUPS[kind]
        self.layout, self.quantization = _lay_out(plain, is_transposed, kind, group, pieces)
        rows = {spec.name: spec.shape[0] for spec in self.layout.tensors}
        for name, width in self.quantization.widths.items():
            if not self.quantization.is_in_blocks:
                if width % group:
                    raise UnsupportedError(
                        f"{name} has rows of {width} weights, and {kind} has groups of {group}",
                        hint="use the model's original weights",
                    )
            elif not self.quantization.has_blocks(name, rows[name], rows[scales_name(name)]):
                raise UnsupportedError(
                    f"{name} is {rows[name]} x {width}, which transformers does not cut into blocks of {group}",
                    hint="use the model's original weights",
                )

    def encode(self, tensors: Mapping[str, torch.Tensor], expert: str) -> Iterator[Bytes]:
        """The data of an expert's file, from its tensors as they were released: of a matrix the bytes [out, groups,
        bytes of a group] and exponents [out, groups], or float8 [out, in] and the scales of its blocks, of any float;
        and biases. `expert` is what messages call it.

        Raises IntegrityError for tensors that do not fit, and for factors that no finite weight has.
        """
        made = self.quantization
        ready = dict(tensors)
        for name in map(scales_name, made.widths):
            if made.is_in_blocks:
                ready[name] = _to_float32(tensors[name], f"{name} of {expert}")
            elif tensors[name].numel() and (largest := int(tensors[name].max())) > _LARGEST_EXPONENT:
                raise IntegrityError(
                    f"{name} of {expert} holds the exponent {largest}, which no finite weights have",
                    hint="the checkpoint is damaged",
                )
        for spec in self.layout.tensors:
            tensor, shape = ready[spec.name], spec.shape
            if spec.name in made.widths and not made.is_in_blocks:
                shape = (shape[0], made.row_groups(spec.name), made.group * made.bits // 8)
            if tensor.shape != shape or tensor.dtype != TORCH_DTYPES[spec.dtype]:
                raise IntegrityError(
                    f"{spec.name} of {expert} is {tensor.dtype} {list(tensor.shape)}, not {spec.dtype} {list(shape)}",
                    hint="the checkpoint is damaged, or packed in another way: --experts bf16 expands what"
                    " transformers can",
                )
        for spec in self.layout.tensors:
            yield bytes_of(ready[spec.name])


def quantize(
    weight: torch.Tensor, bits: int, group: int, moments: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` [out, in] as (numbers uint8 [out, bytes], factors float16 [out, groups]).

    Of 8 bits, the largest weight of a group becomes 127 or -127. Of 4 bits it becomes -8, or a little less or more: of
    several factors the one with the least squared error is taken, each fitted to the numbers that it gives; it may be
    below 0. Numbers are two's complement; of 4 bits there are two in a byte, the first one in its lower half. A row's
    last group may be shorter.

    With the second `moments` of the inputs [in, in], positive definite, errors count as they do in the outputs, and
    `gptq` goes on from there.
    """
    feedback = None if moments is None else Feedback(moments, bits, group)
    chunk = _CHUNK_WEIGHTS if feedback is None else _FEEDBACK_WEIGHTS
    parts = torch.split(weight, max(1, chunk // max(1, weight.shape[1])))
    numbers, factors = zip(*(_quantize_rows(part, bits, group, feedback) for part in parts), strict=True)
    return torch.cat(numbers), torch.cat(factors)


def dequantize(
    numbers: torch.Tensor,
    factors: torch.Tensor,
    quantization: Quantization,
    width: int,
    dtype: torch.dtype,
    *,
    is_transposed: bool = False,
) -> torch.Tensor:
    """Numbers as weights [out, width] in `dtype`, or [width, out] if `is_transposed`: the products in float32, rounded
    to it. Lossless weights are what they were.
    """
    if quantization.is_lossless:
        return unpack(numbers, factors).to(dtype)
    shape = (width, len(numbers)) if is_transposed else (len(numbers), width)
    weights = torch.empty(shape, dtype=dtype, device=numbers.device)
    by_rows = weights.t() if is_transposed else weights
    if quantization.is_in_blocks:
        factors = factors.repeat_interleave(len(numbers) // len(factors), dim=0)
        expand = _expand_float8_rows
    else:
        expand = _expand_mxfp4_rows if quantization.is_released else _dequantize_rows
    rows = max(1, _CHUNK_WEIGHTS // max(1, width))
    parts = (torch.split(tensor, rows) for tensor in (numbers, factors, by_rows))
    for some, theirs, into in zip(*parts, strict=True):
        expand(some, theirs, quantization, into)
    return weights


def fill_randomly(
    tensors: Mapping[str, torch.Tensor], quantization: Quantization | None, generator: torch.Generator
) -> None:
    """Write random weights, about as large as those of models, into the tensors of an expert that is plain or as it was
    released. A million of them; larger tensors repeat themselves.
    """
    packed = quantization.widths if quantization else {}
    scales = {scales_name(name) for name in packed}
    if quantization is not None and quantization.is_lossless:
        _pack_randomly(tensors, quantization, generator)
        tensors = {name: tensor for name, tensor in tensors.items() if tensor.dtype == torch.bfloat16}
    for name, tensor in tensors.items():
        count = min(tensor.numel(), _DRAWN_WEIGHTS)
        if tensor.dtype == torch.uint8:
            numbers = torch.randint(*(_DRAWN_EXPONENTS if name in scales else (0, 256)), (count,), generator=generator)
        elif tensor.dtype == torch.float8_e4m3fn:
            numbers = (torch.randn(count, generator=generator) * 100).clamp_(-_LARGEST_FLOAT8, _LARGEST_FLOAT8)
        elif name in scales:
            numbers = torch.rand(count, generator=generator) * 2e-4 + 1e-4
        else:
            numbers = torch.randn(count, generator=generator) * 0.02
        for piece in torch.split(tensor.view(-1), count):
            piece.copy_(numbers[: len(piece)])


def _pack_randomly(tensors: Mapping[str, torch.Tensor], quantization: Quantization, generator: torch.Generator) -> None:
    for name, width in quantization.widths.items():
        plain = torch.empty(len(tensors[name]) * quantization.group, width, dtype=torch.bfloat16)
        fill_randomly({name: plain}, None, generator)
        for stored, made in zip((name, quantization.partner(name)), pack(plain), strict=True):
            tensors[stored].view(made.dtype).copy_(made)


@cache
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return _FP4_PAIRS.to(device), _POWERS.to(device)


def _expand_float8_rows(
    numbers: torch.Tensor, factors: torch.Tensor, quantization: Quantization, into: torch.Tensor
) -> None:
    """Blocks of float8, as transformers expands them (transformers/integrations/finegrained_fp8.py).

    torch's own conversion takes many times as long on a processor. Moved to where bfloat16 has them, float8's exponents
    are 120 too small; what is then below its normal numbers is exact, too.
    """
    bits = numbers.view(torch.int8).to(torch.int16)
    bits <<= 4
    bits &= _FLOAT8_BITS
    values = bits.view(torch.bfloat16).float()
    values *= 2.0**120
    values.masked_fill_(numbers.view(torch.uint8) & 127 == 127, torch.nan)
    values = values.view(*factors.shape, -1)
    values *= factors[..., None]
    into.copy_(values.flatten(1))


def _expand_mxfp4_rows(
    numbers: torch.Tensor, factors: torch.Tensor, quantization: Quantization, into: torch.Tensor
) -> None:
    """MXFP4, as transformers expands it (transformers/integrations/mxfp4.py)."""
    fp4_pairs, powers = _tables(numbers.device)
    pairs = torch.index_select(fp4_pairs, 0, numbers.flatten().int())
    values = pairs.view(torch.float32).view(*factors.shape, quantization.group)
    values *= torch.index_select(powers, 0, factors.flatten().int()).view(*factors.shape, 1)
    into.copy_(values.flatten(1))


def _dequantize_rows(
    numbers: torch.Tensor, factors: torch.Tensor, quantization: Quantization, into: torch.Tensor
) -> None:
    signed, factors = numbers.view(torch.int8), factors.float()
    if quantization.bits == 4:
        signed = torch.stack(((numbers << 4).view(torch.int8) >> 4, signed >> 4), -1).flatten(1)
    group = quantization.group
    whole = into.shape[1] // group * group
    for begin, end, size in ((0, whole, group), (whole, into.shape[1], into.shape[1] - whole)):
        if end > begin:
            values = signed[:, begin:end].reshape(len(into), -1, size).float()
            values *= factors[:, begin // group : -(-end // group), None]
            into[:, begin:end] = values.flatten(1)


def _quantize_rows(
    weight: torch.Tensor, bits: int, group: int, feedback: Feedback | None
) -> tuple[torch.Tensor, torch.Tensor]:
    out, width = weight.shape
    groups = -(-width // group)
    padded = F.pad(weight.float(), (0, groups * group - width)).view(out, groups, group)
    factors = _find_factors(padded, bits)
    numbers = _numbers(padded, factors.float(), bits).view(out, -1)
    chosen = Choice(numbers[:, :width], factors.squeeze(-1))
    if feedback is not None:
        shares = F.pad(feedback.shares, (0, groups * group - width)).view(groups, group)
        chosen = feedback.choose(weight, _find_factors(padded, bits, shares).squeeze(-1), chosen)
    flat = F.pad(chosen.numbers, (0, width % (8 // bits))).to(torch.int8).view(torch.uint8)
    if bits == 4:
        flat = (flat[:, ::2] & 15) | (flat[:, 1::2] << 4)
    return flat.contiguous(), chosen.factors


def _find_factors(weights: torch.Tensor, bits: int, shares: torch.Tensor | None = None) -> torch.Tensor:
    """For groups [..., group], the factors [..., 1] in float16 that lose least; squared errors count by `shares`.

    With numbers n, weights w lose |w|² - (w·n)² / |n|² at the best factor, w·n / |n|².
    """
    largest = weights.gather(-1, weights.abs().argmax(-1, keepdim=True))
    if bits == 8:
        return (largest.abs() / _LARGEST_INT8).half()
    inverse = torch.where(largest != 0, -1 / largest, 0)
    best, most = torch.zeros_like(largest), torch.zeros_like(largest)
    for extreme in _EXTREMES:
        numbers = (weights * (inverse * extreme)).round_().clamp_(-8, 7)
        counted = numbers if shares is None else numbers * shares
        product = torch.linalg.vecdot(weights, counted)[..., None]
        square = torch.linalg.vecdot(numbers, counted)[..., None]
        kept = product * product / square
        is_better = kept > most
        best, most = torch.where(is_better, product / square, best), torch.where(is_better, kept, most)
    return best.half()


def _numbers(weights: torch.Tensor, factors: torch.Tensor, bits: int) -> torch.Tensor:
    """The whole numbers nearest to weights / factors, as floats; 0 where the factor is."""
    largest = 2.0 ** (bits - 1)
    return torch.where(factors != 0, weights / factors, 0).round_().clamp_(-largest, largest - 1)


def _to_float32(scales: torch.Tensor, what: str) -> torch.Tensor:
    """Without loss, for float32 has all that the others have."""
    if not scales.is_floating_point() or scales.element_size() > 4:
        raise IntegrityError(f"{what} is {scales.dtype}, which blocks of float8 do not have for scales")
    scales = scales.float()
    if not scales.isfinite().all():
        raise IntegrityError(f"{what} holds NaN or infinity", hint="the checkpoint is damaged")
    return scales


def _lay_out(
    plain: ExpertLayout, is_transposed: bool, kind: str, group: int, pieces: Mapping[str, int] | None = None
) -> tuple[ExpertLayout, Quantization]:
    """How experts lie whose matrices are numbers. Tensors of the widest dtype come first, so that each starts at a
    multiple of its element's size.
    """
    matrices = {spec.name: spec.shape for spec in plain.tensors if len(spec.shape) == 2}
    dtypes = {spec.dtype for spec in plain.tensors if spec.name in matrices}
    if len(dtypes) != 1:
        raise UnsupportedError(f"experts in {' and '.join(sorted(dtypes)) or 'no matrices'} are not quantised")
    rows = {name: shape[1 if is_transposed else 0] for name, shape in matrices.items()}
    widths = {name: shape[0 if is_transposed else 1] for name, shape in matrices.items()}
    made = Quantization(kind, group, dtypes.pop(), widths)
    others = [(spec.name, spec.dtype, spec.shape) for spec in plain.tensors if spec.name not in widths]
    scale_rows = dict(rows)
    if made.is_in_blocks:
        counts = {name: (pieces or {}).get(name, 1) for name in widths}
        scale_rows = {name: count * -(-rows[name] // (count * group)) for name, count in counts.items()}
    scales = [(scales_name(name), made.scales_dtype, (scale_rows[name], made.row_groups(name))) for name in widths]
    numbers = [(name, made.numbers_dtype, (rows[name], made.row_bytes(name))) for name in widths]
    specs, offset = [], 0
    for name, dtype, shape in sorted([*others, *scales, *numbers], key=lambda tensor: -DTYPE_BYTES[tensor[1]]):
        specs.append(TensorSpec(name, dtype, shape, offset))
        offset += specs[-1].nbytes
    return ExpertLayout(len(encode_expert_header(specs)), tuple(specs), made), made
