"""`moeinf quantize` and `moeinf quality`: smaller experts, and what they cost in quality."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

import moeinf
from moeinf.errors import UsageError
from moeinf.forms import ExpertForm
from moeinf.pull import resolve
from moeinf.quantizing import Calibration, quantize_model
from moeinf.settings import EngineOptions, resolve_options
from moeinf.store import TRACES_FOLDER, Store, StoredModel
from moeinf.units import format_bytes

from .options import EngineFlags, ExpertKind, Group, Model, OutputFlags
from .output import Output, columns

if TYPE_CHECKING:
    from moeinf.engine import Engine

__all__ = ["quality", "quantize"]


def quantize(
    model: Model,
    experts: ExpertKind,
    name: Annotated[str, typer.Option(metavar="NAME", help="What to call the new model.")],
    group: Group = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE|HUB-ID",
            help="Choose numbers of int8 and int4 by what experts are given when MODEL reads these texts, which are "
            "named as for `moeinf trace`.",
        ),
    ] = None,
    max_prompts: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Calibrate with only the first so many texts.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what has that name.")] = False,
    output_flags: OutputFlags = OutputFlags(),
) -> None:
    """\b
    moeinf quantize mixtral-instruct --experts lossless --name mixtral-lossless
    moeinf quantize mixtral-instruct --experts int4 --name mixtral-int4 --calibrate default

    Make a model of MODEL whose experts take three quarters of the bytes (lossless), a half (int8) or a quarter (int4).
    Lossless ones answer as MODEL does, to the last bit. The answers of the others are no longer MODEL's: `moeinf
    quality` says how far they are from them, and --calibrate brings them nearer. Attention and other linear
    layers are packed without loss beside any of them. MODEL stays as it is. A run that was interrupted goes on where it
    stopped when the same command is run again.
    """
    output = output_flags.output()
    store = Store()
    form = ExpertForm.read(experts, group)
    store.path(name)
    if calibrate is None and max_prompts is not None:
        raise UsageError("--max-prompts says how many texts to calibrate with", hint="add --calibrate, or leave it out")
    stored = resolve(model, store, output)
    calibration = _read_calibration(stored, calibrate, max_prompts, output) if calibrate is not None else None
    made = quantize_model(
        stored,
        name,
        form,
        store=store,
        calibration=calibration,
        force=force,
        progress=output,
        notify=output.note,
    )
    before, after = stored.manifest.layout.nbytes, made.manifest.layout.nbytes
    data = {
        "model": name,
        "of": stored.name,
        "precision": made.manifest.precision,
        "expert_bytes": after,
        "plain_expert_bytes": before,
        "experts_bytes": made.manifest.experts_bytes,
    }
    line = f"{name}: {made.manifest.precision}, {format_bytes(after)} each instead of {format_bytes(before)}"
    output.result(data, lines=[line], names=[name])
    if not made.manifest.layout.is_exact:
        output.note(f"what that costs in quality: {shlex.join(['moeinf', 'quality', name, '--against', stored.name])}")


def quality(
    model: Model,
    against: Annotated[str, typer.Option(metavar="MODEL", help="The model that it was made of.")],
    dataset: Annotated[
        str,
        typer.Option(metavar="NAME|FILE|HUB-ID", help="Texts that both read, as `moeinf trace` takes them."),
    ] = "default-held-out",
    max_prompts: Annotated[int, typer.Option(metavar="N", min=1, help="Take only the first so many texts.")] = 54,
    max_tokens: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens of a text, at most.")] = 128,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="auto|float32",
            help="What both compute in: their own, or float32, where nothing is rounded but the experts' numbers.",
        ),
    ] = "auto",
    engine_flags: EngineFlags = EngineFlags(),
    output_flags: OutputFlags = OutputFlags(),
) -> None:
    """\b
    moeinf quality mixtral-int4 --against mixtral-instruct
    moeinf quality demo-int8 --against demo --dtype float32

    Let both models read texts, and compare what they expect to come next: the likeliest token, the whole distribution,
    and the perplexity. One is loaded after the other. The figures are kept beside MODEL, and `moeinf show` shows them.
    """
    from moeinf.datasets import read_prompts
    from moeinf.quality import compare
    from moeinf.qualityfile import QUALITY_FILE, write_quality

    output = output_flags.output()
    store = Store()
    stored, other = resolve(model, store, output), resolve(against, store, output)
    if stored.name == other.name:
        raise UsageError(f"{stored.name} cannot be compared with itself", hint="name the model that it was made of")
    load = partial(_load, output=output, dtype=dtype, options=engine_flags.resolve())
    prompts = read_prompts(dataset, max_prompts, progress=output, notify=output.note)
    with stored.use():
        found = compare(stored, other, prompts, dataset, load, store=store, max_tokens=max_tokens, progress=output)
        write_quality(found, stored.path / TRACES_FOLDER / QUALITY_FILE, stored.manifest)
    rows = [
        ("", stored.name, other.name),
        ("experts", stored.manifest.precision, other.manifest.precision),
        ("perplexity", f"{found.perplexity:.2f}", f"{found.against_perplexity:.2f}"),
        ("same likeliest token", f"{found.agreement:.2%}", ""),
        ("KL, mean", f"{found.mean_kl:.5f}", ""),
        ("KL, worst", f"{found.worst_kl:.3f}", ""),
        ("tokens", f"{found.tokens:,} of {found.prompts:,} texts, in {found.dtype}", ""),
    ]
    data = {"model": stored.name, "precision": stored.manifest.precision, **asdict(found)}
    output.result(data, lines=columns(rows), names=[f"{found.agreement:.4f}"])


def _read_calibration(model: StoredModel, dataset: str, max_prompts: int | None, output: Output) -> Calibration:
    """The texts of a data set, for `model` to read, which is loaded as environment and config file say."""
    from moeinf import calibrated, datasets

    prompts = datasets.read_prompts(dataset, max_prompts, progress=output, notify=output.note)
    load = partial(_load, output=output, options=resolve_options({}))
    return calibrated.Calibration.read(model, prompts, datasets.short_name(dataset, prompts), load)


@contextmanager
def _load(name: str, *, output: Output, options: EngineOptions, dtype: str = "auto") -> Iterator[Engine]:
    """An engine that reads texts, which are no requests of a person."""
    with output.leaving_at_once(), output.busy(f"loading {name}"):
        engine = moeinf.load(name, dtype=dtype, **asdict(options))
        engine.learns = False
    with engine:
        yield engine
