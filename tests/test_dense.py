"""The native linear layers and norms against torch's: to the last bit where they are taken, and not taken where not."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moeinf.errors import IntegrityError
from moeinf.kernels import dense, expands_for_a_token
from moeinf.kernels.dense import compute_packed, speed_up
from moeinf.kernels.native import LinearLayer, NativePool
from moeinf.kernels.orders import MOST_ROWS
from moeinf.kernels.packed import LosslessLinear
from moeinf.lossless import pack
from moeinf.manifest import ExpertLayout, TensorSpec
from test_native import LIBRARY, TORCH_S, VARIANTS

pytestmark = [
    pytest.mark.skipif(LIBRARY is None, reason="the native library is not built"),
    pytest.mark.usefixtures("rounding_once"),
]

SHAPES = [(16, 16), (64, 256), (100, 37), (513, 130), (1024, 1), (2880, 640), (4100, 65)]
"""Inputs and outputs: fewer than a vector, chains that end early, rows left over."""


@pytest.fixture(params=VARIANTS)
def pool(request: pytest.FixtureRequest) -> Iterator[NativePool]:
    opened = NativePool(2, request.param, LIBRARY)
    yield opened
    opened.close()


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_results_are_torchs_but_for_the_last_bit(inputs: int, outputs: int, has_bias: bool, pool: NativePool) -> None:
    torch.manual_seed(inputs)
    layer = nn.Linear(inputs, outputs, bias=has_bias).bfloat16()
    x = torch.randn(1, 1, inputs).bfloat16()
    with torch.inference_mode():
        expected = layer(x)
        result = dense.NativeLinear(layer.forward, pool, layer.weight, layer.bias)(x)
    assert result.shape == expected.shape
    torch.testing.assert_close(result, expected, rtol=2**-7, atol=2**-8)


def test_only_what_is_exact_is_taken(pool: NativePool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Linear(256, 512, bias=False), nn.Linear(512, 1000), nn.Linear(1000, 96, bias=False))
    layers.to(torch.bfloat16)
    prompts = [torch.randn(1, tokens, 256).to(torch.bfloat16) for tokens in (1, 2, 7, MOST_ROWS, MOST_ROWS + 1)]
    with torch.inference_mode():
        expected = [layers(x) for x in prompts]
        taken = speed_up(layers, pool)
        assert all(torch.equal(layers(x), wanted) for x, wanted in zip(prompts, expected, strict=True))
        assert taken == (3 if pool.adds_as_torch_does else 0)
        monkeypatch.setattr(dense._Native, "gives_the_same", lambda *_: False)
        assert speed_up(nn.Sequential(nn.Linear(64, 96).bfloat16()), pool) == 0


@pytest.mark.skipif(TORCH_S is None, reason="torch may add in another order on such a processor")
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 64), (24, 64), (512, 8), (2048, 2), (4096, 1), (8192, 1)])
def test_what_torch_adds_in_another_order_is_left_to_it(inputs: int, outputs: int) -> None:
    """Of some thousand outputs one is another, which a trial does not see."""
    pool = NativePool(2, TORCH_S, LIBRARY)
    layer = nn.Linear(inputs, outputs, bias=False).bfloat16()
    assert speed_up(layer, pool) == 0
    larger = nn.Linear(inputs, outputs + 4096 // inputs + 1, bias=False).bfloat16()
    assert speed_up(larger, pool) == (inputs >= pool.known.least_inputs)
    pool.close()


@pytest.mark.skipif(TORCH_S is None, reason="torch may add in another order on such a processor")
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 65), (512, 9), (2048, 3), (5000, 2)])
def test_small_layers_are_torchs_for_every_token(inputs: int, outputs: int) -> None:
    pool = NativePool(2, TORCH_S, LIBRARY)
    layer = nn.Linear(inputs, outputs, bias=False).bfloat16()
    native = copy.deepcopy(layer)
    assert speed_up(native, pool) == 1
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for _ in range(2000):
            x = torch.randn(1, 1, inputs, generator=generator).bfloat16()
            assert torch.equal(native(x), layer(x))
    pool.close()


@pytest.mark.skipif(TORCH_S is None, reason="torch may add in another order on such a processor")
def test_one_token_and_some_are_tried_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer whose rows come out otherwise when there are some of them is native for one."""
    pool, layer = NativePool(1, TORCH_S, LIBRARY), nn.Linear(64, 96).bfloat16()
    assert pool.adds_as_torch_does
    apply, calls = NativePool.apply, list[int]()

    def spoil(pool: NativePool, linear: LinearLayer, rows: torch.Tensor, result: torch.Tensor) -> None:
        apply(pool, linear, rows, result)
        calls.append(rows.numel() // 64)
        if calls[-1] > 1:
            result.fill_(7)

    monkeypatch.setattr(NativePool, "apply", spoil)
    one, some = torch.randn(1, 1, 64).bfloat16(), torch.randn(1, 5, 64).bfloat16()
    with torch.inference_mode():
        expected = layer(one), layer(some)
        assert speed_up(layer, pool) == 1
        calls.clear()
        assert all(map(torch.equal, (layer(one), layer(some)), expected))
    assert calls == [1]
    pool.close()


def test_what_is_not_a_few_tokens_of_bfloat16_is_torchs(pool: NativePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense._Native, "gives_the_same", lambda *_: True)
    monkeypatch.setattr(NativePool, "adds_as_torch_does", True)
    torch.manual_seed(2)
    plain, wide, strided = nn.Linear(64, 96).bfloat16(), nn.Linear(64, 96), nn.Linear(64, 96, bias=False).bfloat16()
    strided.weight = nn.Parameter(torch.randn(64, 96, dtype=torch.bfloat16).T)
    assert speed_up(nn.ModuleList([plain, wide, strided]), pool) == 1
    many = torch.randn(1, MOST_ROWS + 1, 64).bfloat16()
    with torch.inference_mode():
        assert torch.equal(plain(many), F.linear(many, plain.weight, plain.bias))
        every_other = torch.randn(1, 128).bfloat16()[:, ::2]
        torch.testing.assert_close(
            plain(every_other), F.linear(every_other, plain.weight, plain.bias), rtol=2**-6, atol=2**-7
        )
        pool.close()
        assert torch.equal(plain(many[:, :1]), F.linear(many[:, :1], plain.weight, plain.bias))


def test_an_input_of_another_width_is_refused_by_torch(pool: NativePool) -> None:
    layer = nn.Linear(64, 96).bfloat16()
    linear = dense.NativeLinear(layer.forward, pool, layer.weight, layer.bias)
    assert linear.takes(torch.zeros(1, 64))
    assert not any(linear.takes(torch.zeros(shape)) for shape in ((), (1, 63), (4, 16), (64, 1)))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        linear(torch.zeros(2, 32).bfloat16())


class Router(nn.Module):
    """Multiplies by a matrix of its own, as the routers of most families do, and does other things with it."""

    def __init__(self, inputs: int, outputs: int, has_bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.randn(outputs)) if has_bias else None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        wide = F.linear(x.float(), self.weight.float(), bias=None)
        return (
            F.linear(x, self.weight, self.bias),
            F.linear(x, self.weight, torch.ones(64).bfloat16()),
            wide,
            x @ self.weight.t(),
        )


@pytest.mark.parametrize("has_bias", [False, True])
def test_what_a_router_multiplies_is_torchs(has_bias: bool, pool: NativePool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    router = Router(256, 64, has_bias).bfloat16()
    weight = router.weight
    one, many = torch.randn(1, 256).bfloat16(), torch.randn(3, 256).bfloat16()
    computed: list[torch.Tensor] = []
    compute = dense.NativeLinear.compute

    def count(linear: dense.NativeLinear, x: torch.Tensor) -> torch.Tensor:
        computed.append(x)
        return compute(linear, x)

    with torch.inference_mode():
        expected = [*router(one), *router(many)]
        taken = speed_up(router, pool)
        monkeypatch.setattr(dense.NativeLinear, "compute", count)
        results = [*router(one), *router(many)]
    assert all(map(torch.equal, results, expected))
    assert {type(result) for result in results} == {torch.Tensor}
    assert taken == (1 if pool.adds_as_torch_does else 0)
    assert len(computed) == 2 * taken
    assert router.weight.data_ptr() == weight.data_ptr()
    assert "weight" in router.state_dict()


class Norm(nn.Module):
    """As most families have it; others multiply by the weight, or by one more, before they round, or add 1 to it and
    round that, or gate the result.
    """

    def __init__(self, size: int, kind: str = "rounds first") -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + torch.randn(size))
        self.variance_epsilon = 1e-6
        self.kind = kind

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        if self.kind == "rounds last":
            return (self.weight * wide).to(x.dtype)
        if self.kind == "one more":
            return (wide * (1.0 + self.weight.float())).to(x.dtype)
        weight = 1 + self.weight if self.kind == "adds one" else self.weight
        return weight * wide.to(x.dtype) if gate is None else weight * wide.to(x.dtype) * gate


@pytest.mark.parametrize("kind", ["rounds first", "rounds last", "one more"])
@pytest.mark.parametrize("size", [1, 7, 8, 33, 64, 100, 128, 520, 1024, 2880, 7168])
@pytest.mark.skipif(TORCH_S is None, reason="torch may add in another order on such a processor")
def test_norms_are_torchs(size: int, kind: str) -> None:
    pool = NativePool(1, TORCH_S, LIBRARY)
    torch.manual_seed(size)
    norm = Norm(size, kind).bfloat16()
    x = torch.randn(1, 1, 4, size).bfloat16() * 30
    with torch.inference_mode():
        expected = norm(x)
        assert speed_up(norm, pool) == 1
        assert torch.equal(norm(x), expected)
        assert torch.equal(norm(x[:, :, 1]), expected[:, :, 1])
    pool.close()


def test_what_only_looks_like_a_norm_is_left_alone(pool: NativePool) -> None:
    torch.manual_seed(3)
    added = Norm(64, "adds one").bfloat16()
    assert speed_up(nn.ModuleList([added, nn.LayerNorm(64, bias=False).bfloat16(), nn.PReLU(64).bfloat16()]), pool) == 0


def test_a_norm_that_cannot_do_without_its_gate_is_left_alone(pool: NativePool) -> None:
    class Gated(Norm):
        def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
            return super().forward(x) * gate.sigmoid()  # type: ignore[union-attr]

    assert speed_up(Gated(64).bfloat16(), pool) == 0


def test_a_norm_that_is_given_more_is_torchs(pool: NativePool) -> None:
    torch.manual_seed(4)
    norm = Norm(64).bfloat16()
    x, gate = torch.randn(1, 1, 64).bfloat16(), torch.randn(1, 1, 64).bfloat16()
    with torch.inference_mode():
        expected = norm(x, gate)
        speed_up(norm, pool)
        assert torch.equal(norm(x, gate=gate), expected)


def make_packed(inputs: int, outputs: int, has_bias: bool) -> tuple[nn.Linear, LosslessLinear]:
    """A layer, and one with the same weight, packed, some of whose numbers no table has."""
    torch.manual_seed(inputs + outputs)
    layer = nn.Linear(inputs, outputs, bias=has_bias).bfloat16().requires_grad_(False)
    layer.weight.view(-1)[torch.randint(layer.weight.numel(), (layer.weight.numel() // 600,))] *= 2.0**-30
    packed = copy.deepcopy(layer)
    LosslessLinear.pack_into(packed, *pack(layer.weight))
    assert isinstance(packed, LosslessLinear)
    return layer, packed


PROMPTS = (1, 2, 7, MOST_ROWS, MOST_ROWS + 1, 150)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 16), (64, 256), (520, 144), (1544, 48), (2048, 272)])
@pytest.mark.parametrize("band_rows", [32, 1 << 20])
def test_packed_layers_give_what_plain_ones_give(
    inputs: int, outputs: int, has_bias: bool, band_rows: int, pool: NativePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For any number of tokens, whether a weight is unpacked at once or in turn, and when the pool is closed."""
    if band_rows < outputs and TORCH_S != "avx512bf16":
        pytest.skip("torch adds narrow matrices in another order on this processor")
    for limit in ("BAND_BYTES", "WHOLE_BYTES"):
        monkeypatch.setattr(f"moeinf.kernels.packed.{limit}", band_rows * inputs * 2)
    layer, packed = make_packed(inputs, outputs, has_bias)
    assert torch.equal(packed.weight, layer.weight)
    compute_packed(packed, pool)
    prompts = [torch.randn(1, tokens, inputs).bfloat16() for tokens in PROMPTS]
    with torch.inference_mode():
        assert all(torch.equal(packed(x), layer(x)) for x in prompts)
        pool.close()
        assert all(torch.equal(packed(x), layer(x)) for x in prompts)


@pytest.mark.skipif(TORCH_S is None, reason="torch may add in another order on such a processor")
def test_few_tokens_are_computed_from_what_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, packed = make_packed(256, 96, False)
    pool = NativePool(2, TORCH_S, LIBRARY)
    compute_packed(packed, pool)
    with torch.inference_mode():
        expected = [layer(x) for x in map(torch.Tensor.bfloat16, (torch.ones(tokens, 256) for tokens in PROMPTS))]
        monkeypatch.setattr(NativePool, "unpack", lambda *_: pytest.fail("it was unpacked"))
        for tokens, wanted in zip(PROMPTS, expected, strict=True):
            if tokens <= min(MOST_ROWS, pool.known.rows):
                assert torch.equal(packed(torch.ones(tokens, 256).bfloat16()), wanted)
    pool.close()


def test_packed_layers_that_come_out_otherwise_are_unpacked(pool: NativePool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, packed = make_packed(64, 32, False)
    monkeypatch.setattr(dense._Native, "gives_the_same", lambda *_: False)
    monkeypatch.setattr(dense.NativeLinear, "compute", lambda *_: pytest.fail("it was not to be taken"))
    compute_packed(packed, pool)
    x = torch.randn(1, 1, 64).bfloat16()
    with torch.inference_mode():
        assert torch.equal(packed(x), layer(x))


@pytest.mark.skipif(TORCH_S is None, reason="torch may add in another order on such a processor")
def test_what_was_unpacked_is_given_back_where_a_token_needs_none() -> None:
    layer, packed = make_packed(256, 96, False)
    plain = ExpertLayout(4096, (TensorSpec("down_proj", "BF16", (96, 256), 0),))
    assert expands_for_a_token(packed, [], plain)
    pool = NativePool(2, TORCH_S, LIBRARY)
    compute_packed(packed, pool)
    assert not expands_for_a_token(packed, [], plain)
    for _ in range(2):
        assert torch.equal(pool.unpack(packed.panels, packed.uppers), layer.weight)
        assert pool._scratch.numel() == 256 * 96
        pool.forget()
        assert pool._scratch.numel() == 0
    pool.close()


def test_a_weight_of_another_layer_is_refused() -> None:
    with pytest.raises(IntegrityError, match=r"a weight of 32 x 64 is stored as one of 32 x 72"):
        LosslessLinear.pack_into(nn.Linear(64, 32), *pack(torch.ones(32, 72).bfloat16()))


class Routing(nn.Module):
    """Multiplies in float32, as routers do, and says how many threads it has."""

    def __init__(self, outputs: int, *, tells: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, 256).bfloat16())
        self.tells, self.threads = tells, list[int]()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        threads = torch.get_num_threads()
        self.threads.append(threads)
        if bool(x.isnan().any()):
            raise ValueError("not a number")
        logits = F.linear(x.float(), self.weight.float())
        return logits, logits.sigmoid() + (threads if self.tells else 0)


@pytest.mark.skipif(TORCH_S is None, reason="torch may add in another order on such a processor")
def test_a_tokens_router_has_one_of_torchs_threads() -> None:
    """The others would stay awake for a while, beside the library's."""
    pool, threads = NativePool(2, TORCH_S, LIBRARY), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for router, expected in ((Routing(64), 1), (Routing(8), 3), (Routing(64, tells=True), 3)):
            plain = copy.deepcopy(router)
            speed_up(nn.Sequential(router), pool)
            for tokens in (1, 5):
                router.threads.clear()
                x = torch.randn(1, tokens, 256).bfloat16()
                with torch.inference_mode():
                    assert all(map(torch.equal, router(x), plain(x)))
                assert router.threads == [expected if tokens == 1 else 3]
            with pytest.raises(ValueError, match="not a number"):
                router(x[:, :1] * float("nan"))
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
        pool.close()
