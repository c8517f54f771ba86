"""Which experts the next layer will ask for: guesses, for the prefetcher to act on.

A predictor sees what the model does and names experts. It owns no bytes and moves none, and being wrong costs time,
never a different output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .collection import RequestCounter
from .native_routing import make_routing_memory
from .routing_memory import RoutingMemory

__all__ = ["CombinedPredictor", "EamPredictor", "GatePredictor", "NoPredictor", "Predictor"]


class Predictor(Protocol):
    """What the prefetcher asks of a predictor. Experts are numbers within their layer."""

    def observe(self, layer: int, tokens: Sequence[Sequence[int]]) -> None:
        """MoE layer `layer` has chosen experts for `tokens`, a list for each, the last one last. Of a long prompt only
        the last tokens are told.
        """

    def predict(self, layer: int) -> list[int]:
        """Experts that the MoE layer which runs after `layer` may choose for the one token that is in `layer` now, the
        likeliest first; after the last layer, what the first one may choose for the next token. Empty where it cannot
        tell.
        """


class NoPredictor:
    """Names nothing: nothing is prefetched."""

    def observe(self, layer: int, tokens: Sequence[Sequence[int]]) -> None:
        pass

    def predict(self, layer: int) -> list[int]:
        return []


class EamPredictor:
    """Matches activation matrices: what this token and this request have chosen so far, with those of the past.

    The chance of an expert is 0.8 of what followed the past tokens that chose most alike (`RoutingMemory`), whose
    matrices have one token each, and 0.2 of what the past requests most like this one used (`RequestCounter`; after
    MoE-Infinity, arXiv 2401.14361). Experts of a chance of 0.35 and more are named: on recorded routing about 0.6 of
    those that were not in the cache were then asked for (docs/experiments.md).

    Args:
        sizes: experts per MoE layer.
        top_k: experts per token and layer.
        counter: counts the present request; somebody else has it count.
        memory: remembers tokens, and somebody else has it observe them; without, it has its own.
    """

    _LEAST_CHANCE = 0.35
    _MEMORY_SHARE = 0.8

    def __init__(
        self, sizes: Sequence[int], top_k: Sequence[int], counter: RequestCounter, memory: RoutingMemory | None = None
    ) -> None:
        self._memory = memory or make_routing_memory(sizes)
        self._feeds_memory = memory is None
        self._sizes = sizes
        self._top_k = top_k
        self._counter = counter

    def observe(self, layer: int, tokens: Sequence[Sequence[int]]) -> None:
        if self._feeds_memory:
            self._memory.observe(layer, tokens)

    def predict(self, layer: int) -> list[int]:
        if not self._memory.has_past:
            return []
        following = (layer + 1) % len(self._sizes)
        next_time = self._memory.followed([following])[0, 0, : self._sizes[following]]
        shares = self._counter.expected_shares(following)
        chances = self._MEMORY_SHARE * next_time + (1 - self._MEMORY_SHARE) * self._top_k[following] * shares
        named = np.flatnonzero(chances >= self._LEAST_CHANCE)
        experts: list[int] = named[np.argsort(-chances[named], kind="stable")].tolist()
        return experts


class CombinedPredictor:
    """Asks one predictor, and where it cannot tell, another. Both observe what was chosen without its help."""

    def __init__(self, first: Predictor, second: Predictor) -> None:
        self._first = first
        self._second = second

    def observe(self, layer: int, tokens: Sequence[Sequence[int]]) -> None:
        pass

    def predict(self, layer: int) -> list[int]:
        return self._first.predict(layer) or self._second.predict(layer)


class GatePredictor:
    """Asks the next layer's router about this layer's state.

    A layer adds little to the hidden state, so what enters this MoE layer is much like what will enter the next one
    (the idea is from Eliseev and Mazur, arXiv 2312.17238). The router is not called by name, since every family has it
    in another place: the whole MoE block of the next layer is run on the input of this one, up to where it hands its
    choice to its experts module, which answers with an exception here. Of the families tested only gemma4 has its
    router outside such a block, and nothing is predicted for it.

    Args:
        model: the transformers model, loaded.
        experts: its experts modules by their names in the model, one per MoE layer in order. Each has the attribute
            `moeinf`, (who computes it, its number).
    """

    def __init__(self, model: nn.Module, experts: dict[str, nn.Module]) -> None:
        self._experts: list[Any] = list(experts.values())
        self._blocks = [_block(model, name) for name in experts]
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        for block in self._blocks:
            if block is not None:
                block.register_forward_pre_hook(self._keep_inputs, with_kwargs=True)

    def observe(self, layer: int, tokens: Sequence[Sequence[int]]) -> None:
        pass

    def predict(self, layer: int) -> list[int]:
        if layer + 1 == len(self._blocks) or self._blocks[layer] is None or self._inputs is None:
            return []
        block, experts = self._blocks[layer + 1], self._experts[layer + 1]
        if block is None:
            return []
        args, kwargs = self._inputs
        computed_by = experts.moeinf
        experts.moeinf = (self, layer + 1)
        try:
            block.forward(*args, **kwargs)
        except _Choice as choice:
            return choice.experts
        finally:
            experts.moeinf = computed_by
        return []

    def forward(
        self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> NoReturn:
        """Stands where the experts would be computed, and takes the router's choice instead."""
        raise _Choice(top_k_index[0].tolist())

    def _keep_inputs(self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inputs = args, kwargs


class _Choice(Exception):  # noqa: N818  # carries an answer past the rest of a block
    def __init__(self, experts: list[int]) -> None:
        self.experts = experts


def _block(model: nn.Module, name: str) -> nn.Module | None:
    """The module around an experts module, if it is the MoE block alone and not a whole layer with its attention."""
    block = model.get_submodule(name.rpartition(".")[0])
    return None if isinstance(block, GradientCheckpointingLayer) else block
