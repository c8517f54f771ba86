"""Whole decoder layers for one token in one call of the native library, where their experts are in memory: norm,
attention, norm, router, experts, and the two sums.

What it is made of is native and torch's to the last bit by itself (`self_attention`, `dense`, `native`). What is saved
are the small steps of Python between, which cost more than they seem to: the weights of each layer drive Python's data
out of the processor's caches (docs/experiments.md). No family is named: a layer is taken when it has the usual parts
under their usual names, and gives on trial what these give in the usual order.
"""

from __future__ import annotations

import copy
import ctypes
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Protocol

import torch
from torch import nn

from moeinf.metamodel import CACHE

from .dense import NativeLinear, NativeNorm, native_linear
from .native import DTYPES, LANES, WANTS_MORE, NativeMaths, NativePool
from .self_attention import NativeSelfAttention, States, hooks_of, kind_of

__all__ = ["DecoderLayers", "Keeper", "LayerRun", "NativeDecoderLayer", "Slots"]

_ATTENTION, _NORMS = "self_attn", ("input_layernorm", "post_attention_layernorm")
_AWAY, _TIED = 1, 2
"""What `moe_decode` returns where experts are not in memory, or the router's choice is left to torch."""
_MOST_CHOSEN = 64
"""`MOST_CHOSEN` of csrc/decoder_layer.c."""
_SHARES = range(3)
"""The kinds of `moe_shares`."""
_ROWS, _SPREADS, _STEPS = 12, (0.3, 3.0, 30.0), (2**-8, 0.5)
"""A choice is tried with so many rows of logits that lie so far apart, and are multiples of these: of the larger one
there are many that are the same.
"""
_ROUNDS = 4
"""A layer is tried with so many times the states that its attention is tried with."""


class Keeper(Protocol):
    """Who has the experts of a model computed."""

    def may_compute(self, layer: int) -> bool:
        """Whether the experts of a token may be computed in this MoE layer where they are, before anybody is told of
        them. What follows is `has_computed`, or `forward`.
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


class _Router(ctypes.Structure):
    """`moe_router` of moe.h."""

    _fields_ = tuple((name, c_int32) for name in ("count", "top_k", "lanes", "shares", "dtype", "breaks_ties"))


class _DecoderLayer(ctypes.Structure):
    """`moe_decoder_layer` of moe.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("norm", "second_norm", "attention", "gate", "router", "experts")),
        ("row_dtype", c_int32),
        ("sum_dtype", c_int32),
        ("scale", c_float),
        ("slots", c_void_p),
        ("memory", c_void_p),
        ("slot_bytes", c_int64),
        *((name, c_void_p) for name in ("what", "cosines", "sines", "between")),
        *((name, c_void_p) for name in ("state", "normed", "logits", "scores", "rows", "weights", "chosen")),
    )


@dataclass(frozen=True)
class _Choosing:
    """How the routers of a kind choose: by vectors of so many lanes, with which shares, in a way that is known here or
    not between experts that are as likely, and with weights of that dtype.
    """

    lanes: int
    shares: int
    breaks_ties: bool
    dtype: torch.dtype

    def router(self, count: int, top_k: int) -> _Router:
        return _Router(count, top_k, self.lanes, self.shares, DTYPES[self.dtype], self.breaks_ties)


class _Between:
    """Memory for what lies between the parts of a layer, which others of its shape share."""

    def __init__(self, hidden: int, count: int, top_k: int) -> None:
        self.state = torch.empty(1, hidden, dtype=torch.bfloat16)
        self.normed = torch.empty(1, hidden, dtype=torch.bfloat16)
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
        self.choosing: dict[tuple[object, ...], _Choosing | None] = {}
        """How layers of a kind choose, which differ in their weights alone; None where they came out otherwise when
        they were tried.
        """
        self._between: dict[tuple[int, int, int], _Between] = {}

    def find(self, layer: nn.Module, experts: nn.Module, maths: Any, span: range) -> NativeDecoderLayer | None:
        """The forward of `layer` from now on, or None for one that is of another kind. `experts` is the module in it
        whose experts `maths` computes, which have the numbers of `span` over all layers.
        """
        parts = dict(layer.named_children())
        norms = [getattr(parts.pop(name, None), "forward", None) for name in _NORMS]
        attention = getattr(parts.pop(_ATTENTION, None), "forward", None)
        if not isinstance(maths, NativeMaths) or not isinstance(attention, NativeSelfAttention) or len(parts) != 1:
            return None
        (block,) = parts.values()
        others = [child for child in block.children() if child is not experts]
        if len(others) != 1 or len(list(block.children())) != 2 or list(block.parameters(recurse=False)):
            return None
        gate, top_k = native_linear(others[0]), getattr(others[0], "top_k", None)
        if gate is None or gate.layer.outputs != len(span):
            return None
        if not isinstance(top_k, int) or not 0 < top_k <= min(len(span) - 1, _MOST_CHOSEN):
            return None
        if not all(isinstance(norm, NativeNorm) for norm in norms):
            return None
        return NativeDecoderLayer(
            self, layer, block, experts, _Parts(norms, attention, others[0], gate, top_k, maths, span.start)
        )

    def between(self, hidden: int, count: int, top_k: int) -> _Between:
        shape = hidden, count, top_k
        if shape not in self._between:
            self._between[shape] = _Between(*shape)
        return self._between[shape]


