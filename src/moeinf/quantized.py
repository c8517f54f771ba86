"""Weights as numbers of 8 or 4 bits with a factor for every group of them within a row: into that form, and back.
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

from .codebook import BOOK, UNIT, find_units, nearest, round_factors, to_codes
from .dtypes import TORCH_DTYPES, bytes_of
from .errors import IntegrityError, UnsupportedError
from .files import Bytes
from .gptq import Choice, Feedback
from .lossless import pack, unpack
from .manifest import DTYPE_BYTES, RELEASED_GROUPS, ExpertLayout, Quantization, TensorSpec, scales_name
from .tensorfile import encode_expert_header

__all__ = ["Encoder", "Packer", "Quantizer", "dequantize", "fill_randomly", "quantize"]

_CHUNK_WEIGHTS = 1 << 18
_LAUNCHED_WEIGHTS = 1 << 22
"""On a GPU, where each operation costs a launch, and caches do not matter."""
_FEEDBACK_WEIGHTS = 1 << 22
"""Rows together, for choosing input by input takes a few operations per input of each part."""
_LARGEST_FLOAT16 = 65504.0
_LARGEST_INT8 = 127
_EXTREMES = tuple(end * (1.09375 - step / 16) for end in (BOOK[0], BOOK[-1]) for step in range(8))
"""What the largest weight of a group is tried as: somewhat more or less than either end of the book."""
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_POWERS = torch.ldexp(torch.ones(256, dtype=torch.float32), torch.arange(256) - 127)
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
                f"{what} holds NaN or infinity, which no number stands for",
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
    """`weight` [out, in] as (numbers uint8 [out, bytes], factors [out, ...]), as they are stored.

    Of 8 bits, the largest weight of a group becomes 127 or -127; factors are float16. Of 4 bits it becomes about the
    first or the last number of `codebook.BOOK`: of several factors the one with the least squared error is taken, each
    fitted to the numbers that it gives; it may be below 0. Two numbers are in a byte then, the first one in its lower
    half; factors are bytes: a row's unit, a float16, then what each is times it, an int8. A row's last group may be
    shorter.

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
    rows = max(1, (_CHUNK_WEIGHTS if numbers.device.type == "cpu" else _LAUNCHED_WEIGHTS) // max(1, width))
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
def _pairs(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """The two of these values that every byte stands for, as one number, so that they are looked up at once."""
    table = torch.tensor(values, dtype=torch.float32)
    return torch.stack((table.repeat(16), table.repeat_interleave(16)), -1).view(torch.int64).flatten().to(device)


@cache
def _powers(device: torch.device) -> torch.Tensor:
    return _POWERS.to(device)


def _look_up(numbers: torch.Tensor, values: tuple[float, ...]) -> torch.Tensor:
    """Numbers of 4 bits [rows, bytes] as what they stand for [rows, 2 * bytes]."""
    pairs = torch.index_select(_pairs(values, numbers.device), 0, numbers.flatten().int())
    return pairs.view(torch.float32).view(len(numbers), -1)


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
    values = _look_up(numbers, _FP4).view(*factors.shape, quantization.group)
    values *= torch.index_select(_powers(numbers.device), 0, factors.flatten().int()).view(*factors.shape, 1)
    into.copy_(values.flatten(1))


def _dequantize_rows(
    numbers: torch.Tensor, factors: torch.Tensor, quantization: Quantization, into: torch.Tensor
) -> None:
    if quantization.bits == 4:
        numbers, factors = _look_up(numbers, BOOK), _unpack_factors(factors)
    else:
        numbers, factors = numbers.view(torch.int8), factors.float()
    group = quantization.group
    whole = into.shape[1] // group * group
    for begin, end, size in ((0, whole, group), (whole, into.shape[1], into.shape[1] - whole)):
        if end > begin:
            values = numbers[:, begin:end].reshape(len(into), -1, size).float()
            values *= factors[:, begin // group : -(-end // group), None]
            into[:, begin:end] = values.flatten(1)


def _quantize_rows(
    weight: torch.Tensor, bits: int, group: int, feedback: Feedback | None
) -> tuple[torch.Tensor, torch.Tensor]:
    out, width = weight.shape
    groups = -(-width // group)
    missing = groups * group - width
    padded = F.pad(weight.float(), (0, missing)).view(out, groups, group)
    shares = F.pad(torch.ones(width), (0, missing)).view(groups, group) if missing else None
    factors, units = _find_factors(padded, bits, shares)
    scaled = padded / factors[..., None]
    numbers = torch.where(factors[..., None] != 0, nearest(scaled, bits), 0).view(out, -1)
    chosen = Choice(numbers[:, :width], factors, units)
    if feedback is not None:
        shares = F.pad(feedback.shares, (0, missing)).view(groups, group)
        chosen = feedback.choose(weight, *_find_factors(padded, bits, shares), chosen)
    codes = to_codes(chosen.numbers, bits)
    if bits == 8:
        return codes, chosen.factors.half()
    codes = F.pad(codes, (0, width % 2))
    return codes[:, ::2] | codes[:, 1::2] << 4, _pack_factors(chosen)


def _pack_factors(chosen: Choice) -> torch.Tensor:
    """Factors as uint8 [rows, 2 + groups]."""
    units = chosen.units
    assert units is not None
    multiples = (chosen.factors / units).nan_to_num_(0).round_().to(torch.int8)
    return torch.cat(((units / UNIT).half().view(torch.uint8), multiples.view(torch.uint8)), 1)


def _unpack_factors(factors: torch.Tensor) -> torch.Tensor:
    """Factors [rows, groups] in float32, which holds them."""
    units = factors[:, :2].clone(memory_format=torch.contiguous_format).view(torch.float16).float() * UNIT
    return factors[:, 2:].view(torch.int8) * units


def _find_factors(
    weights: torch.Tensor, bits: int, shares: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """For groups [rows, groups, group], the factors [rows, groups] that lose least, and their units; squared errors
    count by `shares`.

    With numbers n, weights w lose |w|² - (w·n)² / |n|² at the best factor, w·n / |n|².
    """
    largest = weights.gather(-1, weights.abs().argmax(-1, keepdim=True))
    if bits == 8:
        largest = largest.abs().squeeze(-1)
        factors = round_factors(largest / _LARGEST_INT8, None)
        following = (factors.half().view(torch.int16) + 1).view(torch.float16).float()
        is_cut = factors * (_LARGEST_INT8 + 0.5) < largest  # the smallest of float16 lie far apart
        return torch.where(is_cut, following, factors), None
    inverse = torch.where(largest != 0, 1 / largest, 0)
    best, most = torch.zeros_like(largest), torch.zeros_like(largest)
    for extreme in _EXTREMES:
        numbers = nearest(weights * (inverse * extreme), bits)
        counted = numbers if shares is None else numbers * shares
        product = torch.linalg.vecdot(weights, counted)[..., None]
        square = torch.linalg.vecdot(numbers, counted)[..., None]
        kept = product * product / square
        is_better = kept > most
        best, most = torch.where(is_better, product / square, best), torch.where(is_better, kept, most)
    factors = best.squeeze(-1)
    units = find_units(factors, bits)
    return round_factors(factors, units), units


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
    scales = [(scales_name(name), made.scales_dtype, (scale_rows[name], made.row_scales(name))) for name in widths]
    numbers = [(name, made.numbers_dtype, (rows[name], made.row_bytes(name))) for name in widths]
    specs, offset = [], 0
    for name, dtype, shape in sorted([*others, *scales, *numbers], key=lambda tensor: -DTYPE_BYTES[tensor[1]]):
        specs.append(TensorSpec(name, dtype, shape, offset))
        offset += specs[-1].nbytes
    return ExpertLayout(len(encode_expert_header(specs)), tuple(specs), made), made
