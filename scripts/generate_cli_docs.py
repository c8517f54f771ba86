"""Write docs/cli.md, the reference of the command line, from the commands: `python scripts/generate_cli_docs.py`."""

# ruff: noqa: E501  # rows of tables are lines

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from typer.main import get_command

from moeinf.cli import app
from moeinf.cli.chat import COMMANDS

__all__ = ["PATH", "render"]

PATH = Path(__file__).parents[1] / "docs" / "cli.md"

_HEAD = """\
# The command line

<!-- Written by scripts/generate_cli_docs.py. Change the commands, then run it again. -->

A model argument is an alias (`mixtral`), a hub id (`org/name` or `org/name@revision`), a folder, or the name of a model
that is pulled already. A SIZE is written like `900MiB`, `12GB` or `50%`. Data goes to stdout, and progress, notes,
warnings and statistics to stderr. `--json` prints one object with `"schema": 1`; of models, `-q` prints names only.
Only `pull`, `trace`, `quality`, `bench` and `quantize --calibrate` with a data set of the hub, and `profile` with a model
of the hub that is not here, open a connection.
"""

_TAIL = """\
## Settings

An engine option (`--device` to `--threads` above) that is not on the command line is taken from the environment
(`MOEINF_HOST_MEMORY=8GiB`), else from `$MOEINF_HOME/config.toml` (`host-memory = "8GiB"`), else it has its default.

| option | default | |
|---|---|---|
| `--device` | `auto` | the first GPU that torch can use and the model fits, or else the processor ([gpu.md](gpu.md)) |
| `--device-memory` | what is free, less a twentieth | of the GPU |
| `--host-memory` | what is available, less 1 GiB | everything but Python and the libraries; behind a GPU, its experts alone ([planning.md](planning.md#the-plan)) |
| `--experts` | as many as fit | slots, a number or a share of all experts |
| `--context` | 4096 | less where the model was made for less, the KV cache would take more than an eighth of the memory, or the rest would not fit |
| `--policy` | `neighbour-use` | [policies.md](policies.md) |
| `--prefetch` | `auto` | `gate`: the next layer's router, asked early; `eam`: what past tokens and requests chose; `auto`: what pays, found by trying; `off` ([architecture.md](architecture.md#the-life-of-one-token)) |
| `--miss` | `fetch` | [gpu.md](gpu.md#computed-where-it-is) |
| `--kernels` | `auto` | `native` where it gives torch's results to the last bit, else `torch`; `triton` on a GPU ([kernels.md](kernels.md)) |
| `--compile` | `auto` | compiles nothing; `on` does ([kernels.md](kernels.md#compiled-layers)) |
| `--threads` | one per core | 512 at most |

| variable | what it does |
|---|---|
| `MOEINF_HOME` | the folder of models, data sets, saved chats, history and `config.toml`; `~/.moeinf` without it |
| `MOEINF_DEBUG` | `1` shows where an error comes from |
| `NO_COLOR` | no colours |
| `HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_OFFLINE` | the hub: who you are, where it is, and that it is not to be asked |

## Exit codes

| code | meaning |
|---|---|
| 0 | fine |
| 1 | unexpected, or nothing was done because the answer was no |
| 2 | the command line makes no sense |
| 3 | the model or data set is unknown, or the model not pulled |
| 4 | bytes on disk are not what they should be |
| 5 | not enough disk or memory |
| 6 | network or permission at the hub |
| 7 | not supported, or refused for safety |
| 130 | interrupted with Ctrl-C |
| 141 | nobody reads the output any more |
| 143 | terminated |
"""


def render() -> str:
    """The whole page."""
    group: Any = get_command(app)
    commands = [_command(name, command) for name, command in group.commands.items()]
    return "\n".join([_HEAD, *commands, _TAIL])


def _command(name: str, command: Any) -> str:
    examples, _, text = inspect.cleandoc(command.help).removeprefix("\b\n").partition("\n\n")
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    options = [param for param in command.params if param.param_type_name == "option"]
    lines = [f"## moeinf {name}", "", "```sh", examples, "```", "", text, ""]
    lines += _table("argument", [(_argument(param), param.help) for param in arguments])
    lines += _table("option", [(_option(param), param.help) for param in options])
    if name == "chat":
        lines += _table("in a chat", [(command.usage, command.help) for command in COMMANDS])
    return "\n".join(lines)


def _table(head: str, rows: list[tuple[str, str]]) -> list[str]:
    if not rows:
        return []
    cells = [(f"`{left}`".replace("|", "\\|"), right) for left, right in rows]
    return [f"| {head} | |", "|---|---|", *(f"| {left} | {right} |" for left, right in cells), ""]


def _argument(param: Any) -> str:
    return str(param.metavar) if param.required else f"[{param.metavar}]"


def _option(param: Any) -> str:
    names = ", ".join(sorted(param.opts, key=len))
    return names if param.is_flag else f"{names} {param.metavar}"


if __name__ == "__main__":
    PATH.write_text(render(), encoding="utf-8")
