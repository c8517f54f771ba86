"""The forward of a causal language model for one token: embedding, angles, decoder layers, norm, head, and no more.

transformers' own sees to masks, defaults and positions for every token, which takes Python as long as a small model
takes altogether, and calls one layer after the other. Here layers that the library computes whole follow each other in
one call of it (`kernels.decoder_layer`), and others are called as they were. No family is named: the model's own
forward is watched, with stand-ins for its layers, behind contexts of several lengths. It is taken over where all that
it asks of its parts, hands to its layers and returns is known here, and comes out the same to the last bit.
"""

from __future__ import annotations

import copy
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from .kernels import Hooks, Keeper, LayerRun, NativeDecoderLayer, all_watch, hooks_of, silenced
from .kvcache import keeps_tokens, pretend_cache, windows_of
from .metamodel import CACHE

__all__ = ["TokenForward", "takes_tokens"]

_LENGTHS = 1, 2, 700
"""Tokens behind which a forward is watched, beside those around the windows of layers."""
_STATE, _ROTARY = "hidden_states", "rotary_emb"


def takes_tokens(model: Any, cache: Any) -> bool:
    """Whether single tokens that `model` is given with this KV cache pass its own forward by, at first at least."""
    return isinstance(model.forward, TokenForward) and model.forward.takes(cache)


class TokenForward:
    """Stands for the forward of `model`, and computes single tokens if it then gives the same, or leaves them to the
    model. That is tried when it is first asked for.

    Args:
        model: a causal language model.
        base: the module in it that has the decoder layers, and the norm behind them.
        keeper: who has the experts computed.
        check: is called before each token, and may raise.
        first: the layer that tokens enter first. Hooks before it need not be told of tokens of which the keeper lets
            experts be computed.
    """

    def __init__(self, model: Any, base: Any, keeper: Keeper, check: Callable[[], None], first: Any) -> None:
        self._forward = model.forward
        self.__signature__ = inspect.signature(self._forward)
        self._parts = _Parts(model, base)
        self._config = model.config.get_text_config(decoder=True)
        self._keeper, self._check, self._first = keeper, check, first
        natives = [each.forward for each in base.layers if isinstance(each.forward, NativeDecoderLayer)]
        self._watched = [hooks for native in natives for hooks in native.watched]
        every, watched = hooks_of(list(model.modules())[1:]), {id(each) for each in (*self._watched, self._entered)}
        self._every, self._hooks = every, [hooks for hooks in every if id(hooks) not in watched]
        self._way: _Way | None = None
        self._is_tried = False
        self._known_cache: Callable[[], Any] = lambda: None
        """The last KV cache that was met, while it lives, if it is of the kind that is known."""

    @classmethod
    def find(cls, model: Any, base: Any, *others: Any) -> TokenForward | None:
        """The forward of `model` from now on, or None for one that has not the usual parts."""
        embedding = model.get_input_embeddings()
        has_usual = hasattr(base, "layers") and hasattr(base, "norm") and model.get_output_embeddings() is not None
        return cls(model, base, *others) if has_usual and hasattr(embedding, "num_embeddings") else None

    @property
    def _entered(self) -> Hooks:
        hooks: Hooks = self._first._forward_pre_hooks
        return hooks

    def __call__(self, *args: Any, **named: Any) -> Any:
        is_watched_only = not any(self._hooks) and all_watch((self._entered, *self._watched))
        output = self._compute(**named) if is_watched_only and not args else None
        return self._forward(*args, **named) if output is None else output

    def _compute(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = True,
        **others: Any,
    ) -> Any:
        """What the model returns for one token; None if it is asked for anything else, and then nothing has changed."""
        cache = others.pop(CACHE, None)
        if input_ids is None or input_ids.shape != (1, 1) or not use_cache or return_dict is False:
            return None
        if isinstance(logits_to_keep, torch.Tensor) or logits_to_keep > 1:
            return None
        if any(each is not None and each is not False for each in others.values()):
            return None
        if not self._knows(cache) or (way := self._find_way()) is None:
            return None
        held = cache.get_seq_length()
        if not 0 < held <= way.most_held:
            return None
        if attention_mask is not None and not (attention_mask.shape == (1, held + 1) and bool(attention_mask.all())):
            return None
        if position_ids is None:
            position_ids = torch.tensor([[held]])
        self._check()
        if position_ids.shape != (1, 1):
            return None
        token = way.enter(input_ids, position_ids, cache)
        tells = any(self._watched) or len(self._entered) > 1 or not self._keeper.may_compute(0)
        logits = self._parts.leave(way.put_through(token, self._entered if tells else None))
        return way.output_class(logits=logits, **{CACHE: cache})

    def takes(self, cache: Any) -> bool:
        """Whether it is known how tokens with this KV cache go through the model, as long as it is not too full."""
        way = self._find_way() if self._knows(cache) else None
        return way is not None and way.most_held > 0

    def _knows(self, cache: Any) -> bool:
        """Whether its layers keep tokens, as those do that the model is watched with."""
        if cache is None or cache is not self._known_cache():
            if not keeps_tokens(cache, len(self._parts.layers)):
                return False
            self._known_cache = weakref.ref(cache)
        return True

    def _find_way(self) -> _Way | None:
        if not self._is_tried:
            self._is_tried = True
            with torch.inference_mode(), silenced(self._every):
                self._way = self._try()
        return self._way

    def _try(self) -> _Way | None:
        windows = windows_of(pretend_cache(self._config, 1))
        lengths = {*_LENGTHS, *(max(1, window + more) for window in windows for more in (-2, -1, 0, 1))}
        way, behind = None, 0
        try:
            for tokens in sorted(lengths):
                seen = self._watch(tokens)
                way = way or _Way(self._parts, seen)
                if not way.is_as(seen):
                    way.most_held = behind
                    break
                behind = tokens
        except Exception:  # a family may ask for anything
            return None
        return way

    def _watch(self, tokens: int) -> _Seen:
        """What the model's own forward does for a token behind so many."""
        generator = torch.Generator().manual_seed(tokens)
        ids = torch.randint(self._parts.words, (1, 1), generator=generator)
        seen = _Seen(ids, torch.tensor([[tokens]]), pretend_cache(self._config, tokens))
        given = {"position_ids": seen.position_ids}
        if tokens % 2:  # a mask that hides nothing, or none
            given["attention_mask"] = torch.ones(1, tokens + 1, dtype=torch.int64)
        with self._parts.watched(seen, generator):
            seen.output = self._forward(input_ids=ids, use_cache=True, **{CACHE: seen.cache}, **given)
        return seen


