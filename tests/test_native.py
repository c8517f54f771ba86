"""The native library against torch: every instruction set that this processor has, every kind of experts, sizes that
fit no vector. It rounds where torch rounds, so results differ only where the order of a sum decides the last bit.

`MOEINF_TEST_LIBRARY` names another build of the library to test (scripts/sanitize.sh).
"""

from __future__ import annotations

import os
import platform
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moeinf
from families import FAMILIES, make_model
from moeinf import kernels, shared_library
from moeinf.dtypes import SAFETENSORS_NAMES, TORCH_DTYPES
from moeinf.errors import UnsupportedError
from moeinf.hardware import processor_features
from moeinf.kernels import ExpertMaths, Tensors, choose_maths, native
from moeinf.kernels.native import ExpandingMaths, NativeMaths, NativePool
from moeinf.kernels.orders import IN_TURN, OWN
from moeinf.manifest import GROUPS, ExpertLayout, TensorSpec, scales_name
from moeinf.metamodel import is_experts_module
from moeinf.native_reader import NativeReader
from moeinf.quantized import Packer, Quantizer, dequantize, fill_randomly
from moeinf.shared_library import NotNativeError, built_library

LIBRARY = Path(os.environ["MOEINF_TEST_LIBRARY"]) if "MOEINF_TEST_LIBRARY" in os.environ else built_library()
pytestmark = [
    pytest.mark.skipif(LIBRARY is None, reason="the native library is not built"),
    pytest.mark.usefixtures("rounding_once"),
]

VARIANTS = native.variants(LIBRARY) if LIBRARY else []
TORCH_S = native.variant_of_torch(LIBRARY) if LIBRARY else None
"""The variant that adds as torch does on this processor."""
DTYPES = [torch.bfloat16, torch.float32]
NUMBERS = [(kind, group) for kind, groups in GROUPS.items() for group in groups]
NOT_NATIVE = {"beam": "activation", "inkling2_text": "activation"}
"""Families that the library leaves to torch, in bfloat16, and what it lacks."""


class Experts(nn.Module):
    """An experts module with the flags of transformers' `use_experts_implementation`, and no weights."""

    has_post_expert_norm = False

    def __init__(
        self, *, gate: str = "product", act: Any = F.silu, transposed: bool = False, bias: bool = False
    ) -> None:
        super().__init__()
        self.gate, self.act_fn = gate, act
        self.has_gate, self.has_bias, self.is_transposed = gate != "none", bias, transposed
        self.is_concatenated = gate != "sigmoid"
        if gate in ("clamped", "sigmoid"):
            self.limit, self.alpha = 2.5, 1.702

    def _apply_gate(self, both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, dim=-1) if self.is_concatenated else (both[..., ::2], both[..., 1::2])
        if self.gate == "product":
            return self.act_fn(gate) * up  # type: ignore[no-any-return]
        gate, up = gate.clamp(max=self.limit), up.clamp(min=-self.limit, max=self.limit)
        if self.gate == "clamped":
            return self.act_fn(gate) * up  # type: ignore[no-any-return]
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    return torch.square(F.relu(x))


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


KINDS: dict[str, dict[str, Any]] = {
    "silu": {},
    "gelu": {"act": F.gelu},
    "gelu-tanh": {"act": gelu_tanh, "bias": True},
    "no-gate": {"gate": "none", "act": squared_relu},
    "clamped": {"gate": "clamped"},
    "gpt-oss": {"gate": "sigmoid", "transposed": True, "bias": True},
    "transposed": {"transposed": True},
    "interleaved": {"gate": "sigmoid"},
}


def make_layout(module: Experts, hidden: int, inner: int, dtype: torch.dtype) -> ExpertLayout:
    up, name = (2 * inner, "gate_up_proj") if module.has_gate else (inner, "up_proj")
    shapes: dict[str, tuple[int, ...]] = {name: (up, hidden), "down_proj": (hidden, inner)}
    if module.is_transposed:
        shapes = {key: shape[::-1] for key, shape in shapes.items()}
    if module.has_bias:
        shapes |= {f"{name}_bias": (up,), "down_proj_bias": (hidden,)}
    specs, offset = [], 0
    for key, shape in shapes.items():
        specs.append(TensorSpec(key, SAFETENSORS_NAMES[dtype], shape, offset))
        offset += specs[-1].nbytes
    return ExpertLayout(0, tuple(specs))


def make_expert(layout: ExpertLayout, generator: torch.Generator) -> Tensors:
    """Tensors in a piece of memory of their own, so that reading past an expert's end is reading past a buffer's."""
    memory = torch.empty(layout.nbytes, dtype=torch.uint8)
    tensors = {}
    for spec in layout.tensors:
        dtype = torch.bfloat16 if spec.dtype == "BF16" else torch.float32
        tensor = memory[spec.offset : spec.offset + spec.nbytes].view(dtype).view(spec.shape)
        tensors[spec.name] = tensor.copy_(torch.randn(spec.shape, generator=generator) / spec.shape[-1] ** 0.5)
    return tensors


def compute(maths: ExpertMaths, hidden: torch.Tensor, weights: torch.Tensor, experts: list[Tensors]) -> torch.Tensor:
    places = range(len(experts))
    token = maths.token(hidden, weights)
    token.compute(places, experts)
    return token.total(places)


def compute_rows(maths: ExpertMaths, hidden: torch.Tensor, tensors: Tensors, weights: torch.Tensor) -> torch.Tensor:
    """Of a prompt's tokens `hidden` [n, H], which all chose one expert with `weights` [n, 1]."""
    prompt = maths.prompt(hidden, torch.zeros(len(hidden), 1, dtype=torch.int64), weights, 1)
    prompt.compute([0], [tensors])
    return prompt.total()


