"""Decoder layers compiled by torch: what lies between a layer's experts and its KV cache becomes a few kernels instead
of one for each operation.

The layers of a model share their code, so it is compiled once for a prompt and once for single tokens, when they first
come. Experts, the KV cache and hooks are left out of it: compiled code calls them as plain Python does.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .errors import UnsupportedError
from .kvcache import leave_out_of_compilation

__all__ = ["compile_layers", "load_compiler"]

_OPTIONS: dict[str, Any] = {"emulate_precision_casts": True}
"""Of torch's own compiler: round where the layers' own code rounds."""
_MOST_VARIANTS = 64
"""Of a piece of code: kinds of layers, with and without masks, for one token and for many."""


def load_compiler() -> None:
    """Have torch's compiler in memory, which it is loaded into when it is first asked for otherwise."""
    importlib.import_module("torch._inductor.compile_fx")


def compile_layers(model: nn.Module, experts: list[nn.Module], place: torch.device, backend: str = "inductor") -> None:
    """Compile the decoder layers of `model`, which is on `place`, around its `experts` modules, one per MoE layer, and
    around the hooks that are there by now.

    Raises UnsupportedError if nothing can be compiled for `place` here.
    """
    _check_compiler(place, backend)
    torch._dynamo.config.allow_unspec_int_on_nn_module = True  # a layer's number is no reason for other code
    torch.compiler.config.recompile_limit = max(_MOST_VARIANTS, torch.compiler.config.recompile_limit)
    leave_out: Any = torch.compiler.disable  # untyped
    leave_out_of_compilation()
    for module in experts:
        module.forward = leave_out(module.forward)
    layers: list[Any] = [each for each in model.modules() if isinstance(each, GradientCheckpointingLayer)]
    for layer in layers:
        for module in layer.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                hooks.update((number, leave_out(hook)) for number, hook in list(hooks.items()))
        options = _OPTIONS if backend == "inductor" else None
        layer.forward = torch.compile(layer.forward, backend=backend, options=options)


def _check_compiler(place: torch.device, backend: str) -> None:
    one = torch.ones(1, device=place)
    try:
        torch.compile(torch.neg, backend=backend)(one)
    except Exception as error:  # compilers fail in many ways
        lines = str(error).strip().splitlines()
        raise UnsupportedError(
            f"torch cannot compile for {place} here: {lines[0] if lines else type(error).__name__}",
            hint="install what it lacks (a C++ compiler for a processor, Triton for a GPU), or leave --compile out",
        ) from error