@dataclass
class _Token:
    """A token on its way: its state [1, 1, H], its position [1, 1], the KV cache, and its angles, cosines and sines of
    them, of which there may be several kinds.
    """

    state: torch.Tensor
    position_ids: torch.Tensor
    cache: Any
    angles: list[Any] = field(default_factory=list)


@dataclass
class _Call:
    """A part was called: with what, and what it gave."""

    args: tuple[Any, ...]
    named: dict[str, Any]
    output: Any

    @property
    def state(self) -> torch.Tensor:
        state: torch.Tensor = self.args[0] if self.args else self.named[_STATE]
        return state


@dataclass
class _Seen:
    """What a forward of the model's own was given, and did."""

    ids: torch.Tensor
    position_ids: torch.Tensor
    cache: Any
    turns: list[_Call] = field(default_factory=list)
    layers: list[_Call] = field(default_factory=list)
    output: Any = None

    def token(self, state: torch.Tensor) -> _Token:
        return _Token(state, self.position_ids, self.cache, [call.output for call in self.turns])


_Give = Callable[[_Token], Any]


class _Handed:
    """What a part is handed for any token, as it was in one call. Raises ValueError for what is not understood."""

    def __init__(self, call: _Call, token: _Token) -> None:
        self._args = [_find(value, token) for value in call.args]
        self._named = {name: _find(value, token) for name, value in call.named.items()}

    def call(self, part: Any, token: _Token) -> Any:
        return part(*(give(token) for give in self._args), **{name: give(token) for name, give in self._named.items()})

    def is_as(self, call: _Call, token: _Token) -> bool:
        """Whether that call was handed what this hands."""
        return bool(self.call(lambda *args, **named: _are_same((args, named), (call.args, call.named)), token))


def _find(value: Any, token: _Token) -> _Give:
    """Where in a token that is."""
    if value is None or isinstance(value, bool | int | float | str):
        return lambda _: value
    if value is token.state:
        return lambda token: token.state
    if value is token.position_ids:
        return lambda token: token.position_ids
    if value is token.cache:
        return lambda token: token.cache
    for place, angles in enumerate(token.angles):
        if value is angles:
            return lambda token: token.angles[place]
    raise ValueError(f"a part is handed {type(value).__name__} that nobody knows here")


def _are_same(ours: Any, theirs: Any) -> bool:
    """Whether all of it is, to the last bit."""
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(_are_same(each, theirs[name]) for name, each in ours.items())
    if isinstance(ours, tuple | list) and isinstance(theirs, tuple | list):
        return len(ours) == len(theirs) and all(map(_are_same, ours, theirs))
    return ours is theirs or (type(ours) is type(theirs) and bool(ours == theirs))