def ulps_apart(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """How many bfloat16 values lie between two of them."""
    both = (tensor.view(torch.int16).int() for tensor in (found, wanted))
    ordered = (torch.where(bits < 0, -(bits & 0x7FFF), bits) for bits in both)
    return (next(ordered) - next(ordered)).abs()


def assert_alike(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    if wanted.dtype == torch.float32:
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)
    else:
        lost = wanted.abs().max() * 2**-9  # to rounding, where terms are as large and cancel each other
        assert ((ulps_apart(found, wanted) <= 1) | ((found - wanted).abs() <= lost)).float().mean() >= 0.999


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have other sets")
def test_a_set_is_there_if_the_processor_has_all_of_its_instructions() -> None:
    features = set(processor_features())
    assert ("avx2" in VARIANTS) == (features >= {"avx2", "fma", "f16c"})
    assert ("avx512" in VARIANTS) == ("avx512f" in features)


@pytest.fixture(params=VARIANTS)
def pool(request: pytest.FixtureRequest) -> Iterator[NativePool]:
    pool = NativePool(2, request.param, LIBRARY)
    yield pool
    pool.close()


@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_torch_s(pool: NativePool, kind: str, dtype: torch.dtype) -> None:
    module = Experts(**KINDS[kind])
    generator = torch.Generator().manual_seed(0)
    for hidden_size, inner in ((1, 1), (7, 3), (33, 65), (64, 32), (130, 67), (515, 259)):
        layout = make_layout(module, hidden_size, inner, dtype)
        maths = NativeMaths(module, layout, pool)
        assert maths.computed_by == f"native, {pool.variant}"
        experts = [make_expert(layout, generator) for _ in range(3)]
        for weights_dtype in DTYPES:
            hidden = torch.randn(1, hidden_size, generator=generator).to(dtype)
            weights = torch.rand(1, 3, generator=generator).to(weights_dtype)
            assert_alike(
                compute(maths, hidden, weights, experts), compute(ExpertMaths(module), hidden, weights, experts)
            )


@pytest.mark.parametrize("kind", ["silu", "no-gate", "clamped", "gpt-oss"])
def test_activations_are_torch_s_for_every_bfloat16(kind: str) -> None:
    module = Experts(**KINDS[kind])
    values = torch.arange(1 << 16).to(torch.int16).view(torch.bfloat16)
    values = values[values.isfinite()]
    others = torch.full_like(values, 0.75)
    both = torch.stack((values, others)) if module.has_gate else values[None]
    both = both.t().flatten()[None] if not module.is_concatenated else both.flatten()[None]
    pool = NativePool(1, path=LIBRARY)
    maths = NativeMaths(module, make_layout(module, 8, len(values), torch.bfloat16), pool)
    projected, found = both.float(), torch.empty(1, len(values))
    pool.lib.moe_activate(maths.layer, projected.data_ptr(), found.data_ptr())
    pool.close()
    wanted = (module._apply_gate(both) if module.has_gate else module.act_fn(both)).float()
    assert torch.equal(found.nan_to_num(1e30), wanted.nan_to_num(1e30))


@pytest.mark.parametrize("kind", ["silu", "gpt-oss"])
def test_nothing_depends_on_threads_or_on_the_order_of_arrival(kind: str) -> None:
    module = Experts(**KINDS[kind])
    generator = torch.Generator().manual_seed(0)
    layout = make_layout(module, 300, 200, torch.bfloat16)
    experts = [make_expert(layout, generator) for _ in range(5)]
    hidden, weights = torch.randn(1, 300, generator=generator).bfloat16(), torch.rand(1, 5, generator=generator)
    results = []
    for threads in (1, 2, 5):
        pool = NativePool(threads, path=LIBRARY)
        maths = NativeMaths(module, layout, pool)
        for groups in ([[0, 1, 2, 3, 4]], [[3], [1, 4], [0, 2]], [[4], [3], [2], [1], [0]]):
            token = maths.token(hidden, weights)
            for group in groups:
                token.compute(group, [experts[place] for place in group])
            results.append(token.total([2, 0, 1, 4, 3]))
        pool.close()
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float32"])
@pytest.mark.parametrize("weights_in", DTYPES, ids=["bfloat16 weights", "float32 weights"])
def test_rows_of_another_place_are_as_good_as_one_s_own(
    pool: NativePool, dtype: torch.dtype, weights_in: torch.dtype
) -> None:
    generator, module = torch.Generator().manual_seed(3), Experts()
    layout = make_layout(module, 96, 40, dtype)
    maths = NativeMaths(module, layout, pool)
    experts = [make_expert(layout, generator) for _ in range(3)]
    hidden = torch.randn(1, 96, generator=generator).to(dtype)
    weights = torch.rand(1, 3, generator=generator).to(weights_in)
    one, other = maths.token(hidden, weights), maths.token(hidden, weights)
    one.compute([0, 2, 1], [experts[0], experts[2], experts[1]])
    other.compute([0], [experts[0]])
    rows = maths.rows(hidden, [experts[2], experts[1]])
    assert (rows.dtype, rows.shape) == (dtype, (2, 96))
    other.receive([2, 1], rows)
    assert torch.equal(one.total([0, 1, 2]), other.total([0, 1, 2]))


@pytest.mark.parametrize("kind", ["Inkling2Experts", "NemotronHExperts"])
def test_sums_are_rounded_as_the_family_rounds_them(pool: NativePool, kind: str) -> None:
    module = Experts()
    module.__class__ = type(kind, (Experts,), {})
    generator = torch.Generator().manual_seed(0)
    layout = make_layout(module, 256, 64, torch.bfloat16)
    experts = [make_expert(layout, generator) for _ in range(8)]
    hidden = torch.randn(1, 256, generator=generator).bfloat16()
    for dtype in DTYPES:
        weights = torch.rand(1, 8, generator=generator).to(dtype)
        wanted = compute(ExpertMaths(module), hidden, weights, experts)
        found = compute(NativeMaths(module, layout, pool), hidden, weights, experts)
        assert (found == wanted).float().mean() > 0.98


@pytest.fixture
def exact_pool() -> Iterator[NativePool]:
    """One that adds as torch does; the test is skipped where there is none."""
    pool = NativePool(2, path=LIBRARY)
    try:
        if not pool.adds_as_torch_does:
            pytest.skip("torch adds in another order on this processor")
        yield pool
    finally:
        pool.close()


@pytest.mark.parametrize("inputs", [1, 33, 512, 600, 1024, 1056, 2600])
def test_products_of_many_rows_are_torch_s(exact_pool: NativePool, inputs: int) -> None:
    """All sizes of tiles and more rows than a block has; outputs that fill no panel; inputs that fill no step, or whose
    chains are twice as long; infinities and NaNs.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(100, inputs, generator=generator).bfloat16()
    rows[3, -1], rows[7, -1] = float("inf"), float("nan")
    for outputs in (1, 16, 70, 200):
        weight = torch.randn(outputs, inputs, generator=generator).bfloat16()
        for count in (*range(1, 27), 31, 32, 48, 96, 97, 100):
            if count > exact_pool.known.rows:
                break
            found = exact_pool.multiply(rows[:count], weight)
            assert torch.equal(found.nan_to_num(1e30), F.linear(rows[:count], weight).nan_to_num(1e30)), count


def test_prompts_are_left_to_torch_where_it_adds_otherwise(
    exact_pool: NativePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial decides, for short prompts and for single tokens apart."""
    module = Experts()
    layout = make_layout(module, 96, 64, torch.bfloat16)
    scratch = make_expert(layout, torch.Generator())
    with ExitStack() as stack:
        [maths] = choose_maths([module], layout, "auto", scratch, stack)
        assert isinstance(maths, NativeMaths)
        assert maths.takes_prompts
        total = native._NativePrompt.total
        monkeypatch.setattr(native._NativePrompt, "total", lambda prompt: total(prompt) * 1.01)
        [maths] = choose_maths([module], layout, "auto", scratch, stack)
        assert isinstance(maths, NativeMaths)
        assert not maths.takes_prompts
        rows = torch.ones(3, 96, dtype=torch.bfloat16), scratch, torch.ones(3, 1)
        assert torch.equal(compute_rows(maths, *rows), compute_rows(ExpertMaths(module), *rows))


@pytest.mark.parametrize("inner", [96, 128])
@pytest.mark.parametrize(("kind", "gate"), [("silu", -3.140625), ("gelu", -3.140625), ("gelu-tanh", -5.0625)])
def test_activations_that_depend_on_where_a_gate_stands_are_left_to_torch(
    exact_pool: NativePool, kind: str, gate: float, inner: int
) -> None:
    """With AVX-512 torch has another GELU for a row's last gates, and a prompt's are parted anywhere. All outputs are
    the gate's alone.
    """
    depends = kind != "silu" and "AVX512" in torch.backends.cpu.get_cpu_capability()
    module = Experts(act=KINDS[kind].get("act", F.silu))
    layout = make_layout(module, 128, inner, torch.bfloat16)
    expert = make_expert(layout, torch.Generator())
    with ExitStack() as stack:
        [maths] = choose_maths([module], layout, "auto", expert, stack)
        assert isinstance(maths, NativeMaths) == (not depends or kind != "gelu-tanh" or inner == 128)
        assert getattr(maths, "takes_prompts", False) == (not depends)
        expert["gate_up_proj"].zero_()[:inner, 0] = gate
        expert["gate_up_proj"][inner:, 0] = 1
        expert["down_proj"].copy_(torch.eye(128, inner))
        hidden, weights = torch.eye(1, 128).bfloat16(), torch.ones(1, 1)
        one = hidden, weights, [expert]
        assert torch.equal(compute(maths, *one), compute(ExpertMaths(module), *one))
        some = hidden.repeat(3, 1), expert, weights.repeat(3, 1)
        assert torch.equal(compute_rows(maths, *some), compute_rows(ExpertMaths(module), *some))


@pytest.mark.parametrize("kind", ["silu", "gpt-oss"])
def test_the_output_of_a_real_layer_is_torch_s(pool: NativePool, kind: str) -> None:
    """Within one bfloat16 of torch's for 99.9 % of the outputs; the same where the library adds in torch's order."""
    generator = torch.Generator().manual_seed(0)
    module = Experts(**KINDS[kind])
    layout = make_layout(module, 2048, 768, torch.bfloat16)
    experts = [make_expert(layout, generator) for _ in range(8)]
    found, wanted = [], []
    for _ in range(4):
        hidden = torch.randn(1, 2048, generator=generator).bfloat16()
        weights = torch.rand(1, 8, generator=generator).softmax(-1)
        found.append(compute(NativeMaths(module, layout, pool), hidden, weights, experts))
        wanted.append(compute(ExpertMaths(module), hidden, weights, experts))
    assert_alike(torch.cat(found), torch.cat(wanted))
    if pool.adds_as_torch_does and not (module.is_transposed and pool.known.columns != OWN):
        assert torch.equal(torch.cat(found), torch.cat(wanted))


def quantized(plain: Tensors, quantizer: Quantizer) -> Tensors:
    """The expert in whole numbers, in a piece of memory of its own."""
    data = b"".join(bytes(chunk) for chunk in quantizer.encode(plain, "an expert"))
    assert len(data) == quantizer.layout.nbytes
    memory = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return {
        spec.name: memory[spec.offset : spec.offset + spec.nbytes].view(TORCH_DTYPES[spec.dtype]).view(spec.shape)
        for spec in quantizer.layout.tensors
    }


@pytest.mark.parametrize("kind", ["silu", "no-gate", "gelu-tanh", "gpt-oss", "transposed"])
@pytest.mark.parametrize(("experts_in", "group"), NUMBERS)
def test_experts_in_whole_numbers(pool: NativePool, kind: str, experts_in: str, group: int) -> None:
    """A token and a few rows, against torch, which expands the same numbers to float32: what lies between the
    projections is rounded to 16 bits at most.
    """
    module = Experts(**KINDS[kind])
    generator = torch.Generator().manual_seed(0)
    for hidden_size, inner in ((1, 1), (33, 65), (96, 32), (259, 130), (640, 384)):
        plain = make_layout(module, hidden_size, inner, torch.float32)
        quantizer = Quantizer(plain, module.is_transposed, experts_in, group)
        native_maths = NativeMaths(module, quantizer.layout, pool)
        torch_maths = ExpertMaths(module, quantizer.layout.quantization)
        experts = [quantized(make_expert(plain, generator), quantizer) for _ in range(3)]
        hidden = torch.randn(3, hidden_size, generator=generator)
        weights = torch.rand(3, 3, generator=generator)
        found = compute(native_maths, hidden[:1], weights[:1], experts)
        wanted = compute(torch_maths, hidden[:1], weights[:1], experts)
        assert (found - wanted).abs().max() <= 1e-3 * wanted.abs().max()
        found, wanted = (maths.expert(hidden, experts[0], weights[:, :1]) for maths in (native_maths, torch_maths))
        assert (found - wanted).abs().max() <= 1e-3 * wanted.abs().max()
        many = torch.randn(17, hidden_size, generator=generator), torch.ones(17, 1)
        results = [maths.expert(many[0], experts[0], many[1]) for maths in (native_maths, torch_maths)]
        assert torch.equal(*results)


def released(
    plain: ExpertLayout, is_transposed: bool, exponents: tuple[int, int], seed: int = 0
) -> tuple[ExpertLayout, Tensors]:
    """A random expert as it was released, in a piece of memory of its own."""
    generator = torch.Generator().manual_seed(seed)
    layout = Packer(plain, is_transposed, "mxfp4").layout
    memory = torch.empty(layout.nbytes, dtype=torch.uint8)
    tensors = {}
    for spec in layout.tensors:
        tensor = memory[spec.offset : spec.offset + spec.nbytes].view(TORCH_DTYPES[spec.dtype]).view(spec.shape)
        if spec.dtype == "U8":
            limits = exponents if spec.name.endswith("_scales") else (0, 256)
            tensor.copy_(torch.randint(*limits, spec.shape, generator=generator))
        else:
            tensor.copy_(torch.randn(spec.shape, generator=generator))
        tensors[spec.name] = tensor
    return layout, tensors


def float8(plain: ExpertLayout, scale: float, seed: int = 0) -> tuple[ExpertLayout, Tensors]:
    """The same in float8, all bytes but NaN: blocks of gates and ups are apart."""
    generator = torch.Generator().manual_seed(seed)
    packer = Packer(plain, False, "fp8", {"gate_up_proj": 2})
    memory = torch.empty(packer.layout.nbytes, dtype=torch.uint8)
    tensors = {
        spec.name: memory[spec.offset : spec.offset + spec.nbytes].view(TORCH_DTYPES[spec.dtype]).view(spec.shape)
        for spec in packer.layout.tensors
    }
    fill_randomly(tensors, packer.quantization, generator)
    for name in packer.quantization.widths:
        numbers = tensors[name].view(torch.uint8).random_(0, 256, generator=generator)
        numbers[numbers & 127 == 127] = 0
        tensors[scales_name(name)].mul_(scale)
    return packer.layout, tensors


def expanded(layout: ExpertLayout, tensors: Tensors, plain: ExpertLayout) -> Tensors:
    """The same expert as `plain` has it, [out, in]."""
    made, whole = layout.quantization, make_expert(plain, torch.Generator())
    assert made is not None
    for name, tensor in whole.items():
        if name in made.widths:
            tensor.copy_(dequantize(tensors[name], tensors[scales_name(name)], made, tensor.shape[1], tensor.dtype))
        else:
            tensor.copy_(tensors[name])
    return whole


Chains = tuple[int, int]
CHAINS = ((0, 0), (96, 64), (IN_TURN.chain, IN_TURN.chain))
"""Of what is multiplied with an expert's projections, up and down; 0 for the order that a set of instructions has."""


def in_chains(maths: NativeMaths, chains: Chains) -> NativeMaths:
    if any(chains) and maths.pool.variant != ("avx2" if chains[0] == IN_TURN.chain else "avx512amx"):
        pytest.skip("chains are of AMX, those that take turns of AVX2")
    maths.layer.up_chain, maths.layer.down_chain = chains
    return maths


@pytest.mark.parametrize("chains", CHAINS, ids=str)
@pytest.mark.parametrize(
    "exponents", [(118, 126), (0, 4), (130, 160), (250, 256), (95, 168), (87, 168), (85, 170)], ids=str
)
@pytest.mark.parametrize("kind", ["silu", "no-gate", "gelu-tanh", "interleaved"])
def test_released_experts_give_what_they_give_expanded(
    pool: NativePool, kind: str, exponents: tuple[int, int], chains: Chains
) -> None:
    """To the last bit, with any instruction set, whatever is too small to be a normal number, infinite or none."""
    module = Experts(**KINDS[kind])
    generator = torch.Generator().manual_seed(0)
    for hidden_size, inner in ((32, 32), (64, 96), (544, 160), (2080, 64)):
        plain = make_layout(module, hidden_size, inner, torch.bfloat16)
        experts = [released(plain, False, exponents, seed) for seed in range(3)]
        layout = experts[0][0]
        hidden = (torch.randn(1, hidden_size, generator=generator) * 2.0 ** (120 - exponents[0])).bfloat16()
        weights = torch.rand(1, 3, generator=generator)
        whole = [expanded(*expert, plain) for expert in experts]
        theirs, native = (in_chains(NativeMaths(module, each, pool), chains) for each in (plain, layout))
        wanted = compute(theirs, hidden, weights, whole)
        found = compute(native, hidden, weights, [tensors for _, tensors in experts])
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


FLOAT8_SIZES = ((1, 1), (24, 33), (65, 100), (128, 127), (256, 384), (640, 192), (1152, 256))
"""The next to last one has blocks that the library does not know."""


@pytest.mark.parametrize("chains", CHAINS, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-34, 1e34], ids=str)
@pytest.mark.parametrize("kind", ["silu", "no-gate", "interleaved"])
def test_float8_experts_give_what_they_give_expanded(pool: NativePool, kind: str, scale: float, chains: Chains) -> None:
    """To the last bit, with any instruction set: where weights are too small to be normal numbers, and infinite."""
    module = Experts(**KINDS[kind])
    generator = torch.Generator().manual_seed(0)
    for hidden_size, inner in FLOAT8_SIZES:
        plain = make_layout(module, hidden_size, inner, torch.bfloat16)
        experts = [float8(plain, scale, seed) for seed in range(3)]
        if inner == 192:
            with pytest.raises(NotNativeError, match="whole blocks alone"):
                NativeMaths(module, experts[0][0], pool)
            continue
        hidden = (torch.randn(1, hidden_size, generator=generator) / scale).bfloat16()
        weights = torch.rand(1, 3, generator=generator)
        whole = [expanded(*expert, plain) for expert in experts]
        theirs, native = (in_chains(NativeMaths(module, each, pool), chains) for each in (plain, experts[0][0]))
        wanted = compute(theirs, hidden, weights, whole)
        found = compute(native, hidden, weights, [tensors for _, tensors in experts])
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_the_library_expands_float8_as_torch_does(pool: NativePool) -> None:
    """All bytes, NaN as well, and scales that make them tiny and infinite."""
    module = Experts()
    for hidden_size, inner in FLOAT8_SIZES:
        for scale in (1.0, 1e-36, 1e40):
            layout, tensors = float8(make_layout(module, hidden_size, inner, torch.bfloat16), scale)
            by_library, about = ExpandingMaths(module, layout, pool), layout.quantization
            assert about is not None
            for name, width in about.widths.items():
                numbers, scales = tensors[name], tensors[scales_name(name)]
                numbers.view(torch.uint8).random_(0, 256)
                rows = torch.empty(1, width, dtype=torch.bfloat16)
                wanted = ExpertMaths(module, about)._expand(numbers, scales, rows)
                found = by_library._expand(numbers, scales, rows)
                torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1, 0x7F800000])
