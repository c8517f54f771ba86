"""The maths of experts, and what computes it: torch, or the native library where a layer is of a kind that it knows.

`torch_maths` is transformers' own maths and the reference; `native` gives decoding to a library in C (csrc/) that
reads weights as fast as memory gives them and rounds where torch rounds. Knows nothing of caches.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack

import torch
from torch import nn

from moeinf.errors import UnsupportedError
from moeinf.manifest import ExpertLayout

from .native import NativeMaths, NativePool, NotNativeError
from .torch_maths import ExpertMaths, Tensors, TokenMaths, route

__all__ = ["ExpertMaths", "Tensors", "TokenMaths", "choose_maths", "route"]


def choose_maths(
    modules: Iterable[nn.Module], layout: ExpertLayout, kernels: str, on_close: ExitStack
) -> list[ExpertMaths]:
    """What computes each of `modules`, the experts modules of a model whose experts lie as `layout` says.

    `kernels` is the engine's option: `torch`; `native`, which raises UnsupportedError where that cannot be had; or
    `auto`, which takes native maths for the layers that can have it. `on_close` gets what ends the native threads.
    """
    if kernels == "torch":
        return [ExpertMaths(module) for module in modules]
    try:
        pool = NativePool(torch.get_num_threads())
    except NotNativeError as error:
        if kernels == "native":
            raise _refused(error) from None
        return [ExpertMaths(module, str(error)) for module in modules]
    on_close.callback(pool.close)
    maths: list[ExpertMaths] = []
    for module in modules:
        try:
            maths.append(NativeMaths(module, layout, pool))
        except NotNativeError as error:
            if kernels == "native":
                raise _refused(error) from None
            maths.append(ExpertMaths(module, str(error)))
    return maths


def _refused(error: NotNativeError) -> UnsupportedError:
    return UnsupportedError(f"--kernels native: {error}", hint="leave --kernels out, or give --kernels torch")
