"""Settings and where they come from: command line over environment (`MOEINF_*`) over config file over default.

The config file is `$MOEINF_HOME/config.toml`; its keys are the fields of `EngineOptions`, spelled with `_` or `-`.
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from .errors import UsageError

__all__ = [
    "DEFAULT_POLICY",
    "FEW_PROGRAMS",
    "MANY_PROGRAMS",
    "EngineOptions",
    "home_path",
    "is_debug",
    "keep_programs",
    "kept_programs",
    "resolve_options",
    "tune_libraries",
]

DEFAULT_POLICY = "neighbour-use"
"""What the evidence picks (docs/policies.md)."""

MANY_PROGRAMS, FEW_PROGRAMS = 128, 32
"""Programs of matrix products that libraries keep. torch (through ideep) and oneDNN keep one of 0.4 MiB for every shape
that they met, 1024 of them if nobody says otherwise. Where torch computes the experts of prompts, each meets another
shape for each number of tokens, and attention that is not plain has products of its own; many are kept without a loss
in speed. Else few are: linear layers meet one number of rows per prompt (docs/experiments.md)."""

_SPINS = "GOMP_SPINCOUNT"
_PROGRAMS = {"LRU_CACHE_CAPACITY": 2, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": 1}
"""Of what torch keeps half is enough: what it has dropped, oneDNN still has."""

_CHOICES = {
    "prefetch": ("auto", "eam", "gate", "off"),
    "miss": ("auto", "fetch", "host"),
    "kernels": ("auto", "native", "torch", "triton"),
    "compile": ("auto", "on", "off"),
}


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What the engine is asked for, as typed: sizes and shares stay text until the model and the machine are known.

    `experts` is a number of slots or a share of all experts ("25%"); `context` counts tokens; None means "choose for
    me".
    """

    device: str = "auto"
    device_memory: str | None = None
    host_memory: str | None = None
    experts: str | None = None
    context: int | None = None
    policy: str = DEFAULT_POLICY
    prefetch: str = "auto"
    miss: str = "fetch"
    kernels: str = "auto"
    compile: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise UsageError(f"--{name} {value} is not known", hint=f"choose one of: {', '.join(known)}")
        for name in ("context", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name} must be 1 or more, not {value}")

    @property
    def computes_on_host(self) -> bool:
        """Whether the processor may compute experts that a GPU lacks."""
        return self.miss != "fetch"

    @property
    def compiles(self) -> bool:
        """Whether torch compiles decoder layers. With `auto` it does not: where it was measured, native kernels are
        faster (docs/experiments.md).
        """
        return self.compile == "on"


def home_path(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder that holds everything: `MOEINF_HOME`, else `~/.moeinf`."""
    return Path(environ.get("MOEINF_HOME") or Path.home() / ".moeinf").expanduser()


def tune_libraries(environ: MutableMapping[str, str] = os.environ) -> None:
    """Say in `environ` what suits an engine, where nobody has said otherwise, before torch is imported.

    Idle threads of OpenMP look out for work for milliseconds before they sleep, and keep the cores from the readers,
    from native threads and from other programs; so often they look is enough (docs/experiments.md).
    """
    environ.setdefault(_SPINS, "1000")


def kept_programs(wanted: int, environ: Mapping[str, str] = os.environ) -> int:
    """How many programs of matrix products libraries keep at most: as `environ` says, or as is `wanted`. Raises
    UsageError for what is no number.
    """
    return max(_number(environ.get(name, str(wanted // part)), name) for name, part in _PROGRAMS.items())


def keep_programs(wanted: int, environ: MutableMapping[str, str] = os.environ) -> None:
    """Say in `environ` that so many are to be kept, where nobody has said otherwise, before the first matrix product:
    then, and never again, it is read.
    """
    for name, part in _PROGRAMS.items():
        environ.setdefault(name, str(wanted // part))


def is_debug(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether `MOEINF_DEBUG=1` asks for tracebacks."""
    return environ.get("MOEINF_DEBUG", "") not in ("", "0")


def resolve_options(
    flags: Mapping[str, object], *, environ: Mapping[str, str] = os.environ, home: Path | None = None
) -> EngineOptions:
    """Engine options from `flags` (None: not given), then the environment, then the config file, then the defaults.

    Raises UsageError for a value that cannot be, naming where it came from.
    """
    config = _read_config((home or home_path(environ)) / "config.toml")
    values: dict[str, object] = {}
    for field in dataclasses.fields(EngineOptions):
        variable = f"MOEINF_{field.name.upper()}"
        found = [
            (flags.get(field.name), f"--{field.name.replace('_', '-')}"),
            (environ.get(variable) or None, variable),
            (config.pop(field.name, None), "config.toml"),
        ]
        given = [(value, origin) for value, origin in found if value is not None]
        if given:
            values[field.name] = _convert(field.name, *given[0])
    if config:
        raise UsageError(
            f"config.toml has unknown keys: {', '.join(sorted(config))}", hint="see docs/cli.md for the names"
        )
    return EngineOptions(**values)  # type: ignore[arg-type]  # _convert made every field what it must be


def _convert(name: str, value: object, origin: str) -> object:
    return _number(value, origin) if name in ("context", "threads") else str(value)


def _number(value: object, origin: str) -> int:
    try:
        return int(str(value))
    except ValueError:
        raise UsageError(f"{origin}: {value!r} is not a whole number") from None


def _read_config(path: Path) -> dict[str, object]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return {key.replace("-", "_"): value for key, value in tomllib.loads(text).items()}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from error
