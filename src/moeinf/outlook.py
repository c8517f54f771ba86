"""Whether a model will run well here: a word, the forecast behind it, the same at other budgets, and what would help.
Pure arithmetic; docs/planning.md has the thresholds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from .errors import UnsupportedError
from .forecast import Correction, Forecast, PastRun, Situation, correction, foretell
from .ledger import MemoryPlan, make_plan
from .machine import Machine
from .panels import lossless_layout
from .units import format_bytes

__all__ = ["COMFORTABLE", "USABLE", "Advice", "AtBudget", "Outlook", "Verdict", "at_budgets", "look_ahead"]

Verdict = Literal["resident", "comfortable", "usable", "slow", "no"]

COMFORTABLE = 10.0
"""Tokens per second from which a person reads along without waiting."""
USABLE = 3.0
"""Tokens per second below which a person goes and does something else."""

_BUDGETS = 8
_WORTH_IT = 1.05
"""A gain below this is none."""
_PACKED = "the same experts packed without loss (--experts lossless)"


@dataclass(frozen=True, slots=True)
class AtBudget:
    """What to expect when all that is counted may take `budget` bytes, and no other memory is there."""

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
    """`budgets` ascend; `advice` has what pays, the largest gain first."""

    verdict: Verdict
    reason: str
    forecast: Forecast
    correction: Correction
    budgets: tuple[AtBudget, ...]
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
        advice=_advise(situation, plan, expected),
    )


def at_budgets(situation: Situation, plan: MemoryPlan, factor: float = 1.0) -> tuple[AtBudget, ...]:
    """Forecasts for the context of `plan`, from the least memory that will do to what holds every expert."""
    fixed = plan.total - plan.experts
    fewest = max(layer.top_k for layer in situation.manifest.layers)
    steps = sorted({fewest + (plan.all_experts - fewest) * step // (_BUDGETS - 1) for step in range(_BUDGETS)})
    return tuple(_at_budget(situation, plan.context, fixed + slots * plan.slot_bytes, factor) for slots in steps)


def _at_budget(situation: Situation, context: int, budget: int, factor: float) -> AtBudget:
    plan = make_plan(
        situation.manifest, situation.shape, available_bytes=budget, host_memory=str(budget), context=context
    )
    alone = dataclasses.replace(situation, reads_files=False)
    return AtBudget(budget, plan.slots, foretell(alone, plan).times(factor))


def _verdict(forecast: Forecast) -> Verdict:
    if forecast.regime == "resident":
        return "resident"
    if forecast.tokens_per_s >= COMFORTABLE:
        return "comfortable"
    return "usable" if forecast.tokens_per_s >= USABLE else "slow"


def _reason(situation: Situation, plan: MemoryPlan, forecast: Forecast) -> str:
    """One sentence."""
    speed = f"{forecast.tokens_per_s:.3g} tokens per second"
    if plan.regime == "resident":
        return f"{speed}: all {plan.all_experts:,} experts fit in memory"
    fitting = f"{plan.slots:,} of {plan.all_experts:,} experts ({plan.slots / plan.all_experts:.0%}) fit in memory"
    if situation.reads_files:
        return f"{speed}: {fitting}, and the system's page cache has room for the files of the others"
    if plan.thrashes:
        return f"{speed}: {fitting}, fewer than the {plan.token_experts:,} that one token asks for"
    limit = ", which is the limit" if forecast.by == "disk" else ""
    return f"{speed}: {fitting}, and the others come from the disk{limit}"


def _advise(situation: Situation, plan: MemoryPlan, now: Forecast) -> tuple[Advice, ...]:
    whole = plan.total - plan.experts + plan.all_experts * plan.slot_bytes
    budget = min(whole, 2 * plan.total)
    roomy = _at_budget(situation, plan.context, budget, now.factor)
    fast = dataclasses.replace(situation, machine=_with_fast_disk(situation.machine))
    ideas = [
        (f"{format_bytes(budget)} of memory for it instead of {format_bytes(plan.total)}", roomy.forecast),
        ("a disk twice as fast", foretell(fast, plan).times(now.factor)),
    ]
    with suppress(UnsupportedError):
        packed = _with_lossless_experts(situation)
        ideas.append((_PACKED, _at_budget(packed, plan.context, plan.total, now.factor).forecast))
    gains = [Advice(what, then.tokens_per_s) for what, then in ideas if then.tpot_s * _WORTH_IT < now.tpot_s]
    return tuple(sorted(gains, key=lambda advice: -advice.tokens_per_s))


def _with_lossless_experts(situation: Situation) -> Situation:
    """Raises UnsupportedError for experts that cannot be packed so."""
    manifest = situation.manifest
    layout = lossless_layout(manifest.layout)
    return dataclasses.replace(situation, manifest=dataclasses.replace(manifest, layout=layout))


def _with_fast_disk(machine: Machine) -> Machine:
    rates = (dataclasses.replace(rate, bytes_per_s=2 * rate.bytes_per_s) for rate in machine.disk.rates)
    return dataclasses.replace(machine, disk=dataclasses.replace(machine.disk, rates=tuple(rates)))
