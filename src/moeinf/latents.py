"""Multi-head latent attention: keys and values that were made of latents once are kept.

Families with such attention (DeepSeek's and those that followed) keep one small vector per token and layer in the KV
cache, and transformers makes keys and values of every head of all of them, for each new token. They stay the same as
long as the latents do, so those of the new tokens are enough (docs/kernels.md). No family is named: it is the method
`expand_kv` of attention modules that is replaced. Owns what is kept, and knows when it is out of date; the latents are
the KV cache's.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from .kernels import NativeLinear
from .kvcache import GrowingLayer, States, set_aside
from .metamodel import CACHE

__all__ = ["keep_expanded"]

_EXPAND = "expand_kv"
_TRIALS = (1, 2, 40)
"""Tokens that are expanded apart, to see whether that changes what they become."""


def keep_expanded(model: nn.Module, most_bytes: int) -> int:
    """Keep what attention modules of `model` expand of latents, in `most_bytes` at most, where that changes nothing to
    the last bit: where a projection's outputs are added up alike for one token and for many.

    Returns how many tokens there is room for; of longer sequences all is expanded anew for each token.
    """
    known: dict[tuple[int, ...], bool] = {}
    modules = [module for module in model.modules() if _expands_alike(module, known)]
    tokens = most_bytes // sum(map(_token_bytes, modules)) if modules else 0
    for module in modules if tokens else ():
        module.expand_kv = _Expanded(module, tokens)  # type: ignore[assignment]  # of this one alone
    return tokens


class _Expanded:
    """The `expand_kv` of one module: latents [1, 1, tokens, rank] and turned parts [1, 1, tokens, size] to keys and
    values [1, heads, tokens, size].
    """

    def __init__(self, module: Any, capacity: int) -> None:
        self._expand = module.expand_kv
        self._place: int = module.layer_idx
        self._capacity = capacity
        self._memory: States | None = None
        self._layer: weakref.ref[GrowingLayer] | None = None
        """Of whose latents these are made."""
        self._cache: Any = None
        self._forward = module.forward
        module.forward = self._seeing_cache

    def __call__(self, latents: torch.Tensor, turned: torch.Tensor) -> States:
        layer, tokens = self._find_layer(latents), latents.shape[2]
        if layer is None or tokens > self._capacity:
            expanded: States = self._expand(latents, turned)
            return expanded
        known = layer.unchanged if self._layer is not None and self._layer() is layer else 0
        if known < tokens:
            new = self._expand(latents[:, :, known:], turned[:, :, known:])
            if self._memory is None:
                with torch.inference_mode(False):  # or nobody else may write there
                    keys, values = (set_aside(states, self._capacity) for states in new)
                self._memory = keys, values
            for memory, states in zip(self._memory, new, strict=True):
                memory[:, :, known:tokens] = states
            if self._layer is None or self._layer() is not layer:
                self._layer = weakref.ref(layer, self._forget)
            layer.unchanged = tokens
        assert self._memory is not None
        keys, values = self._memory
        return keys[:, :, :tokens], values[:, :, :tokens]

    def _find_layer(self, latents: torch.Tensor) -> GrowingLayer | None:
        """The layer of the KV cache that holds `latents`, if one does from its first token on."""
        layers = getattr(self._cache, "layers", ())
        layer = layers[self._place] if self._place < len(layers) else None
        if not isinstance(layer, GrowingLayer) or layer.keys is None or latents.shape != layer.keys.shape:
            return None
        return layer if latents.data_ptr() == layer.keys.data_ptr() and len(latents) == 1 else None

    def _forget(self, layer: weakref.ref[GrowingLayer]) -> None:
        """The conversation has ended, and its memory is somebody else's."""
        if layer is self._layer:
            self._memory = self._layer = None

    def _seeing_cache(self, *args: Any, **named: Any) -> Any:
        """The module's forward. (Hooks would have everybody think that somebody else wants to be told of tokens.)"""
        self._cache = named.get(CACHE)
        try:
            return self._forward(*args, **named)
        finally:
            self._cache = None


def _expands_alike(module: Any, known: dict[tuple[int, ...], bool]) -> bool:
    """Whether it is attention that makes the same of latents one by one as of all at once, which is tried once for each
    shape of projection.
    """
    projection = getattr(module, "kv_b_proj", None)
    native = getattr(projection, "forward", None)
    if not hasattr(module, _EXPAND) or not isinstance(native, NativeLinear) or not native.adds_rows_alike:
        return False
    shape = native.layer.inputs, native.layer.outputs
    if shape not in known:
        known[shape] = _is_alike(module)
    return known[shape]


def _is_alike(module: Any) -> bool:
    latents, turned = _random_latents(module, max(_TRIALS))
    with torch.inference_mode():
        everything = module.expand_kv(latents, turned)
        for tokens in _TRIALS:
            parts = module.expand_kv(latents[:, :, -tokens:], turned[:, :, -tokens:])
            if not all(torch.equal(part, all_[:, :, -tokens:]) for part, all_ in zip(parts, everything, strict=True)):
                return False
    return True


def _token_bytes(module: Any) -> int:
    heads = module.kv_b_proj.out_features // (module.qk_nope_head_dim + module.v_head_dim)
    numbers: int = heads * (module.qk_nope_head_dim + module.qk_rope_head_dim + module.v_head_dim)
    return numbers * torch.bfloat16.itemsize


def _random_latents(module: Any, tokens: int) -> States:
    generator = torch.Generator().manual_seed(0)
    latents, turned = (
        torch.randn(1, 1, tokens, width, generator=generator).bfloat16()
        for width in (module.kv_lora_rank, module.qk_rope_head_dim)
    )
    return latents, turned
