"""Short causal convolutions of each channel by itself, which layers with a recurrent state have before it (Mamba, gated
delta networks, LFM2), in bfloat16.

Where torch has no kernel for them, which is so on processors without AVX-512, it multiplies one channel after the
other: 16 ms for the 4,096 of one layer and one token. A convolution is a few products and sums, which it computes for
all channels at once in a fraction of a millisecond, and in the order in which it adds up itself they give the same to
the last bit. That is tried for every shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["speed_up_convolutions"]

_TRIED = 1, 2, 3, 40
"""Outputs of a channel, of which so many come out the same before more are believed to."""
_MOST_TRIED = 512
"""Channels, of which each is the same."""
_TELLING = (2.0**24, -(2.0**24), 2.0**25, -(2.0**25), 1.0, -1.0, 3.0, 0.5)
"""Products whose sums are others in any other order."""


def speed_up_convolutions(model: nn.Module) -> int:
    """Have the convolutions of `model` in bfloat16 that are of each channel by itself computed for all channels at
    once, if that gives torch's results to the last bit; returns how many there are. Whatever else is done with their
    weights is torch's.
    """
    if _has_kernel():
        return 0
    found: dict[tuple[int, int, bool], bool] = {}
    count = 0
    for module in model.modules():
        if not isinstance(module, nn.Conv1d) or module.weight.dtype != torch.bfloat16:
            continue
        channels, inputs, taps = module.weight.shape
        if inputs != 1 or module.groups != channels:
            continue
        shape = channels, taps, module.bias is not None
        if shape not in found:
            found[shape] = _gives_the_same(*shape)
        if found[shape]:
            module.weight = _Taps.of(module.weight)
            count += 1
    return count


def _has_kernel() -> bool:
    """Whether torch has one for convolutions in bfloat16 on this processor."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a torch without that library
        return False


class _Taps(nn.Parameter):
    """The weight [C, 1, K] of such a convolution, or the same as [C, K]."""

    @classmethod
    def of(cls, weight: torch.Tensor) -> _Taps:
        taps: _Taps = torch.Tensor._make_subclass(cls, weight.detach())
        return taps

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if function is torch.conv1d and (output := _convolve(*args, **(kwargs or {}))) is not None:
                return output
            output = function(*args, **(kwargs or {}))
            is_still = function in _VIEWS and output.dim() in (2, 3)
            return cls.of(output) if is_still else output


_VIEWS: set[Callable[..., Any]] = {torch.Tensor.squeeze, torch.Tensor.unsqueeze, torch.squeeze, torch.unsqueeze}


def _convolve(
    states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> torch.Tensor | None:
    """What `torch.conv1d` gives for `states` [B, C, T]; None for what is of another kind."""
    if states.dim() != 3 or weight.shape != (groups, 1, weight.shape[-1]) or states.shape[1] != groups:
        return None
    if states.dtype != torch.bfloat16 or any(_number(each) != 1 for each in (stride, dilation)):
        return None
    around, taps = _number(padding), weight.shape[2]
    if around is None or (outputs := states.shape[2] + 2 * around - taps + 1) < 1:
        return None
    wide = nn.functional.pad(states, (around, around)).float()
    weights = weight.float().unbind(2)
    total = wide[..., :outputs] * weights[0]
    for tap in range(1, taps):  # products of two bfloat16 are exact in float32: the order of the sums is all there is
        total.addcmul_(wide[..., tap : tap + outputs], weights[tap])
    if bias is not None:
        total += bias.float()[:, None]
    return total.bfloat16()


def _number(value: Any) -> int | None:
    """That of a module's tuple of one, or of a function's argument; None for a padding that has a name."""
    (number,) = value if isinstance(value, tuple | list) and len(value) == 1 else (value,)
    return number if isinstance(number, int) else None


def _gives_the_same(channels: int, taps: int, has_bias: bool) -> bool:
    generator = torch.Generator().manual_seed(0)
    channels = min(channels, _MOST_TRIED)
    values = torch.tensor(_TELLING, dtype=torch.bfloat16)

    def telling(*shape: int) -> torch.Tensor:
        return values[torch.randint(len(values), shape, generator=generator)]

    bias = telling(channels) if has_bias else None
    for outputs in _TRIED:
        shape = 1, channels, outputs + taps - 1
        for weight, states in (
            (telling(channels, 1, taps), torch.randn(shape, generator=generator).sign().bfloat16()),
            (
                torch.randn(channels, 1, taps, generator=generator).bfloat16(),
                torch.randn(shape, generator=generator).bfloat16(),
            ),
        ):
            ours = _convolve(states, weight, bias, groups=channels)
            if ours is None or not torch.equal(ours, torch.conv1d(states, weight, bias, groups=channels)):
                return False
    return True