def test_scales_that_are_no_numbers_come_through(pool: NativePool, bits: int) -> None:
    """Whatever else their bits say: rounding must not make a number of them."""
    module = Experts()
    layout, tensors = float8(make_layout(module, 256, 128, torch.bfloat16), 1.0)
    tensors[scales_name("down_proj")].view(torch.int32)[:] = bits
    about = layout.quantization
    assert about is not None
    numbers, scales = tensors["down_proj"], tensors[scales_name("down_proj")]
    wanted = dequantize(numbers, scales, about, 128, torch.bfloat16)
    found = ExpandingMaths(module, layout, pool)._expand(numbers, scales, torch.empty(1, 128, dtype=torch.bfloat16))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    hidden, weights = torch.ones(1, 256).bfloat16(), torch.ones(1, 1)
    assert not compute(NativeMaths(module, layout, pool), hidden, weights, [tensors]).isfinite().any()


def test_factors_that_are_no_numbers_come_through(pool: NativePool) -> None:
    module = Experts()
    quantizer = Quantizer(make_layout(module, 64, 64, torch.bfloat16), False, "int8", 64)
    numbers = torch.full((64, 64), 3, dtype=torch.uint8)
    factors = torch.tensor([float("inf"), float("nan"), -float("inf"), 65504.0] * 16).half()[:, None]
    rows = torch.empty(1, 64, dtype=torch.bfloat16)
    wanted = dequantize(numbers, factors, quantizer.quantization, 64, torch.bfloat16)
    found = ExpandingMaths(module, quantizer.layout, pool)._expand(numbers, factors, rows)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_small_numbers_count_in_every_thread(pool: NativePool) -> None:
    """Also where the caller's own are told to take them for 0, as torch and other libraries may."""
    module = Experts()
    layout, tensors = float8(make_layout(module, 1024, 512, torch.bfloat16), 1.0)
    numbers, scales = tensors["gate_up_proj"], tensors[scales_name("gate_up_proj")]
    numbers.view(torch.uint8).random_(0, 8)
    several = NativePool(2, pool.variant, LIBRARY)
    rows = torch.empty(1, 1024, dtype=torch.bfloat16)
    assert layout.quantization is not None
    wanted = dequantize(numbers, scales, layout.quantization, 1024, torch.bfloat16)
    try:
        torch.set_flush_denormal(True)
        found = [ExpandingMaths(module, layout, several)._expand(numbers, scales, rows) for _ in range(3)]
    finally:
        torch.set_flush_denormal(False)
        several.close()
    assert wanted.count_nonzero() > 0
    assert all(torch.equal(each, wanted) for each in found)


