"""Forecasts: what must hold for every machine and model, and the arithmetic of one that can be done by hand."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest

from machines import GB, MIB, make_machine, make_manifest, make_shape, random_machine, random_model, with_faster_disk
from moeinf import forecast
from moeinf.errors import CapacityError
from moeinf.forecast import PUBLISHED, Correction, HitCurve, PastRun, Situation, correction, foretell
from moeinf.kernels import orders
from moeinf.ledger import MemoryPlan, make_plan
from moeinf.machine import MathsRate
from moeinf.manifest import ExpertLayout, Quantization, TensorSpec
from moeinf.quantized import Packer
from moeinf.units import KIB

WHOLE = HitCurve(((0.5, 0.5),), "a straight line")


def random_situation(seed: int) -> tuple[Situation, random.Random]:
    chance = random.Random(seed)
    manifest, shape = random_model(chance)
    rates = sorted(chance.random() for _ in range(3))
    situation = Situation(
        random_machine(chance),
        manifest,
        shape,
        chance.choice([PUBLISHED, HitCurve(tuple(zip((0.1, 0.3, 0.8), rates, strict=True)), "random")]),
        kernels=chance.choice(["auto", "native", "torch"]),
        prefetch=chance.choice(["auto", "eam", "gate", "off"]),
        reads_files=chance.random() < 0.2,
    )
    return situation, chance


def plans(situation: Situation, chance: random.Random) -> list[MemoryPlan]:
    """Plans of the same context with ever more memory; none where the model needs more than there is."""
    made = []
    for available in sorted(chance.randint(200, 100_000) * MIB for _ in range(8)):
        try:
            made.append(make_plan(situation.manifest, situation.shape, available_bytes=available, context=256))
        except CapacityError:
            assert not made
    return made


SEEDS = range(200)


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_the_machine_and_the_model(seed: int) -> None:
    situation, chance = random_situation(seed)
    made = plans(situation, chance)
    found = [foretell(situation, plan, prompt_tokens=chance.choice([1, 100, 10_000])) for plan in made]
    for plan, expected in zip(made, found, strict=True):
        numbers = [value for value in dataclasses.asdict(expected).values() if isinstance(value, float)]
        assert all(math.isfinite(number) and number >= 0 for number in numbers)
        assert plan.total <= plan.budget
        assert expected.tpot_s >= expected.bound_s > 0
        assert expected.ttft_s > 0
        assert 0 <= expected.hit_rate <= 1
    times = [expected.tpot_s for expected in found]
    assert times == sorted(times, reverse=True), "more memory made it slower"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_faster_disk_is_never_slower(seed: int) -> None:
    situation, chance = random_situation(seed)
    for plan in plans(situation, chance):
        slow = foretell(situation, plan)
        fast = foretell(
            dataclasses.replace(situation, machine=with_faster_disk(situation.machine, 1 + 3 * chance.random())), plan
        )
        assert fast.tpot_s <= slow.tpot_s
        assert fast.ttft_s <= slow.ttft_s


def small(share: str, **situation: object) -> tuple[Situation, MemoryPlan]:
    manifest, shape = make_manifest(), make_shape()
    plan = make_plan(manifest, shape, available_bytes=16_000 * MIB, experts=share)
    return Situation(make_machine(), manifest, shape, WHOLE, **situation), plan  # type: ignore[arg-type]


def test_resident_is_computing_alone() -> None:
    situation, plan = small("100%")
    expected = foretell(situation, plan)
    assert (expected.hit_rate, expected.stall_s, expected.by) == (1.0, 0.0, "host")
    assert expected.experts_s == pytest.approx(128 * 3 * MIB / (forecast.SUSTAINED * 28 * GB))
    assert expected.dense_s == pytest.approx(138 * MIB / (forecast.SUSTAINED * 15 * GB))
    assert expected.bound_s == pytest.approx((138 + 384) * MIB / (30 * GB))
    parts = expected.dense_s + expected.layers_s + expected.experts_s + expected.bookkeeping_s
    assert expected.tpot_s == pytest.approx(parts)


def test_without_foreseeing_a_layer_waits_for_its_reads_but_computes_what_is_here() -> None:
    situation, plan = small("50%", prefetch="off")
    expected = foretell(situation, plan)
    assert expected.bound_s == pytest.approx(64 * 3 * MIB / (2 * GB)), "in the best moments"
    assert expected.read_s == pytest.approx(expected.bound_s / forecast.SUSTAINED)
    assert expected.by == "disk"
    one = expected.experts_s / 128
    assert expected.stall_s == pytest.approx(expected.read_s + 16 * one - expected.experts_s)


def test_foreseeing_hides_reads_behind_the_rest_of_a_layer() -> None:
    off, gate, auto = (foretell(*small("50%", prefetch=prefetch)).tpot_s for prefetch in ("off", "gate", "auto"))
    assert auto == gate < off
    by_mistake = dataclasses.replace(small("50%")[0], machine=make_machine(disk=1000 * GB))
    quick = {
        prefetch: foretell(dataclasses.replace(by_mistake, prefetch=prefetch), small("50%")[1]).tpot_s
        for prefetch in ("off", "gate", "auto")
    }
    assert quick["auto"] == quick["off"] < quick["gate"], "asking costs more than such a disk"


def test_what_comes_from_the_page_cache_is_copied_by_the_cores() -> None:
    situation, plan = small("50%", reads_files=True)
    expected = foretell(situation, plan)
    assert expected.stall_s == expected.read_s == pytest.approx(64 * 3 * MIB / (30 * GB / forecast.COPIES))
    assert expected.by == "host"


def test_kernels_are_those_that_the_engine_would_take() -> None:
    situation, plan = small("100%")
    torch_s = foretell(dataclasses.replace(situation, kernels="torch"), plan).experts_s
    assert torch_s == pytest.approx(128 * 3 * MIB / (forecast.SUSTAINED * 15 * GB))
    other = dataclasses.replace(situation.machine.processor, kernels="avx512", adds_as_torch_does=False)
    old = dataclasses.replace(situation.machine, processor=other)
    assert foretell(dataclasses.replace(situation, machine=old), plan).experts_s == torch_s
    assert foretell(dataclasses.replace(situation, machine=old, kernels="native"), plan).experts_s < torch_s


def test_layers_that_are_one_call_take_less() -> None:
    situation, plan = small("100%")
    _, streaming = small("25%")
    known = dataclasses.replace(situation, manifest=dataclasses.replace(situation.manifest, model_type="olmoe"))
    parts, whole = foretell(situation, plan).layers_s, foretell(known, plan).layers_s
    assert parts - whole == pytest.approx(16 * 2e-4 / forecast.SUSTAINED)
    assert foretell(known, streaming).layers_s == parts
    for other in (dataclasses.replace(known, kernels="torch"), dataclasses.replace(known, prefetch="gate")):
        assert foretell(other, plan).layers_s == parts


def quantised(kernels: str) -> tuple[Situation, MemoryPlan]:
    """The small model in int4, on a machine whose disk is no hindrance and that computes int4 natively."""
    up, down = ((1024, 512), 1024), ((1024, 256), 512)
    made = Quantization("int4", 16, "BF16", {"gate_up_proj": up[1], "down_proj": down[1]})
    specs = [TensorSpec("gate_up_proj", "U8", up[0], 0), TensorSpec("down_proj", "U8", down[0], 1 << 19)]
    manifest = dataclasses.replace(make_manifest(), layout=ExpertLayout(4096, tuple(specs), made))
    machine = make_machine(disk=1e6 * GB, fresh=1e6 * GB)
    machine = dataclasses.replace(machine, maths=(*machine.maths, MathsRate("native", "int4", 1, 12 * GB)))
    situation = Situation(machine, manifest, make_shape(), WHOLE, kernels=kernels)
    return situation, make_plan(manifest, make_shape(), available_bytes=100_000 * MIB, experts="100%", context=2048)


def test_quantised_experts_have_a_rate_of_their_own() -> None:
    stored, plain = 128 * 768 * KIB, 128 * 3 * MIB
    assert foretell(*quantised("auto")).experts_s == pytest.approx(stored / (forecast.SUSTAINED * 12 * GB))
    by_torch_s = plain / (forecast.SUSTAINED * 15 * GB) * (1 + forecast.EXPANDING["int4"])
    assert foretell(*quantised("torch")).experts_s == pytest.approx(by_torch_s)


def test_a_prompt_expands_quantised_experts() -> None:
    situation, plan = quantised("auto")
    as_plain = dataclasses.replace(situation, manifest=make_manifest())
    expanding_s = 1024 * 3 * MIB / (15 * GB) * forecast.EXPANDING_NATIVELY["int4"]
    many = [foretell(each, plan, prompt_tokens=1000).ttft_s for each in (situation, as_plain)]
    assert many[0] - many[1] == pytest.approx(expanding_s / forecast.SUSTAINED, rel=0.01)
    one_token_s = [foretell(each, plan, prompt_tokens=1).ttft_s for each in (situation, as_plain)]
    assert one_token_s[0] < one_token_s[1]


def test_the_first_prompt_waits_for_memory_that_nobody_used_before() -> None:
    situation, plan = small("25%")
    times = []
    for fresh in (1e6 * GB, 1 * GB):
        there = dataclasses.replace(situation, machine=make_machine(disk=1e6 * GB, fresh=fresh))
        times.append(foretell(there, plan, prompt_tokens=1000).ttft_s)
    assert times[1] - times[0] == pytest.approx(256 * 3 * MIB / (1 * GB), rel=0.01)


def released(kind: str, kernels: str, instructions: str) -> tuple[Situation, MemoryPlan]:
    """The small model as released in `kind`, on a machine that computes it natively with such instructions."""
    plain = make_manifest().layout
    situation, plan = quantised(kernels)
    machine = dataclasses.replace(
        situation.machine,
        processor=dataclasses.replace(
            situation.machine.processor, kernels=instructions, adds_as_torch_does=instructions != "avx512"
        ),
        maths=(*situation.machine.maths, MathsRate("native", kind, 1, 10 * GB)),
    )
    manifest = dataclasses.replace(situation.manifest, layout=Packer(plain, False, kind).layout)
    return dataclasses.replace(situation, machine=machine, manifest=manifest), plan


@pytest.mark.parametrize(("kind", "share"), [("mxfp4", 17 / 64), ("fp8", 0.5 + 1 / 8192)])
def test_experts_as_released_are_computed_by_what_gives_torch_s_bits(kind: str, share: float) -> None:
    stored, plain = 128 * 3 * MIB * share, 128 * 3 * MIB
    natively = pytest.approx(stored / (forecast.SUSTAINED * 10 * GB))
    assert foretell(*released(kind, "auto", "avx512bf16")).experts_s == natively
    assert foretell(*released(kind, "native", "avx512")).experts_s == natively
    for kernels, expanding in (("auto", forecast.EXPANDING_NATIVELY), ("torch", forecast.EXPANDING)):
        by_torch_s = plain / (forecast.SUSTAINED * 15 * GB) * (1 + expanding[kind])
        assert foretell(*released(kind, kernels, "avx512")).experts_s == pytest.approx(by_torch_s)


@pytest.mark.parametrize("kind", ["mxfp4", "fp8"])
def test_a_prompt_expands_experts_as_released_whole(kind: str) -> None:
    """However few its tokens are: what torch computes is what it always was."""
    situation, plan = released(kind, "auto", "avx512bf16")
    as_plain = dataclasses.replace(situation, manifest=make_manifest())
    expanding_s = 1024 * 3 * MIB / (15 * GB) * forecast.EXPANDING_NATIVELY[kind]
    many = [foretell(each, plan, prompt_tokens=1000).ttft_s for each in (situation, as_plain)]
    assert many[0] - many[1] == pytest.approx(expanding_s / forecast.SUSTAINED, rel=0.01)


@pytest.mark.parametrize("kind", ["mxfp4", "fp8"])
def test_a_prompt_is_computed_from_what_is_packed_where_that_was_measured(kind: str) -> None:
    situation, plan = released(kind, "auto", "avx512bf16")
    rates = *situation.machine.maths, MathsRate("native", kind, 64, 2 * GB)
    measured = dataclasses.replace(situation, machine=dataclasses.replace(situation.machine, maths=rates))
    short_s, long_s = (foretell(measured, plan, prompt_tokens=tokens).ttft_s for tokens in (1000, 2000))
    rows = [tokens * 8 / 64 for tokens in (1000, 2000)]  # of each expert
    experts_s = [1024 * situation.manifest.layout.nbytes / (2 * GB * 64 / n) / forecast.SUSTAINED for n in rows]
    assert long_s - short_s > experts_s[1] - experts_s[0]
    assert short_s < foretell(situation, plan, prompt_tokens=1000).ttft_s
    by_torch = dataclasses.replace(measured, kernels="torch")
    assert foretell(by_torch, plan, prompt_tokens=1000).ttft_s > short_s


def test_layers_take_longer_beside_weights_that_push_them_out_of_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    def layers_s() -> float:
        return foretell(*small("100%")).layers_s - forecast.TOKEN_S

    assert layers_s() == pytest.approx(16 * 5e-4 / forecast.SUSTAINED)
    monkeypatch.setattr(forecast, "CACHED_BYTES", 1 << 40)
    assert layers_s() == pytest.approx(16 * 5e-4)


def test_a_long_prompt_waits_for_programs_where_torch_computes_it_or_has_to_be_tried() -> None:
    """It makes two for each of the 1024 experts, which have 125 rows each, or 4; or for every number of rows once, in a
    longer time.
    """
    situation, plan = small("100%")

    def first_token_s(program_s: float, tokens: int, instructions: str, kernels: str = "auto") -> float:
        machine = dataclasses.replace(
            situation.machine,
            processor=dataclasses.replace(situation.machine.processor, kernels=instructions),
            disk=make_machine(disk=1e6 * GB).disk,
            maths=(*situation.machine.maths, MathsRate("native", "bfloat16", 64, 3 * GB)),
            program_s=program_s,
        )
        there = dataclasses.replace(situation, machine=machine, kernels=kernels)
        return foretell(there, plan, prompt_tokens=tokens).ttft_s

    for tokens, instructions, kernels, made in (
        (1000, "avx512bf16", "auto", 0),
        (1000, "avx512bf16", "torch", 2048),
        (1000, "avx512amx", "torch", 2048),
        (1000, "avx512amx", "auto", (2 * 125 - 16) * 2 * 2.5),
        (32, "avx512amx", "auto", 0),
    ):
        without, with_it = (first_token_s(each, tokens, instructions, kernels) for each in (0.0, 3e-3))
        assert with_it - without == pytest.approx(made * 3e-3, rel=0.01)


def test_where_the_library_multiplies_any_number_of_rows_a_long_prompt_is_sooner() -> None:
    """Of dense weights: 200 MiB at a fifth of torch's rate, or as much faster."""
    situation, plan = small("100%")

    def first_token_s(instructions: str, kernels: str, rate: float) -> float:
        machine = dataclasses.replace(
            situation.machine,
            processor=dataclasses.replace(situation.machine.processor, kernels=instructions),
            maths=(*situation.machine.maths, MathsRate("native", "bfloat16", 64, rate)),
        )
        return foretell(
            dataclasses.replace(situation, machine=machine, kernels=kernels), plan, prompt_tokens=640
        ).ttft_s

    slow, fast = (first_token_s("avx2", "auto", rate * GB) for rate in (3, 15))
    assert slow == pytest.approx(first_token_s("avx512bf16", "auto", 3 * GB), rel=0.01)
    experts_s = first_token_s("avx512bf16", "auto", 3 * GB) - first_token_s("avx512bf16", "auto", 15 * GB)
    dense_s = 200 * MIB / forecast.SUSTAINED * (10 / (3 * GB) - 10 / (15 * GB))
    assert slow - fast > experts_s + 0.99 * dense_s
    assert first_token_s("avx2", "torch", 3 * GB) == first_token_s("avx2", "torch", 15 * GB)


