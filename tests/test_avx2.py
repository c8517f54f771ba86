"""The order in which AVX2 adds up products of bfloat16, against that order written down once more: so it is tested on
processors where torch has another one, too. And what it has loops of its own for, at numbers that those might miss.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from moeinf.kernels import ExpertMaths
from moeinf.kernels.native import NativeMaths, NativePool, telling_rows
from moeinf.kernels.orders import IN_TURN, OWN, Order
from moeinf.lossless import pack
from moeinf.quantized import Quantizer
from test_native import LIBRARY, VARIANTS, Experts, compute_rows, make_expert, make_layout, quantized

VECTORS, LANES, TURNS = 8, 8, 4
WIDTHS = [8, 24, 33, 64, 72, 96, 130, 512, 1100, 2056]
ROWS = [1, 2, 3, 5, 24, 25, 100]


@pytest.fixture
def pool() -> Iterator[NativePool]:
    if "avx2" not in VARIANTS:
        pytest.skip("this processor has no AVX2")
    pool = NativePool(2, "avx2", LIBRARY)
    yield pool
    pool.close()


def fold(sums: torch.Tensor) -> torch.Tensor:
    """Upper halves of [..., n] added to lower ones until one is left."""
    while sums.shape[-1] > 1:
        lower, upper = sums.chunk(2, -1)
        sums = lower + upper
    return sums[..., 0]


def add_in_vectors(products: torch.Tensor) -> torch.Tensor:
    """[n, out, in] in float32, of weights that lie [out, in]."""
    width = products.shape[-1]
    step, pair = VECTORS * LANES, 2 * LANES
    whole, pairs = width // step * step, width // pair * pair
    sums = torch.zeros(*products.shape[:-1], VECTORS, LANES)
    for begin in range(0, whole, step):
        sums += products[..., begin : begin + step].reshape(sums.shape)
    total = fold(fold(sums.transpose(-1, -2)))
    rest = torch.zeros(*products.shape[:-1], LANES)
    for begin in range(whole, pairs, LANES):
        rest += products[..., begin : begin + LANES]
    total = total + fold(rest)
    for at in range(pairs, width):
        total = total + products[..., at]
    return total


def add_in_turn(products: torch.Tensor) -> torch.Tensor:
    """The same of weights that lie [in, out]."""
    width = products.shape[-1]
    chains = [torch.zeros(products.shape[:-1]) for _ in range(TURNS)]
    for at in range(width):
        chains[at % TURNS if at < width // TURNS * TURNS else 0] += products[..., at]
    return chains[0] + chains[1] + chains[2] + chains[3]


def expected(rows: torch.Tensor, weight: torch.Tensor, order: Order) -> torch.Tensor:
    products = rows.float()[:, None] * weight.float()  # which float32 holds exactly
    return (add_in_vectors if order == OWN else add_in_turn)(products).bfloat16()


@pytest.mark.parametrize("order", [OWN, IN_TURN], ids=["vectors", "turns"])
@pytest.mark.parametrize("width", WIDTHS)
def test_products_are_added_in_torch_s_own_order(pool: NativePool, width: int, order: Order) -> None:
    weight = torch.randn(70, width, generator=torch.Generator().manual_seed(width)).bfloat16()
    rows = telling_rows(weight, max(ROWS))
    wanted = expected(rows, weight, order)
    assert not torch.equal(wanted, expected(rows, weight, IN_TURN if order == OWN else OWN)) or width < 16
    for count in ROWS:
        assert torch.equal(pool.multiply(rows[:count], weight, order=order), wanted[:count]), count


@pytest.mark.parametrize("order", [OWN, IN_TURN], ids=["vectors", "turns"])
@pytest.mark.parametrize("width", [width for width in WIDTHS if width % 8 == 0])
def test_lossless_weights_are_added_in_the_same_order(pool: NativePool, width: int, order: Order) -> None:
    weight = torch.randn(112, width, generator=torch.Generator().manual_seed(width)).bfloat16()
    odd = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(1))[: weight.numel() // 400]
    weight.view(-1)[odd] *= 2.0**-40  # exceptions
    packed = pack(weight)
    rows = telling_rows(weight, max(ROWS))
    wanted = expected(rows, weight, order)
    for count in ROWS:
        assert torch.equal(pool.multiply(rows[:count], *packed, order), wanted[:count]), count


def test_torch_has_that_order_where_the_set_is_chosen(pool: NativePool) -> None:
    if not pool.adds_as_torch_does:
        pytest.skip("torch adds in another order on this processor")
    weight = torch.randn(300, 1100, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows = telling_rows(weight, 60)
    assert torch.equal(F.linear(rows, weight), expected(rows, weight, OWN))
    assert torch.equal(rows @ weight.t().contiguous(), expected(rows, weight, IN_TURN))


@pytest.mark.parametrize("scale", [1.0, 3e-38, 1e-30, 1e36, -2.0, 0.0, float("inf")])
def test_float8_expands_as_torch_does_with_any_scale(pool: NativePool, scale: float) -> None:
    """Also where its numbers are no normal ones, or infinite, and for every byte."""
    numbers = torch.arange(256, dtype=torch.uint8).repeat(3, 1)
    weight, scales = numbers.view(torch.float8_e4m3fn), torch.tensor([[scale, 1.0]])
    found = torch.empty(3, 256, dtype=torch.bfloat16)
    pool.lib.moe_expand_fp8(pool.handle, 128, weight.data_ptr(), scales.data_ptr(), 3, 256, found.data_ptr())
    wanted = (weight.float() * scales.repeat_interleave(128, 1)).bfloat16()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_mxfp4_expands_with_every_power(pool: NativePool) -> None:
    """Also where its numbers are no normal ones, or infinite, and for every pair of them."""
    weights = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(255, 1)  # 16 groups for each power
    scales = torch.arange(255, dtype=torch.uint8).repeat_interleave(16)
    found = torch.empty(len(weights), 32, dtype=torch.bfloat16)
    pool.lib.moe_expand(pool.handle, weights.data_ptr(), scales.data_ptr(), len(weights), 32, 0, found.data_ptr())
    sizes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    table = torch.cat([sizes, -sizes])
    numbers = torch.stack([weights & 15, weights >> 4], -1).flatten(1).long()
    wanted = (table[numbers].double() * 2.0 ** (scales.double()[:, None] - 127)).float().bfloat16()
    assert torch.equal(found.view(torch.int16), wanted.view(torch.int16))


@pytest.mark.parametrize(("experts_in", "group"), [("int8", 32), ("int8", 64), ("int4", 16)])
@pytest.mark.parametrize(("hidden_size", "inner"), [(96, 65), (288, 130)])
def test_a_prompt_s_quantised_experts_are_torch_s(
    pool: NativePool, experts_in: str, group: int, hidden_size: int, inner: int
) -> None:
    if not pool.adds_as_torch_does:
        pytest.skip("torch adds in another order on this processor")
    module = Experts()
    plain = make_layout(module, hidden_size, inner, torch.bfloat16)
    quantizer = Quantizer(plain, False, experts_in, group)
    generator = torch.Generator().manual_seed(0)
    tensors = quantized(make_expert(plain, generator), quantizer)
    native, by_torch = NativeMaths(module, quantizer.layout, pool), ExpertMaths(module, quantizer.layout.quantization)
    for rows in (2, 3, 40):
        hidden, weights = torch.randn(rows, hidden_size, generator=generator).bfloat16(), torch.ones(rows, 1)
        wanted = compute_rows(by_torch, hidden, tensors, weights)
        assert torch.equal(compute_rows(native, hidden, tensors, weights), wanted)
