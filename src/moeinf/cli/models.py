"""`moeinf pull`, `list`, `show`, `rm` and `verify`: the models on this machine."""

from __future__ import annotations

import os
import shlex
from dataclasses import asdict
from typing import Annotated

import typer

from moeinf import demo
from moeinf.errors import CapacityError, IntegrityError, MoeinfError
from moeinf.forms import name_calibration, pull_options, quantize_again
from moeinf.manifest import MANIFEST_NAME, Manifest
from moeinf.pull import PullPlan, plan_pull, resolve
from moeinf.pull import pull as pull_model
from moeinf.qualityfile import QUALITY_FILE, Quality, read_quality
from moeinf.store import TRACES_FOLDER, Store, StoredModel, is_valid_name
from moeinf.units import format_bytes

from .options import Group, Model, Models, OutputFlags, SourceModel
from .output import Output, columns

__all__ = ["list_models", "pull", "remove", "show", "verify"]


def pull(
    source: SourceModel,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="What to call the model here.")] = None,
    revision: Annotated[str | None, typer.Option(metavar="REV", help="Branch, tag or commit at the hub.")] = None,
    dtype: Annotated[
        str, typer.Option(metavar="auto|bfloat16|float16|float32", help="What to compute in; auto is the model's own.")
    ] = "auto",
    experts: Annotated[
        str | None,
        typer.Option(
            metavar="lossless|bf16|int8|int4",
            help="How experts are to be stored, if not lossless or as released, whichever is faster here.",
        ),
    ] = None,
    group: Group = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be downloaded and written.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Pull again what is here, in place of it.")] = False,
    output_flags: OutputFlags = OutputFlags(),
) -> None:
    """\b
    moeinf pull mixtral-instruct
    moeinf pull ./my-checkpoint --name mine --experts int4

    Download a model, or read it from a folder, and write it to the store with a file per expert. Its answers stay what
    they are: unless --experts says otherwise, weights are stored as they were released, or, where this machine computes
    from that, bfloat16 in 12 bits without loss. A pull that was interrupted goes on where it stopped when the same
    command is run again.
    """
    output = output_flags.output()
    store = Store()
    if dry_run:
        return _show_plan(
            plan_pull(
                source,
                store=store,
                name=name,
                revision=revision,
                dtype=dtype,
                experts=experts,
                group=group,
                packs=_packs_unasked,
                force=force,
            ),
            output,
        )
    stored = pull_model(
        source,
        store=store,
        name=name,
        revision=revision,
        dtype=dtype,
        experts=experts,
        group=group,
        packs=_packs_unasked,
        force=force,
        progress=output,
        notify=output.note,
    )
    size = format_bytes(stored.manifest.stored_bytes)
    line = f"{stored.name}: {stored.manifest.architecture}, {_experts(stored.manifest)}, {size}"
    output.result(_details(stored, _read_quality(stored, output)), lines=[line], names=[stored.name])
    return None


def _packs_unasked() -> bool:
    from moeinf.kernels import computes_from_packed  # torch is loaded when this is asked, and not for --help

    return computes_from_packed()


def _show_plan(plan: PullPlan, output: Output) -> None:
    """Raises CapacityError, after all is said, when the pull would."""
    about = "about " if plan.is_estimate else ""
    rows = [
        ("name", plan.name),
        ("source", plan.source.repo),
        *([("architecture", plan.architecture)] if plan.architecture else []),
        *([("precision", plan.precision)] if plan.precision else []),
        ("download", f"{format_bytes(plan.download_bytes)} in {len(plan.files):,} files" if plan.files else "nothing"),
        *((f"  {file.path}", format_bytes(file.size)) for file in plan.files),
        ("store", f"{about}{format_bytes(plan.store_bytes)}" + (", here already" if plan.is_stored else "")),
        ("disk needed", f"{about}{format_bytes(plan.needed_bytes)} of {format_bytes(plan.free_bytes)} free"),
    ]
    data = {**asdict(plan), "download_bytes": plan.download_bytes, "has_room": plan.has_room}
    output.result(data, lines=columns(rows), names=[plan.name])
    if not plan.has_room:
        missing = format_bytes(plan.needed_bytes - plan.free_bytes)
        raise CapacityError(
            f"{plan.name} does not fit", hint=f"free {missing}, or set MOEINF_HOME to a folder on a larger disk"
        )


