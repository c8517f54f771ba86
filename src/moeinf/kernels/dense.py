"""The dense part between the experts, by the native library where one token goes through it, or a short prompt: linear
layers, routers and norms.

While decoding they are read once per token like the experts, and torch reads a matrix for one vector at half the rate
at which memory gives it, and for a few not much sooner; a norm takes it eight small operations. The library adds in
torch's own order where the processor has AVX-512 BF16 (csrc/dot_pairs.c, csrc/tiles.c, csrc/norm.c), which is tried
for every shape that a model has, so the model's output does not change.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moeinf.ledger import WHOLE_BYTES
from moeinf.manifest import PANEL_INPUTS, PANEL_ROWS

from .native import LEAST_PRODUCTS, WANTS_MORE, LinearLayer, NativePool, one_thread, telling_rows
from .orders import MOST_ROWS, OWN, Order
from .packed import LosslessLinear

__all__ = ["NativeLinear", "NativeNorm", "compute_packed", "native_linear", "speed_up"]

Found = dict[tuple[int, ...], tuple[int, Order]]
"""For a shape, as many rows as come out the same, and in which order the library adds up one."""

_TRIALS = 4
_NORMS = (True, False), (False, False), (False, True)
"""Kinds of norms: whether they round before they multiply, and by one more than the weight."""
_MOST_ALONE = 1 << 20
"""A matrix of more numbers than this one thread would need longer for than two and what they cost others."""
_MOST_NUMBERS = 1 << 15
"""More than one token brings to a norm, heads and all; torch has threads for more."""


def speed_up(model: nn.Module, pool: NativePool) -> int:
    """Let `pool` compute the linear layers and root-mean-square norms of `model` in bfloat16, and what other modules
    multiply by their own weights with `F.linear`, in steps of few tokens, if it gives torch's results to the last bit.
    Other steps are torch's as before. From then on weights have to stay where they are.

    Returns how many modules and weights it computes.
    """
    if not pool.adds_as_torch_does:
        return 0
    found: Found = {}
    replaced = 0
    for module in list(model.modules()):
        native = _stand_in(module, pool, found)
        if native is not None:
            module.forward = native  # type: ignore[method-assign, assignment, unused-ignore]  # of this one alone
            replaced += 1
        elif not isinstance(module, nn.Linear | nn.Embedding):
            replaced += _wrap_matrices(module, pool, found)
            _compute_alone(module)
    return replaced


def compute_packed(model: nn.Module, pool: NativePool) -> None:
    """Let `pool` unpack the weights of the linear layers of `model` that are packed, and compute products of few rows
    from what is packed, if it gives torch's results to the last bit.
    """
    found: Found = {}
    for module in model.modules():
        if not isinstance(module, LosslessLinear):
            continue
        module.pool = pool
        if pool.adds_as_torch_does and (module.bias is None or _is_plain(module.bias)):
            linear = NativeLinear(module.forward, pool, module.panels, module.bias, module.uppers)
            if linear.is_exact(found):
                module.forward = linear  # type: ignore[method-assign]  # of this one alone


def _compute_alone(module: nn.Module) -> None:
    """Have a token's products by small matrices of the module's own, or of children of it, that are torch's because
    they are in float32, computed by one of torch's threads, if that gives the same.
    """
    weights = [weight for weight in module.parameters() if weight.dim() == 2]
    if len(weights) == 1 and LEAST_PRODUCTS < weights[0].numel() <= _MOST_ALONE:
        alone = _OneThread(module.forward, weights[0].shape[1])
        if alone.gives_the_same():
            module.forward = alone  # type: ignore[method-assign, assignment, unused-ignore]  # of this one alone


class _OneThread:
    """The forward of a module of one input, by one of torch's threads where that is a token [..., inputs]."""

    def __init__(self, forward: Callable[..., Any], inputs: int) -> None:
        self._forward, self._inputs = forward, inputs

    def __call__(self, x: torch.Tensor, *more: Any, **named: Any) -> Any:
        if x.numel() != self._inputs:
            return self._forward(x, *more, **named)
        with one_thread():
            return self._forward(x, *more, **named)

    def gives_the_same(self) -> bool:
        generator = _generator()
        with torch.inference_mode():
            for _ in range(_TRIALS):
                x = torch.randn(1, self._inputs, generator=generator).bfloat16()
                try:
                    ours, theirs = (tuple(forward(x)) for forward in (self, self._forward))
                    if not all(map(torch.equal, ours, theirs)):
                        return False
                except WANTS_MORE:
                    return False
        return True


