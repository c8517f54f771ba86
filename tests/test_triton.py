"""Kernels that find their weights by slot, against torch: in Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined
pytest.importorskip("triton")

from families import make_model
from moeinf.kernels import ExpertMaths
from moeinf.kernels.triton_maths import TritonMaths, slot_linear
from moeinf.metamodel import is_experts_module

PLACE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SLOTS = 5


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
            # the interpreter cuts bfloat16 off where a GPU rounds
            tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
            assert torch.allclose(found[number].double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "family", ["deepseek_v2", "gpt_oss", "granitemoe", "inkling2_text", "minimax_m2", "mixtral", "nemotron_h"]
)
@pytest.mark.filterwarnings("ignore")  # what transformers says about families of its own
def test_a_token_is_that_of_torch(family: str) -> None:
    """Of the families' own modules: gates in turn and first, none, transposed weights, biases, a norm behind them."""
    model = make_model(family)
    module: Any = next(each for each in model.modules() if is_experts_module(each)).to(PLACE)
    shapes = {name: tuple(each.shape[1:]) for name, each in module.named_parameters(recurse=False)}
    tensors = pool(shapes, torch.float32)
    width = tensors["down_proj"].shape[2 if module.is_transposed else 1]
    hidden = torch.randn(1, width, generator=torch.Generator().manual_seed(2)).to(PLACE)
    weights = torch.tensor([[0.5, 0.3, 0.2]], device=PLACE)
    experts = [{name: tensor[slot] for name, tensor in tensors.items()} for slot in (3, 0, 4)]
    results = []
    with torch.inference_mode():
        for maths in (ExpertMaths(module), TritonMaths(module, SimpleNamespace(weights=tensors))):
            token = maths.token(hidden, weights)
            token.compute([1, 0], experts[:2])
            token.compute([2], experts[2:])
            results.append(token.total([0, 1, 2]))
    assert torch.allclose(results[0], results[1], rtol=1e-4, atol=1e-4)
    assert results[0].abs().max() > 0.01
