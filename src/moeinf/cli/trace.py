"""`moeinf trace`: record what the routers choose over a prompt set, and say what that means for a cache."""

from __future__ import annotations

import math
import os
import shlex
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeinf.errors import MoeinfError
from moeinf.files import explained
from moeinf.store import TRACES_FOLDER, Store

from .answers import Interrupts, open_engine
from .options import EngineFlags, Model, OutputFlags, SamplingFlags
from .output import INTERRUPTED, Output, columns
from .simulate import hit_rate_table

if TYPE_CHECKING:
    from moeinf.analysis import Domains, Routing
    from moeinf.page import Saved
    from moeinf.report import Report

__all__ = ["trace"]

_SHOWN = (0.1, 0.25, 0.5, 0.75)


def trace(
    model: Model,
    dataset: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE|HUB-ID",
            help="`default` or `default-held-out`, which ship with the program; a file of prompts: .txt, .jsonl, "
            ".json, .csv, .parquet; or a data set of the hub: org/name, org/name@revision.",
        ),
    ] = "default",
    max_prompts: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Take only the first so many prompts.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="New tokens per prompt, at most.")] = 64,
    engine_flags: EngineFlags = EngineFlags(),
    output_flags: OutputFlags = OutputFlags(),
) -> int:
    """\b
    moeinf trace demo
    moeinf trace mixtral --dataset questions.jsonl --max-prompts 50

    Put prompts through a model and record which experts it asks for. The trace is kept beside the model, for
    `moeinf simulate`, and with it a report: a page for a browser, and its pictures. A run that was interrupted goes on
    where it stopped when the same command is run again. A connection is opened only for a data set of the hub.
    """
    from moeinf import calibration, datasets
    from moeinf.report import make_report

    output = output_flags.output()
    prompts = datasets.read_prompts(dataset, max_prompts, progress=output, notify=output.note)
    with open_engine(model, engine_flags, SamplingFlags(), output) as (name, engine, _):
        expert_bytes = engine.manifest.layout.nbytes
        folder = Store().path(name) / TRACES_FOLDER
        with explained(folder):
            folder.mkdir(exist_ok=True)
        path = folder / f"{datasets.short_name(dataset, prompts)}-{len(prompts)}x{max_tokens}.safetensors"
        with Interrupts().watch() as should_stop:
            found = calibration.collect(
                engine,
                name,
                prompts,
                path,
                max_tokens=max_tokens,
                progress=output,
                notify=output.note,
                should_stop=should_stop,
            )
    learned = engine.learned_requests
    done = len(set(found.sequence_id.tolist()))
    if done < len(prompts):
        output.note(f"stopped after {done} of {len(prompts)} prompts; the same command goes on")
        return INTERRUPTED
    domains = [prompts[number].domain for number in dict.fromkeys(found.sequence_id.tolist())]
    report = make_report(
        found,
        domains if all(domains) else [],
        expert_bytes,
        command=_command(name, dataset, len(prompts), max_tokens),
        made=date.today().isoformat(),
        processes=os.cpu_count() or 1,
        progress=output,
    )
    _show(report, path, _save(report, path, output), learned, output)
    return 0


def _command(name: str, dataset: str, prompts: int, max_tokens: int) -> str:
    """What gives the same trace again: the engine's options change no choice of a router."""
    options = {"--dataset": dataset, "--max-prompts": f"{prompts}", "--max-tokens": f"{max_tokens}"}
    return shlex.join(["moeinf", "trace", name, *(word for option in options.items() for word in option)])


def _save(report: Report, path: Path, output: Output) -> Saved:
    from moeinf.page import save

    try:
        with output.busy("drawing the report"):
            return save(report, path)
    except MoeinfError as error:
        hint = f"the trace itself is whole: moeinf simulate {shlex.quote(str(path))}"
        raise type(error)(f"the report could not be kept: {error}", hint=hint) from error


def _show(report: Report, path: Path, saved: Saved, learned: int, output: Output) -> None:
    """`learned`: requests that the model's collection holds now."""
    from moeinf.report import recommendation, replayed_part
    from moeinf.sizing import slots_of

    shown = {slots_of(report.trace, share) for share in _SHOWN}
    lines = [
        *_routing_lines(report.routing),
        *(["", *_domain_lines(report.domains)] if report.domains is not None else []),
        "",
        *hit_rate_table([replay for replay in report.sizing.replays if replay.slots in shown]),
        "",
        *recommendation(report.sizing),
        *filter(None, [replayed_part(report.sizing)]),
        *([f"What {learned:,} requests used is known at the next start, and fills the cache then."] if learned else []),
        "",
        str(saved.page),
        str(path),
    ]
    data = {
        "model": report.trace.identity.model,
        "trace": str(path),
        **report.to_json(),
        "learned_requests": learned,
        "page": str(saved.page),
        "pictures": [str(picture) for picture in saved.pictures],
    }
    output.result(data, lines=lines, names=[str(path)])


def _routing_lines(routing: Routing) -> list[str]:
    from moeinf.report import naming_rows, reuse_rows

    rows = [
        ("requests", f"{routing.requests:,}, of {routing.tokens:,} tokens together"),
        ("a request uses", f"{routing.used_share:.0%} of all experts"),
    ]
    for window, chance, even in reuse_rows(routing):
        label = "used again by the next token" if window == 1 else f"  within {window} tokens"
        rows.append((label, f"{chance:.0%} (even use would give {even:.0%})"))
    for number, (name, share) in enumerate(naming_rows(routing)):
        rows.append(("next experts named rightly" if not number else "", f"{share:.0%} by {name}"))
    if routing.likeness is not None:
        rows.append(
            (
                "distance of requests",
                f"{routing.likeness.within:.2f} within a domain, {routing.likeness.between:.2f} between domains",
            )
        )
    return columns(rows)


def _domain_lines(domains: Domains) -> list[str]:
    within = (domains.distances[place, place] for place in range(len(domains.names)))
    rows = zip(domains.names, domains.requests, within, domains.others, strict=True)
    cells = [(name, f"{requests:,}", _distance(near), _distance(far)) for name, requests, near, far in rows]
    return columns([("DOMAIN", "REQUESTS", "DISTANCE WITHIN", "TO OTHERS"), *cells])


def _distance(value: float) -> str:
    return "none" if math.isnan(value) else f"{value:.2f}"
