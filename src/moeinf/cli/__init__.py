"""The command line: what the commands are called, and what their ends mean to a shell.

`main` is the one place that turns errors into exit codes. The commands parse, call the library, and render.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib import metadata
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from moeinf.errors import MoeinfError, UsageError
from moeinf.settings import is_debug

from .bench import bench
from .chat import chat
from .models import list_models, pull, remove, show, verify
from .options import with_groups
from .output import BROKEN_PIPE, INTERRUPTED, Output, unexpected
from .profile import profile
from .quantize import quality, quantize
from .run import run
from .simulate import simulate
from .trace import trace

__all__ = ["app", "main"]

TERMINATED = 143

_COMMAND_LINE_ERROR: Any = typer.BadParameter.__base__  # typer has no public name for it

app = typer.Typer(
    name="moeinf",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
app.command("pull", short_help="Bring a model here, ready to run.")(with_groups(pull))
app.command("list", short_help="The models here.")(with_groups(list_models))
app.command("show", short_help="What a model is, and where its bytes go.")(with_groups(show))
app.command("rm", short_help="Remove models.")(with_groups(remove))
app.command("verify", short_help="Check every byte of a model.")(with_groups(verify))
app.command("quantize", short_help="Make a model with smaller experts.")(with_groups(quantize))
app.command("quality", short_help="What smaller experts cost in quality.")(with_groups(quality))
app.command("run", short_help="Print one answer.")(with_groups(run))
app.command("chat", short_help="Talk to a model.")(with_groups(chat))
app.command("profile", short_help="Measure this machine; with a model, say how it would run.")(with_groups(profile))
app.command("trace", short_help="Record which experts a model asks for.")(with_groups(trace))
app.command("simulate", short_help="Replay traces through cache policies.")(with_groups(simulate))
app.command("bench", short_help="Measure a model, beside what else could run it.")(with_groups(bench))


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line (`sys.argv` when `args` is None) and return its exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # __main__ has seen to that
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _open_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an answer may hold what the locale cannot show
    code = _run(args)
    if code == INTERRUPTED:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one more Ctrl-C would break into Python's own end
    return code


def _open_streams() -> None:
    """Give a process that was started without standard streams some that lead nowhere."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  # as long as the process


def _run(args: Sequence[str] | None) -> int:
    try:
        return _dispatch(args)
    except KeyboardInterrupt:
        return INTERRUPTED
    except MoeinfError as error:
        return _report(error)
    except Exception as error:
        return _report(unexpected(error))


def _dispatch(args: Sequence[str] | None) -> int:
    try:
        return app(args, prog_name="moeinf", standalone_mode=False) or 0
    except SystemExit as end:  # click's, where nobody reads the help that it prints
        if isinstance(end.__context__, BrokenPipeError):
            raise SystemExit(BROKEN_PIPE) from None
        raise
    except _COMMAND_LINE_ERROR as error:
        command = error.ctx.command_path if error.ctx else "moeinf"
        raise UsageError(error.format_message().rstrip("."), hint=f"{command} --help") from error


def _report(error: MoeinfError) -> int:
    if is_debug():
        traceback.print_exc()
    Output().error(error)
    return error.exit_code


def _terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(TERMINATED)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"moeinf {metadata.version('moeinf')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def moeinf(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """\b
    moeinf pull mixtral-instruct
    moeinf chat mixtral-instruct

    Run Mixture-of-Experts language models that do not fit in memory.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
