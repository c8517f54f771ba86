"""The next token drawn as `torch.multinomial` draws it, in a quarter to a third of the time.

torch divides each chance by a number of the exponential distribution, -log(1 - u) of a random u, and takes the token
with the largest quotient (ATen/native/Distributions.cpp). For each of these numbers it takes a logarithm by itself, a
vocabulary's worth of them per token. But -log(1 - u) is never below u: a token whose chance divided by u is less than
some quotient is not the one. So logarithms are taken of the few others alone, which are then compared by torch's own
arithmetic, and a seed gives the tokens that it gives in transformers. NumPy computes, on one thread: torch would wait
for others, whose cores are reading experts. Knows nothing of models.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor

__all__ = ["QuickDraw", "draw", "draws_as_torch_does"]

_NEAR = 1 - 1e-6
"""float32 rounds each quotient, and what it is divided by, by a sixteenth of the difference at most."""

_TRIALS, _TRIAL_SIZE = 8, 1000


def draw(chances: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """`torch.multinomial(chances, 1)` for `chances` [1, vocabulary] in float32 in host memory: a token [1, 1]."""
    uniform = torch.empty_like(chances, dtype=torch.float64).uniform_(generator=generator)
    numbers, wanted = uniform.numpy()[0], chances.numpy()[0]
    with np.errstate(all="ignore"):
        most = wanted / numbers
        first = int(most.argmax())
        number = float(numbers[first])
        least = float(wanted[first]) / -math.log1p(-number) * _NEAR if 0 < number < 1 else 0.0
        near = (most >= least).nonzero()[0]
        if not len(near):
            return torch.multinomial(chances, 1)  # which says what is wrong with the chances
        logarithms = np.array([-math.log1p(-each) for each in numbers[near].tolist()], dtype=np.float32)
        best = (wanted[near] / logarithms).argmax()
    return torch.from_numpy(near[best : best + 1, None])


@cache
def draws_as_torch_does() -> bool:
    """Whether `draw` gives what torch gives, by trying; torch makes these numbers in other ways where it has MKL's."""
    ours, torchs = (torch.Generator().manual_seed(0) for _ in range(2))
    for chances in torch.randn(_TRIALS, 1, _TRIAL_SIZE, generator=torch.Generator().manual_seed(1)).softmax(-1):
        if not torch.equal(draw(chances, ours), torch.multinomial(chances, 1, generator=torchs)):
            return False
    return True


class QuickDraw(LogitsProcessor):
    """Leaves scores as they are, and has the token that `generate` draws by them come from `draw`."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.as_subclass(_Scores)


class _Scores(torch.Tensor):
    """Scores of tokens, and the chances that are made of them."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.multinomial and kwargs == {"num_samples": 1} and len(args[0]) == 1:
            return draw(args[0].as_subclass(torch.Tensor))
        default: Any = super().__torch_function__  # untyped
        return default(function, types, args, kwargs or {})
