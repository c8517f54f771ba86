"""Which experts the next layer will ask for: guesses, for the prefetcher to act on.

A predictor sees what the model does and names experts. It owns no bytes and moves none, and being wrong costs time,
never a different output.
"""

from __future__ import annotations

from typing import Any, NoReturn, Protocol

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

__all__ = ["GatePredictor", "NoPredictor", "Predictor"]


class Predictor(Protocol):
    """What the prefetcher asks of a predictor."""

    def predict(self, layer: int) -> list[int]:
        """Experts (numbers within their layer) that MoE layer `layer + 1` may choose for the one token that is in
        `layer` now; empty where it cannot tell.
        """


class NoPredictor:
    """Names nothing: nothing is prefetched."""

    def predict(self, layer: int) -> list[int]:
        return []


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