def list_models(output_flags: OutputFlags) -> None:
    """\b
    moeinf list
    moeinf list --json

    List the models here.
    """
    output = output_flags.output()
    store = Store()
    names = store.names()
    models: list[StoredModel] = []
    for name in names:
        try:
            models.append(store.open(name))
        except MoeinfError as error:
            told = str(error).removeprefix(f"{name}: ")
            output.warn(f"{name}: {told}" + (f" ({error.hint})" if error.hint else ""))
    for path in store.misnamed():
        output.warn(f"{path} has a name that no model may have: rename the folder, or remove it")
    unfinished = store.unfinished()
    broken = [name for name in store.without_manifest() if name not in unfinished]
    head = ("NAME", "ARCHITECTURE", "EXPERTS", "PRECISION", "SIZE", "SOURCE")
    rows = [_row(model) for model in models]
    output.result(
        {"models": [_summary(model) for model in models], "unfinished": sorted([*unfinished, *broken])},
        lines=columns([head, *rows]) if rows else (),
        names=names,
    )
    if not names:
        output.note("no models here yet; moeinf pull SOURCE brings one, and moeinf chat demo needs none")
    for name in unfinished:
        output.note(f"{name} is only partly here: run the command that makes it again to go on, or `moeinf rm {name}`")
    for name in broken:
        output.note(f"{name} has no {MANIFEST_NAME} and is no model: make it again with --force, or `moeinf rm {name}`")


def show(model: Model, output_flags: OutputFlags) -> None:
    """\b
    moeinf show mixtral-instruct
    moeinf show mixtral-instruct --json

    Say what a model is, where its bytes go, and what one token reads.
    """
    output = output_flags.output()
    stored = resolve(model, Store(), output)
    quality = _read_quality(stored, output)
    output.result(_details(stored, quality), lines=_show_lines(stored, quality), names=[stored.name])


def remove(
    models: Models,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    output_flags: OutputFlags = OutputFlags(),
) -> int:
    """\b
    moeinf rm mixtral-instruct
    moeinf rm -y mixtral-instruct olmoe

    Remove models, and what unfinished pulls of them left. Asks first.
    """
    output = output_flags.output()
    store = Store()
    names = list(dict.fromkeys(_name_to_remove(store, model) for model in models))
    if not (yes or output.confirm(f"remove {', '.join(names)}?", hint=shlex.join(["moeinf", "rm", "-y", *models]))):
        output.note("nothing was removed")
        return 1
    removed: list[str] = []
    try:
        for name in names:
            store.remove(name)
            removed.append(name)
    except MoeinfError:
        if removed:
            output.note(f"removed {', '.join(removed)}, and nothing else")
        raise
    output.result({"removed": names}, lines=[f"removed {name}" for name in names], names=names)
    return 0


def verify(model: Model, output_flags: OutputFlags) -> None:
    """\b
    moeinf verify mixtral-instruct
    moeinf verify mixtral-instruct --json

    Read every file of a model and compare it with what was written. Exit code 4 if anything is wrong.
    """
    output = output_flags.output()
    store = Store()
    stored = resolve(model, store, output)
    name, manifest = stored.name, stored.manifest
    problems = store.verify(name, output)
    good = f"{name}: {len(manifest.files)} files, {format_bytes(manifest.stored_bytes)}, all as they were written"
    output.result(
        {"model": name, "ok": not problems, "problems": [asdict(problem) for problem in problems]},
        lines=[str(problem) for problem in problems] or [good],
        names=[problem.path for problem in problems],
    )
    if problems:
        files = "1 file is" if len(problems) == 1 else f"{len(problems)} files are"
        command = ["moeinf", "pull", manifest.source.repo, "--name", name, *pull_options(manifest), "--force"]
        if name_calibration(manifest.precision):
            command = quantize_again(name, manifest)
        raise IntegrityError(f"{name}: {files} not as written", hint=shlex.join(command))


def _name_to_remove(store: Store, argument: str) -> str:
    """The name that `argument` means, also of what is damaged or only partly pulled."""
    if is_valid_name(argument) and (os.path.lexists(store.path(argument)) or argument in store.unfinished()):
        return argument
    return store.resolve(argument).name


