"""Whole decoder layers for one token in one call of the native library, where their experts are in memory: norm,
attention, norm, router, experts, MLP, and the sums.

What it is made of is native and torch's to the last bit by itself (`self_attention`, `dense`, `mlp`, `native`). What is
saved are the small steps of Python between, which cost more than they seem to: the weights of each layer drive Python's
data out of the processor's caches (docs/experiments.md). Of attention, and of routers, that the library does not know,
it is told the results, and computes the rest. No family is named: a layer is taken when it has the usual parts, by
whatever names, and gives on trial what these give in the usual order.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from moeinf.metamodel import CACHE

from .attending import Attending, CalledAttending, NativeAttending, Trial
from .dense import NativeNorm
from .feed_forward import TIED, Asked, Choosing, FeedForward, Router, by_expert
from .mlp import NativeMlp
from .native import WANTS_MORE
from .self_attention import NativeSelfAttention, kind_of
from .watching import Hooks, all_watch, hooks_of, silenced

__all__ = ["DecoderLayers", "Keeper", "LayerRun", "NativeDecoderLayer", "Slots"]

_STATE = "hidden_states"
_AWAY, _UNATTENDED, _UNDECIDED = 1, 3, 4
"""What `moe_decode` returns where experts are not in memory, where somebody else is to attend, and to choose."""


class Keeper(Protocol):
    """Who has the experts of a model computed."""

    def may_compute(self, layer: int) -> bool:
        """Whether the experts of a token may be computed in this MoE layer where they are, before anybody is told of
        them. What follows is `has_computed`, or `forward`, as it is where they may not.
        """

    def has_computed(self, layer: int, experts: list[int]) -> None:
        """These were there, and have been computed for a token."""

    def forward(
        self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The MoE layer's output [tokens, H], wherever its experts are."""


@dataclass(frozen=True)
class Slots:
    """Where experts lie: in which slot each is, numbered over all layers, or -1; and slots from an address on, so many
    bytes apart.
    """

    resident: array[int]
    address: int
    nbytes: int