def test_what_is_tried_is_what_the_library_tries() -> None:
    assert forecast.MOST_TRIED_BYTES == orders.MOST_BYTES
    assert orders.KNOWN["avx512amx"].alike_inputs == forecast.ALIKE_INPUTS
    assert orders.KNOWN["avx512amx"].rows == forecast.FEW_ROWS
    assert forecast.FEW_TOKENS == orders.MOST_ROWS


def test_a_prompt_reads_every_expert_it_needs_once_per_piece() -> None:
    situation, plan = small("100%")
    situation = dataclasses.replace(situation, machine=make_machine(disk=0.1 * GB))
    all_s = 1024 * 3 * MIB / (forecast.SUSTAINED * 0.1 * GB)
    assert foretell(situation, plan, prompt_tokens=1000).ttft_s == pytest.approx(all_s, rel=0.05)
    assert foretell(situation, plan, prompt_tokens=1).ttft_s == pytest.approx(all_s / 8, rel=0.05)


def test_the_curve_never_falls() -> None:
    curve = HitCurve(((0.1, 0.3), (0.2, 0.25), (0.5, 0.9)), "bumpy")
    rates = [curve.at(share / 100) for share in range(101)]
    assert rates == sorted(rates)
    assert (rates[0], rates[100]) == (0.0, 1.0)
    assert curve.at(0.05) == pytest.approx(0.15)


