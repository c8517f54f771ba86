"""Settings and where they come from: command line over environment (`MOEINF_*`) over config file over default.

The config file is `$MOEINF_HOME/config.toml`; its keys are the fields of `EngineOptions`, spelled with `_` or `-`.
"""

from __future__ import annotations

import dataclasses
import os
import re
import stat
import tomllib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from .errors import MoeinfError, UsageError
from .units import parse_size

__all__ = [
    "DEFAULT_POLICY",
    "FEW_PROGRAMS",
    "MANY_PROGRAMS",
    "TRANSFORMERS",
    "EngineOptions",
    "attend_alike",
    "check_transformers",
    "home_path",
    "is_debug",
    "keep_programs",
    "kept_programs",
    "resolve_options",
    "tune_libraries",
]

DEFAULT_POLICY = "neighbour-use"
"""What the evidence picks (docs/policies.md)."""

TRANSFORMERS = "transformers>=5.21,<5.25"
"""What pyproject.toml asks for. In 5.21 quantizers and conversions became what conversion.py runs; later versions than
5.24 were not tried, and 5.24 alone renamed what all models are called with.
"""

MANY_PROGRAMS, FEW_PROGRAMS = 128, 32
"""Programs of matrix products that libraries keep. torch (through ideep) and oneDNN keep one of 0.4 MiB for every shape
that they met, 1024 of them if nobody says otherwise. Where torch computes the experts of prompts, each meets another
shape for each number of tokens, and attention that is not plain has products of its own; many are kept without a loss
in speed. Else few are: linear layers meet one number of rows per prompt (docs/experiments.md)."""

