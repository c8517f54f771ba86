"""All of a layer's attention for one token in one call of the native library: projections, norms of queries and keys,
rotary embedding, KV cache, attention, output.

What it is made of is native and torch's to the last bit by itself (`dense`, `attention`); what is saved are the
small steps of Python between. Where attention itself is not native, torch attends between what comes before it and the
output's projection. No family is named: a module is taken when it has the usual parts under their usual names, and
gives on trial what these give in the usual order.
"""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable
from ctypes import c_int64, c_void_p
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moeinf.metamodel import CACHE

from .attention import AttentionCall, NativeAttention
from .dense import NativeLinear, NativeNorm

__all__ = ["SelfAttentions"]

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = ("q_norm", "k_norm")
_ASKED = {"hidden_states", "position_embeddings", "attention_mask", CACHE}
"""What a module's forward may ask for by name. Whatever else it takes it hands on."""
_MEANT_FOR_OTHERS = {"cache_position", "position_ids", "use_cache"}
"""What decoder layers hand on, and attention that has its angles and its cache does not look at."""
_TRIALS = ((1, 1.0), (37, 30.0), (520, 1e3))
"""Tokens in the cache, the new one included, and the size of a state: sizes at which whoever limits something does."""

_ONE_THREAD = 1 << 21
"""Fewer numbers than this in the keys of all heads are attended to sooner by one of torch's threads: the others would
have to wake up, on cores where the library's look out for work (docs/experiments.md)."""

States = tuple[torch.Tensor, torch.Tensor]


class _SelfAttention(ctypes.Structure):
    """`moe_self_attention` of moe.h."""

    _fields_ = (
        ("turned", c_int64),
        *((name, c_void_p) for name in ("query", "key", "value", "output", "query_norm", "key_norm")),
    )


class SelfAttentions:
    """Finds what can stand in for the attention modules of one model. `attention` is what they attend with."""

    def __init__(self, attention: NativeAttention) -> None:
        self.attention = attention
        self.is_exact: dict[tuple[object, ...], bool] = {}
        """Whether modules of a kind, which differ in their weights alone, came out the same when they were tried."""
        self._between: dict[int, torch.Tensor] = {}

    def find(self, module: nn.Module) -> NativeSelfAttention | None:
        """The forward of `module` from now on, or None for one that is of another kind."""
        return NativeSelfAttention(module, self) if _has_usual_parts(module) else None

    def between(self, numbers: int) -> torch.Tensor:
        """Memory for so many numbers between two steps, which all modules share."""
        return self._between.setdefault(numbers, torch.empty(numbers, dtype=torch.bfloat16))


