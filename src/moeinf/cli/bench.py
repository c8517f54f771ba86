"""`moeinf bench`: measure a model, beside what a person would run instead."""

from __future__ import annotations

import csv
import io
import itertools
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeinf import demo
from moeinf.errors import UsageError
from moeinf.policies import POLICIES
from moeinf.pull import resolve
from moeinf.store import Store
from moeinf.systems import RIVALS, installed
from moeinf.units import format_bytes, format_seconds

from .options import EngineFlags, Model, OutputFlags
from .output import Output, columns
from .simulate import check_plot, check_writable

if TYPE_CHECKING:
    from moeinf.bench import Report
    from moeinf.scores import Score
    from moeinf.settings import EngineOptions

__all__ = ["bench"]


def bench(
    model: Model,
    against: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help=f"What to compare with, of: {', '.join(RIVALS)}. Each is a process of its own, in turn with moeinf, "
            "on the same weights, and where the system allows it in the same memory limit.",
        ),
    ] = "",
    gguf: Annotated[Path | None, typer.Option(metavar="FILE", help="What llama.cpp reads.")] = None,
    dataset: Annotated[
        str, typer.Option(metavar="NAME|FILE|HUB-ID", help="Where prompts come from, as for `moeinf trace`.")
    ] = "default-held-out",
    prompts: Annotated[int, typer.Option(metavar="N", help="Prompts to measure.")] = 4,
    prompt_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens of each prompt, at most.")] = 128,
    tokens: Annotated[int, typer.Option(metavar="N", help="New tokens for each prompt.")] = 32,
    repeat: Annotated[int, typer.Option(metavar="N", help="Processes of each kind.")] = 3,
    cold: Annotated[
        bool, typer.Option("--cold", help="Measure processes that have answered nothing yet; the default.")
    ] = False,
    warm: Annotated[
        bool, typer.Option("--warm", help="Measure processes that have answered as many other prompts before.")
    ] = False,
    temperature: Annotated[
        float, typer.Option(metavar="T", min=0, help="0 takes the likeliest token; else the same seed for all.")
    ] = 0.0,
    replay: Annotated[
        Path | None,
        typer.Option(metavar="TRACE", help="Let a recorded trace choose the experts, in the routers' place."),
    ] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write a line per row too.")] = None,
    md: Annotated[Path | None, typer.Option("--md", metavar="FILE", help="Write the table as Markdown too.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the speeds too, into a .png, .svg or .pdf.")
    ] = None,
    engine_flags: EngineFlags = EngineFlags(),
    output_flags: OutputFlags = OutputFlags(),
) -> int:
    """\b
    moeinf bench demo
    moeinf bench demo --against transformers,accelerate,mmap --experts 10%,25%,50% --plot bench.png

    Measure time to first token, time per token, hit rate and memory, how near that is to what the machine allows, and
    how long others take within the same memory. --experts, --policy and --prefetch take several values, with commas
    between them: every combination is measured. docs/bench.md says what is measured how.
    """
    from moeinf import datasets
    from moeinf.bench import Wishes
    from moeinf.bench import bench as measure

    output = output_flags.output()
    for path, option in ((csv_file, "--csv"), (md, "--md")):
        if path is not None:
            check_writable(path, option)
    if plot is not None:
        check_plot(plot)
    rivals = _rivals(against, gguf, output)
    stored = resolve(model, Store(), output)
    if stored.manifest.source.repo == demo.NAME:
        output.note(demo.NOTE)
    wishes = Wishes(
        engines=_grid(engine_flags),
        rivals=rivals,
        texts=[each.text for each in datasets.read_prompts(dataset, 2 * prompts, progress=output, notify=output.note)]
        if prompts > 0
        else [],
        prompts=prompts,
        prompt_tokens=prompt_tokens,
        tokens=tokens,
        repeat=repeat,
        starts=[name for name, is_asked in (("cold", cold or not warm), ("warm", warm)) if is_asked],
        temperature=temperature,
        gguf=gguf,
        trace=replay,
    )
    report = measure(stored, wishes, progress=output, notify=output.warn)
    written = _write(report, csv_file, md, plot)
    output.result(
        {**report.to_dict(), **{option: str(path) for option, path in written.items()}},
        lines=[*_lines(report), *map(str, written.values())],
        names=[str(path) for path in written.values()] or None,
    )
    return 0 if any(score.runs for score in report.scores if score.system == "moeinf") else 1