def test_what_routers_were_seen_to_foresee_counts() -> None:
    situation, plan = small("25%")

    def token_s(prefetch: str, foreseen: float | None) -> float:
        curve = dataclasses.replace(situation.curve, foreseen=foreseen)
        return foretell(dataclasses.replace(situation, curve=curve, prefetch=prefetch), plan).tpot_s

    assert token_s("gate", 0.8) == token_s("gate", None) < token_s("gate", 0.4)
    assert token_s("off", 0.8) == token_s("off", None) == token_s("auto", 0.0)
    assert token_s("eam", 0.8) == token_s("eam", None)


# Past runs


def run(slots: int, tpot_s: float, **changes: object) -> PastRun:
    like = PastRun(
        date="2026-01-01",
        slots=slots,
        budget=MIB,
        tokens=64,
        hit_rate=0.5,
        reads_files=False,
        policy="neighbour-use",
        prefetch="auto",
        kernels="auto",
        threads=None,
        tpot_s=tpot_s,
    )
    return dataclasses.replace(like, **changes)  # type: ignore[arg-type]


def test_nothing_known_is_nothing_corrected() -> None:
    assert correction(*small("50%"), [], None) == Correction(1.0, 0)


def test_the_median_of_what_like_runs_took() -> None:
    situation, plan = small("50%")
    predicted = foretell(situation, plan, hit_rate=0.5).tpot_s
    runs = [run(512, ratio * predicted) for ratio in (1.0, 1.2, 3.0)]
    found = correction(situation, plan, runs, None)
    assert found.factor == pytest.approx(1.2)
    assert found.runs == 3
    corrected = foretell(situation, plan).times(found.factor)
    assert corrected.tpot_s == pytest.approx(1.2 * predicted)


