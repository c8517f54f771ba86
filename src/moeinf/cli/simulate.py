"""`moeinf simulate`: what cache policies would have found resident, from recorded traces."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from moeinf.errors import UsageError
from moeinf.ledger import parse_slots
from moeinf.policies import POLICIES

from .options import OutputFlags
from .output import Output, columns

__all__ = ["simulate"]

_SIZES = "10%,25%,50%,75%"


def simulate(
    traces: Annotated[
        list[Path], typer.Argument(metavar="TRACE...", help="Trace files: safetensors, JSON lines, or NumPy's npz.")
    ],
    policy: Annotated[
        str, typer.Option(metavar="NAME,...", help="Policies to compare, or all.", show_default=True)
    ] = "all",
    experts: Annotated[
        str, typer.Option(metavar="N|P%,...", help="Slots, as numbers or shares of all experts.", show_default=True)
    ] = _SIZES,
    output_flags: OutputFlags = OutputFlags(),
) -> None:
    """\b
    moeinf simulate demo.safetensors
    moeinf simulate demo.safetensors --policy lru,expected-use --experts 25%,50%

    Replay traces through the expert cache, without a model: which share of the experts that were asked for would have
    been resident. `belady`, which knows the future, is what nobody can beat.
    """
    output = output_flags.output()
    policies = _policies(policy)
    results: list[dict[str, object]] = []
    lines: list[str] = []
    for path in traces:
        found, table = _simulate(path, policies, experts, output)
        results += found
        lines += [f"{path}", *table] if len(traces) > 1 else table
    output.result({"results": results}, lines=lines)


def _simulate(
    path: Path, policies: list[str], experts: str, output: Output
) -> tuple[list[dict[str, object]], list[str]]:
    """(objects, lines of a table) about one trace."""
    from moeinf.simulate import replay_all
    from moeinf.tracefile import read_trace

    trace = read_trace(path)
    num_experts, fewest = sum(trace.identity.layer_sizes), trace.identity.width
    sizes = [(text.strip(), parse_slots(text.strip(), num_experts, fewest) or fewest) for text in experts.split(",")]
    jobs = [(name, slots) for name in policies for _, slots in sizes]
    rates: dict[str, list[str]] = {name: [name] for name in policies}
    results: list[dict[str, object]] = []
    with output.task(f"replay {path.name}", len(jobs), "replays") as task:
        for replay in replay_all(trace, jobs, os.cpu_count() or 1):
            task.advance(1)
            rates[replay.policy].append(f"{replay.hit_rate:.1%}")
            results.append(
                {
                    "trace": str(path),
                    "policy": replay.policy,
                    "slots": replay.slots,
                    "fraction": replay.fraction,
                    "requests": replay.requests,
                    "hits": replay.hits,
                    "hit_rate": replay.hit_rate,
                    "evictions": replay.evictions,
                }
            )
    head = ["POLICY", *(f"{text} ({slots:,})" for text, slots in sizes)]
    return results, columns([head, *rates.values()])


def _policies(text: str) -> list[str]:
    from moeinf.simulate import BELADY

    known = [*sorted(POLICIES), BELADY]
    names = known if text == "all" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise UsageError(f"policy {name!r} is not known", hint=f"choose some of: {', '.join(known)}")
    return list(dict.fromkeys(names))
