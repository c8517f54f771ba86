"""What followed, when the router chose like this before: a policy that learns from the tokens it has seen."""

from __future__ import annotations

from collections.abc import Sequence

from moeinf.native_routing import make_routing_memory

from .layered import Floats, LayeredPolicy

__all__ = ["NeighbourUsePolicy"]


class NeighbourUsePolicy(LayeredPolicy):
    """Expected use, where the next few tokens are foreseen from what followed the past tokens most like this one: a
    rank is the visits that `RoutingMemory` expects to pass without a use, each worth as many layers as there are.

    Layers that have run are ranked two at a time at least, which is one search for both (docs/experiments.md).
    `memory` is there for others to ask too.
    """

    _TOGETHER = 2

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__(sizes)
        self.memory = make_routing_memory(sizes)

    def learn(self, layer: int, tokens: list[list[int]]) -> None:
        self.memory.observe(layer, tokens)

    def ranks(self, layers: list[int]) -> Floats:
        ranks: Floats = self._layers * self.memory.visits(layers)
        return ranks[:, : self._shape[1]]
