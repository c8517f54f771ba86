"""Recorded routing in the routers' place: a model of any weights then asks for experts as another one really did.

What a replay times is the engine and the machine, with the locality of the recording; what the model says means
nothing. A router that is asked ahead of its turn names what the recorded one named when it was. Works on any
transformers model whose experts are modules of their own, moeinf's or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from .errors import UsageError
from .gate import GatePredictor
from .manifest import Manifest
from .trace import NO_EXPERT, Trace

__all__ = ["Replay", "check_replay", "recorded_layer"]


def recorded_layer(layer: int, recorded: int) -> int:
    """Which of a trace's `recorded` MoE layers a model's layer `layer` follows: that of its number, and behind the last
    one they repeat from the second on (0 1 2 1 2 1 ...). The first one's router sees little but the token itself, and
    chooses as no other does; it repeats only where it is the only one.
    """
    if layer < recorded:
        return layer
    return 1 + (layer - 1) % (recorded - 1) if recorded > 1 else 0


def check_replay(trace: Trace, manifest: Manifest) -> None:
    """Raise UsageError, which says what does not fit, unless each layer of the model can follow its `recorded_layer`;
    layers of the trace beyond the model's are left out.
    """
    sizes, top_k = trace.identity.layer_sizes, trace.identity.top_k
    for number, layer in enumerate(manifest.layers):
        followed = recorded_layer(number, len(sizes))
        theirs, ours = f"its layer {followed}", f"layer {number} of the model"
        if sizes[followed] > layer.num_experts:
            raise _misfit(f"{theirs} has {sizes[followed]} experts, {ours} {layer.num_experts}")
        if top_k[followed] > layer.top_k:
            raise _misfit(f"{theirs} asks for {top_k[followed]} experts, {ours} for {layer.top_k}")
    empty = (trace.experts[:, : len(manifest.layers)] == NO_EXPERT).all(axis=2)
    for token, number in np.argwhere(empty)[:1]:
        raise _misfit(f"token {token} asks for no expert of layer {number}")


class Replay:
    """Makes experts modules compute what a trace names for their `recorded_layer`. One thread uses it, the model's.

    A layer that a `GatePredictor` asks gets what the trace has foreseen of its recorded one, which may be nothing.

    Args:
        sequences: the requests that can be replayed, each a trace of its own, checked by `check_replay`.
        modules: the model's experts modules, one per MoE layer in forward order.
    """

    def __init__(self, sequences: Sequence[Trace], modules: Iterable[nn.Module]) -> None:
        self._sequences = sequences
        self._now: Trace | None = None
        self._token = 0
        self._last = -1
        for layer, module in enumerate(modules):
            module.register_forward_pre_hook(self._hook(layer))
            self._last = layer

    @property
    def foresees(self) -> bool:
        """Whether what routers foresaw was recorded, too."""
        return all(sequence.foreseen is not None for sequence in self._sequences)

    def begin(self, sequence: int, first: int = 0) -> None:
        """The next token that runs is `first` of this sequence. After its last token the routers choose again."""
        self._now, self._token = self._sequences[sequence], first

    def _hook(self, layer: int) -> Any:
        def choose(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
            hidden, experts, weights, *rest = arguments
            begin, end = self._token, self._token + len(experts)
            asked_by: Any = getattr(module, "moeinf", (None,))[0]
            is_asked = isinstance(asked_by, GatePredictor)
            if layer == self._last and not is_asked:
                self._token = end
            if self._now is None or end > self._now.num_tokens:
                return None
            followed = recorded_layer(layer, len(self._now.layer_sizes))
            if is_asked:
                chosen = _foreseen(self._now, followed, begin)
                shares = torch.ones(chosen.shape)
            else:
                chosen, shares = _choice(self._now, followed, begin, end)
            return (hidden, chosen.to(experts), shares.to(weights), *rest)

        return choose


def _foreseen(trace: Trace, layer: int, token: int) -> torch.Tensor:
    """What the router of a recorded layer named for a token before its turn [1, at most k]."""
    if trace.foreseen is None:
        return torch.zeros(1, 0)
    named = trace.foreseen[token, layer]
    return torch.from_numpy(named[named != NO_EXPERT])[None]


def _choice(trace: Trace, layer: int, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts and weights of some tokens in a recorded layer, both [tokens, k]; without weights in the trace all
    experts count alike. A place that a token leaves empty is left out, or where other tokens fill it, names one expert
    again, at weight 0.
    """
    width = trace.identity.top_k[layer]
    experts = trace.experts[begin:end, layer, :width]
    is_used = experts != NO_EXPERT
    if trace.weights is None:
        weights = is_used / is_used.sum(axis=1, keepdims=True)
    else:
        weights = trace.weights[begin:end, layer, :width].astype(np.float32)
    first = np.take_along_axis(experts, is_used.argmax(axis=1)[:, None], axis=1)
    places = is_used.any(axis=0)
    chosen = np.where(is_used, experts, first)[:, places]
    return torch.from_numpy(chosen), torch.from_numpy(weights[:, places])


def _misfit(what: str) -> UsageError:
    return UsageError(
        f"the trace cannot be replayed with this model: {what}",
        hint="python -m moeinf.testing SHAPE FOLDER --experts N --top-k N makes a model that fits",
    )
