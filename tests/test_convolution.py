"""Convolutions of each channel by itself: torch's results, computed for all channels at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moeinf
from families import make_model
from moeinf.kernels import convolution, speed_up_convolutions
from moeinf.kernels.convolution import _Taps

CHANNELS, TAPS = 24, 4


@pytest.fixture(autouse=True)
def without_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processors for which torch has a kernel may add up in another order."""
    if convolution._has_kernel():
        pytest.skip("torch has a kernel of its own for them here")


def make(channels: int = CHANNELS, dtype: torch.dtype = torch.bfloat16, **options: Any) -> nn.Conv1d:
    torch.manual_seed(0)
    options = {"kernel_size": TAPS, "groups": channels, "bias": True, **options}
    return nn.Conv1d(channels, options.pop("out_channels", channels), **options).to(dtype)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each convolution that is asked for, whether torch's was passed by."""
    found: list[bool] = []
    convolve = convolution._convolve

    def tell(*args: Any, **named: Any) -> torch.Tensor | None:
        output = convolve(*args, **named)
        found.append(output is not None)
        return output

    monkeypatch.setattr(convolution, "_convolve", tell)
    return found


def both(module: nn.Conv1d, call: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What `call` makes of the weight as torch has it, and since it is another."""
    with torch.inference_mode():
        theirs = call(module.weight)
        assert speed_up_convolutions(nn.Sequential(module)) == 1
        return call(module.weight), theirs


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("outputs", [1, 2, 17])
@pytest.mark.parametrize("batch", [1, 2])
def test_models_that_take_its_weight_get_torchs_results(
    has_bias: bool, outputs: int, batch: int, computed: list[bool]
) -> None:
    module = make(bias=has_bias)
    states = torch.randn(batch, CHANNELS, outputs + TAPS - 1).bfloat16()
    ours, theirs = both(
        module,
        lambda weight: F.conv1d(states, weight.squeeze(1).unsqueeze(1), module.bias, padding=0, groups=CHANNELS),
    )
    assert torch.equal(ours, theirs)
    assert computed[-1]


@pytest.mark.parametrize("padding", [0, TAPS - 1])
def test_modules_that_are_called_give_the_same(padding: int, computed: list[bool]) -> None:
    module, states = make(padding=padding), torch.randn(1, CHANNELS, 9).bfloat16()
    ours, theirs = both(module, lambda _: module(states))
    assert torch.equal(ours, theirs)
    assert computed[-1]


def test_other_uses_of_the_weight_are_torchs(computed: list[bool]) -> None:
    module, states = make(), torch.randn(1, CHANNELS, 9).bfloat16()
    calls: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda weight: F.conv1d(states, weight, stride=2, groups=CHANNELS),
        lambda weight: F.conv1d(states, weight, dilation=2, groups=CHANNELS),
        lambda weight: F.conv1d(states, weight, padding="valid", groups=CHANNELS),
        lambda weight: F.conv1d(states.float(), weight.float(), groups=CHANNELS),
        lambda weight: F.conv1d(states[0], weight, groups=CHANNELS),
        lambda weight: (weight.squeeze(1) * 2).sum(1),
    ]
    with torch.inference_mode():
        theirs = [call(module.weight) for call in calls]
        speed_up_convolutions(nn.Sequential(module))
        computed.clear()
        assert all(torch.equal(call(module.weight), their) for call, their in zip(calls, theirs, strict=True))
    assert not any(computed)
    with pytest.raises(RuntimeError, match=r"[Kk]ernel size"):
        F.conv1d(states[..., :2], module.weight, groups=CHANNELS)


@pytest.mark.parametrize(
    "options", [{"groups": 1}, {"out_channels": 2 * CHANNELS}, {"dtype": torch.float32}, {"groups": CHANNELS // 2}]
)
def test_other_convolutions_are_left_alone(options: dict[str, Any]) -> None:
    module = make(**options)
    assert speed_up_convolutions(nn.Sequential(module)) == 0
    assert not isinstance(module.weight, _Taps)


def test_an_order_that_is_not_torchs_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    convolve = convolution._convolve

    def backwards(states: torch.Tensor, weight: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
        output = convolve(states.flip(2), weight.flip(2), *more, **named)
        assert output is not None
        return output.flip(2)

    monkeypatch.setattr(convolution, "_convolve", backwards)
    assert speed_up_convolutions(nn.Sequential(make())) == 0


@pytest.mark.parametrize("family", ["jamba", "lfm2_moe", "nemotron_h", "qwen3_5_moe_text", "qwen3_next"])
def test_families_that_have_some_are_sped_up(family: str) -> None:
    assert speed_up_convolutions(make_model(family)) > 0


def test_kernels_of_torch_are_torchs(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[nn.Module] = []
    monkeypatch.setattr("moeinf.engine.speed_up_convolutions", asked.append)
    for kernels, times in (("torch", 0), ("auto", 1)):
        with moeinf.load(tiny, kernels=kernels):
            assert len(asked) == times
