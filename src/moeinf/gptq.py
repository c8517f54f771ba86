"""Numbers for weights whose inputs are known: error feedback, then descent.

Rows w of a matrix that become v cost (w - v) H (w - v)ᵀ in squares of their outputs, where H is the second moments of
the inputs: the sum of x xᵀ. Numbers are chosen input by input, each one making up for the errors before it as far as
it can (Frantar et al., GPTQ, arXiv 2210.17323; written with one Cholesky factor as in Chee et al., QuIP, arXiv
2307.13304). Then they go downhill, one at a time, and so do the factors of their groups. Owns nothing, and knows
nothing of how numbers are stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .codebook import nearest, round_factors

__all__ = ["Choice", "Feedback"]

_BLOCK = 64
"""Inputs whose errors are moved on together, a whole number of groups."""
_PASSES = 4
"""Of descent; more gain nothing (docs/experiments.md)."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Numbers [rows, inputs], the factors [rows, groups] of each `group` of a row, and what these are multiples of, if
    anything [rows, 1]; all as floats.
    """

    numbers: torch.Tensor
    factors: torch.Tensor
    units: torch.Tensor | None

    def values(self, group: int) -> torch.Tensor:
        """What the numbers stand for."""
        return self.numbers * _spread(self.factors, group, self.numbers.shape[1])


class Feedback:
    """Chooses the numbers of a matrix whose inputs have these second moments [inputs, inputs], positive definite.
    Making it takes 24 bytes at most for each pair of inputs for a while.
    """

    def __init__(self, moments: torch.Tensor, bits: int, group: int) -> None:
        self._moments = moments
        self._bits, self._group = bits, group
        self._order = moments.diagonal().argsort(descending=True)
        turned = self._order.flip(0)
        upper = torch.linalg.cholesky(moments[turned][:, turned].double()).flip(0, 1)
        upper /= upper.diagonal().clone()
        self._feedback = upper.float()
        """Column k says how much of each error before it number k makes up for. With inputs in that order, moments are
        U Uᵀ for an upper triangular U, a row e of errors costs the sum of the squares of e U, and this is U with each
        column divided by what it has on the diagonal."""

    @property
    def shares(self) -> torch.Tensor:
        """How much a squared error at each input counts by itself [inputs]."""
        return self._moments.diagonal()

    def choose(self, weight: torch.Tensor, factors: torch.Tensor, units: torch.Tensor | None, plain: Choice) -> Choice:
        """Numbers and factors for `weight` [rows, inputs], starting from these `factors`; of rows that `plain` has at
        less cost, its own.
        """
        columns = weight.float().t().contiguous()
        codes = self._feed_back(columns, factors)
        found = self._descend(columns, codes, factors.t().contiguous(), units)
        is_better = (self.cost(weight, found) < self.cost(weight, plain))[:, None]
        return Choice(
            torch.where(is_better, found.numbers, plain.numbers),
            torch.where(is_better, found.factors, plain.factors),
            None if units is None or plain.units is None else torch.where(is_better, units, plain.units),
        )

    def cost(self, weight: torch.Tensor, choice: Choice) -> torch.Tensor:
        """What each row loses by it [rows], in squares of its outputs."""
        errors = weight.float() - choice.values(self._group)
        return ((errors @ self._moments) * errors).sum(1)

    def _feed_back(self, columns: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """Numbers [inputs, rows] for `columns` of weights [inputs, rows]."""
        ordered = columns[self._order]
        steps = _spread(factors, self._group, len(columns)).t()[self._order]
        codes, errors = torch.empty_like(ordered), torch.empty_like(ordered)
        for begin in range(0, len(ordered), _BLOCK):
            end = min(begin + _BLOCK, len(ordered))
            wanted = ordered[begin:end] + self._feedback[:begin, begin:end].t() @ errors[:begin]
            for at in range(begin, end):
                codes[at] = nearest(wanted[at - begin] / steps[at], self._bits)
                torch.sub(ordered[at], codes[at] * steps[at], out=errors[at])
                wanted[at - begin + 1 :] += torch.outer(self._feedback[at, at + 1 : end], errors[at])
        return torch.empty_like(codes).index_copy_(0, self._order, codes)

    def _descend(
        self, columns: torch.Tensor, codes: torch.Tensor, factors: torch.Tensor, units: torch.Tensor | None
    ) -> Choice:
        """Move each number, and after those of a group its factor, to where the cost is least if all others stay;
        `codes` [inputs, rows] and `factors` [groups, rows] are changed in place.
        """
        row_units = None if units is None else units[:, 0]
        values = codes * factors.repeat_interleave(self._group, 0)[: len(codes)]
        downhill = self._moments @ (columns - values)
        for _ in range(_PASSES):
            for begin in range(0, len(codes), _BLOCK):
                block = slice(begin, begin + _BLOCK)
                moments, slopes, before = self._moments[block, block], downhill[block].clone(), values[block].clone()
                for first in range(0, len(before), self._group):
                    inputs = slice(first, first + self._group)
                    some, factor = codes[block][inputs], factors[(begin + first) // self._group]
                    own, local = moments[inputs, inputs], slopes[inputs].clone()
                    self._move_numbers(some, factor, own, local)
                    self._move_factor(some, factor, row_units, own, local)
                    moved = some * factor
                    slopes -= moments[:, inputs] @ (moved - values[block][inputs])
                    values[block][inputs] = moved
                downhill -= self._moments[:, block] @ (values[block] - before)
        return Choice(codes.t().contiguous(), factors.t(), units)

    def _move_numbers(
        self, codes: torch.Tensor, factor: torch.Tensor, moments: torch.Tensor, local: torch.Tensor
    ) -> None:
        for at, code in enumerate(codes):
            best = nearest(code + local[at] / (factor * moments[at, at]), self._bits)
            local -= torch.outer(moments[at], (best - code) * factor)
            code.copy_(best)

    def _move_factor(
        self,
        codes: torch.Tensor,
        factor: torch.Tensor,
        units: torch.Tensor | None,
        moments: torch.Tensor,
        local: torch.Tensor,
    ) -> None:
        square = torch.linalg.vecdot(codes, moments @ codes, dim=0)
        best = round_factors(factor + torch.linalg.vecdot(codes, local, dim=0) / square, units)
        factor.copy_(torch.where(best.isfinite() & (best != 0), best, factor))


def _spread(factors: torch.Tensor, group: int, inputs: int) -> torch.Tensor:
    """The factor of each weight [rows, inputs]."""
    return factors.repeat_interleave(group, 1)[:, :inputs]
