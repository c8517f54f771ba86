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
from collections.abc import Callable, Iterator
from ctypes import c_int64, c_void_p
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moeinf.metamodel import CACHE

from .attention import AttentionCall, NativeAttention
from .dense import NativeLinear, NativeNorm
from .native import WANTS_MORE, one_thread
from .watching import hooks_of

__all__ = ["NativeSelfAttention", "SelfAttentions", "States", "TrialCache", "kind_of"]

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = ("q_norm", "k_norm")
_ASKED = {"hidden_states", "position_embeddings", "attention_mask", CACHE}
"""What a module's forward may ask for by name. Whatever else it takes it hands on."""
_MEANT_FOR_OTHERS = {"cache_position", "position_ids", "use_cache"}
"""What decoder layers hand on, and attention that has its angles and its cache does not look at."""
_TRIALS = ((1, 1.0), (37, 30.0), (520, 1e3))
"""Tokens in the cache, the new one included, and the size of a state: sizes at which whoever limits something does."""

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
        self._is_exact, self._kind = shared.is_exact, kind_of(module)
        projections = [getattr(module, name).forward.layer for name in _PROJECTIONS]
        norms = [getattr(module, name).forward.layer if hasattr(module, name) else None for name in _NORMS]
        query, key, *_ = projections
        self._hidden, self._size = query.inputs, module.head_dim
        self._hooks = hooks_of(module.children())
        self._known_for = 0
        self._parts = projections, norms  # which have these addresses
        self.layer = _SelfAttention(0, *(part and ctypes.addressof(part) for part in (*projections, *norms)))
        heads, kv_heads = (layer.outputs // self._size for layer in (query, key))
        self._scale: float = module.scaling
        self._what = AttentionCall(heads, kv_heads, self._size, scale=self._scale)
        self.between = shared.between(2 * (query.outputs + key.outputs))
        self.output = None if shared.attention.knows(heads, kv_heads, self._size) else projections[-1]
        """What torch's attention is followed by; None where attention is native."""

    def __call__(self, *args: Any, **named: Any) -> Any:
        output = None if args or any(self._hooks) else self._compute(**named)
        return self._forward(*args, **named) if output is None else (output, None)

    def _compute(self, hidden_states: torch.Tensor | None = None, **others: Any) -> torch.Tensor | None:
        """The output [1, 1, H] for one token [1, 1, H]; None if it is anything else, and then nothing has changed."""
        cache = others.pop(CACHE, None)
        if hidden_states is None or not self.takes(hidden_states, **others) or (states := self.grow(cache)) is None:
            return None
        return self._attend(hidden_states, others["position_embeddings"], states)

    def takes(
        self,
        hidden: torch.Tensor,
        position_embeddings: States | None = None,
        attention_mask: torch.Tensor | None = None,
        **others: Any,
    ) -> bool:
        """Whether the library can attend to this token, as the module would that is given the same."""
        if hidden.numel() != self._hidden or attention_mask is not None or position_embeddings is None:
            return False
        if self._pool.handle is None or not all(map(_is_of_no_matter, others.items())):
            return False
        cos, sin = position_embeddings
        return hidden.dtype == cos.dtype == sin.dtype == torch.bfloat16 and self._turns(cos, sin)

    def grow(self, cache: Any) -> States | None:
        """Keys and values that `cache` holds for this layer, and room for the token's; None where there is none."""
        layers = getattr(cache, "layers", ())
        layer = layers[self._place] if self._place < len(layers) else None
        grow: Callable[[], States | None] | None = getattr(layer, "grow", None)
        return grow() if grow is not None else None

    def _turns(self, cos: torch.Tensor, sin: torch.Tensor) -> bool:
        """Whether these are the angles of a head, or of its first numbers, for one token, and come out the same."""
        turned = cos.shape[-1]
        if not cos.shape == sin.shape == (1, 1, turned) or turned > self._size or turned % 2:
            return False
        if turned != self._known_for:
            kind = *self._kind, turned
            if kind not in self._is_exact:
                self._is_exact[kind] = self._try(turned)
            if not self._is_exact[kind]:
                return False
            self._known_for = turned
        return True

    def _attend(self, hidden: torch.Tensor, angles: States, states: States) -> torch.Tensor:
        """Keys and values [1, KV heads, tokens, size] get those of the token as their last."""
        hidden, cos, sin = (each.contiguous() for each in (hidden, *angles))
        output = torch.empty_like(hidden)
        what = self.point_to(cos, *states)
        if self.output is None:
            self._call(what, hidden, cos, sin, output.data_ptr())
        else:
            self._pool.apply(self.output, self.attend_by_torch(hidden, cos, sin, states), output)
        return output

    def point_to(self, cos: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> int:
        """The address of what says that these are attended to, by queries that so many angles turn."""
        self.layer.turned = cos.shape[2]
        self._what.point_to(keys, values)
        return ctypes.addressof(self._what)

    def attend_by_torch(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, states: States
    ) -> torch.Tensor:
        """What the output's projection is given, after `point_to`, where attention itself is not native."""
        self._call(ctypes.addressof(self._what), hidden, cos, sin, None)
        heads = self._what.heads
        query = self.between[: heads * self._size].view(1, heads, 1, self._size)
        with one_thread(NativeAttention.is_small(query, states[0].shape[2])):
            return F.scaled_dot_product_attention(query, *states, scale=self._scale, enable_gqa=True).contiguous()

    def _call(self, what: int, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, into: int | None) -> None:
        addresses = (x.data_ptr() for x in (hidden, cos, sin, self.between))
        if self._pool.lib.moe_self_attend(self._pool.handle, ctypes.addressof(self.layer), what, *addresses, into):
            raise MemoryError("no memory for the attention of a token")

    def trials(self, turned: int, rounds: int = 1) -> Iterator[tuple[torch.Tensor, States, TrialCache]]:
        """States of one token, their angles, and what is in the cache by then."""
        generator = torch.Generator().manual_seed(0)
        for tokens, spread in _TRIALS * rounds:
            hidden = (torch.randn(1, 1, self._hidden, generator=generator) * spread).bfloat16()
            cos, sin = (torch.randn(1, 1, turned, generator=generator).bfloat16() for _ in range(2))
            shape = 1, self._what.kv_heads, tokens, self._size
            keys, values = (torch.randn(shape, generator=generator).bfloat16() for _ in range(2))
            yield hidden, (cos, sin), TrialCache(keys, values)

    def _try(self, turned: int) -> bool:
        with torch.inference_mode():
            for hidden, angles, cache in self.trials(turned):
                keys, values = (states.clone() for states in cache.states)
                given = {"position_embeddings": angles, "attention_mask": None, CACHE: cache}
                try:
                    output, weights = self._forward(hidden_states=hidden, **given)
                except WANTS_MORE:
                    return False
                ours = self._attend(hidden, angles, (keys, values)), keys, values
                if weights is not None or not all(map(torch.equal, ours, (output, *cache.states))):
                    return False
        return True


def _is_of_no_matter(named: tuple[str, Any]) -> bool:
    """Whether what a decoder layer hands on changes nothing here."""
    name, value = named
    return value is None or value is False or name in _MEANT_FOR_OTHERS


class TrialCache:
    """A KV cache whose last token is there already, and is written over."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.states: States = keys, values

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> States:
        for states, new in zip(self.states, (keys, values), strict=True):
            states[:, :, -1:] = new
        return self.states


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


def kind_of(module: nn.Module) -> tuple[object, ...]:
    """What modules that compute alike have in common."""
    settings = {name: value for name, value in vars(module).items() if isinstance(value, int | float | str | None)}
    settings.pop("layer_idx", None)
    shapes = [(name, weight.shape) for name, weight in module.named_parameters()]
    return type(module), *sorted(map(repr, settings.items())), *shapes
