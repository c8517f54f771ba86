"""The next layer's router, asked one layer early: the predictor `gate`.

A router sees a token's state, the sum of what all layers before it have added. From one MoE layer to the next that sum
changes little (the idea is from Eliseev and Mazur, arXiv 2312.17238), and much of how it changes can be told: what the
experts have added so far is known, and the rest, the next layer's attention above all, has a mean, which is learned
while the model runs. So the router is asked about the state as it will probably be. Before the first MoE layer it is
the token's, as it enters the model. Knows nothing of caches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .kernels import Watching
from .metamodel import output_collector
from .predictors import Added

__all__ = ["GatePredictor", "first_decoder_layer"]

_RATE = 1 / 32
"""How much of a mean the last token is. From 1/8 to 1/128 guesses are as good (docs/experiments.md)."""
_LEAST_RIGHT = 0.5
"""A layer of which fewer guesses come true is not worth reading for."""
_TRUSTED = 4
"""A layer begins as if all guesses for so many tokens had come true."""
_RETRY_TOKENS = 32
"""Whether that has changed is looked at so often."""
_LEARN_EVERY = 4
"""Once some tokens are known, one of so many is learned from: that takes as long as asking a router."""
_PROMPT_ROWS = 64
"""So many tokens of a prompt say how the state changes, the last ones."""


class GatePredictor:
    """Asks the next layer's router about this layer's state, as it is expected to be there.

    The router is not called by name, since every family has it in another place: the whole MoE block of the next layer
    is run on that state, up to where it hands its choice to its experts module, which answers with an exception here.
    Of the families tested only gemma4 has its router outside such a block, and nothing is predicted for it.

    Args:
        model: the transformers model, loaded.
        experts: its experts modules by their names in the model, one per MoE layer in order. Each has the attribute
            `moeinf`, (who computes it, its number).
    """

    def __init__(self, model: nn.Module, experts: dict[str, nn.Module]) -> None:
        self._experts: list[Any] = list(experts.values())
        self._entries = [_find_entry(model, name, partial(self._enter, layer)) for layer, name in enumerate(experts)]
        self.forget()
        self._tokens = 0
        self._layer = -1
        """Where the token is: `_state` is its state there, `_added` what that layer's experts gave for it."""
        self._state: torch.Tensor | None = None
        self._added: torch.Tensor | None = None
        self._more: _Inputs = (), {}
        """What blocks are given beside the state."""
        self._named: list[int] = []
        """What was named last, of layer `_asked`, which has not chosen yet."""
        self._asked = -1
        self._news: Callable[[], None] | None = None
        for module in self._experts:
            module.register_forward_hook(Watching(self._keep_added))
        if (first := first_decoder_layer(model, next(iter(experts)))) is not None:
            first.register_forward_pre_hook(Watching(self._begin), prepend=True, with_kwargs=True)

    def forget(self) -> None:
        """Forget what was learned of how states change, and how many guesses came true. Nothing is named until a step
        has run.
        """
        for entry in self._entries:
            if entry is not None:
                entry.is_known = False
        self._changes = [_Change() for _ in self._experts]
        self._right = [_Share() for _ in self._experts]

    def observe(self, layer: int, tokens: Sequence[Sequence[int]]) -> None:
        if layer == self._asked and self._named:
            self._right[layer].count(tokens[-1], self._named)
        self._asked, self._named = -1, []

    def predict(self, layer: int, added: Added | None = None) -> list[int]:
        if self._news is not None:
            self._news()
            self._news = None
        following = layer + 1
        if following == len(self._entries) or layer != self._layer or self._state is None or len(self._state) > 1:
            return []
        entry, experts, more = self._entries[following], self._experts[following], self._more
        if entry is None or not entry.is_known or (layer < 0 and (entry.norm is None or any(more))):
            return []
        right = self._right[following]
        if not right.is_worth_asking():
            return []
        self._asked = following
        expected = self._changes[following].expect(self._state, added() if added is not None and entry.norm else None)
        computed_by = experts.moeinf
        experts.moeinf = (self, following)
        collector = output_collector.set(None)  # what routers gave is collected for who asks, and this is no answer
        try:
            with torch.no_grad():
                entry.run(expected, more)
        except _Choice as choice:
            self._named = choice.experts
            return self._named if right.is_enough else []
        finally:
            experts.moeinf = computed_by
            output_collector.reset(collector)
        return []

    def forward(
        self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> NoReturn:
        """Stands where the experts would be computed, and takes the router's choice instead."""
        raise _Choice(top_k_index[0].tolist())

    def _begin(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state, _ = _split(args, kwargs)
        self._layer, self._state, self._added = -1, _last_rows(state), None
        self._tokens += 1

    def _enter(self, layer: int, state: torch.Tensor, has_norm: bool, more: _Inputs) -> None:
        """A step's state has come to this layer: learn how it changed since the one before."""
        before, after = self._state, _last_rows(state)
        if before is not None and self._layer == layer - 1 and before.shape == after.shape:
            change = self._changes[layer]
            learn = partial(change.learn, before, self._added if has_norm else None, after)
            if len(after) > 1:
                learn()
            elif self._asked == layer and (change.is_new or self._tokens % _LEARN_EVERY == 0):
                self._news = learn  # later, when somebody waits for experts and not for this
        self._layer, self._state, self._added, self._more = layer, after, None, more

    def _keep_added(self, _experts: nn.Module, _args: tuple[Any, ...], output: torch.Tensor) -> None:
        self._added = _last_rows(output)


_Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class _Share:
    """Of a layer's experts, the share that was named before; all of them, as far as is known at first."""

    def __init__(self) -> None:
        self._share, self._counted, self._refused = 1.0, _TRUSTED, 0

    @property
    def is_enough(self) -> bool:
        return self._share >= _LEAST_RIGHT

    def is_worth_asking(self) -> bool:
        if self.is_enough:
            return True
        self._refused += 1
        return self._refused % _RETRY_TOKENS == 0

    def count(self, chosen: Sequence[int], named: Sequence[int]) -> None:
        self._counted += 1
        right = sum(expert in named for expert in chosen) / len(chosen)
        self._share += max(_RATE, 1 / self._counted) * (right - self._share)


class _Entry:
    """Where the state enters an MoE layer: at the norm whose output the layer's block is given, or, if there is none,
    at the block. The first step that runs tells which norm that is.

    Args:
        block: the MoE block, from its router on.
        norms: what may be the norm.
        tell: is told the state of every step that enters, whether it enters through a norm, and what else the block is
            given.
    """

    def __init__(
        self, block: nn.Module, norms: list[nn.Module], tell: Callable[[torch.Tensor, bool, _Inputs], None]
    ) -> None:
        self.norm: nn.Module | None = None
        self.is_known = False
        self._block = block
        self._tell = tell
        self._normed: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []
        self._watched = {norm: norm.register_forward_hook(Watching(self._keep_normed)) for norm in norms}
        self._like = torch.empty(1, 1, 0)
        block.register_forward_pre_hook(Watching(self._enter), with_kwargs=True)

    def run(self, state: torch.Tensor, more: _Inputs) -> None:
        """Run the block on the state [1, H] of one token, and with what else it is to be given."""
        args, kwargs = more
        state = state.to(self._like.dtype).view(*(1,) * (self._like.dim() - 1), -1)
        if self.norm is not None:
            state = self.norm.forward(state)
        self._block.forward(state, *args, **kwargs)

    def _keep_normed(self, norm: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if args:
            self._normed.append((norm, args[0], output))

    def _enter(self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state, more = _split(args, kwargs)
        self._like, self.is_known = state.new_empty((0,) * state.dim()), True
        found = next(((norm, given) for norm, given, output in self._normed if output is state), None)
        self._normed.clear()
        self.norm, state = found or (None, state)
        for norm in self._watched.keys() - {self.norm}:
            self._watched.pop(norm).remove()
        self._tell(state, found is not None, more)


class _Change:
    """How a token's state changes on its way into an MoE layer: as on average; and where what the experts before it add
    is not the average, by a share of the difference, which is all of it in most families.
    """

    def __init__(self) -> None:
        self._moved: torch.Tensor | None = None
        self._added: torch.Tensor | None = None
        """The averages [H], in float32."""
        self._along = self._size = 0.0
        self._share = 1.0
        self._seen = 0

    @property
    def is_new(self) -> bool:
        return self._seen < _PROMPT_ROWS

    def learn(self, before: torch.Tensor, added: torch.Tensor | None, after: torch.Tensor) -> None:
        """Some tokens' states, and what the experts added to them, all [tokens, H]."""
        count = len(after)
        stands_for = _LEARN_EVERY if count == 1 and not self.is_new else count
        rate = max(1 - (1 - _RATE) ** stands_for, count / (self._seen + count))
        moved = after.float() - before.float()
        if added is not None:
            added = added.float()
            moved_by = moved - (moved.mean(0) if count > 1 or self._moved is None else self._moved)
            added_by = added - (added.mean(0) if count > 1 or self._added is None else self._added)
            self._along += rate * (float(torch.sum(moved_by * added_by)) / count - self._along)
            self._size += rate * (float(torch.sum(added_by * added_by)) / count - self._size)
            self._share = self._along / self._size if self._size else 1.0
            self._added = _mix(self._added, added.mean(0), rate)
        self._moved = _mix(self._moved, moved.mean(0), rate)
        self._seen += count

    def expect(self, before: torch.Tensor, added: torch.Tensor | None) -> torch.Tensor:
        """What the state of one token [1, H] becomes, in float32, if so much is added, or as much as on average."""
        state = before.float() if self._moved is None else before.float() + self._moved
        if added is None:
            return state
        added = added.float() if self._added is None else added.float() - self._added
        return torch.add(state, added, alpha=self._share)


def _mix(mean: torch.Tensor | None, news: torch.Tensor, rate: float) -> torch.Tensor:
    return news if mean is None else torch.lerp(mean, news, rate)


class _Choice(Exception):  # noqa: N818  # carries an answer past the rest of a block
    def __init__(self, experts: list[int]) -> None:
        self.experts = experts


def first_decoder_layer(model: nn.Module, experts: str) -> nn.Module | None:
    """The decoder layer that a token enters first, in the list in which the module of this name is; None if there is no
    such list.
    """
    layers = model.get_submodule(".".join(experts.split(".")[:-3]))
    return layers[0] if isinstance(layers, nn.ModuleList) else None


def _find_entry(model: nn.Module, experts: str, tell: Callable[[torch.Tensor, bool, _Inputs], None]) -> _Entry | None:
    """The entry of the layer whose experts have this name; None if the module around them is no MoE block alone, but a
    whole layer with its attention.
    """
    name = experts.rpartition(".")[0]
    block, layer = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    if isinstance(block, GradientCheckpointingLayer):
        return None
    norms = [child for child in layer.children() if child is not block and _has_one_vector(child)]
    return _Entry(block, norms, tell)


def _has_one_vector(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.dim() == 1


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, _Inputs]:
    """The state that a module is given, and the rest."""
    if args:
        return args[0], (args[1:], kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), ((), rest)


def _last_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The last tokens' [tokens, H]; of a prompt apart from the rest, which need not be kept."""
    rows = tensor.detach().reshape(-1, tensor.shape[-1])
    return rows if len(rows) == 1 else rows[-_PROMPT_ROWS:].float().clone()
