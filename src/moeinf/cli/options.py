"""Options that several commands share, and completion of model names.

A group of options is a dataclass; a command asks for the group in one parameter, and `with_groups` gives the command
line one option per field. Knows what is typed, not what it does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from moeinf import demo
from moeinf.errors import MoeinfError, UsageError
from moeinf.policies import POLICIES
from moeinf.settings import EngineOptions, resolve_options

from .output import Mode, Output

if TYPE_CHECKING:
    from moeinf.generation import Sampling

__all__ = [
    "EngineFlags",
    "ExpertKind",
    "Group",
    "Model",
    "Models",
    "OutputFlags",
    "Quiet",
    "SamplingFlags",
    "SourceModel",
    "Stats",
    "source_or_stored_names",
    "with_groups",
]


def stored_names(incomplete: str) -> list[str]:
    """`demo`, and names of models in the store, that start with `incomplete`; an unreadable store has none."""
    from moeinf.store import Store

    try:
        names = Store().names()
    except (MoeinfError, OSError):
        names = []
    return [name for name in sorted({demo.NAME, *names}) if name.startswith(incomplete)]


def source_names(incomplete: str) -> list[tuple[str, str]]:
    """Aliases of the catalog that start with `incomplete`, each with a line about the model."""
    from moeinf.catalog import entries

    return [(entry.alias, entry.description) for entry in entries() if entry.alias.startswith(incomplete)]


def source_or_stored_names(incomplete: str) -> list[str]:
    """What `stored_names` and `source_names` know, for commands that need not have the model here."""
    return sorted({*stored_names(incomplete), *(alias for alias, _ in source_names(incomplete))})


_MODEL_HELP = "`demo`, or a pulled model: its name, alias, hub id (org/name) or the folder it came from."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP, autocompletion=stored_names)]
Models = Annotated[list[str], typer.Argument(metavar="MODEL...", help=_MODEL_HELP, autocompletion=stored_names)]
SourceModel = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="An alias, a hub id (org/name or org/name@revision) or a folder.",
        autocompletion=source_names,
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes; of models, names only.")]
ExpertKind = Annotated[
    str, typer.Option("--experts", metavar="lossless|int8|int4", help="How experts are to be stored.")
]
Group = Annotated[
    int | None, typer.Option(metavar="32|64", help="Weights of int8 experts that share a factor; by default 64.")
]
Stats = Annotated[bool, typer.Option("--stats", help="After an answer, say on stderr what it cost.")]


@dataclass(frozen=True, slots=True)
class OutputFlags:
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False
    quiet: Quiet = False

    def output(self) -> Output:
        """Raises UsageError when both are given."""
        if self.json and self.quiet:
            raise UsageError("--json and --quiet exclude each other", hint="leave one of them out")
        return Output(Mode.JSON if self.json else Mode.QUIET if self.quiet else Mode.HUMAN)


@dataclass(frozen=True, slots=True)
class EngineFlags:
    """The engine options as typed; None leaves the choice to environment, config file and default."""

    device: Annotated[str | None, typer.Option(metavar="auto|cpu|cuda[:N]", help="Where the model computes.")] = None
    device_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory to use on the GPU, like 12GB or 50%.")
    ] = None
    host_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory to use on the host: weights, KV cache, workspace and experts."),
    ] = None
    experts: Annotated[
        str | None, typer.Option(metavar="N|P%", help="Experts to keep on the compute device, instead of a size.")
    ] = None
    context: Annotated[int | None, typer.Option(metavar="N", help="Tokens that a conversation may have.")] = None
    policy: Annotated[
        str | None, typer.Option(metavar="|".join(sorted(POLICIES)), help="Which expert makes room for another.")
    ] = None
    prefetch: Annotated[
        str | None,
        typer.Option(metavar="auto|eam|gate|off", help="What foresees the experts that are fetched early."),
    ] = None
    miss: Annotated[
        str | None,
        typer.Option(metavar="auto|fetch|host", help="What is done about experts in host memory that a GPU lacks."),
    ] = None
    kernels: Annotated[
        str | None, typer.Option(metavar="auto|native|torch|triton", help="What computes the experts.")
    ] = None
    compile: Annotated[
        str | None,
        typer.Option(metavar="auto|on|off", help="Whether torch compiles what lies between experts; auto does not."),
    ] = None
    threads: Annotated[int | None, typer.Option(metavar="N", help="Threads that compute.")] = None

    def resolve(self) -> EngineOptions:
        return resolve_options(asdict(self))


@dataclass(frozen=True, slots=True)
class SamplingFlags:
    """What `moeinf.generation.Sampling` takes; None leaves the choice to the model."""

    max_tokens: Annotated[int | None, typer.Option(metavar="N", help="Tokens an answer may have.")] = None
    temperature: Annotated[
        float | None, typer.Option(metavar="T", help="0 takes the likeliest token; higher is more varied.")
    ] = None
    top_p: Annotated[
        float | None, typer.Option(metavar="P", help="Choose among the likeliest tokens that make up this share.")
    ] = None
    top_k: Annotated[int | None, typer.Option(metavar="K", help="Choose among this many likeliest tokens.")] = None
    seed: Annotated[int | None, typer.Option(metavar="N", help="The same seed gives the same answer.")] = None

    def resolve(self) -> Sampling:
        from moeinf.generation import Sampling

        return Sampling(**asdict(self))


def with_groups(command: Callable[..., int | None]) -> Callable[..., int | None]:
    """`command` with each parameter that is a group of options replaced by one parameter per option."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if name != "return" and is_dataclass(hint)}
    signature = inspect.signature(command)

    def call(**values: Any) -> int | None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        return command(**values)

    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        expanded = _parameters(groups[name]) if name in groups else [parameter.replace(annotation=hints[name])]
        parameters += [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in expanded]
    call.__doc__ = command.__doc__
    call.__name__ = command.__name__
    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {each.name: each.annotation for each in parameters}
    return call


def _parameters(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(group)
    ]
