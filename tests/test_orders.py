"""In which order torch adds up products of many rows: what is tried, what is remembered, and what comes of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
import torch
import torch.nn.functional as F

from moeinf.kernels.native import LinearLayer, NativePool, telling_rows, variants
from moeinf.kernels.orders import MOST_BYTES, OWN, STEP, Order, Orders, step_of
from test_native import LIBRARY

WHOLE = 1 << 62


class Torch:
    """Stands in for a trial: says which of the orders is `right`, and keeps what it was asked."""

    def __init__(self, right: Order | None) -> None:
        self.right = right
        self.asked: list[tuple[int, list[Order]]] = []

    def __call__(self, weight: torch.Tensor, rows: int, among: Iterable[Order]) -> Order | None:
        self.asked.append((rows, list(among)))
        return self.right if self.right in self.asked[-1][1] else None


def weight() -> torch.Tensor:
    return torch.empty(64, 512, dtype=torch.bfloat16)


KIND = (64, 512, False)


def test_an_order_is_tried_once_for_a_size() -> None:
    trial = Torch(Order(256, WHOLE))
    orders = Orders(trial)
    assert [orders.find(rows, KIND, weight) for rows in (40, 40, 41)] == [Order(256, WHOLE)] * 3
    assert [rows for rows, _ in trial.asked] == [40, 41]


def test_the_library_s_own_comes_first_and_then_what_was_found_last() -> None:
    trial = Torch(Order(256, WHOLE))
    orders = Orders(trial)
    orders.find(40, KIND, weight)
    orders.find(41, KIND, weight)
    assert [among[0] for _, among in trial.asked] == [OWN, Order(256, WHOLE)]


def test_matrices_of_as_many_inputs_have_orders_in_common() -> None:
    trial = Torch(Order(256, WHOLE))
    orders = Orders(trial)
    orders.find(40, KIND, weight)
    orders.find(40, (128, 512, False), weight)
    assert trial.asked[1][1][0] == Order(256, WHOLE)


def test_threads_may_share_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    trial = Torch(None)
    Orders(trial).find(40, KIND, weight)
    [(_, among)] = trial.asked
    assert {order.share for order in among if order.chain == 128} == {WHOLE, 256}
    assert {order.share for order in among if order.chain == 64} == {WHOLE, 256, 192}
    assert all(order.chain % STEP == 0 and order.share % STEP == 0 for order in among)


def test_what_is_not_found_is_soon_given_up() -> None:
    trial = Torch(None)
    orders = Orders(trial)
    assert [orders.find(rows, KIND, weight) for rows in range(40, 50)] == [None] * 10
    assert len(trial.asked) == 3
    orders.find(40, (128, 512, False), weight)
    assert len(trial.asked) == 4


def test_large_matrices_are_left_alone() -> None:
    trial = Torch(OWN)
    assert Orders(trial).find(40, (MOST_BYTES // 2048 + 1, 1024, False), weight) is None
    assert not trial.asked


def test_other_threads_have_other_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Torch(OWN)
    orders = Orders(trial)
    for threads in (1, 2, 1):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        orders.find(40, KIND, weight)
    assert len(trial.asked) == 2


@pytest.mark.parametrize(("inputs", "step"), [(64, 32), (72, 24), (104, 26), (100, 32), (1000, 32), (40, 20)])
def test_steps_are_of_equal_length_if_that_takes_no_more(inputs: int, step: int) -> None:
    assert step_of(inputs) == step


@pytest.fixture(params=["avx512amx", "avx512bf16"])
def pool(request: pytest.FixtureRequest) -> Iterator[NativePool]:
    if LIBRARY is None or request.param not in variants(LIBRARY):
        pytest.skip(f"this processor has no {request.param}")
    pool = NativePool(2, request.param, LIBRARY)
    yield pool
    pool.close()


@pytest.mark.parametrize("inputs", [72, 130, 512, 1000, 1344])
@pytest.mark.parametrize("rows", [33, 47, 100, 257])
def test_the_order_that_is_found_is_torch_s_for_all_outputs(pool: NativePool, inputs: int, rows: int) -> None:
    if not pool.adds_as_torch_does:
        pytest.skip("torch adds in another order on this processor")
    matrix = torch.randn(300, inputs, generator=torch.Generator().manual_seed(inputs)).bfloat16()
    order = OWN
    if not pool.knows_order(rows, (*matrix.shape, False)):
        found = pool.orders.find(rows, (*matrix.shape, False), lambda: matrix)
        assert found is not None
        order = found
    telling = telling_rows(matrix, rows)
    assert torch.equal(pool.multiply(telling, matrix, order=order), F.linear(telling, matrix))


@pytest.mark.parametrize("size", [(300, 5120), (1100, 7168), (520, 14336)], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_the_order_of_one_row_is_torch_s(pool: NativePool, size: tuple[int, int], threads: int) -> None:
    """Also where it has so many inputs that torch cuts them."""
    if not pool.adds_as_torch_does:
        pytest.skip("torch adds in another order on this processor")
    matrix = torch.randn(size, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        order = pool.order(1, (*size, False), lambda: matrix)
        assert order is not None
        for row in torch.split(telling_rows(matrix, 64), 1):
            assert torch.equal(pool.multiply(row, matrix, order=order), F.linear(row, matrix))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("number", [0, 1])
def test_other_sets_of_instructions_refuse_chains_of_one_row(number: int) -> None:
    if LIBRARY is None or len(variants(LIBRARY)) <= number:
        pytest.skip("there is no such set")
    pool = NativePool(1, variants(LIBRARY)[number], LIBRARY)
    try:
        x, matrix, result = (torch.ones(size).bfloat16() for size in ((1, 512), (32, 512), (1, 32)))
        layer = LinearLayer(512, 32, matrix.data_ptr(), None, None, *Order(256, WHOLE))
        assert pool.lib.moe_linear(pool.handle, layer, 1, x.data_ptr(), result.data_ptr()) == -2
        assert (result == 1).all()
    finally:
        pool.close()


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("order", [Order(96, WHOLE), Order(64, 256), Order(352, 704), Order(256, WHOLE)])
def test_inputs_are_added_up_in_the_order_asked_for(order: Order, rows: int) -> None:
    """Against sums of products of each chain by itself, in float32."""
    if rows == 1 and order.share != WHOLE:
        pytest.skip("one row is in one share")
    if LIBRARY is None or "avx512amx" not in variants(LIBRARY):
        pytest.skip("this processor has no AMX")
    pool = NativePool(2, "avx512amx", LIBRARY)
    try:
        inputs = 1000
        generator = torch.Generator().manual_seed(0)
        matrix = torch.randn(80, inputs, generator=generator).bfloat16()
        x = torch.randn(rows, inputs, generator=generator).bfloat16()
        total = torch.zeros(rows, len(matrix))
        for share in range(0, inputs, min(order.share, inputs)):
            part = torch.zeros_like(total)
            end = min(inputs, share + order.share)
            for begin in range(share, end, order.chain):
                part = part + _chain(x, matrix, begin, min(end, begin + order.chain))
            total = total + part
        assert torch.equal(pool.multiply(x, matrix, order=order), total.bfloat16())
    finally:
        pool.close()


def _chain(x: torch.Tensor, matrix: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    """Steps of 32 inputs, of which even and odd ones are added up apart, with one rounding for each product."""
    total = torch.zeros(len(x), len(matrix))
    for step in range(begin, end, STEP):
        sums = [torch.zeros_like(total), torch.zeros_like(total)]
        for k in range(step, min(end, step + STEP)):
            product = x[:, k, None].double() * matrix[None, :, k].double()
            sums[k % 2] = (sums[k % 2].double() + product).float()
        total = total + (sums[0] + sums[1])
    return total
