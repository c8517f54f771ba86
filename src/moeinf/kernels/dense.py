"""The linear layers of the dense part, by the native library where one token goes through them.

While decoding they are read once per token like the experts, and torch reads a matrix for one vector at half the rate
at which memory gives it. The library adds products in torch's own order where the processor has AVX-512 BF16
(csrc/dot_pairs.c), which is tried for every shape that a model has, so the model's output does not change.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p

import torch
import torch.nn.functional as F
from torch import nn

from .native import NativePool

__all__ = ["speed_up_linears"]

_TRIALS = 2


def speed_up_linears(model: nn.Module, pool: NativePool) -> int:
    """Let `pool` compute the linear layers of `model` in bfloat16, in steps of one token, if it gives torch's results
    to the last bit; other steps are torch's as before. Weights must not be replaced afterwards.

    Returns how many layers it computes from now on.
    """
    is_exact: dict[tuple[int, int, bool], bool] = {}
    replaced = 0
    if not pool.adds_as_torch_does:
        return replaced
    for module in model.modules():
        if type(module) is not nn.Linear or not _is_plain(module.weight, module.bias):
            continue
        shape = (*module.weight.shape, module.bias is not None)
        native = _NativeLinear(module.weight, module.bias, pool)
        if shape not in is_exact:
            is_exact[shape] = _gives_the_same(native)
        if is_exact[shape]:
            module.forward = native  # type: ignore[method-assign, assignment]  # of this module alone
            replaced += 1
    return replaced


class _LinearLayer(ctypes.Structure):
    """`moe_linear_layer` of moe.h."""

    _fields_ = (("inputs", c_int64), ("outputs", c_int64), ("weight", c_void_p), ("bias", c_void_p))


class _NativeLinear:
    """What `nn.Linear.forward` computes."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, pool: NativePool) -> None:
        self.weight, self.bias = weight, bias
        self._pool = pool
        self._outputs, self._inputs = weight.shape
        self._layer = _LinearLayer(
            self._inputs, self._outputs, weight.data_ptr(), None if bias is None else bias.data_ptr()
        )
        self._address = ctypes.addressof(self._layer)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() != self._inputs or x.dtype != torch.bfloat16 or self._pool.handle is None:
            return F.linear(x, self.weight, self.bias)
        x = x.contiguous()
        output = torch.empty(*x.shape[:-1], self._outputs, dtype=torch.bfloat16)
        if self._pool.lib.moe_linear(self._pool.handle, self._address, x.data_ptr(), output.data_ptr()):
            raise MemoryError("no memory for the input of a linear layer")
        return output


def _is_plain(*tensors: torch.Tensor | None) -> bool:
    present = [tensor for tensor in tensors if tensor is not None]
    return all(tensor.dtype == torch.bfloat16 and tensor.is_contiguous() for tensor in present)


def _gives_the_same(native: _NativeLinear) -> bool:
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for _ in range(_TRIALS):
            x = torch.randn(1, native.weight.shape[1], generator=generator).to(torch.bfloat16)
            if not torch.equal(native(x), F.linear(x, native.weight, native.bias)):
                return False
    return True
