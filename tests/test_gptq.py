"""Numbers chosen by moments of inputs: what is lost beside the plain search, and beside GPTQ as it was published."""

from __future__ import annotations

import pytest
import torch

from moeinf.codebook import BOOK
from moeinf.gptq import Choice, Feedback
from moeinf.manifest import Quantization
from moeinf.quantized import dequantize, quantize

SHAPES = [(4, 16, 72), (4, 16, 131), (8, 64, 131), (8, 32, 96), (4, 16, 5)]
"""Bits, group, and inputs: whole groups, a shorter last one, odd rows, and fewer inputs than a group has."""


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def correlated(inputs: int, rows: int = 2000) -> torch.Tensor:
    """Second moments of inputs that depend on each other, some of them large."""
    source = torch.randn(rows, inputs, generator=generator()) * torch.linspace(0.1, 3, inputs)
    mixed = source @ torch.randn(inputs, inputs, generator=torch.Generator().manual_seed(1)) + 2 * source + 1
    moments = mixed.t() @ mixed / rows
    return moments + 0.01 * moments.diagonal().mean() * torch.eye(inputs)


def costs(
    weight: torch.Tensor, made: tuple[torch.Tensor, torch.Tensor], moments: torch.Tensor, bits: int, group: int
) -> torch.Tensor:
    """What each row loses in squares of its outputs."""
    about = Quantization(f"int{bits}", group, "F32", {})
    errors = weight - dequantize(*made, about, weight.shape[1], torch.float32)
    return ((errors.double() @ moments.double()) * errors.double()).sum(1)


@pytest.mark.parametrize(("bits", "group", "inputs"), SHAPES)
def test_correlated_inputs_lose_less_than_by_the_plain_search(bits: int, group: int, inputs: int) -> None:
    weight, moments = torch.randn(40, inputs, generator=generator()), correlated(inputs)
    plain, found = quantize(weight, bits, group), quantize(weight, bits, group, moments)
    assert [(part.shape, part.dtype) for part in found] == [(part.shape, part.dtype) for part in plain]
    lost, lost_plainly = (costs(weight, made, moments, bits, group) for made in (found, plain))
    assert (lost <= lost_plainly * (1 + 1e-4)).all()
    assert lost.sum() < 0.6 * lost_plainly.sum()


@pytest.mark.parametrize("bits", [4, 8])
def test_no_row_is_worse_than_by_the_plain_search(bits: int) -> None:
    """Moments of any kind: of few rows, of inputs that are nearly the same, of no use at all."""
    weight = torch.randn(64, 48, generator=generator())
    weight[0] = 0
    few = torch.randn(3, 48, generator=generator())
    same = torch.ones(48, 48) + 1e-3 * torch.eye(48)
    for moments in (torch.eye(48), few.t() @ few + 0.01 * torch.eye(48), same):
        group = {8: 32, 4: 16}[bits]
        plain, found = quantize(weight, bits, group), quantize(weight, bits, group, moments)
        lost, lost_plainly = (costs(weight, made, moments, bits, group) for made in (found, plain))
        assert (lost <= lost_plainly * (1 + 1e-3) + 1e-6).all()


def test_a_row_that_the_search_has_at_less_cost_stays_as_it_was() -> None:
    weight = torch.randn(6, 32, generator=generator())
    exact = Choice(weight.clone(), torch.ones(6, 2), torch.ones(6, 1))
    feedback = Feedback(correlated(32), 4, 16)
    found = feedback.choose(weight, torch.full((6, 2), 0.3), torch.full((6, 1), 0.01), exact)
    assert torch.equal(found.numbers, exact.numbers)
    assert torch.equal(found.factors, exact.factors)
    assert found.units is not None
    assert torch.equal(found.units, torch.ones(6, 1))
    assert (feedback.cost(weight, exact) == 0).all()


def test_errors_are_fed_back_as_in_the_paper() -> None:
    """By the inverse of the moments, from which inputs that are done are eliminated (arXiv 2210.17323, equation 3)."""
    inputs, group = 40, 16
    weight, moments = torch.randn(16, inputs, generator=generator()), correlated(inputs)
    factors = torch.rand(16, 3, generator=generator()) * 0.02 + 0.01
    steps = factors.repeat_interleave(group, 1)[:, :inputs].double()
    left, inverse = weight.double().clone(), moments.double().inverse()
    codes = torch.zeros_like(left)
    for at in moments.diagonal().argsort(descending=True).tolist():
        distances = (left[:, at] / steps[:, at])[:, None] - torch.tensor(BOOK)
        codes[:, at] = torch.tensor(BOOK).double()[distances.abs().argmin(1)]
        error = (left[:, at] - codes[:, at] * steps[:, at]) / inverse[at, at]
        left -= torch.outer(error, inverse[at])
        inverse -= torch.outer(inverse[:, at], inverse[at]) / inverse[at, at]
    found = Feedback(moments, 4, group)._feed_back(weight.t().contiguous(), factors)
    assert torch.equal(found.t().double(), codes)


def test_rows_are_chosen_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever part of a matrix is in memory together."""
    weight, moments = torch.randn(30, 64, generator=generator()), correlated(64)
    whole = quantize(weight, 4, 16, moments)
    monkeypatch.setattr("moeinf.quantized._FEEDBACK_WEIGHTS", 7 * 64)
    assert costs(weight, quantize(weight, 4, 16, moments), moments, 4, 16) == pytest.approx(
        costs(weight, whole, moments, 4, 16), rel=0.05
    )