def test_the_default_dtype_is_of_no_matter(pool: NativePool) -> None:
    module = Experts(**KINDS["no-gate"])
    for dtype in DTYPES:
        layout = make_layout(module, 64, 96, dtype)
        experts = [make_expert(layout, torch.Generator().manual_seed(seed)) for seed in range(3)]
        hidden, weights = torch.ones(1, 64, dtype=dtype), torch.tensor([[0.25, 0.5, 1.0]])
        wanted = compute(NativeMaths(module, layout, pool), hidden, weights, experts)
        try:
            torch.set_default_dtype(torch.bfloat16)
            found = compute(NativeMaths(module, layout, pool), hidden, weights, experts)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(found, wanted)


@pytest.mark.filterwarnings("ignore")  # that threads and fork do not go together
def test_a_child_closes_what_it_cannot_use() -> None:
    pool = NativePool(2, path=LIBRARY)
    reader = NativeReader(threads=2, direct=False)
    child = os.fork()
    if child == 0:
        reader.close()
        pool.close()
        os._exit(7)
    deadline = time.monotonic() + 20
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended[0] == 0:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    reader.close()
    pool.close()
    assert os.waitstatus_to_exitcode(ended[1]) == 7


def test_a_set_that_is_not_there_opens_no_pool() -> None:
    assert NativePool(1, path=LIBRARY).lib.moe_open(1, 99) is None