class _Parts:
    """The parts of a model that a token meets."""

    def __init__(self, model: Any, base: Any) -> None:
        self._base = base
        self.layers: list[Any] = list(base.layers)
        self.rotary = getattr(base, _ROTARY, None)
        self._embedding, self._norm, self._head = model.get_input_embeddings(), base.norm, model.get_output_embeddings()
        self._multiplier = getattr(base, "embedding_multiplier", None)
        self._scaling = getattr(model.config, "logits_scaling", None)
        self.words: int = self._embedding.num_embeddings

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        state: torch.Tensor = self._embedding.forward(ids)
        return state if self._multiplier is None else state * self._multiplier

    def leave(self, state: torch.Tensor) -> torch.Tensor:
        """The logits [1, 1, V]."""
        logits: torch.Tensor = self._head.forward(self._norm.forward(state))
        return logits if self._scaling is None else logits / self._scaling

    @contextmanager
    def watched(self, seen: _Seen, generator: torch.Generator) -> Iterator[None]:
        """While this is open, `seen` gets what parts are handed, layers give any state, and angles are a copy's, since
        some remember the longest context that they met.
        """

        def give_any(*args: Any, **named: Any) -> torch.Tensor:
            call = _Call(args, named, None)
            call.output = state = torch.randn(call.state.shape, generator=generator).to(call.state.dtype)
            seen.layers.append(call)
            return state

        def turn(*args: Any, **named: Any) -> Any:
            seen.turns.append(_Call(args, named, plain(*args, **named)))
            return seen.turns[-1].output

        kept = [vars(layer).get("forward") for layer in self.layers]
        try:
            if self.rotary is not None:
                watched = _copy(self.rotary)
                plain, watched.forward = watched.forward, turn
                setattr(self._base, _ROTARY, watched)
            for layer in self.layers:
                layer.forward = give_any
            yield
        finally:
            for layer, forward in zip(self.layers, kept, strict=True):
                if forward is None:
                    del layer.forward
                else:
                    layer.forward = forward
            if self.rotary is not None:
                setattr(self._base, _ROTARY, self.rotary)


def _copy(module: Any) -> Any:
    """The same module, whose buffers may be changed."""
    other = copy.copy(module)
    if other is not None:
        vars(other)["_buffers"] = dict(other._buffers)
    return other


class _Way:
    """The way of tokens through a model, as it was `seen` of one. Raises ValueError for what is not understood."""

    def __init__(self, parts: _Parts, seen: _Seen) -> None:
        self._parts = parts
        self.most_held = sys.maxsize
        """Behind more tokens it is another: layers are handed masks where their windows do not show all tokens."""
        self.output_class: type[Any] = type(seen.output)
        entering, *_ = seen.layers
        self._turns = [_Handed(call, _Token(entering.state, seen.position_ids, seen.cache)) for call in seen.turns]
        self._handed = [_Handed(call, seen.token(call.state)) for call in seen.layers]
        self._natives = list(map(_native, parts.layers, seen.layers))
        self._looks = [_looked(native, call, seen) for native, call in zip(self._natives, seen.layers, strict=True)]
        self._run = LayerRun(self._natives)

    def is_as(self, seen: _Seen) -> bool:
        """Whether a token that goes it meets the same, and becomes the same."""
        parts, calls = self._parts, seen.layers
        if len(calls) != len(self._handed) or len(seen.turns) != len(self._turns):
            return False
        token = self.enter(seen.ids, seen.position_ids, seen.cache, _copy(parts.rotary))
        passed = [token.state, *(call.output for call in calls)]
        ours = [passed[: len(calls)], token.angles, {"logits": parts.leave(passed[-1]), CACHE: seen.cache}]
        theirs = [[call.state for call in calls], [call.output for call in seen.turns], dict(seen.output)]
        handed = (each.is_as(call, seen.token(call.state)) for each, call in zip(self._handed, calls, strict=True))
        return _are_same(ours, theirs) and all(handed)

    def enter(self, ids: torch.Tensor, position_ids: torch.Tensor, cache: Any, rotary: Any = None) -> _Token:
        """A token before the first layer."""
        token = _Token(self._parts.embed(ids), position_ids, cache)
        token.angles = [handed.call(rotary or self._parts.rotary, token) for handed in self._turns]
        return token

    def put_through(self, token: _Token, entered: Hooks | None = None) -> torch.Tensor:
        """Its state behind all layers. Those that follow each other are computed in one go, where the library can. With
        hooks that want to know when it has `entered` the first layer, others are told of its experts, too.
        """
        state, begin, tells = token.state.clone(), 0, entered is not None
        for place, native in enumerate(self._natives):
            if native is None or not self._looks[place](token):
                token.state = self._run.compute(state, begin, place, tells=tells)
                state, begin = self._handed[place].call(self._parts.layers[place], token), place + 1
            elif place == 0 and entered:
                for hook in list(entered.values()):
                    hook(self._parts.layers[0], (token.state,), {})
        return self._run.compute(state, begin, len(self._natives), tells=tells)


def _looked(native: NativeDecoderLayer | None, call: _Call, seen: _Seen) -> _Give:
    """Has a layer that is computed here look at what it was handed in `call`."""
    if native is None:
        return lambda _: False
    names = call.named.keys() - {_STATE} if native.attention.asks_for is None else native.attention.asks_for
    handed = _Handed(_Call((), {name: call.named[name] for name in names}, None), seen.token(call.state))
    look_at = partial(native.look_at, native.attention)
    return lambda token: handed.call(look_at, token)


def _native(layer: Any, call: _Call) -> NativeDecoderLayer | None:
    """What computes a layer whole that is called like this, if anything does."""
    native = layer.forward
    return native if isinstance(native, NativeDecoderLayer) and native.takes(*call.args, **call.named) else None
