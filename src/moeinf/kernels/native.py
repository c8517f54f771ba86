"""Experts computed by the native library (csrc/), a whole layer's worth of them per call.

Owns the library's pool of threads, and says which layers the library can compute: weights of float32 or bfloat16, or
packed ones; no norm behind the experts; and an activation that it has, which is found out by trying it. It rounds
where torch rounds, and adds in torch's order where the processor has AVX-512 BF16 or AMX. There prompts are its, too;
elsewhere they are left to torch, for which it expands packed weights, but for quantised experts of a few rows.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from ctypes import POINTER, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from functools import cache, cached_property, partial
from itertools import count, product, takewhile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moeinf.manifest import LOSSLESS, PANEL_INPUTS, PANEL_ROWS, ExpertLayout, Quantization, TensorSpec
from moeinf.shared_library import NotNativeError, Signature, load_library

from .orders import KNOWN, MOST_BYTES, OWN, Kind, Known, Order, Orders
from .torch_maths import ExpertMaths, PromptMaths, Routed, Tensors, TokenMaths, route

__all__ = [
    "DTYPES",
    "LANES",
    "LEAST_PRODUCTS",
    "TAIL",
    "WANTS_MORE",
    "WHOLE",
    "ExpandingMaths",
    "LinearLayer",
    "NativeLayer",
    "NativeMaths",
    "NativePool",
    "best_variant",
    "can_add_as_torch_does",
    "computes_any_rows",
    "every_bfloat16",
    "may_compute_any_rows",
    "one_thread",
    "telling_rows",
    "variant_of_torch",
    "variants",
]

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
LANES = 16, 8
"""Numbers in the vectors in which torch may add up exponentials: those of AVX-512 and of AVX2."""
WANTS_MORE = AttributeError, TypeError, ValueError, LookupError, RuntimeError
"""What a module or function raises that is tried, and wants more than it is given."""
_NAMES = {"F32": torch.float32, "BF16": torch.bfloat16}
_WEIGHTS = {"int8": 1, "int4": 2, "mxfp4": 3, "fp8": 4, LOSSLESS: 5}
_GATES = {"none": 0, "product": 1, "clamped": 2, "sigmoid": 3}
_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu2": 3}
"""The numbers of moe.h."""

LEAST_PRODUCTS = 1 << 12
"""So few of them, and those of a single output, torch adds up in another order, which a trial can miss
(docs/experiments.md)."""

_FEW_ROWS = 8
"""As many rows of a quantised expert are computed one by one where there are no products of many rows
(docs/quantization.md)."""

_THREAD_OUTPUTS = 64
"""With fewer for each of torch's threads, threads may share inputs instead."""

_TRIED = (256, 1100)
"""A matrix wider than two chains of csrc/dot_pairs.c."""
_FEW_TELLING, _TELLING = 32, 64
"""Rows that show an order well enough, and those that differ: more would not show more."""
_FAR, _SIZES = 2.0**40, 24
"""Beside numbers so large no bias counts; of numbers of so many sizes every sum is rounded."""

_PROBE = 1024
"""Values that an activation is tried on."""

TAIL, WHOLE = 32, 64
"""torch has GELU of so few gates, and of what a row has beyond multiples of the second, by other code than of many."""

_SMALL = 1e-5
"""Differences below this are none, where gates and ups are about 4."""


class NativeLayer(ctypes.Structure):
    """`moe_layer` of moe.h: what the experts of a layer look like."""

    _fields_ = (
        ("dtype", c_int32),
        ("weights", c_int32),
        ("group", c_int32),
        ("gate", c_int32),
        ("activation", c_int32),
        ("is_transposed", c_int32),
        ("is_interleaved", c_int32),
        ("limit", c_float),
        ("alpha", c_float),
        ("hidden", c_int64),
        ("inner", c_int64),
        ("up", c_int64),
        ("up_scales", c_int64),
        ("up_bias", c_int64),
        ("down", c_int64),
        ("down_scales", c_int64),
        ("down_bias", c_int64),
        ("up_block", c_int64),
        ("down_block", c_int64),
        ("up_chain", c_int64),
        ("down_chain", c_int64),
        ("values", c_void_p),
        ("values_of_several", c_void_p),
    )


class LinearLayer(ctypes.Structure):
    """`moe_linear_layer` of moe.h: a matrix [outputs, inputs] to multiply by, and what is added."""

    _fields_ = (
        ("inputs", c_int64),
        ("outputs", c_int64),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("uppers", c_void_p),
        ("chain", c_int64),
        ("share", c_int64),
        ("step", c_int64),
    )


