"""The native linear layers against torch's, to the last bit where they are taken, and not taken where they differ."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moeinf.kernels import dense
from moeinf.kernels.dense import speed_up_linears
from moeinf.kernels.native import NativePool
from test_native import LIBRARY, VARIANTS

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the native library is not built")

SHAPES = [(16, 16), (64, 256), (100, 37), (513, 130), (1024, 1), (2880, 640), (4100, 65)]
"""Inputs and outputs: fewer than a vector, chains that end early, rows left over."""


@pytest.fixture(params=VARIANTS)
def pool(request: pytest.FixtureRequest) -> Iterator[NativePool]:
    opened = NativePool(2, request.param, LIBRARY)
    yield opened
    opened.close()


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_results_are_torchs_but_for_the_last_bit(inputs: int, outputs: int, has_bias: bool, pool: NativePool) -> None:
    torch.manual_seed(inputs)
    weight = (torch.randn(outputs, inputs) / inputs**0.5).to(torch.bfloat16)
    bias = torch.randn(outputs).to(torch.bfloat16) if has_bias else None
    x = torch.randn(1, 1, inputs).to(torch.bfloat16)
    result = dense._NativeLinear(weight, bias, pool)(x)
    expected = F.linear(x, weight, bias)
    assert result.shape == expected.shape
    torch.testing.assert_close(result, expected, rtol=2**-7, atol=2**-8)


def test_only_what_is_exact_is_taken(pool: NativePool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Linear(256, 512, bias=False), nn.Linear(512, 1000), nn.Linear(1000, 96, bias=False))
    layers.to(torch.bfloat16)
    x = torch.randn(1, 1, 256).to(torch.bfloat16)
    with torch.inference_mode():
        expected = layers(x)
        taken = speed_up_linears(layers, pool)
        assert torch.equal(layers(x), expected)
        assert taken == (3 if pool.adds_as_torch_does else 0)
        monkeypatch.setattr(dense, "_gives_the_same", lambda _: False)
        assert speed_up_linears(nn.Sequential(nn.Linear(64, 64).bfloat16()), pool) == 0


def test_what_is_not_one_token_of_bfloat16_is_torchs(pool: NativePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "_gives_the_same", lambda _: True)
    monkeypatch.setattr(NativePool, "adds_as_torch_does", True)
    torch.manual_seed(2)
    plain, wide, strided = nn.Linear(64, 32).bfloat16(), nn.Linear(64, 32), nn.Linear(64, 32, bias=False).bfloat16()
    strided.weight = nn.Parameter(torch.randn(64, 32, dtype=torch.bfloat16).T)
    assert speed_up_linears(nn.ModuleList([plain, wide, strided]), pool) == 1
    many = torch.randn(1, 5, 64).bfloat16()
    with torch.inference_mode():
        assert torch.equal(plain(many), F.linear(many, plain.weight, plain.bias))
        every_other = torch.randn(1, 128).bfloat16()[:, ::2]
        torch.testing.assert_close(
            plain(every_other), F.linear(every_other, plain.weight, plain.bias), rtol=2**-6, atol=2**-7
        )
        pool.close()
        assert torch.equal(plain(many[:, :1]), F.linear(many[:, :1], plain.weight, plain.bias))
