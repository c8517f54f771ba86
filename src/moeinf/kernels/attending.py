"""What attends to one token in a decoder layer: the native library, which then computes the rest of the layer in the
same call, or the attention module itself, whatever it does, which the library is told the result of.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moeinf.metamodel import CACHE

from .self_attention import NativeSelfAttention, States

__all__ = ["Attending", "CalledAttending", "NativeAttending", "Trial", "replaced"]

_ANGLES, _STATE, _MASK = "position_embeddings", "hidden_states", "attention_mask"
_ROUNDS = 4
"""A layer is tried with so many times the states that its attention is tried with."""
_SIZES = (1.0, 30.0, 1e3)
"""Of states for attention that is not tried itself."""


@dataclass(frozen=True)
class Trial:
    """A state of one token, what a layer is handed with it, and what is in the KV cache where the library, and the
    layer, attend. `look_at` says in a `moe_decoder_layer` where the first of these is.
    """

    hidden: torch.Tensor
    named: dict[str, Any]
    look_at: Callable[[Any], object]
    ours: Sequence[torch.Tensor] = ()
    theirs: Sequence[torch.Tensor] = ()


class Attending(ABC):
    """What attends in one layer, which `layer`, a `moe_decoder_layer` of moe.h, describes."""

    asks_for: tuple[str, ...] | None = None
    """What `look_at` needs of what the layer is handed, by name; None for all of it."""
    learned: dict[str, str]
    """What trials have shown, which holds for all layers of a kind."""

    def __init__(self) -> None:
        self.learned = {}

    @abstractmethod
    def describe(self, layer: Any) -> None:
        """Say in `layer` what the library computes of it."""

    @abstractmethod
    def takes(self, hidden: torch.Tensor, **named: Any) -> object:
        """What tells apart the ways in which tokens are attended to, each of which has to be tried; None for a token
        that is not attended to here. `named` is what the layer is handed beside its state.
        """

    @abstractmethod
    def look_at(self, layer: Any, **named: Any) -> bool:
        """Whether there is room for a token now, where it goes being said in `layer`."""

    @abstractmethod
    def attend(self, normed: Callable[[], torch.Tensor]) -> torch.Tensor | None:
        """What `moe_decode` is given as attended, or None where it attends."""

    @abstractmethod
    def trials(self, **named: Any) -> Iterator[Trial]:
        """States to try it with. What is done with one is to be done before the next. Raises ValueError where the layer
        does not hand attention what it is handed.
        """


class NativeAttending(Attending):
    """The library: all of attention, or all but attending itself, which torch does."""

    asks_for = (_ANGLES, CACHE)

    def __init__(self, native: NativeSelfAttention) -> None:
        super().__init__()
        self._native = native
        self._angles: States | None = None
        self._states: States | None = None

    def describe(self, layer: Any) -> None:
        layer.attention = ctypes.addressof(self._native.layer)
        layer.asks_attended = self._native.output is not None
        layer.between = self._native.between.data_ptr()

    def takes(self, hidden: torch.Tensor, **named: Any) -> object:
        del named[CACHE]
        return named[_ANGLES][0].shape[2] if self._native.takes(hidden, **named) else None

    def look_at(self, layer: Any, **named: Any) -> bool:
        if (states := self._native.grow(named[CACHE])) is None:
            return False
        self._point_to(layer, named[_ANGLES], states)
        return True

    def _point_to(self, layer: Any, angles: States, states: States) -> None:
        self._angles = cos, sin = angles[0].contiguous(), angles[1].contiguous()
        layer.what = self._native.point_to(cos, *states)
        layer.cosines, layer.sines = cos.data_ptr(), sin.data_ptr()
        if self._native.output is not None:
            self._states = states

    def attend(self, normed: Callable[[], torch.Tensor]) -> torch.Tensor | None:
        if self._states is None:
            return None
        states, self._states = self._states, None  # whose memory somebody may want to have back
        assert self._angles is not None
        return self._native.attend_by_torch(normed(), *self._angles, states)

    def trials(self, **named: Any) -> Iterator[Trial]:
        for hidden, angles, cache in self._native.trials(named[_ANGLES][0].shape[2], _ROUNDS):
            keys, values = (states.clone() for states in cache.states)
            given = {_ANGLES: angles, _MASK: None, CACHE: cache}

            def look_at(layer: Any, angles: States = angles, states: States = (keys, values)) -> None:
                self._point_to(layer, angles, states)

            yield Trial(hidden, given, look_at, (keys, values), cache.states)


class CalledAttending(Attending):
    """Any attention module, or what stands in its place, which is called as the layer calls it: with what that is
    handed, by the same names or others.

    Args:
        module: it.
        hidden: how many numbers a state has.
        gives_more: whether its output is the first of several that it gives.
    """

    def __init__(self, module: nn.Module, hidden: int, *, gives_more: bool) -> None:
        super().__init__()
        self._module, self._hidden, self._gives_more = module, hidden, gives_more
        self._handed: dict[str, Any] = {}

    def describe(self, layer: Any) -> None:
        layer.attention, layer.asks_attended = None, True

    def takes(self, hidden: torch.Tensor, **named: Any) -> object:
        if hidden.numel() != self._hidden or hidden.dtype != torch.bfloat16:
            return None
        kinds = ((name, value if isinstance(value, bool) else type(value)) for name, value in sorted(named.items()))
        return self._gives_more, *kinds

    def look_at(self, layer: Any, **named: Any) -> bool:
        self._handed = named
        return True

    def attend(self, normed: Callable[[], torch.Tensor]) -> torch.Tensor | None:
        handed, self._handed = self._handed, {}  # a KV cache whose memory somebody may want to have back
        given = {name: handed[source] if source else None for name, source in self.learned.items()}
        output = self._module(hidden_states=normed(), **given)
        attended: torch.Tensor = output[0] if self._gives_more else output
        return attended.contiguous()

    def trials(self, **named: Any) -> Iterator[Trial]:
        generator = torch.Generator().manual_seed(0)
        asked: list[dict[str, Any]] = []
        attended = torch.empty(0)

        def attend(**handed: Any) -> Any:
            asked.append(handed)
            return (attended, None) if self._gives_more else attended

        def look_at(_layer: Any) -> None:
            self._handed = named
            self.learned = _sources(asked[0], named)

        for size in _SIZES * _ROUNDS:
            asked.clear()
            hidden, attended = (
                (torch.randn(1, 1, self._hidden, generator=generator) * size).bfloat16() for _ in range(2)
            )
            with replaced(self._module, "forward", attend):
                yield Trial(hidden, named, look_at)
            theirs, ours = asked
            if not torch.equal(theirs.pop(_STATE), ours.pop(_STATE)) or not _are_the_same(theirs, ours):
                raise ValueError("attention is handed something else")


def _sources(handed: dict[str, Any], named: dict[str, Any]) -> dict[str, str]:
    """By which names what is `handed` on is found in what the layer is handed, `named`; "" for nothing. Raises
    ValueError for what is not there.
    """
    sources = {}
    for name, value in handed.items():
        if name == _STATE:
            continue
        others = (name,) if value is None else (name, *named)
        same = [other for other in others if other in named and named[other] is value]
        if not same and value is not None:
            raise ValueError("attention is handed what its layer is not")
        sources[name] = same[0] if same else ""
    return sources


def _are_the_same(ones: dict[str, Any], others: dict[str, Any]) -> bool:
    """Whether they are the same objects, by the same names."""
    return ones.keys() == others.keys() and all(ones[name] is others[name] for name in ones)


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """While this is open, `module` has that value under this name."""
    kept = vars(module).get(name)
    setattr(module, name, value)
    try:
        yield
    finally:
        if kept is None:
            delattr(module, name)
        else:
            setattr(module, name, kept)
