"""Gated MLPs natively, against the modules' own code: to the last bit where they are taken, not taken where they are
others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from moeinf.kernels.dense import compute_packed, speed_up
from moeinf.kernels.mlp import NativeMlp, speed_up_mlps
from moeinf.kernels.native import NativePool
from moeinf.kernels.packed import LosslessLinear
from moeinf.lossless import pack
from test_native import LIBRARY, TORCH_S

pytestmark = pytest.mark.skipif(TORCH_S is None, reason="torch may add in another order on such a processor")

HIDDEN = 256


@pytest.fixture
def pool() -> Iterator[NativePool]:
    opened = NativePool(2, TORCH_S, LIBRARY)
    yield opened
    opened.close()


class Mlp(nn.Module):
    def __init__(self, inner: int, activation: str = "silu", *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, inner, bias=bias)
        self.up_proj = nn.Linear(HIDDEN, inner, bias=bias)
        self.down_proj = nn.Linear(inner, HIDDEN, bias=bias)
        self.act_fn = ACT2FN[activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return output


class Doubled(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class Swapped(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))
        return output


class Normed(Mlp):
    def __init__(self, inner: int) -> None:
        super().__init__(inner)
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.norm(x))


class Stateful(Mlp):
    """Its activation is a number that it has."""

    def __init__(self, inner: int) -> None:
        super().__init__(inner)
        self.act_fn = nn.PReLU()


def made(make: Callable[..., nn.Module], *args: Any, **named: Any) -> tuple[Any, Any]:
    """A module in bfloat16, and the same once more."""
    torch.manual_seed(0)
    module = make(*args, **named).to(torch.bfloat16)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module, copy.deepcopy(module)


def taken(module: nn.Module, pool: NativePool) -> bool:
    speed_up(module, pool)
    is_taken = speed_up_mlps(nn.Sequential(module), pool) == 1
    assert is_taken == isinstance(module.forward, NativeMlp)
    return is_taken


def hold_the_same(ours: nn.Module, theirs: nn.Module, tokens: int = 1, most: float = 1e4) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        for size in (0.1, 1.0, most):
            for shape in ((1, tokens, HIDDEN), (tokens, HIDDEN)):
                for _ in range(20):
                    x = (torch.randn(shape, generator=generator) * size).bfloat16()
                    output = ours(x)
                    assert output.shape == shape
                    assert torch.equal(output, theirs(x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("inner", [64, 100, 448, 1000])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2"])
def test_results_are_torchs(activation: str, inner: int, bias: bool, pool: NativePool) -> None:
    ours, theirs = made(Mlp, inner, activation, bias=bias)
    is_taken = taken(ours, pool)
    assert is_taken or (activation.startswith("gelu") and inner % 64)
    hold_the_same(ours, theirs)
    hold_the_same(ours, theirs, tokens=3)


def test_packed_weights(pool: NativePool) -> None:
    ours, theirs = made(Mlp, 320)
    for name in ("gate_proj", "up_proj", "down_proj"):
        LosslessLinear.pack_into(getattr(ours, name), *pack(getattr(ours, name).weight))
    compute_packed(ours, pool)
    assert taken(ours, pool)
    hold_the_same(ours, theirs)


@pytest.mark.parametrize("kind", [Doubled, Swapped, Normed, Stateful])
def test_what_does_anything_else_is_left_alone(kind: type[Mlp], pool: NativePool) -> None:
    ours, theirs = made(kind, 192)
    assert not taken(ours, pool)
    hold_the_same(ours, theirs)


def test_so_is_what_has_a_layer_that_is_not_native(pool: NativePool) -> None:
    ours, theirs = made(Mlp, 192)
    ours.up_proj.float()
    assert not taken(ours, pool)
    ours, theirs = made(Mlp, 192)
    ours.up_proj, theirs.up_proj = (nn.Linear(HIDDEN, 1).bfloat16() for _ in range(2))
    theirs.up_proj.load_state_dict(ours.up_proj.state_dict())
    assert not taken(ours, pool)
    hold_the_same(ours, theirs)


@pytest.mark.parametrize("part", ["gate_proj", "down_proj", "act_fn"])
def test_hooks_are_called(part: str, pool: NativePool) -> None:
    ours, theirs = made(Mlp, 192)
    assert taken(ours, pool)
    for module in (ours, theirs):
        module.get_submodule(part).register_forward_hook(lambda _module, _args, output: output + 1)
    hold_the_same(ours, theirs)


def test_mlps_of_several_sizes(pool: NativePool) -> None:
    """One lends its memory to another of its size alone."""
    torch.manual_seed(0)
    ours = nn.Sequential(*(Mlp(inner) for inner in (64, 1000, 64, 320))).bfloat16()
    theirs = copy.deepcopy(ours)
    speed_up(ours, pool)
    assert speed_up_mlps(ours, pool) == 4
    hold_the_same(ours, theirs, most=10)


def test_behind_the_end_it_is_the_modules(pool: NativePool) -> None:
    ours, theirs = made(Mlp, 192)
    assert taken(ours, pool)
    pool.close()
    hold_the_same(ours, theirs)