def _row(stored: StoredModel) -> tuple[str, ...]:
    manifest = stored.manifest
    size = format_bytes(manifest.stored_bytes)
    return stored.name, manifest.architecture, _experts(manifest), manifest.precision, size, manifest.source.repo


def _experts(manifest: Manifest) -> str:
    """Like "32 x 8, top 2": layers, experts of a layer, and how many of them a token asks for."""
    sizes = "/".join(str(size) for size in sorted({layer.num_experts for layer in manifest.layers}))
    asked = "/".join(str(top_k) for top_k in sorted({layer.top_k for layer in manifest.layers}))
    return f"{len(manifest.layers)} x {sizes}, top {asked}"


def _summary(stored: StoredModel) -> dict[str, object]:
    manifest = stored.manifest
    return {
        "name": stored.name,
        "architecture": manifest.architecture,
        "model_type": manifest.model_type,
        "layers": len(manifest.layers),
        "experts": manifest.num_experts,
        "token_experts": manifest.token_experts,
        "dtype": manifest.dtype,
        "precision": manifest.precision,
        "stored_bytes": manifest.stored_bytes,
        "source": asdict(manifest.source),
    }


def _details(stored: StoredModel, quality: Quality | None) -> dict[str, object]:
    manifest = stored.manifest
    return {
        **_summary(stored),
        "path": str(stored.path),
        "files": len(manifest.files),
        "dense_bytes": manifest.dense_bytes,
        "dense_is_packed": bool(manifest.packed_dense),
        "experts_bytes": manifest.experts_bytes,
        "expert_bytes": manifest.layout.nbytes,
        "kv_token_bytes": manifest.kv_token_bytes,
        "kv_fixed_bytes": manifest.kv_fixed_bytes,
        "token_bytes": manifest.token_experts * manifest.layout.nbytes,
        "max_context": manifest.max_context,
        "quality": asdict(quality) if quality else None,
    }


def _read_quality(stored: StoredModel, output: Output) -> Quality | None:
    try:
        return read_quality(stored.path / TRACES_FOLDER / QUALITY_FILE, stored.manifest)
    except MoeinfError as error:
        output.warn(str(error))
        return None


def _quality_rows(stored: StoredModel, quality: Quality | None) -> list[tuple[str, str]]:
    if quality is not None:
        return [("quality", quality.text)]
    if stored.manifest.layout.is_exact:
        return []
    return [("quality", f"not measured: moeinf quality {stored.name} --against MODEL")]


def _show_lines(stored: StoredModel, quality: Quality | None) -> list[str]:
    manifest = stored.manifest
    experts, expert = format_bytes(manifest.experts_bytes), format_bytes(manifest.layout.nbytes)
    commit = f", commit {manifest.source.commit}" if manifest.source.commit else ""
    kv_cache = f"{format_bytes(1000 * manifest.kv_token_bytes)} per 1,000 tokens"
    if manifest.kv_fixed_bytes:
        kv_cache += f", and {format_bytes(manifest.kv_fixed_bytes)} in any case"
    dense = format_bytes(manifest.dense_bytes) + (", packed without loss" if manifest.packed_dense else "")
    token_bytes = format_bytes(manifest.token_experts * manifest.layout.nbytes)
    share = f"{manifest.token_experts / manifest.num_experts:.0%}"
    about = [("about", demo.NOTE)] if manifest.source.repo == demo.NAME else []
    rows = [
        ("name", stored.name),
        *about,
        ("source", manifest.source.repo + commit),
        ("architecture", f"{manifest.architecture} ({manifest.model_type})"),
        ("precision", f"{manifest.precision}, computed in {manifest.dtype}"),
        *_quality_rows(stored, quality),
        ("experts", f"{manifest.num_experts:,} ({_experts(manifest)})"),
        ("context", f"up to {manifest.max_context:,} tokens"),
        ("on disk", f"{format_bytes(manifest.stored_bytes)} in {len(manifest.files):,} files at {stored.path}"),
        ("  dense", dense),
        ("  experts", f"{experts}, {expert} each"),
        ("KV cache", kv_cache),
        ("a token reads", f"{manifest.token_experts:,} experts, {token_bytes}, {share} of them all"),
    ]
    return columns(rows)
