"""Forecasts for a GPU: what must hold for every GPU, machine and model, and the arithmetic of each regime by hand. None
of it was ever compared with a time on a GPU.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from itertools import pairwise

import pytest

from machine_fakes import make_gpu
from machines import GB, MIB, make_machine, make_manifest, make_shape, random_gpu, random_machine, random_model
from machines import with_faster_disk as with_fast_disk
from moeinf import forecast, profiling
from moeinf.errors import CapacityError, MoeinfError
from moeinf.forecast import PUBLISHED, Forecast, HitCurve, Situation, correction, foretell
from moeinf.gpu_forecast import GpuSituation, on_gpu
from moeinf.ledger import MemoryPlan, make_device_plan
from moeinf.machine import MEASURED_BYTES, Gpu, MathsRate
from moeinf.outlook import LIMITS, at_budgets, at_host_budgets, look_ahead
from moeinf.profiling import maths
from moeinf.units import KIB
from test_forecast import run

WHOLE = HitCurve(((0.5, 0.5),), "a straight line")
EXPERT = 3 * MIB
ASKED_S = MEASURED_BYTES / (500 * GB) / forecast.SUSTAINED
"""What one expert for one token takes on `make_gpu()`, whose experts are smaller than those that were measured."""
SEEDS = range(150)


def random_situation(seed: int) -> tuple[GpuSituation, random.Random]:
    chance = random.Random(seed)
    manifest, shape = random_model(chance)
    situation = GpuSituation(
        random_machine(chance),
        manifest,
        shape,
        chance.choice([PUBLISHED, WHOLE]),
        kernels=chance.choice(["auto", "torch", "triton"]),
        prefetch=chance.choice(["auto", "eam", "gate", "off"]),
        gpu=random_gpu(chance),
    )
    return situation, chance


def plans(situation: Situation, chance: random.Random) -> list[MemoryPlan]:
    """Plans of the same context with ever more memory, of the GPU and then of the host, behind it."""
    made = []
    device, host = chance.randint(1000, 50_000), chance.randint(6000, 100_000)
    for more, behind in ((0, 0), (100, 0), (1000, 0), (30_000, 0), (0, 100), (0, 1000), (0, 30_000)):
        try:
            plan = make_device_plan(
                situation.manifest,
                situation.shape,
                device_bytes=(device + more) * MIB,
                host_bytes=(host + behind) * MIB,
                context=256,
                widening=chance.choice([1, 1, 2]),
            )
        except CapacityError:
            continue
        made.append(plan)
    return made


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_the_gpu_the_machine_and_the_model(seed: int) -> None:
    situation, chance = random_situation(seed)
    for plan in plans(situation, chance):
        expected = foretell(situation, plan, prompt_tokens=chance.choice([1, 100, 10_000]))
        numbers = [value for value in dataclasses.asdict(expected).values() if isinstance(value, float)]
        assert all(math.isfinite(number) and number >= 0 for number in numbers)
        assert expected.tpot_s >= expected.bound_s > 0
        assert expected.ttft_s > 0
        assert expected.regime == plan.regime
        assert expected.by in LIMITS
        if plan.regime == "resident":
            assert (expected.hit_rate, expected.read_s, expected.by) == (1.0, 0.0, "device")
        if plan.regime == "host-cached":
            assert expected.by != "disk"


@pytest.mark.parametrize("seed", SEEDS)
def test_more_memory_is_never_slower(seed: int) -> None:
    """With pieces of a prompt as long as before: longer ones take memory from slots."""
    situation, chance = random_situation(seed)
    for plan in plans(situation, chance)[:1]:
        host = plan.host
        assert host is not None
        some = sorted(chance.randint(1, plan.all_experts) for _ in range(5))
        growing = [[plan.with_slots(slots) for slots in (*some, plan.all_experts)]]
        partly = plan.with_slots(some[0])
        growing += [[partly.with_host_slots(slots) for slots in (*some, plan.all_experts)]]
        for budgets in growing:
            found = [foretell(situation, then, prompt_tokens=3000) for then in budgets]
            assert all(after.tpot_s <= before.tpot_s for before, after in pairwise(found))
            assert all(after.ttft_s <= before.ttft_s for before, after in pairwise(found))
        for chart in (at_budgets(situation, plan), at_host_budgets(situation, plan)):
            assert [point.budget for point in chart] == sorted({point.budget for point in chart})
            speeds = [point.forecast.tokens_per_s for point in chart]
            assert speeds == sorted(speeds)


Faster = Callable[[GpuSituation, float], GpuSituation]


def faster_gpu(name: str) -> Faster:
    def change(situation: GpuSituation, times: float) -> GpuSituation:
        gpu = dataclasses.replace(situation.gpu, **{name: times * getattr(situation.gpu, name)})
        return dataclasses.replace(situation, gpu=gpu)

    return change


def faster_maths(situation: GpuSituation, times: float) -> GpuSituation:
    """One of the rates, any."""
    rates = list(situation.gpu.maths)
    if rates:
        rates[0] = dataclasses.replace(rates[0], bytes_per_s=times * rates[0].bytes_per_s)
    return dataclasses.replace(situation, gpu=dataclasses.replace(situation.gpu, maths=tuple(rates)))


def faster_disk(situation: GpuSituation, times: float) -> GpuSituation:
    return dataclasses.replace(situation, machine=with_fast_disk(situation.machine, times))


def faster_host(situation: GpuSituation, times: float) -> GpuSituation:
    memory = dataclasses.replace(situation.machine.memory, bytes_per_s=times * situation.machine.memory.bytes_per_s)
    return dataclasses.replace(situation, machine=dataclasses.replace(situation.machine, memory=memory))


def faster_layers(situation: GpuSituation, times: float) -> GpuSituation:
    return dataclasses.replace(
        situation, machine=dataclasses.replace(situation.machine, layer_s=situation.machine.layer_s / times)
    )


def unhindered(situation: GpuSituation) -> GpuSituation:
    """Nothing but maths takes time."""
    return faster_host(faster_disk(faster_gpu("pinned_to_device")(situation, 1e6), 1e6), 1e6)


@pytest.mark.parametrize(
    "faster",
    [
        faster_gpu("bytes_per_s"),
        faster_gpu("pinned_to_device"),
        faster_maths,
        faster_disk,
        faster_host,
        faster_layers,
    ],
)
@pytest.mark.parametrize("seed", range(60))
def test_nothing_that_is_faster_makes_it_slower(faster: Faster, seed: int) -> None:
    situation, chance = random_situation(seed)
    quick = faster(situation, 1 + 3 * chance.random())
    for plan in plans(situation, chance):
        slow, fast = (foretell(each, plan, prompt_tokens=1000) for each in (situation, quick))
        # sums of floats: the same but for the last bits where the part does not count
        assert fast.tpot_s <= slow.tpot_s * (1 + 1e-12)
        assert fast.ttft_s <= slow.ttft_s * (1 + 1e-12)
        assert fast.bound_s <= slow.bound_s


# By hand


def small(device: str, host: int = 1024, gpu: Gpu | None = None, **options: str) -> tuple[GpuSituation, MemoryPlan]:
    """1024 experts of 3 MiB, 128 for a token, on a GPU with a link of 25 GB/s and memory of 900; disk: 2 GB/s."""
    manifest, shape = make_manifest(), make_shape()
    plan = make_device_plan(
        manifest, shape, device_bytes=16_000 * MIB, host_bytes=16_000 * MIB, experts=device, context=2048
    )
    situation = Situation(make_machine(), manifest, shape, WHOLE, **options)  # type: ignore[arg-type]
    there = dataclasses.replace(situation.machine, gpus=(gpu or make_gpu(),))
    on = on_gpu(dataclasses.replace(situation, machine=there), 0, "A GPU")
    return on, plan if plan.regime == "resident" else plan.with_host_slots(host)


def expect(device: str, host: int = 1024, gpu: Gpu | None = None, **options: str) -> Forecast:
    return foretell(*small(device, host, gpu, **options))


def test_resident_is_computing_alone() -> None:
    expected = expect("100%")
    assert (expected.regime, expected.stall_s, expected.by) == ("resident", 0.0, "device")
    assert expected.experts_s == pytest.approx(128 * ASKED_S)
    assert expected.dense_s == pytest.approx(138 * MIB / (900 * GB) / forecast.SUSTAINED)
    assert expected.layers_s == pytest.approx(16 * 5e-4 + forecast.TOKEN_S)
    assert expected.tpot_s == pytest.approx(expected.experts_s + expected.dense_s + expected.layers_s)
    assert expected.bound_s == pytest.approx((138 + 384) * MIB / (900 * GB))


def test_host_cached_waits_for_the_link() -> None:
    expected = expect("50%", prefetch="off")
    assert (expected.regime, expected.by, expected.hit_rate) == ("host-cached", "link", 0.5)
    assert expected.bound_s == pytest.approx(64 * EXPERT / (25 * GB))
    assert expected.read_s == pytest.approx(expected.bound_s / forecast.SUSTAINED)
    assert expected.bookkeeping_s == pytest.approx(64 * 8e-5 / forecast.SUSTAINED)
    assert expected.stall_s == pytest.approx(max(0.0, expected.read_s + 16 * ASKED_S - expected.experts_s))
    assert expected.stall_s > 0


def test_streaming_waits_for_the_disk_and_the_last_copy() -> None:
    """Host memory has a quarter of what the GPU misses, as it has a quarter of all."""
    expected = expect("50%", 256, prefetch="off")
    assert (expected.regime, expected.by) == ("streaming", "disk")
    assert expected.bound_s == pytest.approx(48 * EXPERT / (2 * GB))
    copy_s = EXPERT / (25 * GB) / forecast.SUSTAINED
    assert expected.stall_s == pytest.approx(expected.read_s + 16 * (ASKED_S + copy_s) - expected.experts_s)


def test_whatever_binds_is_named() -> None:
    found = {
        expect("100%").by,
        expect("50%").by,
        expect("50%", 256).by,
        foretell(faster_gpu("pinned_to_device")(small("50%")[0], 100), small("50%")[1]).by,
    }
    assert found == {"device", "link", "disk", "host"}


def test_foreseeing_hides_copies_behind_the_rest_of_a_layer() -> None:
    off, gate, auto = (expect("50%", prefetch=prefetch).tpot_s for prefetch in ("off", "gate", "auto"))
    assert auto == min(off, gate)
    assert expect("50%", 256, prefetch="auto").tpot_s < expect("50%", 256, prefetch="off").tpot_s


def test_a_larger_expert_takes_what_its_bytes_take_beside_what_asking_does() -> None:
    situation, plan = small("100%")
    large = dataclasses.replace(situation, manifest=make_manifest(inner=14336))
    more_s = (14336 * 6 * KIB - MEASURED_BYTES) / (900 * GB) / forecast.SUSTAINED
    assert foretell(large, plan).experts_s == pytest.approx(128 * (ASKED_S + more_s))


def test_kernels_that_take_a_layer_s_experts_at_once_ask_once() -> None:
    more_s = (8 * EXPERT - MEASURED_BYTES) / (900 * GB) / forecast.SUSTAINED
    assert expect("100%", kernels="triton").experts_s == pytest.approx(16 * (ASKED_S + more_s))
    situation, plan = small("100%", kernels="triton")
    quick = unhindered(situation)
    one_by_one = foretell(dataclasses.replace(quick, kernels="torch"), plan, prompt_tokens=1)
    gained_s = one_by_one.ttft_s - foretell(quick, plan, prompt_tokens=1).ttft_s
    assert gained_s == pytest.approx(one_by_one.experts_s - 16 * (ASKED_S + more_s) + (128 - 16) * forecast.PASS_S)


def test_many_tokens_take_a_smaller_expert_s_share_of_the_arithmetic() -> None:
    """Of 2000 tokens, each of 64 experts takes 250, whose arithmetic the rate of 256 says."""
    situation, plan = small("100%")
    quick = unhindered(situation)
    whole = dataclasses.replace(quick, manifest=make_manifest(inner=1536))
    times = [foretell(each, plan, prompt_tokens=2000).ttft_s for each in (quick, whole)]
    assert 3 * EXPERT == MEASURED_BYTES
    third_s = 1024 * MEASURED_BYTES / situation.gpu.maths_rate(250) / forecast.SUSTAINED / 3
    assert times[1] - times[0] == pytest.approx(2 * third_s, rel=0.01)


def test_the_first_prompt_reads_and_copies_every_expert_it_needs() -> None:
    situation, plan = small("100%")
    slow = faster_disk(situation, 0.05)
    assert foretell(slow, plan, prompt_tokens=1000).ttft_s == pytest.approx(
        1024 * EXPERT / (forecast.SUSTAINED * 0.1 * GB), rel=0.05
    )
    linked = faster_disk(faster_gpu("pinned_to_device")(situation, 0.01), 100)
    assert foretell(linked, plan, prompt_tokens=1000).ttft_s == pytest.approx(
        1024 * EXPERT / (forecast.SUSTAINED * 0.25 * GB), rel=0.05
    )


def test_a_later_piece_copies_what_the_gpu_has_not() -> None:
    situation, plan = small("50%", prefetch="off")
    slow = faster_disk(faster_gpu("pinned_to_device")(situation, 0.01), 100)
    short = dataclasses.replace(plan, step_tokens=512)
    one, two = (foretell(slow, short, prompt_tokens=tokens).ttft_s for tokens in (512, 1024))
    assert two - one == pytest.approx(512 * EXPERT / (forecast.SUSTAINED * 0.25 * GB), rel=0.05)


def test_weights_that_become_wider_take_more_memory_but_no_more_of_the_link() -> None:
    situation, plan = small("50%")
    wide = dataclasses.replace(plan, dense=2 * plan.dense)
    plain, widened = foretell(situation, plan), foretell(situation, wide)
    assert widened.dense_s == pytest.approx(2 * plain.dense_s)
    assert widened.read_s == plain.read_s


def test_a_gpu_of_which_no_maths_was_measured_computes_as_its_memory_is_read() -> None:
    gpu = dataclasses.replace(make_gpu(), maths=())
    assert expect("100%", gpu=gpu).experts_s == pytest.approx(128 * MEASURED_BYTES / (900 * GB) / forecast.SUSTAINED)
    some = dataclasses.replace(make_gpu(), maths=(MathsRate("torch", "bfloat16", 16, 1.0),))
    assert (some.maths_rate(1), some.most_tokens) == (1.0, 16)


def test_the_measured_expert_is_the_one_that_is_measured() -> None:
    assert MEASURED_BYTES == 3 * maths.HIDDEN * maths.INNER * 2
    assert profiling.gpu._WEIGHTS == "bfloat16"


def test_what_was_not_measured_is_not_foretold() -> None:
    situation, _ = small("50%")
    for index, name in ((1, "A GPU"), (0, "Another GPU")):
        with pytest.raises(MoeinfError, match=f"{name} was not measured"):
            on_gpu(situation, index, name)


# Past runs, and what is said


def test_runs_on_a_gpu_teach_about_that_gpu_alone() -> None:
    situation, plan = small("50%")
    there = foretell(situation, plan, hit_rate=0.5).tpot_s
    runs = [run(512, 2 * there, device="A GPU", host_slots=1024)]
    assert correction(situation, plan, runs, None).factor == pytest.approx(2.0)
    for other in (
        run(512, 2 * there),
        run(512, 2 * there, device="Another", host_slots=1024),
        run(512, 2 * there, device="A GPU", host_slots=1023),
        run(1024, 2 * there, device="A GPU", host_slots=32),
    ):
        assert correction(situation, plan, [other], None).runs == 0
    on_the_processor = Situation(situation.machine, situation.manifest, situation.shape, WHOLE)
    alone = dataclasses.replace(plan, host=None)
    assert correction(on_the_processor, alone, runs, None).runs == 0
    assert correction(on_the_processor, alone, [run(512, 1.0)], None).runs == 1


def test_a_run_with_other_host_memory_is_judged_by_what_it_had() -> None:
    situation, plan = small("50%", 256)
    then = foretell(situation, plan.with_host_slots(900), hit_rate=0.5).tpot_s
    assert then < foretell(situation, plan, hit_rate=0.5).tpot_s
    found = correction(situation, plan, [run(512, then, device="A GPU", host_slots=900)], None)
    assert found.factor == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("device", "host", "said"),
    [
        ("100%", 1024, "all 1,024 experts fit in the GPU's memory"),
        (
            "50%",
            1024,
            "512 of 1,024 experts (50%) fit in the GPU's memory, and the others come from host memory; the link to the"
            " GPU is the bound",
        ),
        (
            "50%",
            256,
            "512 of 1,024 experts (50%) fit in the GPU's memory, 256 in host memory, and the others come from the disk;"
            " the disk is the bound",
        ),
    ],
)
def test_the_sentence_names_regime_and_limit(device: str, host: int, said: str) -> None:
    found = look_ahead(*small(device, host))
    assert found.reason == f"{found.forecast.tokens_per_s:.3g} tokens per second: {said}"


def test_charts_over_both_memories() -> None:
    situation, plan = small("50%", 256)
    found = look_ahead(situation, plan)
    assert [point.slots for point in (found.budgets[0], found.budgets[-1])] == [8, 1024]
    assert found.budgets[-1].forecast.regime == "resident"
    dense_slots = -(-situation.manifest.dense_bytes // plan.slot_bytes)
    assert [point.slots for point in (found.host_budgets[0], found.host_budgets[-1])] == [dense_slots, 1024]
    assert found.host_budgets[-1].forecast.regime == "host-cached"
    assert look_ahead(*small("100%")).host_budgets == ()


def test_advice_is_about_memory_link_and_disk() -> None:
    streaming = {advice.what for advice in look_ahead(*small("50%", 256)).advice}
    assert streaming >= {"a disk twice as fast", "512 experts in host memory instead of 256"}
    cached = look_ahead(*small("25%", prefetch="off"))
    assert [advice.what for advice in cached.advice][-1] == "a link to the GPU twice as fast"
    assert "of the GPU's memory for it instead of" in cached.advice[0].what
    assert look_ahead(*small("100%")).advice == ()
