"""A gated MLP of the dense part for one token in one call of the native library: gate, activation, up, product, down.
Shared experts are such MLPs, and what stands in place of experts in layers that have none.

Its linear layers are native and torch's to the last bit by themselves (`dense`); of the activation the library has a
table, of every bfloat16. No family is named: a module is taken when it has the usual parts under their usual names, and
gives on trial what these give in the usual order.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_void_p
from typing import Any

import torch
from torch import nn

from .dense import NativeLinear
from .native import TAIL, WANTS_MORE, WHOLE, NativePool, every_bfloat16
from .self_attention import kind_of
from .watching import hooks_of

__all__ = ["NativeMlp", "speed_up_mlps"]

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_ACTIVATION = "act_fn"
_TRIALS = (1.0, 30.0, 1e3)
"""Sizes of a state."""


class _MlpLayer(ctypes.Structure):
    """`moe_mlp_layer` of moe.h."""

    _fields_ = tuple((name, c_void_p) for name in ("gate", "up", "down", "values", "inner"))


def speed_up_mlps(model: nn.Module, pool: NativePool) -> int:
    """Let `pool` compute the gated MLPs of `model` whose linear layers it computes, for one token, if it gives torch's
    results to the last bit. Returns how many it computes.
    """
    mlps = _Mlps(pool)
    replaced = 0
    for module in model.modules():
        if _has_usual_parts(module) and (native := mlps.find(module)) is not None:
            module.forward = native  # of this one alone
            replaced += 1
    return replaced


class _Mlps:
    """Finds what can stand in for the MLPs of one model."""

    def __init__(self, pool: NativePool) -> None:
        self.pool = pool
        self._values: dict[tuple[object, ...], torch.Tensor | None] = {}
        """Of modules of a kind, which differ in their weights alone, what their activation makes of every bfloat16;
        None where they came out otherwise when they were tried.
        """
        self._between: dict[int, torch.Tensor] = {}

    def find(self, module: Any) -> NativeMlp | None:
        kind = tuple(map(kind_of, module.modules()))
        if kind not in self._values:
            self._values[kind] = self._try(module)
        values = self._values[kind]
        return None if values is None else self._stand_in(module, values)

    def _stand_in(self, module: Any, values: torch.Tensor) -> NativeMlp:
        inner = module.gate_proj.forward.layer.outputs
        between = self._between.setdefault(inner, torch.empty(2 * inner, dtype=torch.bfloat16))
        return NativeMlp(module, self.pool, values, between)

    def _try(self, module: Any) -> torch.Tensor | None:
        with torch.inference_mode():
            try:
                values = self.pool.keep(_tabulate(getattr(module, _ACTIVATION)))
                return values if self._stand_in(module, values).is_exact() else None
            except WANTS_MORE:
                return None


class NativeMlp:
    """The forward of an MLP, which the library computes for one token or leaves to the module. `values` is what the
    activation makes of every bfloat16, and `between` memory for what gate and up make.
    """

    def __init__(self, module: Any, pool: NativePool, values: torch.Tensor, between: torch.Tensor) -> None:
        self._forward: Callable[..., torch.Tensor] = module.forward
        self.pool = pool
        self._hooks = hooks_of(module.children())
        self._activation = getattr(module, _ACTIVATION)
        linear = [getattr(module, name).forward.layer for name in _PROJECTIONS]
        self._parts = linear, values, between  # which have these addresses
        addresses = map(ctypes.addressof, linear)
        self.layer = _MlpLayer(*addresses, values.data_ptr(), between.data_ptr())
        self._address = ctypes.addressof(self.layer)
        self.hidden, self._inner = linear[0].inputs, linear[0].outputs

    def __call__(self, x: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
        is_token = x.numel() == x.shape[-1] == self.hidden and x.dtype == torch.bfloat16
        if more or named or not is_token or self.pool.handle is None or any(self._hooks):
            return self._forward(x, *more, **named)
        return self.compute(x)

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        output = torch.empty_like(x)
        if self.pool.lib.moe_mlp(self.pool.handle, self._address, x.data_ptr(), output.data_ptr()):
            raise MemoryError("no memory for the input of an MLP")
        return output

    def is_exact(self) -> bool:
        """Whether it gives what the module gives."""
        generator = torch.Generator().manual_seed(0)
        states = [(torch.randn(1, 1, self.hidden, generator=generator) * size).bfloat16() for size in _TRIALS]
        is_smooth = self._inner % WHOLE == 0 or _has_no_tails(self._activation)
        return is_smooth and all(torch.equal(self.compute(x), self._forward(x)) for x in states)


def _has_usual_parts(module: Any) -> bool:
    """Whether it has all that a gated MLP usually has, all of it native, and nothing else."""
    parts = dict(module.named_children())
    if not {*_PROJECTIONS} <= parts.keys() <= {*_PROJECTIONS, _ACTIVATION}:
        return False
    others = [module, *(child for name, child in parts.items() if name == _ACTIVATION)]
    if any(list(each.parameters(recurse=False)) or list(each.buffers(recurse=False)) for each in others):
        return False
    linear = [parts[name].forward for name in _PROJECTIONS]
    if not all(isinstance(each, NativeLinear) for each in linear) or not callable(getattr(module, _ACTIVATION, None)):
        return False
    gate, up, down = (each.layer for each in linear)
    return (gate.inputs, gate.outputs) == (up.inputs, up.outputs) == (down.outputs, down.inputs)


def _tabulate(activation: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return activation(every_bfloat16()).contiguous()


def _has_no_tails(activation: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Whether it makes the same of few numbers as of many."""
    few = torch.cat([activation(each) for each in torch.split(every_bfloat16(), TAIL)])
    return torch.allclose(few, _tabulate(activation), rtol=0, atol=0, equal_nan=True)