class _DecoderLayer(ctypes.Structure):
    """`moe_decoder_layer` of moe.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("norm", "second_norm", "attention", "gate", "router", "experts", "mlp")),
        *((name, c_int32) for name in ("asks_attended", "asks_share", "top_k", "row_dtype", "sum_dtype")),
        ("scale", c_float),
        ("share", c_float),
        ("slots", c_void_p),
        ("memory", c_void_p),
        ("slot_bytes", c_int64),
        *((name, c_void_p) for name in ("what", "cosines", "sines", "between")),
        *((name, c_void_p) for name in ("state", "normed", "added", "logits", "scores", "rows", "weights", "chosen")),
    )


class _Between:
    """Memory for what lies between the parts of a layer, which others of its shape share."""

    def __init__(self, hidden: int, count: int, top_k: int) -> None:
        self.state, self.normed, self.added = (torch.empty(1, hidden, dtype=torch.bfloat16) for _ in range(3))
        self.logits = torch.empty(1, count, dtype=torch.bfloat16)
        self.scores = torch.empty(1, count, dtype=torch.float32)
        self.rows = torch.empty(top_k, hidden, dtype=torch.float32)
        self.weights = torch.empty(1, top_k, dtype=torch.float32)


class DecoderLayers:
    """Finds what can stand in for the decoder layers of one model. `check` is called before each of a token, and may
    raise.
    """

    def __init__(self, keeper: Keeper, slots: Slots, check: Callable[[], None]) -> None:
        self.keeper, self.slots, self.check = keeper, slots, check
        self.known: dict[tuple[object, ...], tuple[Choosing, dict[str, str]] | None] = {}
        """How layers of a kind choose, which differ in their weights alone, and what is known of how they attend; None
        where they came out otherwise when they were tried.
        """
        self._between: dict[tuple[int, int, int], _Between] = {}

    def find(
        self, layer: nn.Module, experts: nn.Module | None = None, maths: Any = None, span: range = range(0)
    ) -> NativeDecoderLayer | None:
        """The forward of `layer` from now on, or None for one that is of another kind. `experts` is the module in it
        whose experts `maths` computes, which have the numbers of `span` over all layers; None for a layer without.
        """
        parts = list(layer.children())
        norms: list[Any] = [part for part in parts if isinstance(part.forward, NativeNorm)]
        blocks = [part for part in parts if part not in norms and _is_block(part, experts)]
        if len(norms) != 2 or len(blocks) != 1 or len(parts) != 4:
            return None
        (attention,) = (part for part in parts if part not in (*norms, *blocks))
        feed = FeedForward.find(blocks[0], experts, maths, span)
        return None if feed is None else NativeDecoderLayer(self, layer, norms, attention, feed)

    def between(self, hidden: int, count: int, top_k: int) -> _Between:
        shape = hidden, count, top_k
        if shape not in self._between:
            self._between[shape] = _Between(*shape)
        return self._between[shape]


def _is_block(part: nn.Module, experts: nn.Module | None) -> bool:
    """Whether it has the experts, or is all that a layer has in their place."""
    return isinstance(part.forward, NativeMlp) if experts is None else any(each is experts for each in part.modules())


class LayerRun:
    """Decoder layers that follow each other, which the library puts a token through in one call for as long as it finds
    what it needs. None stands for one that it does not compute.
    """

    def __init__(self, layers: Sequence[NativeDecoderLayer | None]) -> None:
        self._layers = layers
        addresses = (None if layer is None else ctypes.addressof(layer.layer) for layer in layers)
        self._addresses = (c_void_p * len(layers))(*map(c_void_p, addresses))
        self._first, self._step = ctypes.addressof(self._addresses), ctypes.sizeof(c_void_p)
        self._done = c_int32()

    def compute(self, state: torch.Tensor, begin: int, end: int, *, tells: bool) -> torch.Tensor:
        """What becomes of `state` [1, 1, H], which is written over, in the layers from `begin` to before `end`. They
        have all been told where to look (`NativeDecoderLayer.look_at`). Where it `tells`, their keeper hears of experts
        before they are computed.
        """
        while begin < end:
            found, done = self.decode(state, begin, end, tells=tells)
            for layer in self._layers[begin : begin + done]:
                assert layer is not None
                layer.has_computed()
            begin += done
            if found:
                layer = self._layers[begin]
                assert layer is not None
                state = layer.complete(found)
                begin += 1
        return state

    def decode(self, state: torch.Tensor, begin: int, end: int, *, tells: bool = False) -> tuple[int, int]:
        """Write over `state` what layers make of it, and return what was found where they end, and how many they are:
        with 0, as many as could be computed before somebody else has to attend.
        """
        layer = self._layers[begin]
        assert layer is not None
        attended = layer.attend(state)
        found: int = layer.pool.lib.moe_decode(
            layer.pool.handle,
            self._first + begin * self._step,
            end - begin,
            tells,
            None if attended is None else attended.data_ptr(),
            state.data_ptr(),
            ctypes.addressof(self._done),
        )
        done = self._done.value
        if found == _UNDECIDED:
            layer = self._layers[begin + done]
            assert layer is not None
            found = layer.decide(state, tells=tells)
            done += not found
        if found < 0:
            raise MemoryError("no memory for a token's layers")
        return (0 if found == _UNATTENDED else found), done


class NativeDecoderLayer:
    """The forward of a decoder layer, which the library computes for one token if that gives what the layer gives, or
    leaves to the layer. That is tried when it is first asked for.
    """

    def __init__(
        self, shared: DecoderLayers, layer: Any, norms: list[Any], attention: nn.Module, feed: FeedForward
    ) -> None:
        self._shared, self._forward, self._feed, self.pool = shared, layer.forward, feed, feed.pool
        self._norm: NativeNorm = norms[0].forward
        self._second_norm = norms[1]
        hidden, count, top_k = self._norm.layer.size, len(feed.span), feed.top_k
        self._ways: list[Attending] = [CalledAttending(attention, hidden, gives_more=more) for more in (True, False)]
        if isinstance(attention.forward, NativeSelfAttention):
            self._ways.insert(0, NativeAttending(attention.forward))
        self.attention = self._ways[0]
        """What attends to the token that was taken last."""
        self._kind = tuple(map(kind_of, layer.modules()))
        self.watched: list[Hooks] = []
        """Hooks that are told of a token here, too, as long as they do nothing but watch: those before the block, and
        behind the norm before it, and behind experts.
        """
        if feed.experts is not None:
            behind = (module._forward_hooks for module in (self._second_norm, feed.experts))
            self.watched = [feed.block._forward_pre_hooks, *behind]
        every, watched = hooks_of(list(layer.modules())[1:]), set(map(id, self.watched))
        self._hooks = [hooks for hooks in every if id(hooks) not in watched]
        self._choosing: Choosing | None = None
        self._known_for: tuple[object, ...] = ()
        self._router = Router()
        self._between = shared.between(hidden, count, top_k)
        self._index = torch.empty(1, top_k, dtype=torch.int64)
        self._chosen = (c_int64 * top_k).from_address(self._index.data_ptr())
        self.layer = _DecoderLayer(
            *(ctypes.addressof(norm.layer) for norm in (self._norm, self._second_norm.forward)),
            mlp=feed.mlp and ctypes.addressof(feed.mlp.layer),
            asks_share=feed.share is not None,
            top_k=top_k,
            scale=float(getattr(layer, "residual_multiplier", 1)),
            share=1,
            chosen=self._index.data_ptr(),
            **{name: tensor.data_ptr() for name, tensor in vars(self._between).items()},
        )
        self.attention.describe(self.layer)
        if feed.maths is not None:
            resident = shared.slots.resident
            self.layer.experts = ctypes.addressof(feed.maths.layer)
            self.layer.slots = resident.buffer_info()[0] + feed.span.start * resident.itemsize
            self.layer.memory, self.layer.slot_bytes = shared.slots.address, shared.slots.nbytes
        self._alone = LayerRun([self])

    def __call__(self, *args: Any, **named: Any) -> Any:
        is_watched_only = not any(self._hooks) and all_watch(self.watched)
        output = self._compute(*args, **named) if len(args) < 2 and is_watched_only else None
        return self._forward(*args, **named) if output is None else output

    def _compute(self, *args: Any, **named: Any) -> torch.Tensor | None:
        """The output [1, 1, H] for one token [1, 1, H]; None if it is anything else, and then nothing has changed."""
        if not self.takes(*args, **named):
            return None
        self._shared.check()
        state: torch.Tensor = args[0] if args else named.pop(_STATE)
        if not self.look_at(self.attention, **named):
            return None
        experts = self._feed.experts
        tells = experts is not None and (any(self.watched) or not self._shared.keeper.may_compute(experts.moeinf[1]))
        return self._alone.compute(state.clone(memory_format=torch.contiguous_format), 0, 1, tells=tells)

    def takes(self, hidden_states: torch.Tensor | None = None, **others: Any) -> bool:
        """Whether the library computes the layer for this token, given the rest, as the layer would."""
        if others.get(CACHE) is None or hidden_states is None or self.pool.handle is None:
            return False
        for attention in self._ways:
            way = attention.takes(hidden_states, **others)
            if way is not None and self._knows(attention, way, others):
                return True
        return False

    def look_at(self, attention: Attending, **named: Any) -> bool:
        """Whether a token can be computed now, of which the layer is handed this, with what `attention` was when such a
        one was taken: then there is room for it in the KV cache, and the layer knows where.
        """
        experts = self._feed.experts
        if experts is not None and experts.moeinf[0] is not self._shared.keeper:
            return False
        self._use(attention)
        return attention.look_at(self.layer, **named)

    def _use(self, attention: Attending) -> None:
        if attention is not self.attention:
            self.attention = attention
            attention.describe(self.layer)

    def attend(self, state: torch.Tensor) -> torch.Tensor | None:
        """What somebody else makes of the normed state, where the library does not attend."""
        return self.attention.attend(lambda: self._norm.compute(state))

    def decide(self, state: torch.Tensor, *, tells: bool) -> int:
        """Choose, after the library has found that it does not know how to, and have the rest computed, over `state`,
        unless it `tells`. Returns what was found then.
        """
        between, feed = self._between, self._feed
        assert self._choosing is not None
        if not self._choosing.lanes:
            index, weights = feed.ask_router(between.normed)
            self._index.copy_(index)
            between.weights.copy_(weights)
        if feed.share is not None:
            self.layer.share = feed.ask_share(between.normed)
        if tells:
            return _AWAY
        found: int = self.pool.lib.moe_finish(self.pool.handle, ctypes.addressof(self.layer), state.data_ptr())
        return found

    def has_computed(self) -> None:
        """The library has computed all of it."""
        if self._feed.experts is not None:
            self._shared.keeper.has_computed(self._feed.experts.moeinf[1], list(self._chosen))

    def complete(self, found: int) -> torch.Tensor:
        """The output [1, 1, H], after the library has `found` that it cannot compute the rest, or is not to."""
        between, feed = self._between, self._feed
        before_block, behind_norm, behind_experts = self.watched
        normed = between.normed[None].clone()  # who is told may keep what he is given
        if before_block or behind_norm:
            state = between.state[None].clone()
            for hook in list(behind_norm.values()):
                hook(self._second_norm, (state,), normed)
            for hook in list(before_block.values()):
                hook(feed.block, (normed,), {})
        if found == TIED:
            return self._add(feed.block.forward(normed)[0])
        assert self._choosing is not None
        keeper, number = feed.experts.moeinf
        weights = between.weights.to(self._choosing.dtype, copy=True)
        added: torch.Tensor = keeper.forward(number, normed[0], self._index.clone(), weights)
        for hook in behind_experts.values():
            hook(feed.experts, (), added)
        return self._add(feed.add_mlp(added, normed[0], self.layer.share))

    def _add(self, added: torch.Tensor) -> torch.Tensor:
        """The layer's output, if experts and MLP have `added` that."""
        scale: float = self.layer.scale
        return self._between.state[None] + added.view(1, 1, -1) * scale

    def _knows(self, attention: Attending, way: object, named: dict[str, Any]) -> bool:
        """Whether it is known how the layer chooses, and all else comes out the same for tokens that go this way. Then
        it is set to that.
        """
        self._use(attention)
        if (attention, way) != self._known_for:
            kind = *self._kind, type(attention), way
            if kind not in self._shared.known:
                choosing = self._try(named)
                self._shared.known[kind] = None if choosing is None else (choosing, attention.learned)
            if (known := self._shared.known[kind]) is None:
                return False
            choosing, attention.learned = known
            self._choose(choosing)
            self._known_for = attention, way
        return True

    def _choose(self, choosing: Choosing) -> None:
        self._choosing, feed = choosing, self._feed
        self._router = choosing.router(len(feed.span), feed.top_k)
        self.layer.router = ctypes.addressof(self._router)
        self.layer.gate = ctypes.addressof(feed.gate.layer) if choosing.lanes and feed.gate else None
        if feed.maths is not None:
            self.layer.row_dtype, self.layer.sum_dtype = feed.maths.rounding[choosing.dtype]

    def _try(self, named: dict[str, Any]) -> Choosing | None:
        before, slots, nowhere = self._choosing, self.layer.slots, array("i", [-1]) * len(self._feed.span)
        self.layer.slots, _ = nowhere.buffer_info()
        try:
            with torch.inference_mode(), silenced([*self._hooks, *self.watched]):
                tried = (self._tried(choosing, named) for choosing in self._feed.choices())
                return next((choosing for choosing in tried if choosing is not None), None)
        except WANTS_MORE:
            return None
        finally:
            self.layer.slots = slots
            if before is not None:
                self._choose(before)

    def _tried(self, choosing: Choosing, named: dict[str, Any]) -> Choosing | None:
        """The same with the dtype that weights have, if all else comes out the same with it."""
        found = []
        for trial in self.attention.trials(**named):
            asked = Asked(trial.hidden.shape[-1], trial.hidden.dtype)
            with self._feed.asking(asked):
                output = self._forward(trial.hidden, **trial.named)
            if self._feed.experts is not None:
                choosing = replace(choosing, dtype=asked.weights.dtype)
            self._choose(choosing)
            found.append(self._compare(trial, asked, output.view(1, -1)))
        ends = 0 if self._feed.experts is None else _AWAY
        return choosing if None not in found and ends in found else None

    def _compare(self, trial: Trial, asked: Asked, output: torch.Tensor) -> int | None:
        """What is found in the trial's place; None if anything is not the same."""
        trial.look_at(self.layer)
        state = trial.hidden.clone()
        found, _ = self._alone.decode(state, 0, 1)
        between, feed = self._between, self._feed
        ours, theirs = [*trial.ours], [*trial.theirs]
        if feed.experts is not None:
            share = self.layer.share if feed.share is None else feed.ask_share(between.normed)
            state = self._add(feed.add_mlp(asked.added, between.normed, share))
            ours.append(between.normed)
            theirs.append(asked.normed)
        if found == _AWAY:
            ours += by_expert(self._index, between.weights.to(asked.weights.dtype))
            theirs += by_expert(asked.index, asked.weights)
        is_same = torch.equal(state.view(1, -1), output) and all(map(torch.equal, ours, theirs))
        return found if is_same else None
