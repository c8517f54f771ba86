"""Weights as whole numbers: what is lost, what is chosen, how an expert of them lies, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moeinf.codebook import BOOK, UNIT
from moeinf.dtypes import TORCH_DTYPES
from moeinf.errors import IntegrityError, UnsupportedError
from moeinf.manifest import GROUPS, ExpertLayout, Quantization, TensorSpec
from moeinf.quantized import Quantizer, dequantize, quantize

WIDTH = 131
"""Three groups of 32 and a shorter one, or of 64, and odd."""


def weights(rows: int = 5, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0))


def back(numbers: torch.Tensor, factors: torch.Tensor, bits: int, group: int, width: int = WIDTH) -> torch.Tensor:
    about = Quantization(f"int{bits}", group, "F32", {"weight": width})
    return dequantize(numbers, factors, about, width, torch.float32)


def largest_of_groups(weight: torch.Tensor, group: int) -> torch.Tensor:
    """Each weight's group's largest."""
    out, width = weight.shape
    groups = -(-width // group)
    padded = F.pad(weight, (0, groups * group - width)).view(out, groups, group)
    return padded.abs().amax(-1).repeat_interleave(group, 1)[:, :width]


@pytest.mark.parametrize("group", GROUPS["int8"])
def test_eight_bits_round_to_the_nearest_of_255(group: int) -> None:
    weight = weights()
    numbers, factors = quantize(weight, 8, group)
    assert (numbers.shape, factors.shape) == ((5, WIDTH), (5, -(-WIDTH // group)))
    error = (back(numbers, factors, 8, group) - weight).abs()
    assert (error <= 1.07 * 0.5 / 127 * largest_of_groups(weight, group)).all()


@pytest.mark.parametrize("largest", [1e-7, 3e-6, 1.1e-5, 3e-4])
def test_eight_bits_keep_groups_whose_factors_float16_hardly_has(largest: float) -> None:
    weight = torch.linspace(-largest, largest, 64)[None]
    numbers, factors = quantize(weight, 8, 64)
    made = back(numbers, factors, 8, 64, 64)
    assert ((made - weight).abs() <= 0.51 * factors.float()).all()
    assert made.any()


def test_factors_of_eight_bits_are_the_nearest_of_float16() -> None:
    weight = weights(rows=200)
    _, factors = quantize(weight, 8, 64)
    assert torch.equal(factors, (largest_of_groups(weight, 64)[:, ::64] / 127).half())


def test_four_bits_lose_less_than_numbers_that_lie_evenly() -> None:
    weight = weights(rows=200)
    numbers, factors = quantize(weight, 4, 16)
    assert (numbers.shape, factors.shape, factors.dtype) == ((200, 66), (200, 2 + 9), torch.uint8)
    step = largest_of_groups(weight, 16) / 7
    plain = (weight / step).round() * step
    lost, lost_plainly = ((made - weight).square().mean() for made in (back(numbers, factors, 4, 16), plain))
    assert lost < 0.7 * lost_plainly


def test_four_bits_find_the_numbers_that_weights_are_made_of() -> None:
    """Any group that the book holds exactly comes back exactly, whichever end its largest weight is at, if factors of
    a row are whole multiples of one of them.
    """
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor(BOOK)[torch.randint(0, 16, (64, 2, 16), generator=generator)]
    values[:, :, 3], values[::2, :, 5] = BOOK[0], BOOK[-1]
    multiples = torch.randint(-127, 128, (64, 2, 1), generator=generator)
    multiples[:, 0] = 127
    weight = (values * multiples * 2.0**-20).flatten(1)
    made, factors = quantize(weight, 4, 16)
    assert torch.equal(back(made, factors, 4, 16, 32), weight)


def test_small_groups_beside_large_ones_are_not_lost() -> None:
    """A factor that is less than half of a row's unit is all of it."""
    weight = weights(1, 32) * torch.cat((torch.ones(16), torch.full((16,), 1e-3)))
    error = back(*quantize(weight, 4, 16), 4, 16, 32) - weight
    assert error[:, 16:].norm() < weight[:, 16:].norm()


def test_the_book_has_both_ends_and_no_nothing() -> None:
    assert len(BOOK) == 16
    assert list(BOOK) == sorted(set(BOOK))
    assert max(map(abs, BOOK)) == 127


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_stay_zeros(bits: int) -> None:
    weight = weights()
    weight[1] = 0
    weight[2, :64] = 0
    group = {8: 64, 4: 16}[bits]
    assert (back(*quantize(weight, bits, group), bits, group)[weight == 0] == 0).all()


