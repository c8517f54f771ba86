"""bfloat16 in 12 bits, without loss.

The upper byte of a bfloat16 is its sign and seven of its eight exponent bits. Weights of one matrix are of much the
same size, so 16 of the 256 upper bytes do for all but one weight in some ten thousand: a weight becomes its lower byte
and an index of 4 bits, and the few others are written down beside them. (That exponents of weights say little is what
DFloat11 builds on, arXiv 2504.11651, which codes each in as many bits as it needs, and expands a matrix before it is
used. Here all indices have one size, so that a product can look them up as it goes.)

Owns how such a weight lies (docs/store-format.md): in panels of 16 rows, as the native kernel adds up 16 outputs side
by side. Packing is the library's where it is at hand (csrc/pack.c), and works on some rows at a time elsewhere.
"""

from __future__ import annotations

import ctypes
import dataclasses
import threading
from collections.abc import Iterator, Mapping
from ctypes import c_char_p, c_int, c_int64, c_void_p
from functools import cache
from itertools import count, takewhile
from pathlib import Path

import torch

from .dtypes import TORCH_DTYPES, bytes_of
from .errors import UnpackableError, UnsupportedError
from .files import Bytes
from .manifest import (
    EXCEPTION_SHARE,
    PANEL_INPUTS,
    PANEL_ROWS,
    TABLE_WORDS,
    ExpertLayout,
    lossless_shapes,
    uppers_name,
)
from .panels import lossless_layout
from .shared_library import NotNativeError, Signature, load_library
from .tensorfile import TensorFile, encode_expert_header

__all__ = ["LosslessPacker", "expand", "pack", "read_expert", "unpack"]

_FUNCTIONS: tuple[Signature, ...] = (
    ("moe_pack_lossless", c_int64, (c_void_p, c_int64, c_int64, c_void_p, c_void_p)),
    ("moe_variant", c_char_p, (c_int,)),
    ("moe_open", c_void_p, (c_int, c_int)),
    ("moe_expand_lossless", None, (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p)),
)
_CHUNK_WEIGHTS = 1 << 22
_TABLE_SIZE = 16
_LOWER_BYTES = 128
"""Of a panel's eight columns; 64 bytes of indices follow."""


class LosslessPacker:
    """Packs experts that lie as `plain` says; `layout` says how they lie then.

    Matrices are packed, and what has one dimension stays as it is. Raises UnsupportedError for matrices that are not
    bfloat16, for those that lie [in, out], and for sides that are no whole panels.
    """

    def __init__(self, plain: ExpertLayout, is_transposed: bool) -> None:
        if is_transposed:
            raise UnsupportedError("experts that lie [in, out] are not packed without loss", hint="store them as bf16")
        layout = lossless_layout(plain)
        self.layout = dataclasses.replace(layout, data_offset=len(encode_expert_header(layout.tensors)))

    def encode(self, tensors: Mapping[str, torch.Tensor], expert: str) -> Iterator[Bytes]:
        """The data of an expert's file, from its tensors in the plain layout. `expert` is what messages call it.

        Raises UnpackableError for a matrix that has more exceptions than there is room for.
        """
        made = dict(tensors)
        assert self.layout.quantization is not None, "lossless_layout says how they are packed"
        for name in self.layout.quantization.widths:
            try:
                made[name], made[uppers_name(name)] = pack(tensors[name])
            except UnpackableError as error:
                raise UnpackableError(f"{name} of {expert} {error}", hint=error.hint) from error
        for spec in self.layout.tensors:
            yield bytes_of(made[spec.name])


def pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` [rows, width] in bfloat16 as (panels uint8 [rows / 16, width / 8, 192], uppers int32 [words]).

    Raises UnpackableError, in words that go on from a name, when more than one weight in EXCEPTION_SHARE is an
    exception.
    """
    rows, width = weight.shape
    (_, panels_shape), (_, uppers_shape) = lossless_shapes(rows, width)
    panels, uppers = torch.empty(panels_shape, dtype=torch.uint8), torch.empty(uppers_shape, dtype=torch.int32)
    if library := _library():
        weight = weight.contiguous()
        others = library.moe_pack_lossless(weight.data_ptr(), rows, width, panels.data_ptr(), uppers.data_ptr())
    else:
        others = _pack(weight, panels, uppers)
    if others > (room := rows * width // EXCEPTION_SHARE):
        raise UnpackableError(
            f"has {others:,} weights of unusual size, and there is room for {room:,}", hint="store it as bf16"
        )
    return panels, uppers


@cache
def _library() -> ctypes.CDLL | None:
    try:
        return load_library(_FUNCTIONS)
    except NotNativeError:
        return None


def _pack(weight: torch.Tensor, panels: torch.Tensor, uppers: torch.Tensor) -> int:
    """Fill these, and return how many exceptions there are; if too many, they are not filled."""
    rows, width = weight.shape
    both = weight.contiguous().view(torch.uint8).view(rows, width, 2)
    chunk = max(1, _CHUNK_WEIGHTS // (PANEL_ROWS * width)) * PANEL_ROWS
    counts = torch.stack([torch.bincount(part[..., 1].flatten(), minlength=256) for part in torch.split(both, chunk)])
    frequent = torch.argsort(counts.sum(0), descending=True, stable=True)[:_TABLE_SIZE]
    others = rows * width - int(counts[:, frequent].sum())
    if others > rows * width // EXCEPTION_SHARE:
        return others
    index = torch.full((256,), _TABLE_SIZE, dtype=torch.uint8)
    index[frequent] = torch.arange(_TABLE_SIZE, dtype=torch.uint8)
    uppers.zero_()[:TABLE_WORDS] = frequent.to(torch.uint8).view(torch.int32)
    begins = uppers[TABLE_WORDS : TABLE_WORDS + len(panels) + 1]
    exceptions, done = uppers[TABLE_WORDS + len(panels) + 1 :], 0
    for first, part in zip(range(0, len(panels), chunk // PANEL_ROWS), torch.split(both, chunk), strict=True):
        codes = torch.index_select(index, 0, part[..., 1].flatten().int()).view(part.shape[:2])
        row, column = (codes == _TABLE_SIZE).nonzero(as_tuple=True)
        keys = (row // PANEL_ROWS << 32) | column << 12 | row % PANEL_ROWS << 8 | part[row, column, 1]
        keys = keys.sort().values
        exceptions[done : done + len(keys)] = keys.int()  # what is above 32 bits falls away
        ends = torch.bincount(keys >> 32, minlength=len(part) // PANEL_ROWS).cumsum(0) + done
        begins[first + 1 : first + 1 + len(ends)] = ends
        done += len(keys)
        codes[row, column] = 0
        _fill(panels[first : first + len(ends)], part[..., 0], codes)
    return others


def unpack(panels: torch.Tensor, uppers: torch.Tensor) -> torch.Tensor:
    """The weight [rows, width] in bfloat16 that `pack` made these of. On a GPU, nobody waits for it."""
    count, width = len(panels), panels.shape[1] * PANEL_INPUTS
    size, uppers = count * PANEL_ROWS * width, uppers.view(torch.int32)
    memory = torch.empty(size + 1, dtype=torch.bfloat16, device=panels.device)
    weight = memory[:size].view(count * PANEL_ROWS, width)
    both = weight.view(torch.uint8).view(count, PANEL_ROWS, width, 2)
    table = uppers[:TABLE_WORDS].view(torch.uint8)
    chunk = max(1, _CHUNK_WEIGHTS // (PANEL_ROWS * width))
    for part, into in zip(torch.split(panels, chunk), torch.split(both, chunk), strict=True):
        lowers = _reorder(part[..., :_LOWER_BYTES]).view(len(part), -1, 2, PANEL_ROWS, 4)
        codes = _reorder(part[..., _LOWER_BYTES:]).view(len(part), -1, PANEL_ROWS, 4)
        indices = torch.stack((codes & 15, codes >> 4), 2)
        looked_up = torch.index_select(table, 0, indices.flatten().int()).view(indices.shape)
        for byte, values in enumerate((lowers, looked_up)):
            into[..., byte] = values.permute(0, 3, 1, 2, 4).reshape(into.shape[:3])
    begins, exceptions = uppers[TABLE_WORDS : TABLE_WORDS + count + 1], uppers[TABLE_WORDS + count + 1 :].long()
    number = torch.arange(len(exceptions), dtype=torch.int32, device=panels.device)
    row = (torch.searchsorted(begins, number, right=True) - 1) * PANEL_ROWS + (exceptions >> 8 & 15)
    place = torch.where(number < begins[-1], row * width + (exceptions >> 12), size)  # the others go behind the weight
    memory.view(torch.uint8).view(-1, 2)[:, 1].index_copy_(0, place.clamp(0, size), exceptions.to(torch.uint8))
    return weight


def expand(panels: torch.Tensor, uppers: torch.Tensor) -> torch.Tensor:
    """The same in host memory, by the library where it is at hand."""
    library = _library()
    with _one_at_a_time:
        pool = _open_pool(library) if library else None
        if library is not None and pool is not None:
            rows, width = len(panels) * PANEL_ROWS, panels.shape[1] * PANEL_INPUTS
            weight = torch.empty(rows, width, dtype=torch.bfloat16)
            packed = panels.data_ptr(), uppers.data_ptr(), rows, width
            library.moe_expand_lossless(pool, *packed, 0, rows, weight.data_ptr())
            return weight
    return unpack(panels, uppers)


_one_at_a_time = threading.Lock()
"""A pool serves one thread at a time."""


@cache
def _open_pool(library: ctypes.CDLL) -> int | None:
    """A pool without threads of its own, for as long as the process lasts."""
    best = sum(1 for _ in takewhile(bool, map(library.moe_variant, count()))) - 1
    pool: int | None = library.moe_open(1, best)
    return pool


def read_expert(path: Path, layout: ExpertLayout) -> dict[str, torch.Tensor]:
    """The tensors of `layout.unpacked`, of the expert whose file lies as `layout` says."""
    data = bytearray(layout.nbytes)
    with TensorFile.open(path) as file:
        file.pread_into(data, layout.data_offset)
    stored = {}
    for spec in layout.tensors:
        dtype = TORCH_DTYPES[spec.dtype]
        count = spec.nbytes // dtype.itemsize
        stored[spec.name] = torch.frombuffer(data, dtype=dtype, count=count, offset=spec.offset).view(spec.shape)
    packed = layout.quantization.widths if layout.quantization and layout.quantization.is_lossless else {}
    for name in packed:
        stored[name] = expand(stored[name], stored.pop(uppers_name(name)))
    return stored


def _fill(panels: torch.Tensor, lowers: torch.Tensor, codes: torch.Tensor) -> None:
    """Write lower bytes and indices, both [rows, width], into panels."""
    shape = (len(panels), PANEL_ROWS, -1, 2, 4)
    panels[..., :_LOWER_BYTES] = _reorder(lowers.contiguous().view(shape)).permute(0, 2, 3, 1, 4).flatten(2)
    codes = _reorder(codes.view(shape))
    panels[..., _LOWER_BYTES:] = (codes[..., 0, :] | codes[..., 1, :] << 4).permute(0, 2, 1, 3).flatten(2)


def _reorder(four: torch.Tensor) -> torch.Tensor:
    """The bytes [..., 4] of words in the order 0 2 1 3, which is its own inverse."""
    words = four.view(torch.int32)
    words = (words & ~0xFFFF00) | (words >> 8 & 0xFF00) | (words << 8 & 0xFF0000)
    return words.view(torch.uint8)
