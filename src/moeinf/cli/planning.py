"""`moeinf profile MODEL`: the plan for a model on this machine, and the speed to expect. Called by `profile`, which has
measured the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, NoReturn

from moeinf.errors import CapacityError, UnsupportedError
from moeinf.forecast import Forecast, Situation
from moeinf.gpu_forecast import GpuSituation, on_gpu
from moeinf.ledger import MemoryPlan, can_cache_files
from moeinf.machine import Machine
from moeinf.outlook import LIMITS, AtBudget, Outlook, look_ahead
from moeinf.settings import EngineOptions
from moeinf.store import Store
from moeinf.units import format_bytes, format_seconds

from .options import EngineFlags
from .output import Output, columns

if TYPE_CHECKING:
    from moeinf.planning import Subject

__all__ = ["resolve_foreseen", "show_plan"]

_BAR = 40


def resolve_foreseen(flags: EngineFlags) -> EngineOptions:
    """The options of a plan. Raises UnsupportedError for those whose times are not foretold."""
    options = flags.resolve()
    if options.computes_on_host:
        raise UnsupportedError("what --miss brings is not foretold", hint="leave --miss out")
    if options.compiles:
        raise UnsupportedError("what --compile brings is not foretold", hint="leave --compile out")
    return options


def show_plan(model: str, machine: Machine, options: EngineOptions, output: Output) -> int:
    """Say how `model`, stored or not, will run on `machine`.

    Raises CapacityError, after all is said, when it cannot; and what `find_subject` raises.
    """
    with output.busy(f"looking at {model}"):
        from moeinf import evidence, memory
        from moeinf.placement import place
        from moeinf.planning import find_curve, find_subject

        subject = find_subject(model, Store())
    try:
        placement = place(subject.manifest, subject.shape, options)
    except CapacityError as error:
        _refuse(subject, error, output)
    for note in placement.notes:
        output.note(note)
    plan, available = placement.plan, memory.available_bytes()
    situation = Situation(
        machine,
        placement.manifest,
        placement.shape,
        find_curve(subject, options.policy, output),
        kernels=options.kernels,
        prefetch=options.prefetch,
        reads_files=plan.host is None and can_cache_files(plan, subject.manifest, available),
    )
    if placement.device is not None:
        situation = on_gpu(situation, placement.device.place.index or 0, placement.device.name)
    runs = evidence.read_runs(subject.traces, evidence.owner(subject.manifest)) if subject.traces else ()
    outlook = look_ahead(situation, plan, runs=runs, threads=options.threads)
    output.result(
        _to_dict(subject, situation, plan, outlook),
        lines=_lines(situation, plan, outlook, available),
        names=[outlook.verdict],
    )
    return 0


def _refuse(subject: Subject, error: CapacityError, output: Output) -> NoReturn:
    data = {
        "model": subject.name,
        "device": None,
        "verdict": "no",
        "regime": None,
        "reason": str(error),
        "plan": None,
        "expected": None,
        "curve_source": None,
        "corrected_by": None,
        "budgets": [],
        "host_budgets": [],
        "advice": [{"what": error.hint, "tokens_per_s": None}],
    }
    output.result(data, lines=["no"], names=["no"])
    raise error


def _to_dict(subject: Subject, situation: Situation, plan: MemoryPlan, outlook: Outlook) -> dict[str, object]:
    return {
        "model": subject.name,
        "device": situation.device or None,
        "verdict": outlook.verdict,
        "regime": plan.regime,
        "reason": outlook.reason,
        "plan": {**asdict(plan), "experts": plan.experts, "total": plan.total},
        "expected": {**asdict(outlook.forecast), "tokens_per_s": outlook.forecast.tokens_per_s},
        "curve_source": situation.curve.source,
        "corrected_by": asdict(outlook.correction),
        "budgets": [_at(point) for point in outlook.budgets],
        "host_budgets": [_at(point) for point in outlook.host_budgets],
        "advice": [asdict(advice) for advice in outlook.advice],
    }


def _at(point: AtBudget) -> dict[str, object]:
    return {
        "budget": point.budget,
        "slots": point.slots,
        "hit_rate": point.forecast.hit_rate,
        "tpot_s": point.forecast.tpot_s,
        "tokens_per_s": point.forecast.tokens_per_s,
        "by": point.forecast.by,
    }


def _lines(situation: Situation, plan: MemoryPlan, outlook: Outlook, available: int) -> list[str]:
    lines = [
        outlook.verdict,
        f"{outlook.reason}.",
        "",
        *columns([*_memory_rows(plan, available), ("", "", ""), *_time_rows(situation, outlook)]),
        "",
        f"Hit rate from {situation.curve.source}.",
        *(["Never compared with a time measured on a GPU (docs/planning.md)."] if plan.host else []),
        *_correction_lines(outlook),
        "",
        *_chart("MEMORY FOR IT" if plan.host is None else "MEMORY OF THE GPU", outlook.budgets),
        *([""] if outlook.host_budgets else []),
        *_chart("MEMORY OF THE HOST", outlook.host_budgets),
    ]
    if not outlook.advice:
        faster = "a faster disk" if plan.host is None else "a faster disk or link"
        return [*lines, "", f"Neither more memory nor {faster} would help: computing is the limit."]
    best = outlook.advice[0]
    gain = best.tokens_per_s / outlook.forecast.tokens_per_s
    return [
        *lines,
        "",
        f"What would help most: {best.what}, {best.tokens_per_s:.3g} tokens per second ({gain:.2f} times as many).",
    ]


def _correction_lines(outlook: Outlook) -> list[str]:
    corrected = outlook.correction
    if not corrected.runs:
        return []
    runs = "1 past run" if corrected.runs == 1 else f"{corrected.runs} past runs"
    return [f"Corrected by {runs}: times {corrected.factor:.2f}."]


def _memory_rows(plan: MemoryPlan, available: int) -> list[tuple[str, str, str]]:
    cache = plan.kv_cache - plan.expanded
    token = cache // plan.context if plan.context else 0
    longer = "borrow slots" if plan.host is None else "go in pieces"
    tokens = f"{plan.context:,} tokens of {format_bytes(token)}"
    if plan.most_slots > plan.last_slots:
        tokens += f"; until they come, {plan.most_slots - plan.last_slots:,} more experts"
    steps = f"steps of {plan.step_tokens} tokens; longer ones {longer}"
    if plan.last_slots > plan.slots:
        steps += f"; between prompts, {plan.last_slots - plan.slots:,} more experts"
    table = f"{format_bytes(plan.looked_up)} of embeddings stay on disk" if plan.looked_up else ""
    rows = [
        (
            "MEMORY" if plan.host is None else "MEMORY OF THE GPU",
            format_bytes(plan.total),
            f"of a budget of {format_bytes(plan.budget)}",
        ),
        ("  dense weights", format_bytes(plan.dense), table),
        ("  KV cache", format_bytes(cache), tokens),
        *([("  made of it", format_bytes(plan.expanded), "keys and values of its latents")] if plan.expanded else []),
        ("  workspace", format_bytes(plan.workspace), steps),
        ("  experts", format_bytes(plan.experts), f"{plan.slots:,} slots of {format_bytes(plan.slot_bytes)}"),
    ]
    host, budget = plan.host, plan.budget
    if host is not None:
        budget = host.budget
        rows += [
            ("MEMORY OF THE HOST", format_bytes(host.total), f"of a budget of {format_bytes(budget)}"),
            ("  workspace", format_bytes(host.workspace), ""),
            ("  experts", format_bytes(host.experts), f"{host.slots:,} slots of {format_bytes(host.slot_bytes)}"),
        ]
    reserve = format_bytes(max(0, available - budget))
    return [*rows, ("  reserve", reserve, f"of {format_bytes(available)} available, for other programs")]


def _time_rows(situation: Situation, outlook: Outlook) -> list[tuple[str, str, str]]:
    expected, manifest, machine = outlook.forecast, situation.manifest, situation.machine
    asked, expert = manifest.token_experts, manifest.layout.nbytes
    missed = f"{(1 - expected.hit_rate) * asked:.0f} experts, {format_bytes(round(expected.missed_bytes))}"
    rate = expected.missed_bytes / expected.read_s if expected.read_s else 0.0
    dense = max(0, manifest.dense_bytes - situation.shape.lookup_bytes)
    dense_rate, whatever = machine.dense_bytes_per_s, ""
    if isinstance(situation, GpuSituation):
        dense_rate, whatever = situation.gpu.bytes_per_s, " that copies what it misses"
    return [
        ("A TOKEN", _ms(expected.tpot_s), f"hit rate {expected.hit_rate:.1%}"),
        ("  dense weights", _ms(expected.dense_s), f"{format_bytes(dense)} at {_gb(dense_rate)}"),
        (
            "  layers",
            _ms(expected.layers_s),
            f"{situation.shape.layers} of {_ms(situation.layer_s(expected.regime))}, and the rest of a step",
        ),
        (
            "  experts",
            _ms(expected.experts_s),
            f"{asked:,} of {format_bytes(expert)}{_at_rate(expected, asked * expert)}",
        ),
        ("  misses", _ms(expected.bookkeeping_s), "room made, reads handed out"),
        ("  waiting", _ms(expected.stall_s), f"for {missed} at {_gb(rate)}: {_ms(expected.read_s)}" if rate else ""),
        (
            "  bound",
            _ms(expected.bound_s),
            f"by {LIMITS[expected.by]}: no program{whatever} can be faster at this hit rate",
        ),
        (
            "FIRST TOKEN",
            format_seconds(expected.ttft_s),
            f"for a prompt of {expected.prompt_tokens:,} tokens, with no expert in memory yet",
        ),
    ]


def _at_rate(expected: Forecast, nbytes: int) -> str:
    return f" at {_gb(nbytes / expected.experts_s)}" if expected.experts_s else ""


def _chart(title: str, points: Sequence[AtBudget]) -> list[str]:
    """Nothing where there are no points."""
    most = max((point.forecast.tokens_per_s for point in points), default=0.0)
    rows = [(title, "EXPERTS", "TOKENS PER SECOND")] if points else []
    for point in points:
        speed = point.forecast.tokens_per_s
        bar = "█" * max(1, round(_BAR * speed / most))
        rows.append((format_bytes(point.budget), f"{point.slots:,}", f"{bar} {speed:.3g}"))
    return columns(rows)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else format_seconds(seconds)


def _gb(rate: float) -> str:
    return f"{rate / 1e9:.3g} GB/s"
