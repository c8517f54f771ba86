"""A KV cache that grows in place: attention layers have room for the whole context, and hand out what is filled of it.

transformers' own layers make room for a token by copying all keys and values, which takes longer than attending to
them. Memory that is set aside is not held by the process before it is written, so there is no need to grow by steps,
and experts may have its room until then (ledger.py). Owns that memory. State of other kinds (recurrent, compressed,
shared) is kept as transformers keeps it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .ledger import SPARE_WINDOW
from .metamodel import CACHE
from .transfer import allocate_buffer

__all__ = [
    "GrowingLayer",
    "can_crop",
    "continues",
    "grows_in_place",
    "keeps_tokens",
    "leave_out_of_compilation",
    "make_cache",
    "pretend_cache",
    "set_aside",
    "windows_of",
]

States = tuple[torch.Tensor, torch.Tensor]

_TRIED_TOKENS = 3
_ALIKE = 0.1
"""Logits that differ by less of their size differ by rounding; by half, where a state was forgotten."""


class _GrowingCache(DynamicCache):
    """What `make_cache` makes: a kind of its own, which may be left out of compilation."""


def make_cache(config: PreTrainedConfig, context: int) -> Cache:
    """An empty cache for a model of `config` and one sequence of at most `context` tokens."""
    cache = _GrowingCache(config=config)
    cache.layers = [_in_place(layer, context) for layer in cache.layers]
    return cache


def can_crop(cache: Cache) -> bool:
    """Whether the state of every layer can be cut back: that of recurrent layers and of full sliding windows cannot."""
    layers = getattr(cache, "layers", None) or []
    is_croppable = getattr(cache, "is_croppable", True)  # not where something lies beside the layers
    return bool(layers) and is_croppable and all(type(layer) in (DynamicLayer, GrowingLayer) for layer in layers)


def continues(model: PreTrainedModel, context: int) -> bool:
    """Whether `model` goes on behind a cache with several tokens at once as if they had come together with those
    before, which is tried: transformers' jamba begins its recurrent state anew then.
    """
    untyped: Any = model
    if not getattr(untyped, "_is_stateful", False):
        return True
    ids = torch.arange(2 * _TRIED_TOKENS, device=model.device)[None]
    first, second = torch.split(ids, _TRIED_TOKENS, dim=1)
    cache = make_cache(model.config.get_text_config(decoder=True), context)
    with torch.inference_mode():
        whole = untyped(ids, use_cache=False).logits[0, -1].float()
        untyped(first, use_cache=True, **{CACHE: cache})
        parts = untyped(second, use_cache=True, **{CACHE: cache}).logits[0, -1].float()
    return bool((parts - whole).norm() <= _ALIKE * whole.norm())


def grows_in_place(cache: Any) -> bool:
    """Whether `make_cache` made it, and its memory counts as tokens come."""
    return any(isinstance(layer, GrowingLayer) for layer in getattr(cache, "layers", ()))


def keeps_tokens(cache: Any, layers: int) -> bool:
    """Whether `make_cache` made it, it has so many layers, and all of them keep the keys and values of tokens."""
    if type(cache) is not _GrowingCache or len(cache.layers) != layers:
        return False
    return all(isinstance(layer, GrowingLayer | _MovingLayer) for layer in cache.layers)


def pretend_cache(config: PreTrainedConfig, tokens: int) -> Cache:
    """A cache that says that it holds so many tokens, which it has no memory for."""
    cache = make_cache(config, tokens)
    nothing = torch.empty(1, 1, 1, 1)
    layers: list[Any] = cache.layers
    for layer in layers:
        held = nothing.expand(1, 1, tokens, 1)
        if isinstance(layer, _MovingLayer):
            layer.cumulative_length = tokens
            held = held[:, :, -layer.sliding_window + 1 :]
        layer.keys, layer.values, layer.is_initialized = held, held, True
    return cache


def windows_of(cache: Cache) -> set[int]:
    """How many tokens at most its layers let a token see, where that is limited."""
    return {layer.sliding_window for layer in cache.layers if isinstance(layer, _MovingLayer)}


def leave_out_of_compilation() -> None:
    """From now on code that torch.compile makes calls caches of `make_cache` as plain Python does, and is not made
    anew for each layer of them.
    """
    leave_out: Any = torch.compiler.disable  # untyped
    for name in ("update", "update_conv_state", "update_recurrent_state"):
        setattr(_GrowingCache, name, leave_out(getattr(DynamicCache, name)))


def set_aside(states: torch.Tensor, tokens: int) -> torch.Tensor:
    """Memory for so many tokens, shaped like `states` [1, heads, tokens, size], of which small pages count once they
    are written to, and no others.
    """
    shape = (*states.shape[:2], tokens, states.shape[3])
    size = math.prod(shape)
    if states.device.type != "cpu" or not size:
        return states.new_empty(shape)
    buffer = allocate_buffer(size * states.itemsize, in_huge_pages=False)
    return torch.frombuffer(buffer, dtype=states.dtype, count=size).view(shape)


def _in_place(layer: Any, context: int) -> Any:
    """What holds the same as `layer`, in place if it is of a kind that is known here."""
    if type(layer) is DynamicLayer:
        return GrowingLayer(context)
    if type(layer) is DynamicSlidingWindowLayer:
        return _MovingLayer(layer.sliding_window, context)
    return layer


class _Room:
    """Memory for the keys and values of `capacity` tokens, both shaped like `states` [1, heads, tokens, size]."""

    def __init__(self, states: States, capacity: int) -> None:
        self._capacity = capacity
        self._memory = [set_aside(each, capacity) for each in states]
        self._last, self._begin = self.nothing(), 0
        """What was asked for last, and how many tokens lie before it."""

    def nothing(self) -> States:
        keys, values = (memory[:, :, :0] for memory in self._memory)
        return keys, values

    def fits(self, held: States, count: int) -> bool:
        """Whether there is room for `count` tokens more."""
        return held[0].shape[2] + count <= self._capacity

    def put(self, held: States, new: States) -> States:
        """`held` and `new`, one behind the other."""
        everything = self.extend(held, new[0].shape[2])
        for states, added in zip(everything, new, strict=True):
            states[:, :, states.shape[2] - added.shape[2] :].copy_(added)
        return everything

    def extend(self, held: States, count: int) -> States:
        """`held`, and behind it room for `count` tokens that nobody has written. `held` is copied only if it is not a
        part of what was put here last, or has no room behind it.
        """
        tokens, begin = held[0].shape[2], self._begin
        if held[0] is not self._last[0] or held[1] is not self._last[1] or begin + tokens + count > self._capacity:
            begin = self._find(held, count)
        keys, values = (memory.narrow(2, begin, tokens + count) for memory in self._memory)
        self._last, self._begin = (keys, values), begin
        return keys, values

    def _find(self, held: States, count: int) -> int:
        """How many tokens lie before `held`, or before the copy that is made of it."""
        begins = [self._position(memory, each) for memory, each in zip(self._memory, held, strict=True)]
        begin, tokens = begins[0], held[0].shape[2]
        if begin is not None and begins == [begin, begin] and begin + tokens + count <= self._capacity:
            return begin
        for memory, each in zip(self._memory, held, strict=True):
            memory[:, :, :tokens] = each.clone()
        return 0

    def _position(self, memory: torch.Tensor, held: torch.Tensor) -> int | None:
        """How many tokens lie before `held`; None if it lies elsewhere."""
        tokens = (held.data_ptr() - memory.data_ptr()) // (memory.stride(2) * memory.itemsize)
        return tokens if 0 <= tokens <= self._capacity - held.shape[2] else None


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of all tokens. What is cut off is written over.

    `unchanged`: so many tokens, the first ones, are what they were when somebody last wrote here how many there are.
    """

    def __init__(self, context: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._context = context
        self.unchanged = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._room = _Room((key_states, value_states), self._context)
        self.keys, self.values = self._room.nothing()

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> States:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = everything = self._room.put(_held(self), (key_states, value_states))
        return everything

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.unchanged = min(self.unchanged, self.get_seq_length())

    def reset(self) -> None:
        super().reset()
        self.unchanged = 0

    def grow(self) -> States | None:
        """What is held and room for one token, which whoever asks writes; None where `update` has to be asked."""
        if not self.is_initialized or not self._room.fits(_held(self), 1):
            return None
        self.keys, self.values = everything = self._room.extend(_held(self), 1)
        return everything


class _MovingLayer(DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]
    """Keys and values of the last tokens, one fewer than the window has; where the room ends they move to its front."""

    def __init__(self, window: int, context: int) -> None:
        super().__init__(window)
        self._capacity = min(context, window + window // SPARE_WINDOW)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._room = _Room((key_states, value_states), self._capacity)
        self.keys, self.values = self._room.nothing()

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *more: Any, **named: Any) -> States:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = (key_states, value_states)
        if self.record_past or not self._room.fits(_held(self), key_states.shape[2]):
            everything = super().update(key_states, value_states, *more, **named)
            if not self.record_past:
                self.keys, self.values = self._room.put(self._room.nothing(), _held(self))
            return everything
        return self._take(self._room.put(_held(self), new), key_states.shape[2])

    def grow(self) -> States | None:
        """As that of layers that keep all tokens."""
        if not self.is_initialized or self.record_past or not self._room.fits(_held(self), 1):
            return None
        return self._take(self._room.extend(_held(self), 1), 1)

    def _take(self, everything: States, count: int) -> States:
        """`count` tokens were added, and `everything` is there now: keep as much as the window has."""
        self.cumulative_length += count
        self.keys, self.values = (states[:, :, -self.sliding_window + 1 :] for states in everything)
        return everything


def _held(layer: DynamicLayer) -> States:
    assert layer.keys is not None
    assert layer.values is not None
    return layer.keys, layer.values