def test_float8_nan_comes_through(pool: NativePool) -> None:
    module = Experts()
    layout, tensors = float8(make_layout(module, 256, 128, torch.bfloat16), 1.0)
    numbers = tensors["down_proj"].view(torch.uint8)
    numbers[5, 7], numbers[40, 3] = 0x7F, 0xFF
    hidden, weights = torch.ones(1, 256).bfloat16(), torch.ones(1, 1)
    found = compute(NativeMaths(module, layout, pool), hidden, weights, [tensors])
    assert found.isnan().nonzero().tolist() == [[0, 5], [0, 40]]


@pytest.mark.parametrize("is_transposed", [False, True])
def test_the_library_expands_as_torch_does(pool: NativePool, is_transposed: bool) -> None:
    """Every power that a finite weight may have, and sizes that fill no tile."""
    module = Experts(transposed=is_transposed)
    for hidden_size, inner in ((32, 32), (96, 160), (352, 224)):
        layout, tensors = released(make_layout(module, hidden_size, inner, torch.bfloat16), is_transposed, (0, 253))
        by_library = ExpandingMaths(module, layout, pool)
        about = layout.quantization
        assert about is not None
        for name, width in about.widths.items():
            numbers, factors = tensors[name], tensors[scales_name(name)]
            rows = torch.empty(1, width, dtype=torch.bfloat16)
            wanted = ExpertMaths(module, about)._expand(numbers, factors, rows)
            assert wanted.isfinite().all()
            assert torch.equal(by_library._expand(numbers, factors, rows), wanted)


