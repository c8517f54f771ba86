"""Notes what the routers choose while a model runs, and makes a trace of it.

Owns the notes. While the model runs it only keeps references, which takes 12 µs for a token of 48 layers. Every now and
then, and when it is told that there is time, it packs them, which takes some 60 µs a token. Knows nothing of models, of
the engine that calls it, or of files. One thread uses it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from .predictors import Predictor
from .trace import NO_EXPERT, ModelIdentity, Trace

__all__ = ["MAX_TOKENS", "Recorder"]

MAX_TOKENS = 1 << 16
"""A token takes 4 bytes per expert that it asks for: 100 MB for so many of a model of 48 layers and k = 8."""

_PACKED_TOKENS = 64
"""Packing so many at once costs half of packing each, and what lies unpacked stays small."""


class Recorder:
    """Records the routing of one model.

    Args:
        identity: the model; `record` is called for each of its layers in turn.
        max_tokens: what comes after so many tokens is dropped.
        packed_tokens: so many tokens are packed at once. Unpacked, one takes 1.2 kB per layer.
        foresight: asked, of every token that is no part of a prompt, which experts the next layer will choose, and told
            what that chose; what it says is noted beside that.
    """

    def __init__(
        self,
        identity: ModelIdentity,
        *,
        max_tokens: int = MAX_TOKENS,
        packed_tokens: int = _PACKED_TOKENS,
        foresight: Predictor | None = None,
    ) -> None:
        self.num_tokens = 0
        self._identity = identity
        self._max_tokens = max_tokens
        self._packed_tokens = packed_tokens
        self._foresight = foresight
        self._last_layer = len(identity.layer_sizes) - 1
        self._sequence: int | None = None
        self._next_position: dict[int, int] = {}
        self._step: _Step | None = None
        self._first_foreseen: list[int] = []
        self._notes: list[_Step | _Packed] = []
        self._unpacked_tokens = 0

    def begin(self, sequence_id: int, position: int | None = None) -> None:
        """What follows belongs to this sequence, its first token at `position`: by default after its last one, or 0.

        A position grows within a sequence, so a conversation that is cut back goes on under another number.
        """
        come_to = self._next_position.get(sequence_id, 0)
        assert sequence_id >= 0
        assert position is None or position >= come_to, f"sequence {sequence_id} has come to {come_to}"
        self._step = None
        self._sequence = sequence_id
        self._next_position[sequence_id] = come_to if position is None else position

    def token_enters(self) -> None:
        """One token enters the model's first decoder layer; `record` follows."""
        if self._foresight is not None:
            self._first_foreseen = self._foresight.predict(-1)

    def record(self, layer: int, experts: torch.Tensor, weights: torch.Tensor, is_prefill: bool) -> None:
        """Note the choice of one layer's router for the tokens of a step: `experts` and `weights` are [tokens, k].

        Layers come in order from 0; a step that ends before the last one is dropped. The tensors must not change
        afterwards. An index of the layer's number of experts stands for "no expert"; an expert that is named twice for
        a token is noted once, with the sum of its weights.
        """
        if layer == 0:
            self._step = self._new_step(len(experts), is_prefill)
        step = self._step
        if step is None or layer != len(step.choices):
            self._step = None
            return
        if step.tokens > 1:  # a prompt's tensors are large, and may be views of larger ones
            experts, weights = experts[: step.kept].to(torch.int16), weights[: step.kept].to(torch.float16)
        elif self._foresight is not None:
            self._foresight.observe(layer, experts.tolist())
        step.choices.append((experts, weights))
        if layer == 0 and not is_prefill:
            step.foreseen[0] = self._first_foreseen
        if layer == self._last_layer:
            self._finish(step)

    def computed(self, layer: int, output: torch.Tensor) -> None:
        """The experts of a layer, whose choice was recorded, have given this for one token."""
        step = self._step
        if self._foresight is not None and step is not None and layer < self._last_layer:
            step.foreseen[layer + 1] = self._foresight.predict(layer, lambda: output)

    def pack(self) -> None:
        """Pack what lies unpacked."""
        first = len(self._notes)
        while first and isinstance(self._notes[first - 1], _Step):
            first -= 1
        steps = [notes for notes in self._notes[first:] if isinstance(notes, _Step)]
        if steps:
            self._notes[first:] = [_pack(steps, self._identity)]  # one operation, which no interrupt divides
        self._unpacked_tokens = 0

    def trace(self) -> Trace:
        """All tokens that went through every layer so far, in the order in which they ran. Recording may go on."""
        self.pack()
        packed = [notes for notes in self._notes if isinstance(notes, _Packed)] or [_pack([], self._identity)]
        trace = Trace(self._identity, *map(np.concatenate, zip(*packed, strict=True)))
        has_foresight = trace.foreseen is not None and bool((trace.foreseen != NO_EXPERT).any())
        return trace if has_foresight else dataclasses.replace(trace, foreseen=None)

    def _new_step(self, tokens: int, is_prefill: bool) -> _Step:
        assert self._sequence is not None, "begin comes first"
        kept = min(tokens, self._max_tokens - self.num_tokens)
        return _Step(self._sequence, self._next_position[self._sequence], tokens, kept, is_prefill)

    def _finish(self, step: _Step) -> None:
        """The counters go first: an interrupt may then leave a gap, and never two tokens in one place."""
        self._step = None
        self._next_position[step.sequence] = step.position + step.tokens
        self.num_tokens += step.kept
        if step.kept:
            self._notes.append(step)
            self._unpacked_tokens += step.kept
            if self._unpacked_tokens >= self._packed_tokens:
                self.pack()


