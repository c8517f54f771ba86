"""`moeinf simulate`: what cache policies would have found resident, from recorded traces."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeinf.errors import UsageError
from moeinf.policies import POLICIES

from .options import OutputFlags
from .output import Output, columns

if TYPE_CHECKING:
    from moeinf.simulate import Replay
    from moeinf.trace import Trace

__all__ = ["check_plot", "check_writable", "hit_rate_table", "simulate"]

_DEFAULT = "10,25,50,75%"


def simulate(
    traces: Annotated[
        list[Path], typer.Argument(metavar="TRACE...", help="Trace files: safetensors, JSON lines, or NumPy's npz.")
    ],
    policy: Annotated[
        str, typer.Option(metavar="NAME,...", help="Policies to compare, or all.", show_default=True)
    ] = "all",
    slots: Annotated[
        str | None, typer.Option(metavar="N,...", help="Sizes of the cache, as numbers of experts.")
    ] = None,
    fraction: Annotated[
        str | None,
        typer.Option(metavar="P%,...", help=f"Sizes as shares of all experts; {_DEFAULT} where no size is given."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the hit rates too, into a .png, .svg or .pdf.")
    ] = None,
    output_flags: OutputFlags = OutputFlags(),
) -> None:
    """\b
    moeinf simulate demo.safetensors
    moeinf simulate demo.safetensors --policy lru,expected-use --fraction 25,50% --plot rates.png

    Replay traces through the expert cache, without a model: which share of the experts that were asked for would have
    been resident. `belady`, which knows the future, is what nobody can beat. The other policies are sorted by what they
    find. A share of the experts is never less than what a layer asks for at once.
    """
    from moeinf.tracefile import read_trace

    output = output_flags.output()
    policies = _policies(policy)
    shares = _fractions(fraction if slots or fraction else _DEFAULT)
    numbers = _slots(slots)
    if plot is not None:
        check_plot(plot)
    read = {path: read_trace(path) for path in traces}
    sizes = {path: _sizes(path, trace, numbers, shares) for path, trace in read.items()}
    found = {path: _replay(path, trace, policies, sizes[path], output) for path, trace in read.items()}
    results = [
        {"trace": str(path), **asdict(one), "hit_rate": one.hit_rate}
        for path, replays in found.items()
        for one in _in_order(replays)
    ]
    lines: list[str] = []
    for path, replays in found.items():
        lines += [str(path)] if len(found) > 1 else []
        lines += hit_rate_table(replays)
    if plot is None:
        output.result({"results": results}, lines=lines)
        return
    _draw(found, plot)
    output.result({"results": results, "plot": str(plot)}, lines=[*lines, str(plot)], names=[str(plot)])


def hit_rate_table(replays: Sequence[Replay]) -> list[str]:
    """Lines: a row per policy, a column per size."""
    sizes = sorted({(replay.slots, replay.fraction) for replay in replays})
    rows: dict[str, list[str]] = {}
    for replay in _in_order(replays):
        rows.setdefault(replay.policy, [replay.policy]).append(f"{replay.hit_rate:.1%}")
    return columns([["HIT RATE AT", *(f"{slots:,} ({fraction:.0%})" for slots, fraction in sizes)], *rows.values()])


def _in_order(replays: Sequence[Replay]) -> list[Replay]:
    """The best policy first, by size."""
    from moeinf.sizing import ranked

    order = ranked(replays)
    return sorted(replays, key=lambda replay: (order.index(replay.policy), replay.slots))


def _replay(path: Path, trace: Trace, policies: list[str], sizes: list[int], output: Output) -> list[Replay]:
    from moeinf.simulate import replay_all

    jobs = [(name, slots) for name in policies for slots in sizes]
    found = []
    with output.task(f"replay {path.name}", len(jobs), "replays") as task:
        for replay in replay_all(trace, jobs, os.cpu_count() or 1):
            task.advance(1)
            found.append(replay)
    return found


def _sizes(path: Path, trace: Trace, numbers: list[int], shares: list[float]) -> list[int]:
    """Slots, ascending. Raises UsageError for a number of slots that a cache for this trace cannot have."""
    from moeinf.sizing import slots_of

    fewest, most = slots_of(trace, 0), slots_of(trace, 1)
    for slots in numbers:
        if slots < fewest:
            what = f"below the {fewest} that a layer asks for at once"
        elif slots > most:
            what = f"more than all {most}"
        else:
            continue
        raise UsageError(f"{path}: --slots {slots} experts is {what}", hint=f"choose from {fewest} to {most}")
    return sorted({*numbers, *(slots_of(trace, share) for share in shares)})


def _slots(text: str | None) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise UsageError(f"--slots {text!r} is no list of numbers", hint="write it like 64,128") from None


def _fractions(text: str | None) -> list[float]:
    """Shares from 0 to 1; one % is enough for all of them."""
    if not text:
        return []
    try:
        shares = [float(part.strip().removesuffix("%")) / 100 for part in text.split(",")]
    except ValueError:
        shares = []
    if "%" not in text or not shares or not all(0 < share <= 1 for share in shares):
        raise UsageError(f"--fraction {text!r} is no list of shares up to 100%", hint="write it like 10,25,50%")
    return shares


def check_plot(path: Path) -> None:
    """Raise UsageError, before the work is done and not after it, for a place where no picture can be written."""
    from moeinf.figures import FORMATS

    if path.suffix[1:] not in FORMATS:
        known = ", ".join(f".{kind}" for kind in FORMATS)
        raise UsageError(f"--plot {path}: the name does not say which kind of picture", hint=f"end it in {known}")
    check_writable(path, "--plot")


def check_writable(path: Path, option: str) -> None:
    """Raise UsageError for a place where no file can be written."""
    if os.path.isdir(path) or not os.access(path.parent, os.W_OK | os.X_OK):
        raise UsageError(f"{option} {path} cannot be written", hint="name a file in a folder that you may write to")


def _draw(found: dict[Path, list[Replay]], path: Path) -> None:
    from moeinf.figures import hit_rates
    from moeinf.files import publish
    from moeinf.sizing import ranked

    curves = [(trace.name, replays) for trace, replays in found.items()]
    order = ranked([replay for replays in found.values() for replay in replays])
    publish(path, [hit_rates(curves, order, kind=path.suffix[1:])])


def _policies(text: str) -> list[str]:
    from moeinf.simulate import BELADY

    known = [*sorted(POLICIES), BELADY]
    names = known if text == "all" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise UsageError(f"policy {name!r} is not known", hint=f"choose some of: {', '.join(known)}")
    return list(dict.fromkeys(names))