def test_a_run_is_judged_by_the_hit_rate_that_it_had() -> None:
    situation, plan = small("50%")
    cold = foretell(situation, plan, hit_rate=0.1).tpot_s
    assert correction(situation, plan, [run(512, cold, hit_rate=0.1)], None).factor == pytest.approx(1.0)


@pytest.mark.parametrize(
    "other",
    [
        run(1024, 1.0),
        run(512, 1.0, prefetch="off"),
        run(512, 1.0, kernels="torch"),
        run(512, 1.0, threads=1),
        run(512, 1.0, reads_files=True),
    ],
)
def test_other_runs_say_nothing(other: PastRun) -> None:
    assert correction(*small("50%"), [other], None).runs == 0


def test_the_nearest_in_slots_count_and_the_later_of_them() -> None:
    situation, plan = small("50%")
    predicted = foretell(situation, plan, hit_rate=0.5).tpot_s
    old = [run(512, 9 * predicted) for _ in range(5)]
    new = [run(512, 2 * predicted) for _ in range(5)]
    far = [run(100, 1.0) for _ in range(5)]
    found = correction(situation, plan, [*old, *new, *far], None)
    assert found.factor == pytest.approx(2.0)
    assert found.runs == 5


def test_a_correction_never_goes_below_the_bound() -> None:
    expected = foretell(*small("50%")).times(0.01)
    assert expected.tpot_s == expected.bound_s
