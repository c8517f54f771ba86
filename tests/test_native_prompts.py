"""Prompts by the native library, against torch to the last bit: experts of one row and of hundreds, in any order."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from moeinf.kernels import ExpertMaths, Tensors
from moeinf.kernels.native import ExpandingMaths, NativeMaths, NativePool
from moeinf.lossless import LosslessPacker
from moeinf.quantized import Quantizer
from test_lossless import packed
from test_native import (
    DTYPES,
    KINDS,
    LIBRARY,
    NUMBERS,
    Experts,
    compute_rows,
    exact_pool,
    float8,
    make_expert,
    make_layout,
    quantized,
    released,
)

__all__ = ["exact_pool"]

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the native library is not built")

COUNTS = (1, 2, 3, 25, 97, 200)
"""Rows of an expert: fewer than a tile, more than one, more than a task has."""
IN_ROWS = [kind for kind in KINDS if not KINDS[kind].get("transposed")]


def choices(counts: Sequence[int], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(index, weights) [tokens, 2] : each expert chosen so often by a token first, and by others second."""
    flat = torch.tensor([expert for expert, count in enumerate(counts) for _ in range(count)])
    first = flat[torch.randperm(len(flat), generator=generator)]
    second = torch.where(first + 1 < len(counts), first + 1, len(counts))  # nobody, beside the last one
    return torch.stack((first, second), 1), torch.rand(len(flat), 2, generator=generator)


Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def compute(maths: ExpertMaths, case: Case, experts: list[Tensors], groups: Sequence[Sequence[int]]) -> torch.Tensor:
    hidden, index, weights = case
    prompt = maths.prompt(hidden, index, weights, len(experts))
    for group in groups:
        prompt.compute(group, [experts[expert] for expert in group])
    return prompt.total()


@pytest.mark.parametrize("weights_dtype", DTYPES, ids=["bfloat16", "float32"])
@pytest.mark.parametrize("kind", IN_ROWS)
def test_a_prompt_s_output_is_torch_s(exact_pool: NativePool, kind: str, weights_dtype: torch.dtype) -> None:
    """Sizes that fill no panel and no ticket, and one whose chains are longer for many rows than for one."""
    module = Experts(**KINDS[kind])
    generator = torch.Generator().manual_seed(0)
    for hidden_size, inner in ((97, 65), (130, 67), (1100, 64)):
        layout = make_layout(module, hidden_size, inner, torch.bfloat16)
        maths = NativeMaths(module, layout, exact_pool)
        assert maths.takes_prompts
        experts = [make_expert(layout, generator) for _ in COUNTS]
        index, weights = choices(COUNTS, generator)
        hidden = torch.randn(len(index), hidden_size, generator=generator).bfloat16()
        case = hidden, index, weights.to(weights_dtype)
        wanted = compute(ExpertMaths(module), case, experts, [range(len(experts))])
        for groups in ([[0, 1, 2, 3, 4, 5]], [[5, 3], [0], [4, 1, 2]]):
            assert torch.equal(compute(maths, case, experts, groups), wanted)


@pytest.mark.parametrize("rows", [1, 1024])
def test_every_gate_comes_out_as_torch_s(exact_pool: NativePool, rows: int) -> None:
    """GELU of 660 of them depends on whether they stand in one row or in several. The output is the gates' alone."""
    module, size = Experts(**KINDS["gelu"]), 64
    layout = make_layout(module, 2 * size, size, torch.bfloat16)
    expert = make_expert(layout, torch.Generator())
    expert["gate_up_proj"].zero_()[:size, :size] = torch.eye(size)
    expert["gate_up_proj"][size:, size] = 1
    expert["down_proj"].zero_()[:size] = torch.eye(size)
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    hidden = torch.ones(1024, 2 * size, dtype=torch.bfloat16)
    hidden[:, :size] = torch.where(every.isfinite(), every, 0).view(1024, size)
    maths = NativeMaths(module, layout, exact_pool)
    for some in torch.split(hidden, rows)[::97]:
        case = some, torch.zeros(rows, 1, dtype=torch.int64), torch.ones(rows, 1, dtype=torch.bfloat16)
        assert torch.equal(compute(maths, case, [expert], [[0]]), compute(ExpertMaths(module), case, [expert], [[0]]))