@dataclass(frozen=True)
class _Parts:
    """What computes a layer, and how many experts a token chooses of those that begin with number `first`."""

    norms: list[Any]
    attention: NativeSelfAttention
    router: nn.Module
    gate: NativeLinear
    top_k: int
    maths: NativeMaths
    first: int


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

    def compute(self, state: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """What becomes of `state` [1, 1, H], which is written over, in the layers from `begin` to before `end`. They
        have all been told where to look (`NativeDecoderLayer.look_at`).
        """
        while begin < end:
            found, done = self.decode(state, begin, end)
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

    def decode(self, state: torch.Tensor, begin: int, end: int) -> tuple[int, int]:
        """Write over `state` what layers make of it, and return what was found where they end, and how many they are:
        with 0, as many as one call can compute.
        """
        layer = self._layers[begin]
        assert layer is not None
        attended = layer.attend(state)
        found: int = layer.pool.lib.moe_decode(
            layer.pool.handle,
            self._first + begin * self._step,
            end - begin if attended is None else 1,
            None if attended is None else attended.data_ptr(),
            state.data_ptr(),
            ctypes.addressof(self._done),
        )
        if found < 0:
            raise MemoryError("no memory for a token's layers")
        return found, self._done.value


class NativeDecoderLayer:
    """The forward of a decoder layer, which the library computes for one token if that gives what the layer gives, or
    leaves to the layer. That is tried when it is first asked for.
    """

    def __init__(self, shared: DecoderLayers, layer: Any, block: Any, experts: Any, parts: _Parts) -> None:
        self._shared, self._forward, self._block, self._experts = shared, layer.forward, block, experts
        self._parts, self._attention, self.pool = parts, parts.attention, parts.maths.pool
        self._kind = tuple(map(kind_of, layer.modules()))
        self._hooks = hooks_of(list(layer.modules())[1:])
        self._scale = float(getattr(layer, "residual_multiplier", 1))
        self._choosing: _Choosing | None = None
        self._known_for = 0
        self._router = _Router()
        self._between = shared.between(parts.maths.layer.hidden, parts.gate.layer.outputs, parts.top_k)
        self._index = torch.empty(1, parts.top_k, dtype=torch.int64)
        self._chosen = (c_int64 * parts.top_k).from_address(self._index.data_ptr())
        resident = shared.slots.resident
        computing = (*parts.norms, parts.attention, parts.gate)
        self.layer = _DecoderLayer(
            *(ctypes.addressof(part.layer) for part in computing),
            router=ctypes.addressof(self._router),
            experts=ctypes.addressof(parts.maths.layer),
            scale=self._scale,
            slots=resident.buffer_info()[0] + parts.first * resident.itemsize,
            memory=shared.slots.address,
            slot_bytes=shared.slots.nbytes,
            between=parts.attention.between.data_ptr(),
            chosen=self._index.data_ptr(),
            **{name: tensor.data_ptr() for name, tensor in vars(self._between).items()},
        )
        self._alone = LayerRun([self])

    def __call__(self, *args: Any, **named: Any) -> Any:
        output = None if len(args) > 1 or any(self._hooks) else self._compute(*args, **named)
        return self._forward(*args, **named) if output is None else output

    def _compute(self, *args: Any, **named: Any) -> torch.Tensor | None:
        """The output [1, 1, H] for one token [1, 1, H]; None if it is anything else, and then nothing has changed."""
        if not self.takes(*args, **named):
            return None
        self._shared.check()
        number = self._experts.moeinf[1]
        if not self._shared.keeper.may_compute(number) or not self.look_at(named["position_embeddings"], named[CACHE]):
            return None
        state: torch.Tensor = args[0] if args else named["hidden_states"]
        return self._alone.compute(state.clone(memory_format=torch.contiguous_format), 0, 1)

    def takes(self, hidden_states: torch.Tensor | None = None, **others: Any) -> bool:
        """Whether the library computes the layer for this token, given the rest, as the layer would."""
        if others.pop(CACHE, None) is None or hidden_states is None:
            return False
        return self._attention.takes(hidden_states, **others) and self._knows(others["position_embeddings"][0].shape[2])

    def look_at(self, angles: States, cache: Any) -> bool:
        """Whether a token with these angles can be computed now, whose keys and values go into `cache`: then that has
        room for them, and the layer knows where.
        """
        if self._experts.moeinf[0] is not self._shared.keeper or (states := self._attention.grow(cache)) is None:
            return False
        self._point_to(angles, states)
        return True

    def attend(self, state: torch.Tensor) -> torch.Tensor | None:
        """What the output's projection is given, where attention itself is not native."""
        if self._attention.output is None:
            return None
        return self._attention.attend_by_torch(self._parts.norms[0].compute(state), *self._angles, self._states)

    def has_computed(self) -> None:
        """The library has computed all of it."""
        self._shared.keeper.has_computed(self._experts.moeinf[1], list(self._chosen))

    def complete(self, found: int) -> torch.Tensor:
        """The output [1, 1, H], after the library has `found` that it cannot compute the rest."""
        between = self._between
        if found == _TIED:
            added: torch.Tensor = self._block(between.normed[None])
        else:
            assert self._choosing is not None
            weights = between.weights.to(self._choosing.dtype)
            keeper, number = self._experts.moeinf
            added = keeper.forward(number, between.normed, self._index, weights)
        return between.state[None] + added.view(1, 1, -1) * self._scale

    def _point_to(self, angles: States, states: States) -> None:
        self._angles = cos, sin = angles[0].contiguous(), angles[1].contiguous()
        self._states = states
        self.layer.what = self._attention.point_to(cos, *states)
        self.layer.cosines, self.layer.sines = cos.data_ptr(), sin.data_ptr()

    def _knows(self, turned: int) -> bool:
        """Whether it is known how the layer chooses, and all else comes out the same with so many angles."""
        if turned != self._known_for:
            kind = *self._kind, turned
            if kind not in self._shared.choosing:
                self._shared.choosing[kind] = self._try(turned)
            if (choosing := self._shared.choosing[kind]) is None:
                return False
            self._choose(choosing)
            self._known_for = turned
        return True

    def _choose(self, choosing: _Choosing) -> None:
        self._choosing = choosing
        self._router = choosing.router(self._parts.gate.layer.outputs, self._parts.top_k)
        self.layer.router = ctypes.addressof(self._router)
        self.layer.row_dtype, self.layer.sum_dtype = self._parts.maths.rounding[choosing.dtype]

    def _try(self, turned: int) -> _Choosing | None:
        with torch.inference_mode():
            try:
                choosing = self._find_choosing()
                trials = self._run(turned) if choosing else []
            except WANTS_MORE:
                return None
            if not choosing or not trials:
                return None
            choosing = replace(choosing, dtype=trials[0].asked.weights.dtype)
            slots, nowhere = self.layer.slots, array("i", [-1]) * self._parts.gate.layer.outputs
            try:
                self.layer.slots, _ = nowhere.buffer_info()
                self._choose(choosing)
                found = list(map(self._compare, trials))
            finally:
                self.layer.slots, self._choosing = slots, None
            return choosing if None not in found and _AWAY in found else None

    def _find_choosing(self) -> _Choosing | None:
        """How the layer chooses, or would in float32: there nothing is rounded that hides how it is computed."""
        count, hidden = self._parts.gate.layer.outputs, self._between.state.shape[1]
        if count > hidden:
            return None
        generator = torch.Generator().manual_seed(0)
        choices = []
        for spread, step in product(_SPREADS * _ROWS, _STEPS):
            logits = (torch.randn(1, count, generator=generator) * spread / step).round() * step
            state = torch.zeros(1, 1, hidden, dtype=torch.float32)
            state[..., :count] = logits = logits.bfloat16()
            asked = _Asked(hidden, torch.float32)
            with self._asking(asked), _all_logits(self._block, self._parts.router):
                self._block(state)
            choices.append((logits, asked))
        for breaks_ties, lanes, shares in product((True, False), LANES, _SHARES):
            choosing = _Choosing(lanes, shares, breaks_ties, torch.float32)
            found = [_compare_choice(self.pool, choosing, *choice) for choice in choices]
            if None not in found and 0 in found:
                return choosing
        return None

    def _run(self, turned: int) -> list[_Trial]:
        """What the layer does with some states of one token."""
        trials = []
        for hidden, angles, cache in self._attention.trials(turned, _ROUNDS):
            keys, values = (states.clone() for states in cache.states)
            asked = _Asked(hidden.shape[-1], hidden.dtype)
            given = {"position_embeddings": angles, "attention_mask": None, CACHE: cache}
            with self._asking(asked):
                output = self._forward(hidden, **given).view(1, -1)
            trials.append(_Trial(hidden, angles, (keys, values), cache.states, asked, output))
        return trials

    @contextmanager
    def _asking(self, asked: _Asked) -> Iterator[None]:
        """While this is open, the layer's experts are asked of `asked`, once."""
        computed_by = self._experts.moeinf
        self._experts.moeinf = asked, 0
        try:
            yield
        finally:
            self._experts.moeinf = computed_by
        if asked.times != 1 or asked.normed.shape != asked.added.shape:
            raise ValueError("its experts are asked in another way than is known here")

    def _compare(self, trial: _Trial) -> int | None:
        """What is found in the trial's place; None if anything is not the same."""
        self._point_to(trial.angles, trial.states)
        found, _ = self._alone.decode(trial.hidden.clone(), 0, 1)
        between, asked = self._between, trial.asked
        ours = [between.normed, between.state + asked.added * self._scale, *trial.states]
        theirs = [asked.normed, trial.output, *trial.held]
        if found == _AWAY:
            ours += _by_expert(self._index, between.weights.to(asked.weights.dtype))
            theirs += _by_expert(asked.index, asked.weights)
        return found if all(map(torch.equal, ours, theirs)) else None


class _Asked:
    """Stands where experts would be computed, and keeps what they are asked for."""

    normed: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor

    def __init__(self, hidden: int, dtype: torch.dtype) -> None:
        self.added = torch.randn(1, hidden, generator=torch.Generator().manual_seed(1)).to(dtype)
        self.times = 0

    def forward(self, _layer: int, *given: torch.Tensor) -> torch.Tensor:
        self.normed, self.index, self.weights = (each.clone() for each in given)
        self.times += 1
        return self.added


@dataclass(frozen=True)
class _Trial:
    """A state of one token, its angles, and what was in the cache before and after a layer ran; what that asked of its
    experts, and gave.
    """

    hidden: torch.Tensor
    angles: States
    states: States
    held: States
    asked: _Asked
    output: torch.Tensor


@contextmanager
def _all_logits(block: nn.Module, router: nn.Module) -> Iterator[None]:
    """While this is open, the first numbers of what `block` is given, in float32, are the logits of its router."""
    name = next(name for name, child in block.named_children() if child is router)
    plain: Any = copy.copy(router)
    vars(plain).pop("forward", None)
    vars(plain)["_parameters"] = {
        name: nn.Parameter(torch.eye(*each.shape) if each.dim() == 2 else torch.zeros(each.shape))
        for name, each in router.named_parameters(recurse=False)
    }
    block._modules[name] = plain
    try:
        yield
    finally:
        block._modules[name] = router


def _by_expert(index: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
    """A token's choice, in ascending order of expert: who is as likely as another may come before it or after it."""
    ordered, places = index[0].sort()
    return [ordered, weights[0, places]]


def _compare_choice(pool: NativePool, choosing: _Choosing, logits: torch.Tensor, asked: _Asked) -> int | None:
    """What `moe_route` finds for these logits [1, count]; None if that is another choice than was asked for."""
    chosen, weights = torch.empty_like(asked.index), torch.empty_like(asked.weights)
    router, scores = choosing.router(logits.shape[1], chosen.shape[1]), torch.empty_like(logits, dtype=torch.float32)
    addresses = (x.data_ptr() for x in (logits, scores, chosen, weights))
    found: int = pool.lib.moe_route(ctypes.addressof(router), *addresses)
    is_same = all(map(torch.equal, _by_expert(chosen, weights), _by_expert(asked.index, asked.weights)))
    return found if is_same or (found == _TIED and not choosing.breaks_ties) else None
