"""The word, the sentence, the chart and the advice."""

from __future__ import annotations

import dataclasses
import random
import re

import pytest

from machines import GB, MIB, make_machine, make_manifest, make_shape, random_machine, random_model, with_faster_disk
from moeinf.errors import CapacityError
from moeinf.forecast import PUBLISHED, PastRun, Situation, foretell
from moeinf.ledger import MemoryPlan, make_plan
from moeinf.outlook import COMFORTABLE, USABLE, Outlook, at_budgets, look_ahead

ORDER = ["slow", "usable", "comfortable", "resident"]


def small(share: str, disk: float = 2.0 * GB) -> tuple[Situation, MemoryPlan]:
    manifest, shape = make_manifest(), make_shape()
    plan = make_plan(manifest, shape, available_bytes=16_000 * MIB, experts=share, context=2048)
    return Situation(make_machine(disk=disk), manifest, shape, PUBLISHED), plan


def outlook(share: str, disk: float = 2.0 * GB) -> Outlook:
    return look_ahead(*small(share, disk))


@pytest.mark.parametrize("seed", range(100))
def test_whatever_the_machine_and_the_model(seed: int) -> None:
    chance = random.Random(seed)
    manifest, shape = random_model(chance)
    situation = Situation(random_machine(chance), manifest, shape, PUBLISHED)
    before: list[str] = []
    for available in range(1000, 100_000, 9000):
        try:
            plan = make_plan(manifest, shape, available_bytes=available * MIB, context=256)
        except CapacityError:
            assert not before
            continue
        found = look_ahead(situation, plan)
        before.append(found.verdict)
        speeds = [point.forecast.tokens_per_s for point in found.budgets]
        assert speeds == sorted(speeds)
        assert [point.slots for point in found.budgets] == sorted({point.slots for point in found.budgets})
        assert found.budgets[-1].forecast.regime == "resident"
        gains = [advice.tokens_per_s for advice in found.advice]
        assert gains == sorted(gains, reverse=True)
        assert all(gain > found.forecast.tokens_per_s for gain in gains)
    assert before == sorted(before, key=ORDER.index), "more memory made the verdict worse"


@pytest.mark.parametrize("share", ["5%", "25%", "75%"])
def test_a_faster_disk_never_makes_the_verdict_worse(share: str) -> None:
    situation, plan = small(share, 0.01 * GB)
    words = [
        look_ahead(dataclasses.replace(situation, machine=with_faster_disk(situation.machine, 2.0**step)), plan).verdict
        for step in range(12)
    ]
    assert words == sorted(words, key=ORDER.index)
    assert {"slow", "usable", "comfortable"} <= set(words)


@pytest.mark.parametrize("disk", [0.01 * GB, 0.3 * GB, 0.5 * GB, 1 * GB, 4 * GB])
def test_the_word_follows_from_the_speed(disk: float) -> None:
    found = outlook("50%", disk)
    speed = found.forecast.tokens_per_s
    assert found.verdict == ("comfortable" if speed >= COMFORTABLE else "usable" if speed >= USABLE else "slow")
    assert found.reason == (
        f"{speed:.3g} tokens per second: 512 of 1,024 experts (50%) fit in memory, and the others come from the disk, "
        "which is the limit"
    )


def test_what_fits_is_resident_however_slow() -> None:
    found = outlook("100%")
    assert found.verdict == "resident"
    assert found.reason.endswith("tokens per second: all 1,024 experts fit in memory")
    assert found.advice == ()


def test_the_sentence_names_a_cache_that_is_too_small() -> None:
    assert outlook("5%").reason.endswith(
        "51 of 1,024 experts (5%) fit in memory, fewer than the 128 that one token asks for"
    )


def test_the_sentence_names_the_page_cache() -> None:
    situation, plan = small("50%")
    found = look_ahead(dataclasses.replace(situation, reads_files=True), plan)
    assert found.reason.endswith("fit in memory, and the system's page cache has room for the files of the others")


def test_the_sentence_says_what_fits_for_a_while() -> None:
    manifest, shape = make_manifest(), make_shape()

    def reason(budget: int) -> str:
        plan = make_plan(manifest, shape, available_bytes=1 << 40, host_memory=str(budget), context=16384)
        return look_ahead(Situation(make_machine(), manifest, shape, PUBLISHED), plan).reason

    some = make_plan(manifest, shape, available_bytes=1 << 40, host_memory="1500MiB", context=16384)
    most = f"{some.most_slots} of 1,024 experts .* fit in memory, and the others come from the disk"
    assert re.search(most, reason(some.budget))
    few = some.total - (some.last_slots - 100) * some.slot_bytes
    too_few = r"2\d\d of .* fit in memory until the context is full, and then 100, fewer than the 128 that one token"
    assert re.search(too_few, reason(few))
    nearly_all = some.total + (1000 - some.last_slots) * some.slot_bytes
    assert reason(nearly_all).endswith("all 1,024 experts fit in memory until the context is full, and then 1,000")


def test_the_best_advice_comes_first() -> None:
    found = outlook("50%", 0.5 * GB)
    assert [advice.what for advice in found.advice] == [
        "3.38 GiB of memory for it instead of 1.88 GiB",
        "the same experts packed without loss (--experts lossless)",
        "a disk twice as fast",
    ]
    assert found.advice[0].tokens_per_s == outlook("100%", 0.5 * GB).forecast.tokens_per_s
    assert found.advice[2].tokens_per_s == outlook("50%", 1.0 * GB).forecast.tokens_per_s
    assert outlook("5%", 0.05 * GB).advice[0].what == "a disk twice as fast"


def test_the_chart_begins_with_the_least_that_will_do() -> None:
    situation, plan = small("25%")
    points = at_budgets(situation, plan)
    assert len(points) == 8
    assert (points[0].slots, points[-1].slots) == (8, 1024)
    with pytest.raises(CapacityError):
        make_plan(
            situation.manifest,
            situation.shape,
            available_bytes=1 << 40,
            host_memory=str(points[0].budget - 1),
            context=plan.context,
        )


def test_past_runs_correct_the_forecast_and_all_that_follows_from_it() -> None:
    situation, plan = small("25%")
    plain = foretell(situation, plan)
    run = PastRun(
        date="2026-01-01",
        slots=plan.slots,
        budget=plan.budget,
        tokens=64,
        hit_rate=plain.hit_rate,
        reads_files=False,
        policy="neighbour-use",
        prefetch="auto",
        kernels="auto",
        threads=None,
        tpot_s=2 * plain.tpot_s,
    )
    found = look_ahead(situation, plan, runs=[run])
    assert found.forecast.tpot_s == pytest.approx(2 * plain.tpot_s)
    assert found.correction.runs == 1
    for corrected, point in zip(found.budgets, at_budgets(situation, plan), strict=True):
        assert corrected.forecast.tpot_s == pytest.approx(2 * point.forecast.tpot_s)