_FUNCTIONS: tuple[Signature, ...] = (
    ("moe_variant", c_char_p, (c_int,)),
    ("moe_open", c_void_p, (c_int, c_int)),
    ("moe_close", None, (c_void_p,)),
    (
        "moe_experts",
        c_int,
        (c_void_p, POINTER(NativeLayer), c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_int, c_void_p),
    ),
    ("moe_sum", None, (POINTER(NativeLayer), c_int, c_void_p, c_void_p, c_int, c_void_p)),
    (
        "moe_prompt",
        c_int,
        (c_void_p, POINTER(NativeLayer), c_int, *(c_void_p,) * 7, c_int, c_int, c_void_p),
    ),
    ("moe_add", None, (c_void_p, c_int, c_int64, c_int64, c_void_p, c_void_p, c_void_p)),
    ("moe_activate", None, (POINTER(NativeLayer), c_void_p, c_void_p)),
    ("moe_expand", None, (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int, c_void_p)),
    ("moe_expand_fp8", None, (c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_void_p)),
    ("moe_expand_int", None, (c_void_p, c_int, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_void_p)),
    ("moe_expand_lossless", None, (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p)),
    ("moe_linear", c_int, (c_void_p, POINTER(LinearLayer), c_int64, c_void_p, c_void_p)),
    ("moe_mlp", c_int, (c_void_p,) * 4),
    ("moe_norm", c_int, (c_void_p, c_void_p, c_int, c_void_p, c_void_p)),
    ("moe_attend", c_int, (c_void_p, c_void_p, c_void_p)),
    ("moe_self_attend", c_int, (c_void_p,) * 8),
    ("moe_attend_with_sinks", c_int, (c_void_p, c_void_p, c_void_p, c_int32, c_int64, c_void_p, c_void_p, c_void_p)),
    ("moe_soften", c_int, (c_int, c_int64, c_int64, c_int32, c_void_p)),
    ("moe_route", c_int, (c_void_p,) * 5),
    ("moe_decode", c_int, (c_void_p, c_void_p, c_int, c_int, c_void_p, c_void_p, c_void_p)),
    ("moe_finish", c_int, (c_void_p,) * 3),
    ("moe_delta_rule", c_int, (c_void_p,) * 10),
    ("moe_rotate", None, (c_int, c_int64, c_void_p, c_void_p, c_void_p, c_void_p)),
    ("moe_read", c_uint64, (c_void_p, c_void_p, c_size_t)),
)


def variants(path: Path | None = None) -> list[str]:
    """The instruction sets that the library has and this processor can run, the best one last."""
    library = load_library(_FUNCTIONS, path)
    return [name.decode() for name in takewhile(bool, map(library.moe_variant, count()))]


def best_variant(path: Path | None = None) -> str:
    """The one that adds as torch does, or else the fastest."""
    return variant_of_torch(path) or variants(path)[-1]


def can_add_as_torch_does() -> bool:
    """Whether the library can: `NativePool.adds_as_torch_does`."""
    try:
        return variant_of_torch() is not None
    except NotNativeError:
        return False


def computes_any_rows(layout: ExpertLayout) -> bool:
    """Whether it can for products of any number of rows, `NativePool.orders`, or those need not be torch's."""
    return can_add_as_torch_does() and _takes_any_rows(variant_of_torch(), layout)


def may_compute_any_rows(layout: ExpertLayout) -> bool:
    """Whether it might, by what the processor has: for those who must know before the first product."""
    try:
        orders = KNOWN.keys() & variants()
    except NotNativeError:
        return False
    return bool(orders) and all(_takes_any_rows(variant, layout) for variant in orders)


def _takes_any_rows(variant: str | None, layout: ExpertLayout) -> bool:
    is_known = variant not in KNOWN or KNOWN[variant].knows_any_rows
    return not layout.is_exact or is_known or layout.largest_bytes <= MOST_BYTES


@cache
def variant_of_torch(path: Path | None = None) -> str | None:
    """The one that adds products of bfloat16 as torch does on this processor; None if there is none."""
    for variant in KNOWN.keys() & variants(path):
        pool = NativePool(1, variant, path)
        try:
            if pool.adds_as_torch_does:
                return variant
        finally:
            pool.close()
    return None


def every_bfloat16() -> torch.Tensor:
    """All 65,536, in the order of their bits."""
    return torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(torch.bfloat16)