@pytest.mark.parametrize(("experts_in", "group"), NUMBERS)
def test_the_library_expands_whole_numbers_as_torch_does(pool: NativePool, experts_in: str, group: int) -> None:
    """More rows than a ticket has, rows that end within a group, a vector and a byte."""
    module = Experts()
    generator = torch.Generator().manual_seed(0)
    for hidden_size, inner in ((1, 1), (33, 65), (96, 160), (259, 130)):
        plain = make_layout(module, hidden_size, inner, torch.bfloat16)
        quantizer = Quantizer(plain, False, experts_in, group)
        tensors = quantized(make_expert(plain, generator), quantizer)
        by_library, about = ExpandingMaths(module, quantizer.layout, pool), quantizer.quantization
        for name, width in about.widths.items():
            numbers, factors = tensors[name], tensors[scales_name(name)]
            numbers.view(-1)[:256] = torch.arange(256, dtype=torch.uint8)[: numbers.numel()]
            factors.view(torch.uint8)[0, :2] = torch.tensor([1, 0])  # 6e-8, the smallest that float16 has
            rows = torch.empty(1, width, dtype=torch.bfloat16)
            wanted = dequantize(numbers, factors, about, width, torch.bfloat16)
            assert torch.equal(by_library._expand(numbers, factors, rows), wanted)


@pytest.mark.parametrize("kind", ["silu", "gpt-oss"])
def test_many_rows_of_released_experts_are_torch_s(pool: NativePool, kind: str) -> None:
    module = Experts(**KINDS[kind])
    plain = make_layout(module, 96, 64, torch.bfloat16)
    layout, tensors = released(plain, module.is_transposed, (118, 126))
    generator = torch.Generator().manual_seed(0)
    native_maths, torch_maths = NativeMaths(module, layout, pool), ExpertMaths(module, layout.quantization)
    for rows in (2, 40):
        hidden = torch.randn(rows, 96, generator=generator).bfloat16()
        weights = torch.rand(rows, 1, generator=generator)
        wanted = compute_rows(torch_maths, hidden, tensors, weights)
        assert torch.equal(compute_rows(native_maths, hidden, tensors, weights), wanted)