@dataclass(slots=True)
class _Step:
    """One forward pass: `kept` of its `tokens` are noted, and the choice of each layer that was reached."""

    sequence: int
    position: int
    tokens: int
    kept: int
    is_prefill: bool
    choices: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    foreseen: dict[int, list[int]] = field(default_factory=dict)


class _Packed(NamedTuple):
    """Some tokens, as the arrays of a trace, in its order."""

    experts: npt.NDArray[np.int16]
    weights: npt.NDArray[np.float16]
    sequence_id: npt.NDArray[np.int32]
    position: npt.NDArray[np.int32]
    is_prefill: npt.NDArray[np.bool_]
    foreseen: npt.NDArray[np.int16]


def _pack(steps: Sequence[_Step], identity: ModelIdentity) -> _Packed:
    kept = [step.kept for step in steps]
    shape = identity.shapes(sum(kept))["experts"]
    experts, weights = np.full(shape, NO_EXPERT, np.int16), np.zeros(shape, np.float16)
    for layer in range(shape[1] if steps else 0):
        ids, shares = (torch.cat(tensors) for tensors in zip(*(step.choices[layer] for step in steps), strict=True))
        experts[:, layer, : ids.shape[1]] = ids.to("cpu", torch.int16).numpy()
        weights[:, layer, : ids.shape[1]] = shares.detach().to("cpu", torch.float16).numpy()
    experts[experts == np.array(identity.layer_sizes)[:, None]] = NO_EXPERT
    _merge_repeats(experts, weights)
    weights[experts == NO_EXPERT] = 0
    np.nan_to_num(weights, copy=False)  # what float16 cannot hold becomes the largest number that it can
    return _Packed(
        experts,
        weights,
        np.repeat(np.array([step.sequence for step in steps], np.int32), kept),
        np.concatenate([np.arange(step.kept, dtype=np.int32) + step.position for step in steps] or [_NOTHING]),
        np.repeat(np.array([step.is_prefill for step in steps], np.bool_), kept),
        _foreseen(steps, identity),
    )


def _foreseen(steps: Sequence[_Step], identity: ModelIdentity) -> npt.NDArray[np.int16]:
    """What was foreseen of steps of one token; a prompt's places stay empty."""
    foreseen = np.full(identity.shapes(sum(step.kept for step in steps))["foreseen"], NO_EXPERT, np.int16)
    token = 0
    for step in steps:
        for layer, named in step.foreseen.items():
            experts = [expert for expert in dict.fromkeys(named) if expert < identity.layer_sizes[layer]]
            experts = experts[: identity.top_k[layer]]
            foreseen[token, layer, : len(experts)] = experts
        token += step.kept
    return foreseen


_NOTHING = np.zeros(0, np.int32)


def _merge_repeats(experts: npt.NDArray[np.int16], weights: npt.NDArray[np.float16]) -> None:
    """Leave each expert of a token and layer in the first of its places, with the weight of them all."""
    for place in range(1, experts.shape[2]):
        for earlier in range(place):
            repeats = (experts[..., place] == experts[..., earlier]) & (experts[..., place] >= 0)
            if repeats.any():
                with np.errstate(over="ignore"):
                    weights[repeats, earlier] += weights[repeats, place]
                experts[repeats, place] = NO_EXPERT
