"""Grouping a step's requests, against the masks of transformers' eager experts; the maths itself is held by
test_exact.py.
"""

from __future__ import annotations

import pytest
import torch

from moeinf.kernels.torch_maths import route


@pytest.mark.parametrize("tokens", [1, 2, 33])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_route_orders_rows_as_the_eager_experts_do(tokens: int, top_k: int) -> None:
    generator = torch.Generator().manual_seed(tokens * 10 + top_k)
    num_experts = 6
    # One index more than there are experts stands for "no expert".
    index = torch.stack([torch.randperm(num_experts + 1, generator=generator)[:top_k] for _ in range(tokens)])
    weights = torch.rand(tokens, top_k, generator=generator)
    routed = route(index, weights, num_experts)
    assert list(routed.experts) == sorted(set(index.flatten().tolist()) - {num_experts})
    mask = torch.nn.functional.one_hot(index, num_experts + 1).permute(2, 1, 0)
    for expert in routed.experts:
        rows, shares = routed[expert]
        place, token = torch.where(mask[expert])
        assert torch.equal(rows, token)
        assert torch.equal(shares, weights[token, place, None])
