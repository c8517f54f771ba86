"""Whether a model will run well here: a word, the forecast behind it, the same at other budgets, and what would help.
Pure arithmetic; docs/planning.md has the thresholds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from .errors import CapacityError, UnsupportedError
from .forecast import Bound, Correction, Forecast, PastRun, Situation, correction, foretell
from .gpu_forecast import GpuSituation
from .ledger import MemoryPlan, make_plan
from .machine import Gpu, Machine
from .panels import lossless_layout
from .units import format_bytes

__all__ = [
    "COMFORTABLE",
    "LIMITS",
    "USABLE",
    "Advice",
    "AtBudget",
    "Outlook",
    "Verdict",
    "at_budgets",
    "at_host_budgets",
    "look_ahead",
]

Verdict = Literal["resident", "comfortable", "usable", "slow", "no"]

COMFORTABLE = 10.0
"""Tokens per second from which a person reads along without waiting."""
USABLE = 3.0
"""Tokens per second below which a person goes and does something else."""

LIMITS: dict[Bound, str] = {
    "disk": "the disk",
    "host": "host memory",
    "link": "the link to the GPU",
    "device": "the GPU's memory",
}
"""What may bound a time, in words."""

_BUDGETS = 8
_WORTH_IT = 1.05
"""A gain below this is none."""
_PACKED = "the same experts packed without loss (--experts lossless)"


@dataclass(frozen=True, slots=True)
class AtBudget:
    """What to expect when all that is counted may take `budget` bytes, and no other memory is there. With a GPU these
    are of its memory or of the host's, and so are the `slots`; the other one is as it was.
    """

    budget: int
    slots: int
    forecast: Forecast


@dataclass(frozen=True, slots=True)
class Advice:
    """What would make it faster, and the tokens per second then."""

    what: str
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Outlook:
    """`budgets` ascend, and so do `host_budgets`, which are there where a GPU fetches from host memory. `advice` has
    what pays, the largest gain first.
    """

    verdict: Verdict
    reason: str
    forecast: Forecast
    correction: Correction
    budgets: tuple[AtBudget, ...]
    host_budgets: tuple[AtBudget, ...]
    advice: tuple[Advice, ...]


def look_ahead(
    situation: Situation,
    plan: MemoryPlan,
    *,
    prompt_tokens: int = 512,
    runs: Sequence[PastRun] = (),
    threads: int | None = None,
) -> Outlook:
    """What `plan` will give, corrected by past `runs`; `threads` is the engine's option, and the first token that of a
    prompt of `prompt_tokens`.
    """
    corrected = correction(situation, plan, runs, threads)
    expected = foretell(situation, plan, prompt_tokens=prompt_tokens).times(corrected.factor)
    return Outlook(
        verdict=_verdict(expected),
        reason=_reason(situation, plan, expected),
        forecast=expected,
        correction=corrected,
        budgets=at_budgets(situation, plan, corrected.factor),
        host_budgets=at_host_budgets(situation, plan, corrected.factor),
        advice=_advise(situation, plan, expected),
    )


def at_budgets(situation: Situation, plan: MemoryPlan, factor: float = 1.0) -> tuple[AtBudget, ...]:
    """Forecasts for the context of `plan`, from the least memory that will do to what holds every expert."""
    plans = (plan.with_slots(slots) for slots in _steps(_fewest(situation), plan.all_experts))
    return tuple(AtBudget(then.budget, then.slots, _alone(situation, then, factor)) for then in plans)


def at_host_budgets(situation: Situation, plan: MemoryPlan, factor: float = 1.0) -> tuple[AtBudget, ...]:
    """The same over host memory behind a GPU, through which the dense weights pass; none where nothing else does."""
    if plan.host is None or plan.regime == "resident":
        return ()
    fewest = max(_fewest(situation), -(-situation.manifest.dense_bytes // plan.slot_bytes))
    return tuple(
        AtBudget(
            plan.host.workspace + slots * plan.host.slot_bytes,
            slots,
            _alone(situation, plan.with_host_slots(slots), factor),
        )
        for slots in _steps(min(fewest, plan.all_experts), plan.all_experts)
    )


def _steps(fewest: int, most: int) -> list[int]:
    return sorted({fewest + (most - fewest) * step // (_BUDGETS - 1) for step in range(_BUDGETS)})


def _fewest(situation: Situation) -> int:
    return max(layer.top_k for layer in situation.manifest.layers)


def _alone(situation: Situation, plan: MemoryPlan, factor: float) -> Forecast:
    """What to expect where no other memory is there than that of the plan."""
    return foretell(dataclasses.replace(situation, reads_files=False), plan).times(factor)


def _verdict(forecast: Forecast) -> Verdict:
    if forecast.regime == "resident":
        return "resident"
    if forecast.tokens_per_s >= COMFORTABLE:
        return "comfortable"
    return "usable" if forecast.tokens_per_s >= USABLE else "slow"


def _reason(situation: Situation, plan: MemoryPlan, forecast: Forecast) -> str:
    """One sentence."""
    speed = f"{forecast.tokens_per_s:.3g} tokens per second"
    memory = "the GPU's memory" if plan.host else "memory"
    if plan.regime == "resident":
        return f"{speed}: all {plan.all_experts:,} experts fit in {memory}"
    slots = plan.most_slots
    if slots == plan.all_experts:
        return f"{speed}: all {slots:,} experts fit in {memory} until the context is full, and then {plan.last_slots:,}"
    fitting = f"{slots:,} of {plan.all_experts:,} experts ({slots / plan.all_experts:.0%}) fit in {memory}"
    if situation.reads_files:
        return f"{speed}: {fitting}, and the system's page cache has room for the files of the others"
    if plan.thrashes:
        later = f" until the context is full, and then {plan.last_slots:,}" if slots > plan.last_slots else ""
        return f"{speed}: {fitting}{later}, fewer than the {plan.token_experts:,} that one token asks for"
    if plan.host is not None:
        others = "and the others come from host memory"
        if plan.regime == "streaming":
            others = f"{plan.host.slots:,} in host memory, and the others come from the disk"
        return f"{speed}: {fitting}, {others}; {LIMITS[forecast.by]} is the bound"
    limit = ", which is the limit" if forecast.by == "disk" else ""
    return f"{speed}: {fitting}, and the others come from the disk{limit}"


def _advise(situation: Situation, plan: MemoryPlan, now: Forecast) -> tuple[Advice, ...]:
    ideas = [*_more_memory(situation, plan, now.factor)]
    fast = dataclasses.replace(situation, machine=_with_fast_disk(situation.machine))
    ideas += [("a disk twice as fast", foretell(fast, plan).times(now.factor))]
    if isinstance(situation, GpuSituation):
        linked = dataclasses.replace(situation, gpu=_with_fast_link(situation.gpu))
        ideas += [("a link to the GPU twice as fast", foretell(linked, plan).times(now.factor))]
    else:
        with suppress(UnsupportedError, CapacityError):  # unpacked for a long prompt, a weight takes room
            ideas += [(_PACKED, _packed(situation, plan, now.factor))]
    gains = [Advice(what, then.tokens_per_s) for what, then in ideas if then.tpot_s * _WORTH_IT < now.tpot_s]
    return tuple(sorted(gains, key=lambda advice: -advice.tokens_per_s))


def _more_memory(situation: Situation, plan: MemoryPlan, factor: float) -> Iterator[tuple[str, Forecast]]:
    """Twice as much, or what holds every expert."""
    fixed = plan.total - plan.experts
    budget = min(fixed + plan.all_experts * plan.slot_bytes, 2 * plan.total)
    roomy = plan.with_slots((budget - fixed) // plan.slot_bytes)
    memory = "the GPU's memory" if plan.host else "memory"
    more = f"{format_bytes(budget)} of {memory} for it instead of {format_bytes(plan.total)}"
    yield more, _alone(situation, roomy, factor)
    if plan.host is not None and plan.regime == "streaming":
        slots = min(plan.all_experts, 2 * plan.host.slots)
        more = f"{slots:,} experts in host memory instead of {plan.host.slots:,}"
        yield more, foretell(situation, plan.with_host_slots(slots)).times(factor)


def _packed(situation: Situation, plan: MemoryPlan, factor: float) -> Forecast:
    """The same memory with experts packed without loss. Raises UnsupportedError where they cannot be."""
    manifest = dataclasses.replace(situation.manifest, layout=lossless_layout(situation.manifest.layout))
    budget, shape = plan.total, situation.shape
    then = make_plan(
        manifest,
        shape,
        available_bytes=budget,
        host_memory=str(budget),
        context=plan.context,
        libraries=plan.libraries,
    )
    return foretell(dataclasses.replace(situation, manifest=manifest), then).times(factor)


def _with_fast_disk(machine: Machine) -> Machine:
    rates = (dataclasses.replace(rate, bytes_per_s=2 * rate.bytes_per_s) for rate in machine.disk.rates)
    return dataclasses.replace(machine, disk=dataclasses.replace(machine.disk, rates=tuple(rates)))


def _with_fast_link(gpu: Gpu) -> Gpu:
    return dataclasses.replace(gpu, pinned_to_device=2 * gpu.pinned_to_device)
