"""`moeinf quantize` and `moeinf quality`: smaller experts, and what they cost in quality."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

import moeinf
from moeinf.errors import UsageError
from moeinf.forms import ExpertForm
from moeinf.pull import resolve
from moeinf.quantizing import quantize_model
from moeinf.store import TRACES_FOLDER, Store
from moeinf.units import format_bytes

from .options import EngineFlags, ExpertKind, Group, Model, OutputFlags
from .output import columns

if TYPE_CHECKING:
    from moeinf.engine import Engine

__all__ = ["quality", "quantize"]


def quantize(
    model: Model,
    experts: ExpertKind,
    name: Annotated[str, typer.Option(metavar="NAME", help="What to call the new model.")],
    group: Group = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what has that name.")] = False,
    output_flags: OutputFlags = OutputFlags(),
) -> None:
    """\b
    moeinf quantize mixtral-instruct --experts lossless --name mixtral-lossless
    moeinf quantize mixtral-instruct --experts int4 --name mixtral-int4

    Make a model of MODEL whose experts take three quarters of the bytes (lossless), a half (int8) or a quarter (int4).
    Lossless ones answer as MODEL does, to the last bit. The answers of the others are no longer MODEL's: `moeinf
    quality` says how far they are from them. MODEL stays as it is. A run that was interrupted goes on where it stopped
    when the same command is run again.
    """
    output = output_flags.output()
    store = Store()
    form = ExpertForm.read(experts, group)
    store.path(name)
    stored = resolve(model, store, output)
    made = quantize_model(stored, name, form, store=store, force=force, progress=output, notify=output.note)
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
    options = engine_flags.resolve()

    @contextmanager
    def load(name: str) -> Iterator[Engine]:
        with output.busy(f"loading {name}"):
            engine = moeinf.load(name, dtype=dtype, **asdict(options))
            engine.learns = False  # these are no requests of a person
        with engine:
            yield engine

    prompts = read_prompts(dataset, max_prompts, progress=output, notify=output.note)
    with stored.use():
        found = compare(stored, other, prompts, dataset, load, store=store, max_tokens=max_tokens, progress=output)
        write_quality(found, stored.path / TRACES_FOLDER / QUALITY_FILE, stored.manifest)
    rows = [
        ("", stored.name, other.name),
        ("perplexity", f"{found.perplexity:.2f}", f"{found.against_perplexity:.2f}"),
        ("same likeliest token", f"{found.agreement:.2%}", ""),
        ("KL, mean", f"{found.mean_kl:.5f}", ""),
        ("KL, worst", f"{found.worst_kl:.3f}", ""),
        ("tokens", f"{found.tokens:,} of {found.prompts:,} texts, in {found.dtype}", ""),
    ]
    data = {"model": stored.name, "precision": stored.manifest.precision, **asdict(found)}
    output.result(data, lines=columns(rows), names=[f"{found.agreement:.4f}"])