def native_linear(module: nn.Module) -> NativeLinear | None:
    """What computes the products by the one matrix of `module`, which may be a linear layer or have just the matrix."""
    if isinstance(module.forward, NativeLinear):
        return module.forward
    weight = getattr(module, "weight", None)
    return weight._linear if isinstance(weight, _NativeWeight) else None


def _wrap_matrices(module: nn.Module, pool: NativePool, found: Found) -> int:
    """Have the products by the module's own matrices computed, as routers take them; returns how many there are."""
    own = dict(module.named_parameters(recurse=False))
    wrapped = 0
    for name, weight in own.items():
        bias = own.get("bias")
        if weight.dim() == 2 and all(each is None or _is_plain(each) for each in (weight, bias)):
            linear = NativeLinear(partial(F.linear, weight=weight, bias=bias), pool, weight, bias)
            if linear.is_exact(found):
                setattr(module, name, _NativeWeight.of(weight, bias, linear))
                wrapped += 1
    return wrapped


def _stand_in(module: nn.Module, pool: NativePool, found: Found) -> _Native | None:
    """What computes `module` from now on; None for most."""
    weights = list(module.parameters(recurse=False))
    if not weights or not all(map(_is_plain, weights)):
        return None
    if type(module) is nn.Linear:
        linear = NativeLinear(module.forward, pool, module.weight, module.bias)
        return linear if linear.is_exact(found) else None
    if len(weights) == 1 and weights[0].dim() == 1 and _epsilon(module) and not list(module.children()):
        norms = (NativeNorm(module, pool, weights[0], *kind) for kind in _NORMS)
        return next((norm for norm in norms if norm.is_exact()), None)
    return None


def _is_plain(weight: torch.Tensor) -> bool:
    return weight.dtype == torch.bfloat16 and weight.is_contiguous()


