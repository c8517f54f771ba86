"""The maths of experts, and what computes it: torch, or the native library where a layer is of a kind that it knows.

`torch_maths` is transformers' own maths and the reference, on any device; `native` gives decoding to a library in C
(csrc/) that reads weights as fast as memory gives them and rounds where torch rounds; `dense` and `attention` give it
what lies between them, too, `packed` linear layers among it. `triton_maths` has kernels for a GPU. `convolution` has
torch itself do sooner what it is slow at. Knows nothing of caches.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack

import torch
from torch import nn

from moeinf.errors import UnsupportedError
from moeinf.manifest import ExpertLayout
from moeinf.quantized import fill_randomly
from moeinf.shared_library import NotNativeError

from .attention import NativeAttention
from .convolution import speed_up_convolutions
from .decoder_layer import DecoderLayers, Keeper, LayerRun, NativeDecoderLayer, Slots
from .delta_rule import NativeDeltaRule
from .dense import NativeLinear, compute_packed, speed_up
from .mlp import speed_up_mlps
from .native import (
    ExpandingMaths,
    NativeMaths,
    NativePool,
    can_add_as_torch_does,
    computes_any_rows,
    may_compute_any_rows,
    one_thread,
)
from .packed import LosslessLinear
from .self_attention import SelfAttentions
from .sinks import NativeSinks
from .torch_maths import DeviceSlots, ExpertMaths, PromptMaths, Tensors, TokenMaths
from .watching import Hooks, Watching, all_watch, hooks_of, silenced

__all__ = [
    "DecoderLayers",
    "DeviceSlots",
    "ExpertMaths",
    "Hooks",
    "Keeper",
    "LayerRun",
    "LosslessLinear",
    "NativeAttention",
    "NativeDecoderLayer",
    "NativeDeltaRule",
    "NativeLinear",
    "NativeMaths",
    "NativeSinks",
    "PromptMaths",
    "SelfAttentions",
    "Slots",
    "Tensors",
    "TokenMaths",
    "Watching",
    "all_watch",
    "choose_device_maths",
    "choose_maths",
    "computes_from_packed",
    "expands_for_a_token",
    "hooks_of",
    "is_native_exactly",
    "may_take_long_prompts",
    "one_thread",
    "silenced",
    "speed_up_convolutions",
    "speed_up_dense",
    "takes_long_prompts",
]

_TRIALS = 2
_TRIAL_ROWS = (1, 2, 40, 100)
_OTHER_ORDER = "native kernels add in another order than torch on this processor; --kernels native takes them anyway"


def choose_maths(
    modules: Iterable[nn.Module], layout: ExpertLayout, kernels: str, scratch: Tensors, on_close: ExitStack
) -> list[ExpertMaths]:
    """What computes each of `modules`, the experts modules of a model whose experts lie as `layout` says.

    `kernels` is the engine's option: `torch`; `native`, which raises UnsupportedError where that cannot be had; or
    `auto`, which takes native maths for the layers that can have it, if it then gives torch's results to the last bit.
    That is tried with the first of them, on numbers that are written to `scratch`, the tensors of a slot; all add up in
    the order that is found. Quantised experts are not those that
    were released, and native maths rounds them less than torch does: `auto` takes it untried. `on_close` gets what ends
    the native threads.
    """
    modules = list(modules)
    if kernels == "torch":
        return [ExpertMaths(module, layout.quantization) for module in modules]
    try:
        pool = NativePool(torch.get_num_threads())
    except NotNativeError as error:
        _refuse(error, kernels)
        return [ExpertMaths(module, layout.quantization, str(error)) for module in modules]
    on_close.callback(pool.close)
    maths = [_native_maths(module, layout, pool, kernels) for module in modules]
    if not layout.is_exact:
        return maths
    native = [(one, module) for one, module in zip(maths, modules, strict=True) if isinstance(one, NativeMaths)]
    if native:
        is_exact = _is_exact(*native[0], layout, scratch)
        if kernels == "auto" and not is_exact:
            return [ExpandingMaths(module, layout, pool, _OTHER_ORDER) for module in modules]
        is_exact_for_rows = kernels == "native" or _is_exact_for_rows(*native[0], layout, scratch)
        for one, _ in native:
            one.add_as(native[0][0])
            one.takes_prompts &= is_exact_for_rows
    return maths


def choose_device_maths(
    modules: Iterable[nn.Module], layout: ExpertLayout, kernels: str, slots: DeviceSlots
) -> list[ExpertMaths]:
    """The same for a device with memory of its own, in whose `slots` the experts are: torch, unless `kernels` is
    `triton`, which adds in another order and so is never taken unasked. Raises UnsupportedError where it cannot be had.
    """
    if kernels != "triton":
        return [ExpertMaths(module, layout.quantization) for module in modules]
    if layout.quantization is not None:
        raise UnsupportedError("--kernels triton do not compute quantised experts", hint="leave --kernels out")
    try:
        from .triton_maths import TritonMaths
    except ImportError as error:
        raise UnsupportedError(
            "--kernels triton: triton is not installed", hint="pip install triton, or leave --kernels out"
        ) from error
    return [TritonMaths(module, slots) for module in modules]


def is_native_exactly(kernels: str) -> bool:
    """Whether with these `kernels`, the engine's option, the library multiplies a dense part in bfloat16 as torch does.
    Dense weights that are packed without loss then stay so.
    """
    return kernels != "torch" and can_add_as_torch_does()


def computes_from_packed() -> bool:
    """Whether an engine that is told nothing computes from weights that are packed without loss, as fast as it reads
    them or nearly so: not on a GPU, which has them unpacked for each product.
    """
    return is_native_exactly("auto") and not torch.cuda.is_available()


def takes_long_prompts(kernels: str, layout: ExpertLayout) -> bool:
    """Whether with these `kernels` the library may compute all of a long prompt's experts, as torch does if they are
    exact. Else torch computes those with many rows, and makes programs for that.
    """
    return is_native_exactly(kernels) and computes_any_rows(layout)


def may_take_long_prompts(kernels: str, layout: ExpertLayout) -> bool:
    """Whether that may turn out so: the same without a trial."""
    return kernels != "torch" and may_compute_any_rows(layout)


def expands_for_a_token(model: nn.Module, maths: Iterable[ExpertMaths], layout: ExpertLayout) -> bool:
    """Whether any packed weight of `model` or its experts is expanded for each token, not for prompts alone."""
    if layout.expanded_bytes and not all(isinstance(each, NativeMaths) for each in maths):
        return True
    packed = (module for module in model.modules() if isinstance(module, LosslessLinear))
    return not all(isinstance(layer.forward, NativeLinear) for layer in packed)


def speed_up_dense(model: nn.Module, maths: Iterable[ExpertMaths]) -> NativeAttention | None:
    """Have the threads of `maths` compute linear layers of `model` whose weights are packed; and where any of `maths`
    is native, what else they can, with torch's results to the last bit: linear layers and norms, from now on, and
    attention, by what is returned.
    """
    expanding = [each for each in maths if isinstance(each, ExpandingMaths)]
    if not expanding:
        return None
    pool = expanding[0].pool
    compute_packed(model, pool)
    if not any(isinstance(each, NativeMaths) for each in expanding):
        return None
    speed_up(model, pool)
    speed_up_mlps(model, pool)
    return NativeAttention(pool)


def _native_maths(module: nn.Module, layout: ExpertLayout, pool: NativePool, kernels: str) -> ExpertMaths:
    try:
        return NativeMaths(module, layout, pool)
    except NotNativeError as error:
        _refuse(error, kernels)
        return ExpandingMaths(module, layout, pool, str(error))


def _refuse(error: NotNativeError, kernels: str) -> None:
    """Raise UnsupportedError if `kernels` asks for what cannot be had."""
    if kernels == "native":
        raise UnsupportedError(f"--kernels native: {error}", hint="leave --kernels out, or give --kernels torch")


def _is_exact(native: NativeMaths, module: nn.Module, layout: ExpertLayout, scratch: Tensors) -> bool:
    """Whether it gives what torch gives for an expert of random numbers and one token, to the last bit."""
    generator = torch.Generator().manual_seed(0)
    fill_randomly(scratch, layout.quantization, generator)
    if native.dtype == torch.bfloat16 and not (native.pool.adds_as_torch_does and native.adds_alike(scratch, 1)):
        return False
    if not native.activates_alike:
        return False
    weights = torch.ones(1, 1, dtype=native.dtype)
    for _ in range(_TRIALS):
        hidden = torch.randn(1, native.layer.hidden, generator=generator).to(native.dtype)
        results = []
        for maths in (native, ExpandingMaths(module, layout, native.pool)):
            token = maths.token(hidden, weights)
            token.compute([0], [scratch])
            results.append(token.total([0]))
        if not torch.equal(*results):
            return False
    return True


def _is_exact_for_rows(native: NativeMaths, module: nn.Module, layout: ExpertLayout, scratch: Tensors) -> bool:
    """The same for some rows of a prompt, with the numbers that are in `scratch`."""
    if not native.takes_prompts:
        return True
    if not (native.activates_rows_alike and all(native.adds_alike(scratch, rows) for rows in _TRIAL_ROWS)):
        return False
    generator = torch.Generator().manual_seed(1)
    for rows in _TRIAL_ROWS:
        hidden = torch.randn(rows, native.layer.hidden, generator=generator).to(native.dtype)
        weights, index = torch.ones(rows, 1, dtype=native.dtype), torch.zeros(rows, 1, dtype=torch.int64)
        results = []
        for maths in (native, ExpandingMaths(module, layout, native.pool)):
            prompt = maths.prompt(hidden, index, weights, 1)
            prompt.compute([0], [scratch])
            results.append(prompt.total())
        if not torch.equal(*results):
            return False
    return True
