"""What stands behind the second norm of a decoder layer, as the native library computes it for one token: routed
experts, a gated MLP (shared experts, or all there is in a layer without routed ones), or both, whose outputs are added.

Which parts a block has is read off its children; how its router chooses is found by trying. Of routers that choose in a
way that the library does not know, it is told what they chose.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ctypes import c_int32
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import nn

from .attending import replaced
from .dense import NativeLinear, native_linear
from .mlp import NativeMlp
from .native import DTYPES, LANES, NativeMaths, NativePool
from .watching import hooks_of, silenced

__all__ = ["TIED", "Asked", "Choosing", "FeedForward", "Router", "by_expert"]

TIED = 2
"""What `moe_route` and `moe_decode` return where the choice is left to torch."""
_MOST_CHOSEN = 64
"""`MOST_CHOSEN` of csrc/decoder_layer.c."""
_SHARES = range(3)
"""The kinds of `moe_shares`."""
_ROWS, _SPREADS, _STEPS = 12, (0.3, 3.0, 30.0), (2**-8, 0.5)
"""A choice is tried with so many rows of logits that lie so far apart, and are multiples of these: of the larger one
there are many that are the same.
"""


class Router(ctypes.Structure):
    """`moe_router` of moe.h."""

    _fields_ = tuple((name, c_int32) for name in ("count", "top_k", "lanes", "shares", "dtype", "breaks_ties"))


@dataclass(frozen=True)
class Choosing:
    """How the routers of a kind choose: by vectors of so many lanes, with which shares, in a way that is known here or
    not between experts that are as likely, and with weights of that dtype. With 0 lanes it is not known how, and they
    are asked.
    """

    lanes: int = 0
    shares: int = 0
    breaks_ties: bool = False
    dtype: torch.dtype = torch.float32

    def router(self, count: int, top_k: int) -> Router:
        return Router(count, top_k, self.lanes, self.shares, DTYPES[self.dtype], self.breaks_ties)


@dataclass(frozen=True)
class FeedForward:
    """The parts of `block`. Experts, which `maths` computes and which have the numbers of `span` over all layers, come
    with a `router`, and `gate`, what computes its products, if that is native. `share` is what says, by one number, how
    much of the MLP's output is added; without it, that is all.
    """

    block: nn.Module
    experts: Any = None
    maths: NativeMaths | None = None
    span: range = range(0)
    router: Any = None
    gate: NativeLinear | None = None
    mlp: NativeMlp | None = None
    share: nn.Module | None = None
    top_k: int = 0

    @classmethod
    def find(cls, block: nn.Module, experts: nn.Module | None, maths: Any, span: range) -> FeedForward | None:
        """The parts of `block`; None if it has others."""
        if experts is None:
            return cls(block, mlp=block.forward) if isinstance(block.forward, NativeMlp) else None
        others = [child for child in block.children() if child is not experts]
        mlps = [child for child in others if isinstance(child.forward, NativeMlp)]
        shares = [child for child in others if isinstance(child, nn.Linear) and child.out_features == 1]
        routers = [child for child in others if child not in (*mlps, *shares)]
        if not isinstance(maths, NativeMaths) or len(others) == len(list(block.children())):
            return None
        if len(routers) != 1 or len(mlps) > 1 or len(shares) > len(mlps) or list(block.parameters(recurse=False)):
            return None
        (router,), top_k = routers, getattr(routers[0], "top_k", None)
        if not isinstance(top_k, int) or not 0 < top_k <= min(len(span) - 1, _MOST_CHOSEN):
            return None
        gate = native_linear(router)
        if gate is not None and gate.layer.outputs != len(span):
            gate = None
        mlp: Any = mlps[0].forward if mlps else None
        return cls(block, experts, maths, span, router, gate, mlp, shares[0] if shares else None, top_k)

    @property
    def pool(self) -> NativePool:
        pool: NativePool = self.maths.pool if self.maths else self.mlp.pool  # type: ignore[union-attr]  # one is there
        return pool

    def choices(self) -> Iterator[Choosing]:
        """How it may choose, the best way first."""
        if self.experts is not None and self.gate is not None and (choosing := self._find_choosing()) is not None:
            yield choosing
        yield Choosing()

    def ask_router(self, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What it chooses, and with which weights, [1, top_k] each."""
        args, named = self._handed
        _, weights, index = self.router(normed, *args, **named)
        return index, weights

    @cached_property
    def _handed(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the block hands its router beside the state: numbers, and buffers of its own."""
        assert self.maths is not None
        handed: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        forward = self.router.forward

        def see(_state: torch.Tensor, *args: Any, **named: Any) -> Any:
            handed.append((args, named))
            return forward(_state, *args, **named)

        state = torch.zeros(1, 1, self.maths.layer.hidden, dtype=torch.bfloat16)
        with (
            silenced(hooks_of(self.block.modules())),
            self.asking(Asked(state.shape[2], state.dtype)),
            replaced(self.router, "forward", see),
        ):
            self.block(state)
        ((args, named),) = handed
        for value in (*args, *named.values()):
            if not isinstance(value, bool | int | float | None) and all(
                value is not own for own in self.block.buffers()
            ):
                raise ValueError("its router is handed something that nobody knows here")
        return args, named

    def ask_share(self, normed: torch.Tensor) -> float:
        assert self.share is not None
        return float(torch.sigmoid(self.share(normed)))

    def add_mlp(self, added: torch.Tensor, normed: torch.Tensor, share: float) -> torch.Tensor:
        """To what experts have `added`."""
        return added if self.mlp is None else added + self.mlp.compute(normed) * share

    @contextmanager
    def asking(self, asked: Asked) -> Iterator[None]:
        """While this is open, its experts are asked of `asked`, once. Raises ValueError at the end where they were not,
        or in another way than is known here.
        """
        if self.experts is None:
            yield
            return
        with replaced(self.experts, "moeinf", (asked, 0)):
            yield
        if asked.times != 1 or asked.normed.shape != asked.added.shape:
            raise ValueError("its experts are asked in another way than is known here")

    def _find_choosing(self) -> Choosing | None:
        """How it chooses, or would in float32: there nothing is rounded that hides how it is computed."""
        count, hidden = len(self.span), self.gate.layer.inputs  # type: ignore[union-attr]  # it is there
        if count > hidden:
            return None
        generator = torch.Generator().manual_seed(0)
        choices = []
        with self._all_logits():
            for spread, step in product(_SPREADS * _ROWS, _STEPS):
                logits = (torch.randn(1, count, generator=generator) * spread / step).round() * step
                state = torch.zeros(1, 1, hidden, dtype=torch.float32)
                state[..., :count] = logits = logits.bfloat16()
                asked = Asked(hidden, torch.float32)
                with self.asking(asked):
                    self.block(state)
                choices.append((logits, asked))
        for breaks_ties, lanes, shares in product((True, False), LANES, _SHARES):
            choosing = Choosing(lanes, shares, breaks_ties)
            found = [_compare_choice(self.pool, choosing, *choice) for choice in choices]
            if None not in found and 0 in found:
                return choosing
        return None

    @contextmanager
    def _all_logits(self) -> Iterator[None]:
        """While this is open, the first numbers of what the block is given, in float32, are the logits of its router,
        and its MLP makes nothing of it.
        """
        name = next(name for name, child in self.block.named_children() if child is self.router)
        plain: Any = copy.copy(self.router)
        vars(plain).pop("forward", None)
        vars(plain)["_parameters"] = {
            name: nn.Parameter(torch.eye(*each.shape) if each.dim() == 2 else torch.zeros(each.shape))
            for name, each in self.router.named_parameters(recurse=False)
        }
        silent = [child for child in self.block.children() if child not in (self.experts, self.router)]
        with ExitStack() as stack:
            for child in silent:
                stack.enter_context(replaced(child, "forward", torch.zeros_like))
            self.block._modules[name] = plain
            try:
                yield
            finally:
                self.block._modules[name] = self.router


class Asked:
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


def by_expert(index: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
    """A token's choice, in ascending order of expert: who is as likely as another may come before it or after it."""
    ordered, places = index[0].sort()
    return [ordered, weights[0, places]]


def _compare_choice(pool: NativePool, choosing: Choosing, logits: torch.Tensor, asked: Asked) -> int | None:
    """What `moe_route` finds for these logits [1, count]; None if that is another choice than was asked for."""
    chosen, weights = torch.empty_like(asked.index), torch.empty_like(asked.weights)
    router, scores = choosing.router(logits.shape[1], chosen.shape[1]), torch.empty_like(logits, dtype=torch.float32)
    addresses = (x.data_ptr() for x in (logits, scores, chosen, weights))
    found: int = pool.lib.moe_route(ctypes.addressof(router), *addresses)
    is_same = all(map(torch.equal, by_expert(chosen, weights), by_expert(asked.index, asked.weights)))
    return found if is_same or (found == TIED and not choosing.breaks_ties) else None