class _Native(ABC):
    """The forward of a module of one input, which the library computes or leaves to the module."""

    def __init__(self, forward: Callable[..., torch.Tensor], pool: NativePool) -> None:
        self._forward = forward
        self._pool = pool

    def __call__(self, x: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
        if more or named or x.dtype != torch.bfloat16 or self._pool.handle is None or not self.takes(x):
            return self._forward(x, *more, **named)
        return self.compute(x.contiguous())

    @abstractmethod
    def takes(self, x: torch.Tensor) -> bool:
        """Whether x is what one token brings."""

    @abstractmethod
    def compute(self, x: torch.Tensor) -> torch.Tensor: ...

    def gives_the_same(self, inputs: Iterable[torch.Tensor]) -> bool:
        """Whether the library gives what the module gives, to the last bit; not if the module asks for more than x."""
        with torch.inference_mode():
            try:
                return all(torch.equal(self(x), self._forward(x)) for x in map(torch.Tensor.bfloat16, inputs))
            except (AttributeError, TypeError, RuntimeError):
                return False


class NativeLinear(_Native):
    def __init__(
        self,
        forward: Callable[..., torch.Tensor],
        pool: NativePool,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        uppers: torch.Tensor | None = None,
    ) -> None:
        super().__init__(forward, pool)
        self._outputs, self._inputs = weight.shape[:2]
        if uppers is not None:
            self._outputs, self._inputs = self._outputs * PANEL_ROWS, self._inputs * PANEL_INPUTS
        self._has_bias = bias is not None
        also = (None if tensor is None else tensor.data_ptr() for tensor in (bias, uppers))
        self.layer = LinearLayer(self._inputs, self._outputs, weight.data_ptr(), *also)
        self._most_rows = 1
        self._weight, self._uppers = weight, uppers

    def is_exact(self, found: Found) -> bool:
        """Whether layers of this shape come out the same, for one row and for some, which is tried once for each."""
        is_small = self._inputs * self._outputs <= LEAST_PRODUCTS or self._inputs < self._pool.known.least_inputs
        if self._outputs == 1 or is_small:
            return False
        shape = (self._inputs, self._outputs, self._has_bias)
        if shape not in found:
            found[shape] = self._try()
        self._most_rows, order = found[shape]
        self.layer.chain, self.layer.share, self.layer.step = order
        return self._most_rows > 0

    def _try(self) -> tuple[int, Order]:
        """So many rows come out the same, 0 if none does, in this order."""
        most = self._pool.known.linear_rows
        tried = min(MOST_ROWS, most)
        rows = telling_rows(self._last_outputs(), tried)
        single = torch.split(rows[:_TRIALS], 1)
        if self.gives_the_same(single):
            self._most_rows = most
            return (most if self.gives_the_same(rows[:count] for count in (2, tried)) else 1), OWN
        kind = (self._outputs, self._inputs, False)
        if self._pool.knows_order(1, kind) or (self._uppers is not None and 2 * prod(kind[:2]) > WHOLE_BYTES):
            return 0, OWN
        order = self._pool.orders.find(1, kind, self._matrix)
        if order is None:
            return 0, OWN
        self.layer.chain, self.layer.share, self.layer.step = order
        return int(self.gives_the_same(single)), order

    def _matrix(self) -> torch.Tensor:
        return self._weight if self._uppers is None else self._pool.unpack(self._weight, self._uppers)

    def _last_outputs(self) -> torch.Tensor:
        """Some of the matrix [16 or fewer, inputs]."""
        if self._uppers is None:
            return self._weight[-PANEL_ROWS:]
        return self._pool.unpack(self._weight, self._uppers, self._outputs - PANEL_ROWS, PANEL_ROWS)

    @property
    def adds_rows_alike(self) -> bool:
        """Whether an output is the same whatever else is computed with it: of wider matrices torch adds up one row in
        another order than many.
        """
        return self._most_rows > 1 and self._pool.adds_rows_alike(self._inputs)

    def takes(self, x: torch.Tensor) -> bool:
        return x.dim() > 0 and x.shape[-1] == self._inputs and 0 < x.numel() <= self._most_rows * self._inputs

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        output = x.new_empty(*x.shape[:-1], self._outputs)
        self._pool.apply(self.layer, x, output)
        return output


class _NativeWeight(nn.Parameter):
    """A matrix that a module multiplies by without a linear layer, as routers do: `F.linear` is the library's where it
    can, and whatever else is done with the matrix is torch's.
    """

    _linear: NativeLinear
    _bias: nn.Parameter | None

    @classmethod
    def of(cls, weight: nn.Parameter, bias: nn.Parameter | None, linear: NativeLinear) -> _NativeWeight:
        """`weight`, and what computes products with it and that `bias`."""
        made: _NativeWeight = torch.Tensor._make_subclass(cls, weight.data, weight.requires_grad)
        made._linear, made._bias = linear, bias
        return made

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is F.linear and not kwargs and isinstance(args[1], cls):
            x, weight, bias = (*args, None)[:3]
            if bias is weight._bias and x.dtype == weight.dtype == torch.bfloat16:
                return weight._linear(x)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


class _NormLayer(ctypes.Structure):
    """`moe_norm_layer` of moe.h."""

    _fields_ = (
        ("size", c_int64),
        ("epsilon", c_float),
        ("rounds_first", c_int32),
        ("adds_one", c_int32),
        ("weight", c_void_p),
    )


class NativeNorm(_Native):
    """Families differ in whether they round before they multiply by the weight, and in whether that is by one more."""

    def __init__(
        self, module: nn.Module, pool: NativePool, weight: torch.Tensor, rounds_first: bool, adds_one: bool
    ) -> None:
        super().__init__(module.forward, pool)
        self._size = weight.numel()
        self.layer = _NormLayer(self._size, _epsilon(module), rounds_first, adds_one, weight.data_ptr())
        self._address = ctypes.addressof(self.layer)

    def takes(self, x: torch.Tensor) -> bool:
        return x.numel() <= _MOST_NUMBERS and x.shape[-1] == self._size

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(x)
        rows = x.numel() // self._size
        if self._pool.lib.moe_norm(self._pool.handle, self._address, rows, x.data_ptr(), output.data_ptr()):
            raise MemoryError("no memory for the input of a norm")
        return output

    def is_exact(self) -> bool:
        """Whether the norms of numbers of several sizes come out the same."""
        generator = _generator()
        sizes = 10 ** torch.randn(_TRIALS, 1, 1, 1, generator=generator)
        return self.gives_the_same(torch.randn(_TRIALS, 1, 3, self._size, generator=generator) * sizes)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _epsilon(module: nn.Module) -> float:
    """What a norm adds to the mean of squares; 0 for what is no norm."""
    values = (getattr(module, name, None) for name in ("variance_epsilon", "eps"))
    return next((value for value in values if isinstance(value, float)), 0.0)