def _rivals(against: str, gguf: Path | None, output: Output) -> list[str]:
    """The rivals that can be run. Raises UsageError when none of those that were asked for can."""
    names = list(dict.fromkeys(name.strip() for name in against.split(",") if name.strip()))
    for name in names:
        if name not in RIVALS:
            raise UsageError(f"--against {name} is not known", hint=f"choose some of: {', '.join(RIVALS)}")
    if "llama.cpp" in names and gguf is None:
        raise UsageError("--against llama.cpp needs the model as a GGUF file", hint="give it with --gguf FILE")
    if "llama.cpp" not in names and gguf is not None:
        raise UsageError("--gguf is what llama.cpp reads", hint="add --against llama.cpp")
    if gguf is not None and not gguf.is_file():
        raise UsageError(f"--gguf {gguf}: there is no such file")
    missing = [name for name in names if not installed(name)]
    for name in missing:
        if len(missing) == len(names):
            raise UsageError(f"nothing is left to compare with: {name} is not installed", hint=RIVALS[name][1])
        output.warn(f"{name} is left out: it is not installed ({RIVALS[name][1]})")
    return [name for name in names if name not in missing]


def _grid(flags: EngineFlags) -> list[EngineOptions]:
    """Every combination of the values of --experts, --policy and --prefetch."""
    values = [_several(getattr(flags, name)) for name in ("experts", "policy", "prefetch")]
    found = []
    for experts, policy, prefetch in itertools.product(*values):
        options = replace(flags, experts=experts, policy=policy, prefetch=prefetch).resolve()
        if options.policy not in POLICIES:
            raise UsageError(
                f"policy {options.policy!r} is not known", hint=f"choose some of: {', '.join(sorted(POLICIES))}"
            )
        found.append(options)
    return found


def _several(text: str | None) -> list[str | None]:
    parts = [part.strip() for part in (text or "").split(",")]
    return list(dict.fromkeys(part for part in parts if part)) or [None]


# What was measured, for people


def _lines(report: Report) -> list[str]:
    lines = [_title(report), ""]
    for experts in dict.fromkeys(score.experts for score in report.scores):
        scores = [score for score in report.scores if score.experts == experts]
        lines += [_budget(scores[0]), *columns(_rows(scores)), *_failures(scores), ""]
    return [*lines, _verdict(report)]


def _title(report: Report) -> str:
    wishes = report.wishes
    title = f"{report.model}: {report.prompts} prompts, {wishes.tokens} new tokens each, {wishes.repeat} times"
    if report.random:
        title += f" · random weights in the shapes of {report.random}"
    if report.quantization:
        title += f" · {report.quantization}"
    if report.replay:
        title += f" · REPLAY of the routing of {report.replay['model']}"
        if report.replay["layers"] > report.replay["of_layers"]:
            title += f", {report.replay['of_layers']} layers repeated to make {report.replay['layers']}"
    return title


def _budget(score: Score) -> str:
    experts = f"{score.experts} of the experts, " if score.experts else ""
    return f"{experts}{format_bytes(score.budget)} for the model, {format_bytes(score.limit)} with the libraries"


def _verdict(report: Report) -> str:
    same = "all produced the same tokens" if report.same_tokens else "NOT all produced the same tokens"
    if not any(score.runs for score in report.scores):
        same = "nothing was measured"
    limit = "the limit was enforced" if not report.unenforced else "the limit was NOT enforced"
    known = f"; {report.known_prompts} of the prompts were KNOWN from a trace" if report.known_prompts else ""
    return f"{same}; {limit}{known}"