@pytest.mark.skipif(TORCH_S is None, reason="torch adds in another order on this processor")
def test_float8_experts_are_native_by_themselves_where_that_is_exact() -> None:
    module = Experts()
    plain = make_layout(module, 1152, 768, torch.bfloat16)
    (layout, tensors), (_, scratch) = float8(plain, 1.0), float8(plain, 1.0)
    generator = torch.Generator().manual_seed(1)
    with ExitStack() as stack:
        [maths] = choose_maths([module], layout, "auto", scratch, stack)
        assert isinstance(maths, NativeMaths)
        for number in (1, 1, 2, 40):
            hidden = torch.randn(number, 1152, generator=generator).bfloat16()
            weights, torch_maths = torch.ones(number, 1), ExpertMaths(module, layout.quantization)
            if number == 1:
                wanted = compute(torch_maths, hidden, weights, [tensors])
                assert torch.equal(compute(maths, hidden, weights, [tensors]), wanted)
            rows = hidden, tensors, weights
            assert torch.equal(compute_rows(maths, *rows), compute_rows(torch_maths, *rows))


@pytest.mark.skipif(TORCH_S is None, reason="torch adds in another order on this processor")
@pytest.mark.parametrize("kind", ["silu", "gpt-oss"])
def test_released_experts_are_native_by_themselves_where_that_is_exact(kind: str) -> None:
    """As large as real ones: a token's output is torch's, and so the trial at load finds it."""
    module = Experts(**KINDS[kind])
    plain = make_layout(module, 1056, 800, torch.bfloat16)
    layout, tensors = released(plain, module.is_transposed, (118, 126))
    _, scratch = released(plain, module.is_transposed, (118, 126))
    generator = torch.Generator().manual_seed(1)
    with ExitStack() as stack:
        [maths] = choose_maths([module], layout, "auto", scratch, stack)
        assert isinstance(maths, NativeMaths)
        for _ in range(4):
            hidden, weights = torch.randn(1, 1056, generator=generator).bfloat16(), torch.ones(1, 1)
            wanted = compute(ExpertMaths(module, layout.quantization), hidden, weights, [tensors])
            assert torch.equal(compute(maths, hidden, weights, [tensors]), wanted)


def test_where_released_experts_are_not_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """The maths is torch's, to the last bit; the library still expands."""
    monkeypatch.setattr(NativePool, "adds_as_torch_does", False)
    module = Experts(**KINDS["gpt-oss"])
    plain = make_layout(module, 64, 32, torch.bfloat16)
    layout, tensors = released(plain, True, (118, 126))
    _, scratch = released(plain, True, (118, 126))
    hidden, weights = torch.ones(1, 64).bfloat16(), torch.ones(1, 1)
    wanted = compute(ExpertMaths(module, layout.quantization), hidden, weights, [tensors])
    with ExitStack() as stack:
        [maths] = choose_maths([module], layout, "auto", scratch, stack)
        assert "another order than torch" in maths.computed_by
        assert torch.equal(compute(maths, hidden, weights, [tensors]), wanted)
        [explicit] = choose_maths([module], layout, "native", scratch, stack)
        assert isinstance(explicit, NativeMaths)
        wide = Packer(make_layout(module, 64, 32, torch.float32), True, "mxfp4").layout
        [maths] = choose_maths([module], wide, "auto", scratch, stack)
        assert maths.computed_by == "torch: it does not compute mxfp4 experts in F32"
    assert torch.equal(compute(explicit, hidden, weights, [tensors]), wanted), "after the pool is closed"


def test_infinities_and_nans_come_through(pool: NativePool) -> None:
    module = Experts()
    layout = make_layout(module, 64, 33, torch.bfloat16)
    experts = [make_expert(layout, torch.Generator().manual_seed(0))]
    for value in (float("inf"), float("nan"), 3e38):
        hidden = torch.ones(1, 64, dtype=torch.bfloat16)
        hidden[0, 5] = value
        found = compute(NativeMaths(module, layout, pool), hidden, torch.ones(1, 1), experts)
        wanted = compute(ExpertMaths(module), hidden, torch.ones(1, 1), experts)
        assert torch.equal(found.isnan(), wanted.isnan())
        assert torch.equal(found.isinf(), wanted.isinf())


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu-tanh", "no-gate"])
def test_activations_let_nan_through(pool: NativePool, kind: str) -> None:
    module = Experts(**KINDS[kind])
    layout = make_layout(module, 64, 33, torch.float32)
    experts = [make_expert(layout, torch.Generator().manual_seed(0))]
    hidden = torch.full((1, 64), torch.nan)
    assert compute(NativeMaths(module, layout, pool), hidden, torch.ones(1, 1), experts).isnan().all()


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.filterwarnings("ignore")  # what transformers says about families of its
def test_which_families_are_native(family: str) -> None:
    experts = [module for module in make_model(family).modules() if is_experts_module(module)]
    pool = NativePool(1, path=LIBRARY)
    try:
        for module in experts:
            specs, offset = [], 0
            for name, tensor in module.named_parameters(recurse=False):
                specs.append(TensorSpec(name, SAFETENSORS_NAMES[tensor.dtype], tuple(tensor.shape[1:]), offset))
                offset += specs[-1].nbytes
            layout = ExpertLayout(0, tuple(specs))
            if family in NOT_NATIVE:
                with pytest.raises(NotNativeError, match=NOT_NATIVE[family]):
                    NativeMaths(module, layout, pool)
            else:
                NativeMaths(module, layout, pool)
    finally:
        pool.close()


