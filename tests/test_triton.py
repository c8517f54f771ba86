"""Kernels that find their weights by slot, against torch: in Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

import os
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined
pytest.importorskip("triton")

from families import make_model
from moeinf.kernels import ExpertMaths
from moeinf.kernels.triton_maths import TritonMaths, add_up, blocks_of, grouped_linear, slot_linear
from moeinf.metamodel import is_experts_module

PLACE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SLOTS = 5
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-5}
"""The interpreter cuts bfloat16 off where a GPU rounds."""
FAMILIES = ("deepseek_v2", "gpt_oss", "granitemoe", "inkling2_text", "minimax_m2", "mixtral", "nemotron_h")
"""Gates in turn and first, none, transposed weights, biases, a norm behind them, sums in other dtypes."""


def pool(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random tensors of all slots, which lie in one piece of memory as those of a device do."""
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    generator = torch.Generator().manual_seed(0)
    memory = (torch.randn(SLOTS, sum(sizes.values()) + 3, generator=generator) * 0.3).to(dtype).to(PLACE)
    made, begin = {}, 0
    for name, shape in shapes.items():
        made[name] = memory[:, begin : begin + sizes[name]].view(SLOTS, *shape)
        begin += sizes[name]
    return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("num_out", "num_in"), [(1, 1), (33, 129), (64, 256), (100, 77)])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_projection_is_that_of_the_slot(
    dtype: torch.dtype, num_out: int, num_in: int, is_transposed: bool, has_bias: bool
) -> None:
    shape = (num_in, num_out) if is_transposed else (num_out, num_in)
    tensors = pool({"weight": shape, "bias": (num_out,)}, dtype)
    slots = torch.tensor([4, 0, 3], dtype=torch.int32, device=PLACE)
    biases = tensors["bias"] if has_bias else None
    generator = torch.Generator().manual_seed(1)
    for rows in (torch.randn(1, num_in, generator=generator), torch.randn(3, num_in, generator=generator)):
        rows = rows.to(dtype).to(PLACE)
        found = slot_linear(rows, tensors["weight"], biases, slots, is_transposed=is_transposed)
        for number, slot in enumerate(slots.tolist()):
            weight = tensors["weight"][slot].double()
            exact = rows[number % len(rows)].double() @ (weight if is_transposed else weight.t())
            if has_bias:
                exact = exact.to(dtype).double() + tensors["bias"][slot].double()
            assert torch.allclose(found[number].double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def experts_of(family: str) -> tuple[Any, dict[str, torch.Tensor], int]:
    """An experts module of the family's own, a pool of its tensors, and the width of hidden states."""
    module: Any = next(each for each in make_model(family).modules() if is_experts_module(each)).to(PLACE)
    shapes = {name: tuple(each.shape[1:]) for name, each in module.named_parameters(recurse=False)}
    tensors = pool(shapes, torch.float32)
    return module, tensors, tensors["down_proj"].shape[2 if module.is_transposed else 1]


def in_slots(tensors: dict[str, torch.Tensor], slots: Iterable[int]) -> list[dict[str, torch.Tensor]]:
    return [{name: tensor[slot] for name, tensor in tensors.items()} for slot in slots]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore")  # what transformers says about families of its own
def test_a_token_is_that_of_torch(family: str) -> None:
    module, tensors, width = experts_of(family)
    hidden = torch.randn(1, width, generator=torch.Generator().manual_seed(2)).to(PLACE)
    weights = torch.tensor([[0.5, 0.3, 0.2]], device=PLACE)
    experts = in_slots(tensors, (3, 0, 4))
    results = []
    with torch.inference_mode():
        for maths in (ExpertMaths(module), TritonMaths(module, SimpleNamespace(weights=tensors))):
            token = maths.token(hidden, weights)
            token.compute([1, 0], experts[:2])
            token.receive([2], maths.rows(hidden, experts[2:]))
            results.append(token.total([0, 1, 2]))
    assert torch.allclose(results[0], results[1], rtol=1e-4, atol=1e-4)
    assert results[0].abs().max() > 0.01


def test_blocks_have_rows_of_one_expert() -> None:
    assert blocks_of([7, 2, 5], [1, 35, 16], 16) == [(7, 0, 1), (2, 1, 17), (2, 17, 33), (2, 33, 36), (5, 36, 52)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("num_out", "num_in"), [(1, 1), (65, 33), (64, 32), (100, 77)])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_projections_of_many_rows_are_those_of_their_slots(
    dtype: torch.dtype, num_out: int, num_in: int, is_transposed: bool, has_bias: bool
) -> None:
    """Of rows taken from anywhere, by experts that have one, a block full, and one more than that."""
    shape = (num_in, num_out) if is_transposed else (num_out, num_in)
    tensors = pool({"weight": shape, "bias": (num_out,)}, dtype)
    biases = tensors["bias"] if has_bias else None
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(20, num_in, generator=generator).to(dtype).to(PLACE)
    slots, sizes = [4, 0, 3], [1, 16, 17]
    sources = torch.randint(20, (sum(sizes),), generator=generator).to(PLACE)
    blocks = torch.tensor(blocks_of(slots, sizes, 16), device=PLACE)
    found = grouped_linear(rows, tensors["weight"], biases, sources, blocks, block_rows=16, is_transposed=is_transposed)
    for slot, those, theirs in zip(slots, torch.split(found, sizes), torch.split(sources, sizes), strict=True):
        weight = tensors["weight"][slot].double()
        exact = rows[theirs].double() @ (weight if is_transposed else weight.t())
        if has_bias:
            exact = exact.to(dtype).double() + tensors["bias"][slot].double()
        assert torch.allclose(those.double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [1, 1024, 1500])
def test_rows_are_added_up_as_torch_adds_them(dtype: torch.dtype, width: int) -> None:
    """To the last bit, from left to right. (The interpreter cuts bfloat16 off where torch rounds.)"""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(9, width, generator=generator).to(dtype).to(PLACE)
    places = torch.tensor([[2, 0, 8], [5, -1, 1], [-1, -1, -1], [3, 4, -1]])
    expected = torch.zeros(4, width, dtype=dtype, device=PLACE)
    for token, named in enumerate(places.tolist()):
        for place in named:
            if place >= 0:
                expected[token] += rows[place]
    assert torch.equal(add_up(rows, places.to(PLACE)), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_a_prompt_is_that_of_torch_whatever_the_order_of_arrival(family: str) -> None:
    """Of 40 tokens, of which some choose fewer than k experts; one expert is asked by none, one by nearly all."""
    module, tensors, width = experts_of(family)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(40, width, generator=generator).to(PLACE)
    chance = torch.rand(40, 6, generator=generator)
    chance[:, 1], chance[:, 4] = 0.0, 0.8
    chosen = chance[:, :5].topk(3).indices
    chosen[::7, 1] = 5
    weights = torch.rand(40, 3, generator=generator).to(PLACE)
    slots = {0: 3, 2: 0, 3: 4, 4: 2}
    results = []
    with torch.inference_mode():
        for maths, groups in (
            (ExpertMaths(module), [[0], [2], [3], [4]]),
            (TritonMaths(module, SimpleNamespace(weights=tensors)), [[0, 2, 3, 4]]),
            (TritonMaths(module, SimpleNamespace(weights=tensors)), [[4, 2], [3], [0]]),
        ):
            prompt = maths.prompt(hidden, chosen, weights, 5)
            assert list(prompt.experts) == [0, 2, 3, 4]
            for group in groups:
                prompt.compute(group, in_slots(tensors, (slots[expert] for expert in group)))
            results.append(prompt.total())
    assert torch.allclose(results[0], results[1], rtol=1e-4, atol=1e-4)
    assert torch.equal(results[1], results[2])
    assert results[0].abs().max() > 0.01
