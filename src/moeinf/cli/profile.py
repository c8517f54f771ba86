"""`moeinf profile`: what this machine can do, and with a model, how fast it would run here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from moeinf.errors import UsageError
from moeinf.settings import home_path
from moeinf.units import format_bytes, format_seconds

from .options import EngineFlags, OutputFlags, source_or_stored_names
from .output import Output, columns

if TYPE_CHECKING:
    from moeinf.findings import Finding
    from moeinf.machine import Disk, Gpu, HostMemory, Machine, MathsRate, Processor

__all__ = ["profile"]

_JUST_NOW_S = 5.0


def profile(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A model, pulled or not: its name, an alias, a hub id or a folder. Without it, the machine alone.",
            autocompletion=source_or_stored_names,
        ),
    ] = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again, whatever is known.")] = False,
    engine_flags: EngineFlags = EngineFlags(),
    output_flags: OutputFlags = OutputFlags(),
) -> int:
    """\b
    moeinf profile
    moeinf profile mixtral --host-memory 16GiB

    Measure this machine, in about a minute: what its disk, memory, processor and GPUs give, what stands in the way, and
    the command that mends it. The figures are kept. With a model: the plan for it and the speed to expect, from those
    figures. The engine's options belong to that plan.
    """
    from moeinf.evidence import MACHINE_FILE
    from moeinf.profiling import load_or_measure

    output = output_flags.output()
    if model is None and (given := [name for name, value in asdict(engine_flags).items() if value is not None]):
        raise UsageError(
            f"--{given[0].replace('_', '-')} says how a model is to run", hint="moeinf profile MODEL, or leave it out"
        )
    options = None
    if model is not None:
        from .planning import resolve_foreseen, show_plan

        options = resolve_foreseen(engine_flags)
    machine = load_or_measure(home_path(), output, refresh=refresh, notify=output.note)
    if model is not None and options is not None:
        return show_plan(model, machine, options, output)
    _show(machine, str(home_path() / MACHINE_FILE), output)
    return 0


def _show(machine: Machine, path: str, output: Output) -> None:
    from moeinf.findings import find

    findings = find(machine)
    lines = [
        *columns([*_processor_rows(machine.processor), *_memory_rows(machine.memory), *_disk_rows(machine.disk)]),
        "",
        *_read_lines(machine.disk),
        *_maths_lines("EXPERTS COMPUTED WITH", machine.maths),
        *columns(list(_layer_rows(machine))),
        "",
        *(line for gpu in machine.gpus for line in _gpu_lines(gpu)),
        *(f"not measured: {what}" for what in machine.left_out),
        *([""] if machine.left_out else []),
        *_finding_lines(findings),
        _age_line(machine),
    ]
    data = {"machine": machine.to_dict(), "findings": [asdict(finding) for finding in findings]}
    output.result(data, lines=lines, names=[path])


def _processor_rows(processor: Processor) -> Iterator[tuple[str, str]]:
    yield "processor", f"{processor.name}: {_count(processor.cores, 'core')}, {_count(processor.threads, 'thread')}"
    yield "vector instructions", " ".join(processor.features) or "none that are known"
    yield "native library", processor.kernels or f"none: {processor.no_kernels}"


def _memory_rows(memory: HostMemory) -> Iterator[tuple[str, str]]:
    limit = f", {format_bytes(memory.limit)} allowed by its cgroup" if memory.limit is not None else ""
    swap = f"{format_bytes(memory.swap_total - memory.swap_free)} of {format_bytes(memory.swap_total)}"
    yield "memory", f"{format_bytes(memory.total)}{limit}, {format_bytes(memory.available)} available"
    yield "", f"read at {_rate(memory.bytes_per_s)}, handed out at {_rate(memory.fresh_bytes_per_s)}"
    yield "", f"swap used: {swap if memory.swap_total else 'there is none'}"


def _disk_rows(disk: Disk) -> Iterator[tuple[str, str]]:
    ahead = "unknown" if disk.read_ahead is None else format_bytes(disk.read_ahead)
    direct = "direct reads" if disk.reads_direct else "no direct reads"
    yield "disk of the models", f"{disk.device or 'unknown'}: {disk.filesystem or 'unknown file system'}, {direct}"
    yield "", f"read-ahead {ahead}, {format_bytes(disk.free)} free"


def _read_lines(disk: Disk) -> list[str]:
    """Tables of the reads past the page cache and through it: a row per size, a column per depth."""
    lines = []
    for direct in (True, False):
        rates = {(rate.size, rate.depth): _rate(rate.bytes_per_s) for rate in disk.rates if rate.direct == direct}
        if rates:
            depths = sorted({depth for _, depth in rates})
            head = ("DIRECT READS OF" if direct else "BUFFERED READS OF", *(f"{depth} AT ONCE" for depth in depths))
            rows = [
                (format_bytes(size), *(rates.get((size, depth), "") for depth in depths))
                for size in sorted({size for size, _ in rates})
            ]
            lines += [*columns([head, *rows]), ""]
    return lines


def _maths_lines(label: str, maths: Iterable[MathsRate]) -> list[str]:
    rates = {(f"{rate.kernels}, {rate.weights}", rate.tokens): _rate(rate.bytes_per_s) for rate in maths}
    counts = sorted({tokens for _, tokens in rates})
    head = (label, *(_count(tokens, "TOKEN", "S") for tokens in counts))
    kinds = dict.fromkeys(kind for kind, _ in rates)
    return columns([head, *((kind, *(rates.get((kind, tokens), "") for tokens in counts)) for kind in kinds)])


def _layer_rows(machine: Machine) -> Iterator[tuple[str, str]]:
    yield "dense layers, bfloat16, 1 token", _rate(machine.dense_bytes_per_s)
    yield (
        "a layer beside its weights",
        f"{machine.layer_s * 1e3:.2f} ms, {machine.whole_layer_s * 1e3:.2f} in one call (all experts in memory)",
    )
    yield "a miss beside its reading", f"{machine.fetch_s * 1e3:.2f} ms"
    yield "asking a router early", f"{machine.foresee_s * 1e3:.2f} ms"
    yield "torch's program of a product", f"{machine.program_s * 1e3:.2f} ms"


def _gpu_lines(gpu: Gpu) -> list[str]:
    rows = [
        (f"GPU {gpu.index}", f"{gpu.name}, {format_bytes(gpu.total)}, {format_bytes(gpu.free)} free"),
        ("its memory", _rate(gpu.bytes_per_s)),
        ("to it", f"{_rate(gpu.pinned_to_device)} from pinned memory, {_rate(gpu.pageable_to_device)} from other"),
        ("from it", f"{_rate(gpu.device_to_pinned)} to pinned memory"),
    ]
    return [*columns(rows), *_maths_lines(f"EXPERTS COMPUTED ON GPU {gpu.index} WITH", gpu.maths), ""]


def _finding_lines(findings: list[Finding]) -> list[str]:
    lines = []
    for number, finding in enumerate(findings, 1):
        lines += [f"{number}. {finding.what}", f"   costs: {finding.cost}"]
        lines += [f"   mend:  {finding.command}"] if finding.command else []
    return [*lines, ""] if lines else ["nothing stands in the way", ""]


def _age_line(machine: Machine) -> str:
    age_s = machine.age_s(datetime.now(UTC))
    if age_s < _JUST_NOW_S:
        return "measured just now"
    return f"measured {format_seconds(age_s)} ago; moeinf profile --refresh measures again"


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f} GB/s"


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{plural if number != 1 else ''}"