def test_what_the_library_cannot_do_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_is_exact", lambda *_: True)
    monkeypatch.setattr(kernels, "_is_exact_for_rows", lambda *_: True)
    module, normed = Experts(), Experts(act=lambda x: x.softmax(-1))
    halves = make_layout(module, 8, 8, torch.float16)
    layout = make_layout(module, 8, 8, torch.bfloat16)
    with ExitStack() as stack:
        assert [maths.computed_by for maths in choose_maths([module], halves, "auto", {}, stack)] == [
            "torch: it does not compute experts in F16"
        ]
        both = choose_maths([module, normed], layout, "auto", {}, stack)
        assert [maths.computed_by.split(",")[0] for maths in both] == [
            "native",
            "torch: it does not have the activation of Experts",
        ]
        with pytest.raises(UnsupportedError, match="--kernels native: it does not compute experts in F16") as caught:
            choose_maths([module], halves, "native", {}, stack)
        assert caught.value.hint == "leave --kernels out, or give --kernels torch"
        assert [maths.computed_by for maths in choose_maths([module], layout, "torch", {}, stack)] == ["torch"]
        numbers = Quantizer(layout, False, "int8", 32).layout
        [maths] = choose_maths([module], numbers, "auto", {}, stack)
        assert isinstance(maths, NativeMaths)
        half_numbers = Quantizer(halves, False, "int8", 32).layout
        [maths] = choose_maths([module], half_numbers, "auto", {}, stack)
        assert maths.computed_by == "torch: it does not compute experts in F16"


@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float32"])
def test_what_is_not_exact_is_not_chosen_by_itself(dtype: torch.dtype) -> None:
    """`auto` takes native maths where a trial gives torch's bits, and says why it does not elsewhere."""
    module = Experts()
    layout = make_layout(module, 1100, 300, dtype)
    generator = torch.Generator().manual_seed(1)
    scratch = make_expert(layout, generator)
    with ExitStack() as stack:
        [automatic] = choose_maths([module], layout, "auto", scratch, stack)
        [explicit] = choose_maths([module], layout, "native", scratch, stack)
        assert isinstance(explicit, NativeMaths)
        experts, equal = [make_expert(layout, generator)], True
        for _ in range(20):
            hidden, weights = torch.randn(1, 1100, generator=generator).to(dtype), torch.ones(1, 1, dtype=dtype)
            wanted = compute(ExpertMaths(module), hidden, weights, experts)
            equal = equal and torch.equal(compute(explicit, hidden, weights, experts), wanted)
        assert isinstance(automatic, NativeMaths) == equal
        assert equal or "another order than torch on this processor" in automatic.computed_by


def test_without_the_library_torch_computes(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_library, "built_library", lambda: None)
    with moeinf.load(tiny) as engine:
        reason = "the native library is not built; install moeinf where there is a C compiler"
        assert engine.stats().kernels == f"torch: {reason}"
    with pytest.raises(UnsupportedError, match="--kernels native: the native library is not built"):
        moeinf.load(tiny, kernels="native")


@pytest.mark.parametrize("bytes_", [b"", b"nothing that could be loaded"])
def test_a_library_that_cannot_be_loaded_is_an_error(tmp_path: Path, bytes_: bytes) -> None:
    path = tmp_path / "library.so"
    path.write_bytes(bytes_)
    with pytest.raises(NotNativeError, match="cannot be loaded"):
        NativePool(1, path=path)


def test_a_closed_pool_leaves_the_maths_to_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    module = Experts()
    layout = make_layout(module, 64, 32, torch.bfloat16)
    pool = NativePool(1, path=LIBRARY)
    maths = NativeMaths(module, layout, pool)
    pool.close()
    experts = [make_expert(layout, generator)]
    hidden, weights = torch.randn(1, 64, generator=generator).bfloat16(), torch.ones(1, 1)
    assert torch.equal(compute(maths, hidden, weights, experts), compute(ExpertMaths(module), hidden, weights, experts))


def test_the_demo_says_the_same_with_either() -> None:
    tokens = {}
    for kind in ("torch", "native"):
        with moeinf.load("demo", kernels=kind, experts="25%") as engine:
            assert engine.stats().kernels.startswith(kind)
            engine.generation_config.eos_token_id = None
            prompt = engine.tokenizer("The capital of France is")["input_ids"]
            sampling = moeinf.Sampling(max_tokens=256, temperature=0)
            tokens[kind] = engine.session().generate(prompt, sampling).tokens
    assert len(tokens["torch"]) == 256
    agreed = 256 if TORCH_S else 8  # where the last bits differ, a tie may be broken otherwise
    assert tokens["native"][:agreed] == tokens["torch"][:agreed]


def test_reading_memory_reads_all_of_it(pool: NativePool) -> None:
    memory = torch.randint(0, 256, (3 << 20,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    words = np.bitwise_xor.reduce(memory.numpy().view(np.uint32))
    assert pool.read(memory) == words


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads where Linux shows them")
def test_threads_sleep_between_steps_and_end_with_the_pool() -> None:
    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    before = threads()
    pool = NativePool(3, path=LIBRARY)
    assert threads() == before + 2
    pool.read(torch.zeros(1 << 20, dtype=torch.uint8))
    begin = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - begin < 0.1
    pool.close()
    pool.close()
    deadline = time.monotonic() + 10
    while threads() != before and time.monotonic() < deadline:  # Linux shows a thread a moment longer than it lives
        time.sleep(0.01)
    assert threads() == before