def test_the_first_of_two_numbers_is_in_the_lower_half() -> None:
    """And a row's unit lies before its factors."""
    numbers, factors = quantize(torch.tensor([[BOOK[0], BOOK[15], BOOK[9]]]) * 127 * UNIT, 4, 16)
    assert (numbers.tolist(), factors.tolist()) == ([[0xF0, 0x09]], [[0x00, 0x3C, 127]])
    assert back(numbers, factors, 4, 16, 3).tolist() == [[127 * UNIT * number for number in (-127, 110, 16)]]


def test_many_rows_are_done_in_parts() -> None:
    """A row comes out the same alone."""
    weight = weights(rows=5000)
    numbers, factors = quantize(weight, 4, 16)
    alone = quantize(weight[4321:4322], 4, 16)
    assert torch.equal(numbers[4321:4322], alone[0])
    assert torch.equal(factors[4321:4322], alone[1])
    assert torch.equal(back(numbers, factors, 4, 16)[4321:4322], back(*alone, 4, 16))


# An expert


def layout(*tensors: tuple[str, str, tuple[int, ...]]) -> ExpertLayout:
    specs, offset = [], 0
    for name, dtype, shape in tensors:
        specs.append(TensorSpec(name, dtype, shape, offset))
        offset += specs[-1].nbytes
    return ExpertLayout(4096, tuple(specs))


PLAIN = layout(("gate_up_proj", "BF16", (33, 6)), ("gate_up_proj_bias", "BF16", (6,)), ("down_proj", "BF16", (3, 33)))


def test_an_expert_of_a_transposed_family_lies_by_rows() -> None:
    quantizer = Quantizer(PLAIN, True, "int4", 16)
    assert [(spec.name, spec.dtype, spec.shape, spec.offset) for spec in quantizer.layout.tensors] == [
        ("gate_up_proj_bias", "BF16", (6,), 0),
        ("gate_up_proj_scales", "U8", (6, 5), 12),
        ("down_proj_scales", "U8", (33, 3), 42),
        ("gate_up_proj", "U8", (6, 17), 141),
        ("down_proj", "U8", (33, 2), 243),
    ]
    assert quantizer.quantization.widths == {"gate_up_proj": 33, "down_proj": 3}
    assert quantizer.layout.expanded_bytes == 2 * 6 * 33
    tensors = {spec.name: torch.randn(spec.shape).bfloat16() for spec in PLAIN.tensors}
    data = bytearray(b"".join(bytes(chunk) for chunk in quantizer.encode(tensors, "it")))
    assert len(data) == quantizer.layout.nbytes
    found = {
        spec.name: torch.frombuffer(data[spec.offset : spec.offset + spec.nbytes], dtype=TORCH_DTYPES[spec.dtype]).view(
            spec.shape
        )
        for spec in quantizer.layout.tensors
    }
    assert torch.equal(found["gate_up_proj_bias"], tensors["gate_up_proj_bias"])
    made = dequantize(found["gate_up_proj"], found["gate_up_proj_scales"], quantizer.quantization, 33, torch.float32)
    error = (made.t() - tensors["gate_up_proj"].float()).norm() / tensors["gate_up_proj"].float().norm()
    assert error < 0.09


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_what_is_not_finite_is_refused(kind: str, value: float) -> None:
    tensors = {spec.name: torch.zeros(spec.shape, dtype=torch.bfloat16) for spec in PLAIN.tensors}
    tensors["down_proj"][1, 7] = value
    with pytest.raises(IntegrityError, match="down_proj of expert 3 holds NaN or infinity"):
        list(Quantizer(PLAIN, True, kind, 64).encode(tensors, "expert 3"))


def test_weights_beyond_float16_s_factors_are_refused() -> None:
    tensors = {spec.name: torch.full(spec.shape, 1e30, dtype=torch.bfloat16) for spec in PLAIN.tensors}
    with pytest.raises(IntegrityError, match=r"gate_up_proj of it holds 1.0e\+30, and its factors"):
        list(Quantizer(PLAIN, True, "int4", 16).encode(tensors, "it"))


def test_matrices_of_two_dtypes_are_refused() -> None:
    mixed = layout(("gate_up_proj", "BF16", (6, 3)), ("down_proj", "F32", (3, 3)))
    with pytest.raises(UnsupportedError, match="experts in BF16 and F32"):
        Quantizer(mixed, False, "int8", 64)