_CONFIG = "config.toml"
_SPINS = "GOMP_SPINCOUNT"
_OWN_ATTENTION = "TORCH_CUDNN_SDPA_DEPRIORITIZED"
_TORCHS = "LRU_CACHE_CAPACITY"
_PROGRAMS = {_TORCHS: 2, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": 1}
"""Of what torch keeps half is enough: what it has dropped, oneDNN still has."""

_CHOICES = {
    "prefetch": ("auto", "eam", "gate", "off"),
    "miss": ("auto", "fetch", "host"),
    "kernels": ("auto", "native", "torch", "triton"),
    "compile": ("auto", "on", "off"),
}
_SIZES = ("device_memory", "host_memory")
_MOST = {"context": 1 << 30, "threads": 512}
_EXPERTS = re.compile(r"\s*(\d+|(\d+\.?\d*|\.\d+)%)\s*")


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
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if value is None:
                object.__setattr__(self, name, field.default)
            else:
                object.__setattr__(self, name, _convert(name, value, _flag(name)))
                _check(name, getattr(self, name), _flag(name))

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
    """The folder that holds everything: `MOEINF_HOME`, else `~/.moeinf`. Raises UsageError for what cannot be one."""
    try:
        path = Path(environ.get("MOEINF_HOME") or Path.home() / ".moeinf").expanduser()
    except RuntimeError as error:
        raise UsageError(f"there is no home: {error}", hint="set MOEINF_HOME to a folder") from error
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        if path.is_symlink():
            raise UsageError(f"MOEINF_HOME is {path}, a link to what is not there", hint="make that folder") from None
        return path
    except OSError as error:
        raise UsageError(
            f"MOEINF_HOME is {path}, which cannot be used: {error.strerror}", hint="set it to a folder that can"
        ) from error
    if not is_folder:
        raise UsageError(f"MOEINF_HOME is {path}, which is no folder", hint="set it to one")
    return path


def tune_libraries(environ: MutableMapping[str, str] = os.environ) -> None:
    """Say in `environ` what suits an engine, where nobody has said otherwise, before torch is imported.

    Idle threads of OpenMP look out for work for milliseconds before they sleep, and keep the cores from the readers,
    from native threads and from other programs; so often they look is enough (docs/experiments.md).
    """
    environ.setdefault(_SPINS, "1000")
    attend_alike(environ)


def attend_alike(environ: MutableMapping[str, str]) -> None:
    """Say in `environ` that torch's own attention goes before cuDNN's on a GPU, where nobody has said otherwise, before
    torch is first asked for attention: cuDNN makes a plan for each number of tokens (docs/gpu.md).
    """
    environ.setdefault(_OWN_ATTENTION, "1")


def check_transformers() -> None:
    """Refuse a version of transformers that is too old, before what it lacks is used. Raises MoeinfError."""
    found = metadata.version("transformers")
    version, oldest = (tuple(map(int, re.findall(r"\d+", text)[:2])) for text in (found, TRANSFORMERS))
    if version < oldest:
        raise MoeinfError(f"transformers {found} is too old for moeinf", hint=f"pip install '{TRANSFORMERS}'")


def kept_programs(wanted: int, environ: Mapping[str, str] = os.environ) -> int:
    """How many programs of matrix products libraries keep at most: as `environ` says, or as is `wanted`. Raises
    UsageError for what is no number, or none that torch can do with.
    """
    kept = {name: _number(environ.get(name, str(wanted // part)), name) for name, part in _PROGRAMS.items()}
    if kept[_TORCHS] < 1:
        raise UsageError(f"{_TORCHS} must be 1 or more, not {kept[_TORCHS]}")
    return max(kept.values())


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
    config = _read_config((home or home_path(environ)) / _CONFIG)
    values: dict[str, object] = {}
    for field in dataclasses.fields(EngineOptions):
        variable = f"MOEINF_{field.name.upper()}"
        found = [
            (flags.get(field.name), _flag(field.name)),
            (environ.get(variable) or None, variable),
            (config.pop(field.name, None), _CONFIG),
        ]
        given = [(value, origin) for value, origin in found if value is not None]
        if given:
            value, origin = given[0]
            values[field.name] = _convert(field.name, value, origin)
            _check(field.name, values[field.name], origin)
    if config:
        raise UsageError(
            f"{_CONFIG} has unknown keys: {', '.join(sorted(config))}", hint="see docs/cli.md for the names"
        )
    return EngineOptions(**values)  # type: ignore[arg-type]  # _convert made every field what it must be


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _convert(name: str, value: object, origin: str) -> object:
    if name in _MOST:
        return _number(value, f"{origin}: {name}" if origin == _CONFIG else origin)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UsageError(f"{origin}: {name} = {value!r} is no text and no number")
    return str(value)


def _check(name: str, value: Any, origin: str) -> None:
    """Raise UsageError for a value that no model and no machine could do with, and call it by its origin."""
    if value is None:
        return
    what = f"{origin}: {name}" if origin == _CONFIG else origin
    if name in _CHOICES and value not in _CHOICES[name]:
        raise UsageError(f"{what} {value} is not known", hint=f"choose one of: {', '.join(_CHOICES[name])}")
    if name in _MOST and value < 1:
        raise UsageError(f"{what} must be 1 or more, not {value}")
    if name in _MOST and value > _MOST[name]:
        raise UsageError(f"{what} must be {_MOST[name]} or less, not {value}")
    if name == "experts" and not _EXPERTS.fullmatch(value):
        raise UsageError(f"{what} {value!r} is neither a number nor a share", hint="write it like 256 or 25%")
    if name in _SIZES:
        try:
            parse_size(value, whole_bytes=1)
        except UsageError as error:
            raise UsageError(f"{what} {error}", hint=error.hint) from None


def _number(value: object, origin: str) -> int:
    try:
        return int(str(value))
    except ValueError:
        raise UsageError(f"{origin}: {value!r} is not a whole number") from None


def _read_config(path: Path) -> dict[str, object]:
    try:
        config = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from error
    values: dict[str, object] = {}
    for key, value in config.items():
        if (name := key.replace("-", "_")) in values:
            raise UsageError(f"{path} has {name} twice, spelled with - and with _", hint="leave one of them out")
        values[name] = value
    return values
