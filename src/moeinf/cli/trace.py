"""`moeinf trace`: record what the routers choose over a prompt set, and say what that means for a cache."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from moeinf.errors import UsageError
from moeinf.store import TRACES_FOLDER, Store

from .answers import Interrupts, open_engine
from .options import EngineFlags, Model, OutputFlags, SamplingFlags
from .output import Output, columns
from .run import INTERRUPTED

if TYPE_CHECKING:
    from moeinf.analysis import Routing
    from moeinf.simulate import Replay
    from moeinf.trace import Trace

__all__ = ["trace"]

_SHARES = (0.1, 0.25, 0.5, 0.75)
_GOOD_HIT_RATE = 0.9


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
    `moeinf simulate`. A run that was interrupted goes on where it stopped when the same command is run again.
    A connection is opened only for a data set of the hub.
    """
    from moeinf import calibration, datasets

    output = output_flags.output()
    prompts = datasets.read_prompts(dataset, max_prompts, progress=output, notify=output.note)
    with open_engine(model, engine_flags, SamplingFlags(), output) as (name, engine, _):
        folder = Store().path(name) / TRACES_FOLDER
        folder.mkdir(exist_ok=True)
        path = folder / f"{datasets.short_name(dataset)}-{len(prompts)}x{max_tokens}.safetensors"
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
    if not path.exists():
        output.note(
            f"stopped after {len(set(found.sequence_id.tolist()))} of {len(prompts)} prompts; the same command goes on"
        )
        return INTERRUPTED
    domains = [prompt.domain for prompt in prompts]
    _report(found, domains if all(domains) else [], str(path), name, output)
    return 0


def _report(found: Trace, domains: Sequence[str], path: str, name: str, output: Output) -> None:
    from moeinf.analysis import describe
    from moeinf.settings import DEFAULT_POLICY
    from moeinf.simulate import BELADY, replay_all

    if not found.num_tokens:
        raise UsageError("no token went through the model", hint="give it prompts with text in them")
    routing = describe(found, domains)
    policies = ("lru", DEFAULT_POLICY, BELADY)
    slots = sorted({max(found.identity.width, round(sum(found.layer_sizes) * share)) for share in _SHARES})
    jobs = [(policy, size) for policy in policies for size in slots]
    with output.task(f"replay {name}", len(jobs), "replays") as task:
        replays = []
        for replay in replay_all(found, jobs, os.cpu_count() or 1):
            replays.append(replay)
            task.advance(1)
    data = {
        "model": name,
        "trace": path,
        "routing": asdict(routing),
        "replays": [{**asdict(replay), "hit_rate": replay.hit_rate} for replay in replays],
    }
    output.result(
        data, lines=[*_routing_lines(routing), "", *_curve(replays), "", _advice(replays), path], names=[path]
    )


def _routing_lines(routing: Routing) -> list[str]:
    rows = [
        ("requests", f"{routing.requests:,}, of {routing.tokens:,} tokens together"),
        ("a request uses", f"{routing.used_share:.0%} of all experts"),
    ]
    for (window, chance), (_, even) in zip(routing.reuse, routing.even_reuse, strict=True):
        label = "used again by the next token" if window == 1 else f"  within {window} tokens"
        rows.append((label, f"{chance:.0%} (even use would give {even:.0%})"))
    if routing.likeness is not None:
        rows.append(
            (
                "distance of requests",
                f"{routing.likeness.within:.2f} within a domain, {routing.likeness.between:.2f} between domains",
            )
        )
    return columns(rows)


def _curve(replays: Sequence[Replay]) -> list[str]:
    """Hit rates: a row per policy, a column per size."""
    sizes = sorted({replay.slots for replay in replays})
    shares = {replay.slots: replay.fraction for replay in replays}
    rows: dict[str, list[str]] = {}
    for replay in replays:
        rows.setdefault(replay.policy, [replay.policy]).append(f"{replay.hit_rate:.1%}")
    return columns([["HIT RATE AT", *(f"{size:,} ({shares[size]:.0%})" for size in sizes)], *rows.values()])


def _advice(replays: Sequence[Replay]) -> str:
    from moeinf.settings import DEFAULT_POLICY

    ours = [replay for replay in replays if replay.policy == DEFAULT_POLICY]
    good = next((replay for replay in ours if replay.hit_rate >= _GOOD_HIT_RATE), ours[-1])
    return f"--experts {good.slots} would find {good.hit_rate:.0%} of what decoding asks for in memory"