@contextmanager
def one_thread(is_enough: bool = True) -> Iterator[None]:
    """While this is open, torch has one thread, if that `is_enough`: others would have to wake up, and stay awake for a
    while, on cores where the library's look out for work (docs/experiments.md).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if is_enough else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def telling_rows(weight: torch.Tensor, count: int) -> torch.Tensor:
    """Rows [count, in] in bfloat16 whose products with `weight` [out, in] show in which order they were added up. Each
    all but cancels with one of the outputs, so that little but roundings is left of the sum. Of random numbers so few
    results depend on the order that a trial could miss it.
    """
    generator = torch.Generator().manual_seed(0)
    chosen = weight[torch.randint(len(weight), (count,), generator=generator)].float() * _FAR
    inputs = weight.shape[1]
    one, other = torch.randperm(inputs, generator=generator)[: inputs // 2 * 2].view(2, -1)
    sizes = 2.0 ** torch.randint(_SIZES, one.shape, generator=generator)
    rows = torch.zeros(count, inputs, dtype=torch.float32)
    rows[:, one], rows[:, other] = chosen[:, other] * sizes, -chosen[:, one] * sizes
    return rows.bfloat16()


class NativePool:
    """The library and its threads, one of which is the caller's. Raises NotNativeError when they cannot be had.

    Args:
        threads: how many compute.
        variant: the instruction set, by its name in `variants`; `best_variant` if None.
        path: of another library than the package's own.
    """

    def __init__(self, threads: int, variant: str | None = None, path: Path | None = None) -> None:
        self.lib = load_library(_FUNCTIONS, path)
        self.variant = variant or best_variant(path)
        self.known = KNOWN.get(self.variant, Known())
        self.handle: int | None = self.lib.moe_open(threads, variants(path).index(self.variant))
        if self.handle is None:
            raise NotNativeError(f"the native library could not start {threads} threads")
        self._end = weakref.finalize(self, self.lib.moe_close, self.handle)
        self._scratch = torch.empty(0, dtype=torch.bfloat16)
        self._kept: list[torch.Tensor] = []
        self.orders = Orders(self.find_order)

    @cached_property
    def adds_as_torch_does(self) -> bool:
        """Whether products of bfloat16 are added in the order in which torch adds them on this processor."""
        weight = torch.randn(_TRIED, generator=torch.Generator().manual_seed(0)).bfloat16()
        if self.variant not in KNOWN:
            return False
        return self.find_order(weight, 1, [OWN]) is not None

    def order(self, rows: int, kind: Kind, weight: Callable[[], torch.Tensor]) -> Order | None:
        """In which torch adds up so many rows' products with a matrix of this kind, of which `weight` is one; None if
        that is not known.
        """
        return self.known_order(kind) if self.knows_order(rows, kind) else self.orders.find(rows, kind, weight)

    def known_order(self, kind: Kind) -> Order:
        """Torch's, if `knows_order`."""
        *_, is_transposed = kind
        return (self.known.columns if is_transposed else None) or OWN

    def knows_order(self, rows: int, kind: Kind) -> bool:
        """Whether that is the library's own, as far as it is any: what this says is still to be tried."""
        outputs, inputs, _ = kind
        if self.known.knows_any_rows or self.adds_rows_alike(inputs):
            return True
        return 1 < rows <= self.known.rows and outputs >= _THREAD_OUTPUTS * torch.get_num_threads()

    def adds_rows_alike(self, inputs: int) -> bool:
        """Whether an output of so many inputs is the same whatever else is computed with it, if it is torch's."""
        return self.variant in KNOWN and self.known.adds_rows_alike(inputs)

    def find_order(self, weight: torch.Tensor, rows: int, among: Iterable[Order]) -> Order | None:
        """The first order in which `multiply` of so many rows by `weight` [out, in] gives what torch gives, to the last
        bit; None if there is none. That is tried on the outputs at both ends.
        """
        ends = list(dict.fromkeys([*range(PANEL_ROWS), *range(-PANEL_ROWS, 0)]))[: len(weight)]
        some = weight[ends].contiguous()
        if some.shape[1] < self.known.least_inputs:
            return None
        count = -(-_FEW_TELLING // rows) * rows
        telling = torch.split(telling_rows(some, min(count, _TELLING))[torch.arange(count) % _TELLING], rows)
        wanted = [F.linear(each, weight)[:, ends] for each in telling]
        for order in among:
            products = (self.multiply(each, some, order=order) for each in telling)
            if all(map(torch.equal, products, wanted)):
                return order
        return None

    def close(self) -> None:
        """End the threads. Closing twice is harmless."""
        self.handle = None
        self._end()
        self.forget()

    def forget(self) -> None:
        """Give back the memory in which expanded weights lie."""
        self._scratch = torch.empty(0, dtype=torch.bfloat16)

    def keep(self, table: torch.Tensor) -> torch.Tensor:
        """One table for all that have the same."""
        same = (kept for kept in self._kept if torch.equal(kept.view(torch.int16), table.view(torch.int16)))
        if (kept := next(same, None)) is None:
            self._kept.append(kept := table)
        return kept

    def expand(
        self, numbers: torch.Tensor, factors: torch.Tensor, about: Quantization, width: int, *, is_transposed: bool
    ) -> torch.Tensor:
        """A packed weight as bfloat16 [out, width], or [width, out] if `is_transposed`, as only MXFP4 is. It lies where
        the next one will: fresh memory takes the system longer than all of the rest.
        """
        if about.is_lossless:
            return self.unpack(numbers, factors)
        out = len(numbers)
        weight = self._take(width, out) if is_transposed else self._take(out, width)
        packed, into = (numbers.data_ptr(), factors.data_ptr(), out, width), weight.data_ptr()
        if about.is_in_blocks:
            self.lib.moe_expand_fp8(self.handle, out // len(factors), *packed, into)
        elif about.is_released:
            self.lib.moe_expand(self.handle, *packed, is_transposed, into)
        else:
            self.lib.moe_expand_int(self.handle, _WEIGHTS[about.kind], about.group, *packed, into)
        return weight

    def unpack(
        self, panels: torch.Tensor, uppers: torch.Tensor, first: int = 0, count: int | None = None
    ) -> torch.Tensor:
        """`count` rows of a lossless weight as bfloat16 [count, width], from row `first` on, or all; `first` and
        `count` are multiples of PANEL_ROWS. They lie where the next weight will, as in `expand`.
        """
        rows, width = len(panels) * PANEL_ROWS, panels.shape[1] * PANEL_INPUTS
        count = rows if count is None else count
        weight = self._take(count, width)
        packed = panels.data_ptr(), uppers.data_ptr(), rows, width
        self.lib.moe_expand_lossless(self.handle, *packed, first, count, weight.data_ptr())
        return weight

    def _take(self, rows: int, columns: int) -> torch.Tensor:
        """Memory for an expanded weight, which the next one takes over."""
        if self._scratch.numel() < rows * columns:
            self._scratch = torch.empty(rows * columns, dtype=torch.bfloat16)
        return self._scratch[: rows * columns].view(rows, columns)

    def multiply(
        self, rows: torch.Tensor, weight: torch.Tensor, uppers: torch.Tensor | None = None, order: Order = OWN
    ) -> torch.Tensor:
        """`F.linear` of `rows` [n, in] and `weight` [out, in], both in bfloat16 and contiguous, or `weight`
        lossless with its `uppers`; added in that `order`, of which OWN is torch's where the pool `adds_as_torch_does`,
        up to as many rows as are `known`. Only in variants that have products of many rows.
        """
        inputs = rows.shape[1]
        outputs = len(weight) * (1 if uppers is None else PANEL_ROWS)
        result = rows.new_empty(len(rows), outputs)
        also = None if uppers is None else uppers.data_ptr()
        self.apply(LinearLayer(inputs, outputs, weight.data_ptr(), None, also, *order), rows, result)
        return result

    def apply(self, layer: LinearLayer, rows: torch.Tensor, result: torch.Tensor) -> None:
        """Write what `layer` makes of `rows` [..., in] to `result` [..., out], like `multiply`; one row anywhere."""
        count = rows.numel() // layer.inputs
        if self.lib.moe_linear(self.handle, layer, count, rows.data_ptr(), result.data_ptr()):
            raise MemoryError("no memory for the rows of a product")

    def read(self, memory: torch.Tensor) -> int:
        """Read all of `memory` as fast as the threads can; returns the exclusive or of its words."""
        return int(self.lib.moe_read(self.handle, memory.data_ptr(), memory.nbytes))


class ExpandingMaths(ExpertMaths):
    """torch's maths. The library expands packed weights, as long as the pool is open."""

    def __init__(self, module: nn.Module, layout: ExpertLayout, pool: NativePool, reason: str = "") -> None:
        super().__init__(module, layout.quantization, reason)
        self.pool = pool

    def forget(self) -> None:
        self.pool.forget()

    def _expand(self, numbers: torch.Tensor, factors: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        about = self._quantization
        if about is None or rows.dtype != torch.bfloat16 or self.pool.handle is None:
            return super()._expand(numbers, factors, rows)
        if _has_other_blocks(about, rows.shape[1]):
            return super()._expand(numbers, factors, rows)
        return self.pool.expand(numbers, factors, about, rows.shape[1], is_transposed=self._is_transposed)


class NativeMaths(ExpandingMaths):
    """The experts of one MoE layer, by the library: of one token, and of many if it `takes_prompts`. torch takes over
    when the pool is closed.

    Raises NotNativeError when the library cannot compute them.
    """

    most_at_once = 16

    def __init__(self, module: nn.Module, layout: ExpertLayout, pool: NativePool) -> None:
        super().__init__(module, layout, pool)
        self.computed_by = f"native, {pool.variant}"
        self._anchor, self._offset = layout.tensors[0].name, layout.tensors[0].offset
        specs = {spec.name: spec for spec in layout.tensors}
        self.dtype = self._check(module, specs)
        self.rounding = {weights: self._rounding(weights) for weights in DTYPES}
        self.layer = self._describe(module, specs)
        self._values: list[torch.Tensor] = []
        self.activates_alike = self.activates_rows_alike = True
        """Whether activations of one token, and of several, are torch's wherever they stand."""
        self._recognise_activation(module)
        hidden, inner, gates = self.layer.hidden, self.layer.inner, 1 if self.up == "up_proj" else 2
        sizes = {self.up: (gates * inner, hidden), "down_proj": (hidden, inner)}
        self._kinds: dict[str, Kind] = {name: (*size, self._is_transposed) for name, size in sizes.items()}
        self.takes_prompts = (
            pool.adds_as_torch_does
            and self.dtype == torch.bfloat16
            and not self.layer.is_transposed
            and hidden * inner > LEAST_PRODUCTS
        )

    def orders(self, rows: int, tensors: Tensors) -> tuple[Order, Order] | None:
        """Those in which torch adds up so many rows' products with the expert's matrices, up and down; None if they are
        not known of both.
        """
        if self._quantization is not None and not self._quantization.is_exact:
            return OWN, OWN
        up, down = (
            self.pool.order(rows, kind, partial(self._matrix, tensors, name)) for name, kind in self._kinds.items()
        )
        return None if up is None or down is None else (up, down)

    def _matrix(self, tensors: Tensors, name: str) -> torch.Tensor:
        """[out, in], in bfloat16, as torch is given it."""
        weight = tensors[name]
        if self._quantization is not None:
            _, inputs, _ = self._kinds[name]
            rows = torch.empty(0, inputs, dtype=torch.bfloat16)
            weight = self._expand(weight, tensors[self._quantization.partner(name)], rows)
        return weight.t() if self._is_transposed else weight

    def adds_alike(self, tensors: Tensors, rows: int) -> bool:
        """Whether for so many rows the products that it makes with the expert's matrices are torch's, to the last bit,
        in bfloat16.
        """
        if self.layer.is_transposed and self.pool.known.columns is None:
            return False
        orders = self.orders(rows, tensors)
        if orders is None:
            return rows > 1
        if rows == 1:
            self.layer.up_chain, self.layer.down_chain = (order.chain for order in orders)
        assumed = (
            (name, self.pool.known_order(kind))
            for name, kind in self._kinds.items()
            if self.pool.knows_order(rows, kind)
        )
        return all(self.pool.find_order(self._matrix(tensors, name), rows, [order]) for name, order in assumed)

    def add_as(self, other: NativeMaths) -> None:
        """Add up the products of a token in the order that was found for another layer of these widths."""
        self.layer.up_chain, self.layer.down_chain = other.layer.up_chain, other.layer.down_chain

    def token(self, hidden: torch.Tensor, weights: torch.Tensor) -> TokenMaths:
        if not self._computes(hidden, weights):
            return super().token(hidden, weights)
        return _NativeToken(self, hidden, weights)

    def prompt(
        self, hidden: torch.Tensor, top_k_index: torch.Tensor, weights: torch.Tensor, num_experts: int
    ) -> PromptMaths:
        if not self.takes_prompts or not self._computes(hidden, weights) or _names_twice(top_k_index):
            return super().prompt(hidden, top_k_index, weights, num_experts)
        return _NativePrompt(self, hidden, route(top_k_index, weights, num_experts), weights)

    def expert(self, hidden: torch.Tensor, tensors: Tensors, weights: torch.Tensor) -> torch.Tensor:
        quantization = self._quantization
        is_torch_s = quantization is None or quantization.is_exact
        if is_torch_s or len(hidden) > _FEW_ROWS or not self._computes(hidden, weights):
            return super().expert(hidden, tensors, weights)
        rows = [
            _NativeToken(self, *token) for token in zip(torch.split(hidden, 1), torch.split(weights, 1), strict=True)
        ]
        for row in rows:
            row.compute([0], [tensors])
        dtype = torch.promote_types(hidden.dtype, weights.dtype)
        return torch.cat([row.rows for row in rows]).to(dtype)

    def rows(self, hidden: torch.Tensor, experts: Sequence[Tensors]) -> torch.Tensor:
        ones = torch.ones(1, len(experts), dtype=hidden.dtype)
        if not self._computes(hidden, ones):
            return super().rows(hidden, experts)
        token = _NativeToken(self, hidden, ones)
        token.compute(range(len(experts)), experts)
        return token.rows.to(hidden.dtype)

    def _computes(self, hidden: torch.Tensor, weights: torch.Tensor) -> bool:
        return hidden.dtype == self.dtype and weights.dtype in DTYPES and self.pool.handle is not None

    def _rounding(self, weights: torch.dtype) -> tuple[int, int]:
        """What rows and their sum are rounded to with routing weights of this dtype."""
        added, row = self.sum_dtype(self.dtype, weights), torch.promote_types(self.dtype, weights)
        return DTYPES[torch.bfloat16 if torch.bfloat16 in (row, added) else torch.float32], DTYPES[added]

    def address(self, tensors: Tensors) -> int:
        """Where the expert that has these tensors begins."""
        return tensors[self._anchor].data_ptr() - self._offset

    def _check(self, module: nn.Module, specs: Mapping[str, TensorSpec]) -> torch.dtype:
        """The dtype of the maths, if the library has it and knows experts that have these tensors."""
        flags: Any = module
        weights = [self.up, "down_proj"]
        expected = {*weights, *(f"{name}_bias" for name in weights if flags.has_bias)}
        quantization = self._quantization
        if quantization is None:
            dtypes = {spec.dtype for spec in specs.values()}
        else:
            factors = {quantization.partner(name) for name in weights}
            dtypes = {quantization.dtype, *(specs[name].dtype for name in specs.keys() - {*weights, *factors})}
            expected |= factors
            if quantization.is_exact and quantization.dtype != "BF16":
                raise NotNativeError(f"it does not compute {quantization.kind} experts in {quantization.dtype}")
            if any(_has_other_blocks(quantization, width) for width in quantization.widths.values()):
                raise NotNativeError(f"it computes {quantization.kind} experts in whole blocks alone")
        if len(dtypes) > 1 or not dtypes <= set(_NAMES):
            raise NotNativeError(f"it does not compute experts in {' and '.join(sorted(dtypes))}")
        if self._norm is not None:
            raise NotNativeError("it does not compute experts with a norm behind them")
        if set(specs) != expected:
            raise NotNativeError(f"it does not know experts that have {', '.join(sorted(specs))}")
        return _NAMES[dtypes.pop()]

    def _describe(self, module: nn.Module, specs: Mapping[str, TensorSpec]) -> NativeLayer:
        flags: Any = module
        kind, group, is_transposed = 0, 0, self._is_transposed
        if quantization := self._quantization:
            kind, group, is_transposed = _WEIGHTS[quantization.kind], quantization.group, False
            hidden, inner = quantization.rows(specs["down_proj"]), quantization.widths["down_proj"]
        else:
            hidden, inner = specs["down_proj"].shape[:: -1 if is_transposed else 1]
        offsets = {name: spec.offset for name, spec in specs.items()}
        partners: dict[str, TensorSpec] = {}
        if quantization:
            partners = {name: specs[quantization.partner(name)] for name in quantization.widths}
        blocks = {name: specs[name].shape[0] // spec.shape[0] for name, spec in partners.items()}
        return NativeLayer(
            dtype=DTYPES[self.dtype],
            weights=kind,
            group=group,
            is_transposed=is_transposed,
            is_interleaved=flags.has_gate and not flags.is_concatenated,
            limit=_attribute(module, "limit", "swiglu_limit"),
            alpha=_attribute(module, "alpha", "swiglu_alpha"),
            hidden=hidden,
            inner=inner,
            up=offsets[self.up],
            up_scales=partners[self.up].offset if partners else -1,
            up_bias=offsets.get(f"{self.up}_bias", -1),
            down=offsets["down_proj"],
            down_scales=partners["down_proj"].offset if partners else -1,
            down_bias=offsets.get("down_proj_bias", -1),
            up_block=blocks.get(self.up, 0),
            down_block=blocks.get("down_proj", 0),
        )

    def _recognise_activation(self, module: nn.Module) -> None:
        """Find what the module does between the projections among what the library can, by doing it. In bfloat16 the
        library has a table of what the module makes of each gate, in float32 the formulas of some activations.
        """
        has_gate = self.up == "gate_up_proj"
        noise = torch.randn(1, _PROBE * (2 if has_gate else 1), generator=torch.Generator().manual_seed(0))
        values = (noise * max(4.0, self.layer.limit)).to(self.dtype)
        wanted = self._activate(values).float()
        for gate, activation in self._candidates(has_gate):
            self.layer.gate, self.layer.activation = _GATES[gate], _ACTIVATIONS[activation]
            if self.dtype == torch.bfloat16:
                self._values = [self.pool.keep(self._tabulate(gate, rows)) for rows in (1, 2)]
                self.layer.values, self.layer.values_of_several = (table.data_ptr() for table in self._values)
            found = self._try(values.float())
            if self.dtype == torch.bfloat16:
                is_found = torch.equal(found, wanted)
            else:  # torch's exponentials differ in the last bit, which in the tails of GELU is most of the result
                is_found = torch.allclose(found, wanted, rtol=1e-4, atol=_SMALL)
            if is_found:
                if self.dtype == torch.bfloat16:
                    self._compare_tails(gate)
                return
        raise NotNativeError(f"it does not have the activation of {type(module).__name__}")

    def _compare_tails(self, gate: str) -> None:
        """See whether the tables hold where rows are short, and where torch's threads part them."""
        several = self._values[1]
        tails = self._tabulate(gate, len(several) // TAIL)
        others = ((tails != several) & ~(tails.isnan() & several.isnan())).nonzero().flatten()
        self.activates_rows_alike = not len(others)
        if len(others) and self.layer.inner % WHOLE:
            row = others[torch.arange(TAIL) % len(others)]
            self.activates_alike = torch.equal(self._tabulate(gate, 1, row), self._values[0][row])

    def _candidates(self, has_gate: bool) -> Iterator[tuple[str, str]]:
        """(gate, activation) to try. In bfloat16 the table is the activation, whichever is named."""
        gates = ["none"] if not has_gate else ["product"] if not self.layer.limit else ["product", "clamped", "sigmoid"]
        return product(gates, ["silu"] if self.dtype == torch.bfloat16 else _ACTIVATIONS)

    def _tabulate(self, gate: str, rows: int, numbers: torch.Tensor | None = None) -> torch.Tensor:
        """What the module makes of every bfloat16, or of those of these numbers, as a gate, where an up makes nothing
        of it, or as an up, in so many rows: where gates of several stand apart from each other, torch computes GELU in
        another way.
        """
        values = every_bfloat16() if numbers is None else every_bfloat16()[numbers]
        values = values.view(rows, -1)
        if gate != "none":
            ups = torch.full_like(values, 0 if gate == "sigmoid" else 1)
            both = (values, ups)
            values = torch.stack(both, -1).flatten(1) if self.layer.is_interleaved else torch.cat(both, 1)
        table: torch.Tensor = self._activate(values)
        return table.flatten().contiguous()

    def _try(self, values: torch.Tensor) -> torch.Tensor:
        trial = NativeLayer.from_buffer_copy(self.layer)
        trial.inner = _PROBE
        output = torch.empty(1, _PROBE, dtype=torch.float32, device="cpu")
        self.pool.lib.moe_activate(trial, values.data_ptr(), output.data_ptr())
        return output


class _NativeToken:
    """A token's experts, as many in a call as are there."""

    def __init__(self, maths: NativeMaths, hidden: torch.Tensor, weights: torch.Tensor) -> None:
        self._maths = maths
        self._hidden = hidden.contiguous()
        self._weights = weights.float().contiguous()
        self.rows = hidden.new_empty(weights.shape[1], hidden.shape[1], dtype=torch.float32)
        self._row_dtype, self._sum_dtype = maths.rounding[weights.dtype]

    def compute(self, places: Sequence[int], experts: Sequence[Tensors]) -> None:
        maths, size = self._maths, len(places)
        failed = maths.pool.lib.moe_experts(
            maths.pool.handle,
            maths.layer,
            size,
            (c_void_p * size)(*map(maths.address, experts)),
            (c_int32 * size)(*places),
            self._hidden.data_ptr(),
            self._weights.data_ptr(),
            self._row_dtype,
            self.rows.data_ptr(),
        )
        if failed:
            raise MemoryError("no memory for what lies between an expert's projections")

    def receive(self, places: Sequence[int], rows: torch.Tensor) -> None:
        dtype = torch.bfloat16 if self._row_dtype == DTYPES[torch.bfloat16] else torch.float32
        self.rows[list(places)] = (rows * self._weights[0, list(places), None]).to(dtype).float()

    def total(self, places: Sequence[int]) -> torch.Tensor:
        output = torch.empty_like(self._hidden)
        self._maths.pool.lib.moe_sum(
            self._maths.layer,
            len(places),
            (c_int32 * len(places))(*places),
            self.rows.data_ptr(),
            self._sum_dtype,
            output.data_ptr(),
        )
        return output


class _NativePrompt:
    """Many tokens' experts, as many in a call as are there."""

    def __init__(self, maths: NativeMaths, hidden: torch.Tensor, routed: Routed, weights: torch.Tensor) -> None:
        self._maths, self._hidden = maths, hidden.contiguous()
        self._spans, self._tokens = routed.spans, routed.tokens
        self._routed, self._weights = routed, routed.weights.float()
        self.experts: Collection[int] = routed.experts
        self._row_dtype, self._sum_dtype = maths.rounding[weights.dtype]
        self._total = maths.zeros(hidden, weights)
        self._rows = self._total.new_empty(len(self._tokens), hidden.shape[1])
        self._computed: set[int] = set()
        self._unadded, self._added = deque(routed.experts), 0

    def compute(self, experts: Sequence[int], tensors: Sequence[Tensors]) -> None:
        known: list[tuple[int, Tensors, tuple[Order, Order]]] = []
        for expert, there in zip(experts, tensors, strict=True):
            begin, end = self._spans[expert]
            if orders := self._maths.orders(end - begin, there):
                known.append((expert, there, orders))
                continue
            tokens, weights = self._routed[expert]
            self._rows[begin:end] = self._maths.expert(self._hidden[tokens], there, weights)
        if known:
            self._compute(*zip(*known, strict=True))
        self._computed.update(experts)
        self._add()

    def _compute(
        self, experts: Sequence[int], tensors: Sequence[Tensors], orders: Sequence[tuple[Order, Order]]
    ) -> None:
        maths, size = self._maths, len(experts)
        begins, ends = zip(*(self._spans[expert] for expert in experts), strict=True)
        failed = maths.pool.lib.moe_prompt(
            maths.pool.handle,
            maths.layer,
            size,
            (c_void_p * size)(*map(maths.address, tensors)),
            (c_int64 * size)(*begins),
            (c_int64 * size)(*ends),
            (c_int64 * (6 * size))(*(number for each in orders for order in each for number in order)),
            self._tokens.data_ptr(),
            self._weights.data_ptr(),
            self._hidden.data_ptr(),
            self._row_dtype,
            self._sum_dtype,
            self._rows.data_ptr(),
        )
        if failed:
            raise MemoryError("no memory for the rows of a prompt's experts")

    def _add(self) -> None:
        """Add the rows of all experts before which none is missing."""
        end = self._added
        while self._unadded and self._unadded[0] in self._computed:
            _, end = self._spans[self._unadded.popleft()]
        rows, tokens = self._rows[self._added : end], self._tokens[self._added : end]
        self._added = end
        addresses = tokens.data_ptr(), rows.data_ptr(), self._total.data_ptr()
        pool = self._maths.pool
        pool.lib.moe_add(pool.handle, self._sum_dtype, rows.shape[1], len(rows), *addresses)

    def total(self) -> torch.Tensor:
        return self._total.to(self._hidden.dtype)


def _names_twice(top_k_index: torch.Tensor) -> bool:
    """Whether any token chose an expert twice: torch rounds the sum of such rows once."""
    chosen = top_k_index.sort(dim=1).values
    return bool((chosen[:, 1:] == chosen[:, :-1]).any())


def _has_other_blocks(about: Quantization, width: int) -> bool:
    """Whether a row has several blocks that are not as wide as the library knows them."""
    return about.is_in_blocks and width > about.group and width % about.group != 0


def _attribute(module: nn.Module, *names: str) -> float:
    """The first of these numbers that the module has, or 0."""
    values = (getattr(module, name, None) for name in names)
    return next((float(value) for value in values if value is not None), 0.0)