class NativeSelfAttention:
    """The forward of an attention module, which the library computes for one token if that gives what the module gives,
    or leaves to the module. That is tried when it is first asked for.
    """

    def __init__(self, module: Any, shared: SelfAttentions) -> None:
        self._forward = module.forward
        self._pool = shared.attention.pool
        self._place: int = module.layer_idx
        self._is_exact, self._kind = shared.is_exact, _kind(module)
        projections = [getattr(module, name).forward.layer for name in _PROJECTIONS]
        norms = [getattr(module, name).forward.layer if hasattr(module, name) else None for name in _NORMS]
        query, key, *_ = projections
        self._hidden, self._size = query.inputs, module.head_dim
        self._passed_over = list(module.children())
        self._parts = projections, norms  # which have these addresses
        self._layer = _SelfAttention(0, *(part and ctypes.addressof(part) for part in (*projections, *norms)))
        heads, kv_heads = (layer.outputs // self._size for layer in (query, key))
        self._scale: float = module.scaling
        self._what = AttentionCall(heads, kv_heads, self._size, scale=self._scale)
        self._between = shared.between(2 * (query.outputs + key.outputs))
        self._output = None if shared.attention.knows(heads, kv_heads, self._size) else projections[-1]
        """What torch's attention is followed by; None where attention is native."""

    def __call__(self, *args: Any, **named: Any) -> Any:
        output = None if args or self._is_watched() else self._compute(**named)
        return self._forward(*args, **named) if output is None else (output, None)

    def _compute(
        self,
        hidden_states: torch.Tensor | None = None,
        position_embeddings: States | None = None,
        attention_mask: torch.Tensor | None = None,
        **others: Any,
    ) -> torch.Tensor | None:
        """The output [1, 1, H] for one token [1, 1, H]; None if it is anything else, and then nothing has changed."""
        cache = others.pop(CACHE, None)
        if hidden_states is None or hidden_states.numel() != self._hidden or attention_mask is not None:
            return None
        if position_embeddings is None or self._pool.handle is None or not all(map(_is_of_no_matter, others.items())):
            return None
        cos, sin = position_embeddings
        if not hidden_states.dtype == cos.dtype == sin.dtype == torch.bfloat16 or not self._turns(cos, sin):
            return None
        layers = getattr(cache, "layers", ())
        layer = layers[self._place] if self._place < len(layers) else None
        grow: Callable[[], States | None] | None = getattr(layer, "grow", None)
        states = grow() if grow is not None else None
        return None if states is None else self._attend(hidden_states, cos, sin, *states)

    def _is_watched(self) -> bool:
        """Whether somebody wants to be told when parts are called, which they are not here."""
        return any(part._forward_hooks or part._forward_pre_hooks for part in self._passed_over)

    def _turns(self, cos: torch.Tensor, sin: torch.Tensor) -> bool:
        """Whether these are the angles of a head, or of its first numbers, for one token, and come out the same."""
        turned = cos.shape[-1]
        if not cos.shape == sin.shape == (1, 1, turned) or turned > self._size or turned % 2:
            return False
        kind = *self._kind, turned
        if kind not in self._is_exact:
            self._is_exact[kind] = self._try(turned)
        return self._is_exact[kind]

    def _attend(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """`keys` and `values` [1, KV heads, tokens, size] get those of the token as their last."""
        what, layer = self._what, self._layer
        layer.turned = cos.shape[2]
        what.point_to(keys, values)
        hidden, cos, sin = hidden.contiguous(), cos.contiguous(), sin.contiguous()
        output = torch.empty_like(hidden)
        structures = ctypes.addressof(layer), ctypes.addressof(what)
        addresses = (x.data_ptr() for x in (hidden, cos, sin, self._between))
        into = output.data_ptr() if self._output is None else None
        if self._pool.lib.moe_self_attend(self._pool.handle, *structures, *addresses, into):
            raise MemoryError("no memory for the attention of a token")
        if self._output is not None:
            query = self._between[: what.heads * self._size].view(1, what.heads, 1, self._size)
            self._pool.apply(self._output, self._attend_by_torch(query, keys, values), output)
        return output

    def _attend_by_torch(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        threads, heads = torch.get_num_threads(), query.shape[1]
        is_small = query.numel() * keys.shape[2] < _ONE_THREAD
        torch.set_num_threads(1 if is_small and heads > 1 else threads)  # a single one is cut among all of them
        try:
            return F.scaled_dot_product_attention(query, keys, values, scale=self._scale, enable_gqa=True).contiguous()
        finally:
            torch.set_num_threads(threads)

    def _try(self, turned: int) -> bool:
        generator = torch.Generator().manual_seed(0)
        with torch.inference_mode():
            for tokens, spread in _TRIALS:
                hidden = (torch.randn(1, 1, self._hidden, generator=generator) * spread).bfloat16()
                cos, sin = (torch.randn(1, 1, turned, generator=generator).bfloat16() for _ in range(2))
                shape = 1, self._what.kv_heads, tokens, self._size
                held = [torch.randn(shape, generator=generator).bfloat16() for _ in range(2)]
                cache, keys, values = _TrialCache(held), *(states.clone() for states in held)
                try:
                    output, weights = self._forward(
                        hidden_states=hidden,
                        position_embeddings=(cos, sin),
                        attention_mask=None,
                        **{CACHE: cache},
                    )
                except (AttributeError, TypeError, ValueError, LookupError, RuntimeError):
                    return False  # it wants more than this
                ours = self._attend(hidden, cos, sin, keys, values), keys, values
                if weights is not None or not all(map(torch.equal, ours, (output, *held))):
                    return False
        return True


def _is_of_no_matter(named: tuple[str, Any]) -> bool:
    """Whether what a decoder layer hands on changes nothing here."""
    name, value = named
    return value is None or value is False or name in _MEANT_FOR_OTHERS


class _TrialCache:
    """A KV cache whose last token is there already, and is written over."""

    def __init__(self, states: list[torch.Tensor]) -> None:
        self._states = states

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> list[torch.Tensor]:
        for states, new in zip(self._states, (keys, values), strict=True):
            states[:, :, -1:] = new
        return self._states


def _has_usual_parts(module: Any) -> bool:
    """Whether it has all that attention usually has, all of it native, and nothing else."""
    parts = dict(module.named_children())
    usual = {*_PROJECTIONS, *_NORMS} if "q_norm" in parts else {*_PROJECTIONS}
    if parts.keys() != usual or list(module.parameters(recurse=False)):
        return False
    if not all(isinstance(parts[name].forward, NativeLinear) for name in _PROJECTIONS):
        return False
    if not all(isinstance(parts[name].forward, NativeNorm) for name in usual.intersection(_NORMS)):
        return False
    size, scale = (getattr(module, name, None) for name in ("head_dim", "scaling"))
    if not isinstance(size, int) or not isinstance(scale, float) or not isinstance(module.layer_idx, int):
        return False
    query, key, value, output = (parts[name] for name in _PROJECTIONS)
    if (output.in_features, output.out_features) != (query.out_features, query.in_features):
        return False
    if key.out_features != value.out_features or query.out_features % size or key.out_features % size:
        return False
    forward = inspect.signature(type(module).forward)
    asked = {name for name, each in forward.parameters.items() if each.kind is not each.VAR_KEYWORD}
    return asked == {"self", *_ASKED}


def _kind(module: nn.Module) -> tuple[object, ...]:
    """What modules that compute alike have in common."""
    settings = {name: value for name, value in vars(module).items() if isinstance(value, int | float | str | None)}
    settings.pop("layer_idx", None)
    shapes = [(name, weight.shape) for name, weight in module.named_parameters()]
    return type(module), *sorted(map(repr, settings.items())), *shapes