_HEAD = ("SYSTEM", "MS/TOKEN", "MIN-MAX", "P95", "TOKENS/S", "FIRST TOKEN", "PROMPT/S", "HITS", "OF BELADY",
         "MISSED/TOKEN", "STALLED", "PEAK", "BOUND", "ETA", "TOKENS")  # fmt: skip


def _rows(scores: list[Score]) -> list[tuple[str, ...]]:
    return [_HEAD, *(_row(score) for score in scores if score.runs)]


def _row(score: Score) -> tuple[str, ...]:
    """The cells of a system that has run."""
    spreads = (score.tpot_s, score.decode_tokens_per_s, score.ttft_s, score.prefill_tokens_per_s)
    tpot, speed, ttft, prefill = (spread for spread in spreads if spread is not None)
    bound = score.bound
    return (
        score.label,
        _ms(tpot.median),
        f"{_ms(tpot.min)}-{_ms(tpot.max)}",
        _ms(score.token_s(0.95)),
        f"{speed.median:.2f}",
        format_seconds(ttft.median),
        f"{prefill.median:.1f}",
        _or_dash(score.hit_rate, _percent),
        _or_dash(score.belady_share, lambda share: f"{share:.2f} of {_or_dash(score.belady_hit_rate, _percent)}"),
        _or_dash(score.per_token("missed_bytes"), lambda size: format_bytes(int(size))),
        _or_dash(score.per_token("stall_s"), _ms),
        format_bytes(score.peak_rss),
        f"{_ms(bound.tpot_s)} {bound.by}" if bound else "-",
        _or_dash(score.eta, lambda share: f"{share:.2f}"),
        "same" if score.same_tokens else "OTHER",
    )


def _failures(scores: list[Score]) -> list[str]:
    return [f"{score.label}: {score.error}" for score in scores if score.error]


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.1f}"


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _or_dash(value: float | None, show: Any) -> str:
    return "-" if value is None else str(show(value))


# Files


def _write(report: Report, csv_file: Path | None, md: Path | None, plot: Path | None) -> dict[str, Path]:
    """Write the files that were asked for; returns them by option."""
    from moeinf.files import publish

    found: dict[str, Path] = {}
    for option, path, make in (("csv", csv_file, _csv), ("md", md, _markdown), ("plot", plot, _picture)):
        if path is not None:
            publish(path, [make(report, path)])
            found[option] = path
    return found


def _csv(report: Report, _path: Path) -> bytes:
    """A line per score; what holds several values becomes several columns."""
    rows = [dict(_flat(run)) for run in report.to_dict()["runs"]]
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{name}.")
        elif not isinstance(value, list):
            found.append((f"{prefix}{name}", value))
    return found


def _markdown(report: Report, _path: Path) -> bytes:
    machine = report.machine
    lines = [f"{_title(report)}", "", f"`{shlex.join(['moeinf', *sys.argv[1:]])}`, {machine['measured_at']},"]
    lines += [f"{machine['processor']}, {machine['cores']} cores, {format_bytes(machine['memory'])}", ""]
    for experts in dict.fromkeys(score.experts for score in report.scores):
        scores = [score for score in report.scores if score.experts == experts]
        head, *rows = _rows(scores)
        table = [head, ("---",) * len(head), *rows]
        lines += [_budget(scores[0]), "", *(f"| {' | '.join(row)} |" for row in table), ""]
        lines += [line for failure in _failures(scores) for line in (failure, "")]
    return ("\n".join([*lines, _verdict(report)]) + "\n").encode()


def _picture(report: Report, path: Path) -> bytes:
    from moeinf.figures import speeds

    budgets = dict.fromkeys(score.experts for score in report.scores)
    groups = []
    for experts in budgets:
        scores = [score for score in report.scores if score.experts == experts and score.runs]
        name = f"{experts or 'all that fits'}\n{format_bytes(scores[0].limit)}" if scores else f"{experts}"
        groups.append((name, [(s.label, speed, s.eta) for s in scores if (speed := s.decode_tokens_per_s)]))
    return speeds(groups, _title(report), kind=path.suffix[1:])