@pytest.mark.parametrize("kind", ["silu", "interleaved", "no-gate"])
def test_packed_experts_give_what_torch_makes_of_them_expanded(exact_pool: NativePool, kind: str) -> None:
    module = Experts(**KINDS[kind])
    generator = torch.Generator().manual_seed(0)
    plain = make_layout(module, 640, 256, torch.bfloat16)
    packer = LosslessPacker(plain, False)
    forms = {"lossless": (packer.layout, packed(make_expert(plain, generator), packer))}
    forms["mxfp4"] = released(plain, False, (118, 126))
    if kind == "silu":
        forms["fp8"] = float8(plain, 0.01)
    for form, (layout, tensors) in forms.items():
        maths, theirs = NativeMaths(module, layout, exact_pool), ExpertMaths(module, layout.quantization)
        assert maths.takes_prompts, form
        for count in COUNTS:
            rows = torch.randn(count, 640, generator=generator).bfloat16(), tensors, torch.rand(count, 1)
            assert torch.equal(compute_rows(maths, *rows), compute_rows(theirs, *rows)), (form, count)


@pytest.mark.parametrize("kind", ["silu", "gpt-oss", "no-gate"])
@pytest.mark.parametrize(("experts_in", "group"), NUMBERS)
def test_whole_numbers_are_computed_as_well_as_by_torch(
    exact_pool: NativePool, kind: str, experts_in: str, group: int
) -> None:
    """Measured by what float32 makes of the same numbers. torch rounds each weight to bfloat16."""
    module = Experts(**KINDS[kind])
    generator = torch.Generator().manual_seed(0)
    for hidden_size, inner in ((97, 65), (640, 390)):
        plain = make_layout(module, hidden_size, inner, torch.bfloat16)
        quantizer = Quantizer(plain, module.is_transposed, experts_in, group)
        tensors = quantized(make_expert(plain, generator), quantizer)
        maths = NativeMaths(module, quantizer.layout, exact_pool)
        theirs = ExpertMaths(module, quantizer.layout.quantization)
        assert maths.takes_prompts
        for count in (1, 30, 97):
            hidden = torch.randn(count, hidden_size, generator=generator).bfloat16()
            shares = torch.ones(count, 1)
            exact = compute_rows(theirs, hidden.float(), tensors, shares)
            errors = [
                (compute_rows(each, hidden, tensors, shares.bfloat16()).float() - exact).square().mean()
                for each in (maths, theirs)
            ]
            assert errors[0] <= 2 * errors[1]


def test_rows_of_a_token_that_names_an_expert_twice_are_added_as_torch_adds_them(exact_pool: NativePool) -> None:
    """It adds those up before it rounds."""
    module = Experts()
    generator = torch.Generator().manual_seed(0)
    layout = make_layout(module, 128, 96, torch.bfloat16)
    experts = [make_expert(layout, generator) for _ in range(2)]
    index = torch.tensor([[0, 1, 0], [1, 0, 1], [1, 1, 1]])
    hidden, weights = (
        torch.randn(3, 128, generator=generator).bfloat16(),
        torch.rand(3, 3, generator=generator).bfloat16(),
    )
    case = hidden, index, weights
    wanted = compute(ExpertMaths(module), case, experts, [[0, 1]])
    assert torch.equal(compute(NativeMaths(module, layout, exact_pool), case, experts, [[0, 1]]), wanted)


def test_more_rows_than_scratch_memory_has_room_for(exact_pool: NativePool) -> None:
    module = Experts()
    generator = torch.Generator().manual_seed(0)
    layout = make_layout(module, 2048, 1024, torch.bfloat16)
    tensors = make_expert(layout, generator)
    hidden = torch.randn(1500, 2048, generator=generator).bfloat16()
    rows = hidden, tensors, torch.rand(1500, 1, generator=generator).bfloat16()
    maths = NativeMaths(module, layout, exact_pool)
    assert torch.equal(compute_rows(maths, *rows), compute_rows(ExpandingMaths(module, layout, exact_pool), *rows))


def test_prompts_of_products_that_torch_adds_otherwise_are_left_to_it(exact_pool: NativePool) -> None:
    module = Experts()
    small = make_layout(module, 64, 64, torch.bfloat16)
    assert not NativeMaths(module, small, exact_pool).takes_prompts
    assert not NativeMaths(module, make_layout(module, 64, 65, torch.float32), exact_pool).takes_prompts
    assert NativeMaths(module, make_layout(module, 64, 65, torch.bfloat16), exact_pool).takes_prompts
