"""All output of the command line: data on stdout; notes, warnings, errors, questions and progress on stderr.

Owns the three modes and what a terminal is. Knows nothing of models; `progress` knows how a step is drawn.
"""

from __future__ import annotations

import codecs
import errno
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import IO

from moeinf.errors import CapacityError, MoeinfError, UsageError
from moeinf.progress import NO_PROGRESS, Task, Unit

from .progress import Bars, LineTask

__all__ = ["BROKEN_PIPE", "INTERRUPTED", "Mode", "Output", "columns", "unexpected"]

BROKEN_PIPE = 141
"""Exit code when nobody reads what we write: what a program has that a SIGPIPE ends."""
INTERRUPTED = 130
"""Exit code after Ctrl-C."""

_UNSAFE = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}
_UNSAFE[ord("\r")] = ""
_STYLES = {"error": "31;1", "warning": "33;1", "hint": "36;1"}


class Mode(Enum):
    HUMAN = "human"
    JSON = "json"
    QUIET = "quiet"


class Output:
    """Where a command writes. Implements `moeinf.progress.Progress`.

    On a terminal, control characters in what models and hubs say are replaced: they could move the cursor or worse.
    """

    def __init__(
        self,
        mode: Mode = Mode.HUMAN,
        *,
        stdin: IO[str] | None = None,
        stdout: IO[str] | None = None,
        stderr: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.mode = mode
        self._stdin = stdin or sys.stdin
        self._stdout = stdout or sys.stdout
        self._stderr = stderr or sys.stderr
        self._clock = clock
        self._bars = Bars(self._stderr)
        self._is_mid_line = False

    @property
    def is_interactive(self) -> bool:
        """Whether a person sits in front of it: input and both outputs are a terminal."""
        return self._stdin.isatty() and self._stdout.isatty() and self._stderr.isatty()

    def result(self, data: Mapping[str, object], *, lines: Sequence[str], names: Sequence[str] | None = None) -> None:
        """Show what was asked for: `data` with a schema number as JSON, `lines` to people, `names` when quiet if it has
        any.
        """
        if self.mode is Mode.JSON:
            is_utf8 = codecs.lookup(getattr(self._stdout, "encoding", None) or "utf-8").name == "utf-8"
            lines = [json.dumps({"schema": 1, **data}, ensure_ascii=not is_utf8)]
        elif self.mode is Mode.QUIET and names is not None:
            lines = names
        self.write("".join(f"{line}\n" for line in lines))

    def write(self, text: str) -> None:
        """Write a piece of data as it is, at once."""
        self._put(self._stdout, text)
        if text:
            self._is_mid_line = not text.endswith("\n")

    def end_line(self) -> None:
        """Begin a new line of data, unless one has begun already."""
        if self._is_mid_line:
            self.write("\n")

    def note(self, text: str) -> None:
        """Tell a person something that is no data; nothing when quiet."""
        if self.mode is not Mode.QUIET:
            self._say(text)

    def tell(self, text: str) -> None:
        """Tell a person something that is no data and was asked for: when quiet, too."""
        self._say(text)

    def warn(self, text: str) -> None:
        self._say(text, "warning")

    def error(self, error: MoeinfError) -> None:
        self._say(str(error), "error")
        if error.hint:
            self._say(error.hint, "hint")

    def confirm(self, question: str, *, hint: str) -> bool:
        """Ask; only "y" or "yes" is a yes. Raises UsageError with `hint` where nobody can answer."""
        if not (self._stdin.isatty() and self._stderr.isatty()):
            raise UsageError(f"not a terminal, so nobody can answer: {question}", hint=hint)
        self._put(self._stderr, f"{question} [y/N] ")
        return self._stdin.readline().strip().lower() in ("y", "yes")

    @contextmanager
    def task(self, label: str, total: int, unit: Unit, *, done: int = 0) -> Iterator[Task]:
        """Show a step: a bar on a terminal, a line now and then elsewhere, nothing when quiet."""
        if self.mode is Mode.QUIET:
            with NO_PROGRESS.task(label, total, unit, done=done) as silent:
                yield silent
        elif self._stderr.isatty():
            with self._bars.task(label.translate(_UNSAFE), total, unit, done) as bar:
                yield bar
        else:
            lines = LineTask(self.note, self._clock, label, total, unit, done)
            yield lines
            lines.finish()

    @contextmanager
    def busy(self, label: str) -> Iterator[None]:
        """Show that a step of unknown length is running."""
        if self.mode is not Mode.QUIET and self._stderr.isatty():
            with self._bars.spinner(label):
                yield
        else:
            self.note(label)
            yield

    @contextmanager
    def leaving_at_once(self) -> Iterator[None]:
        """While this is open, Ctrl-C ends the process where it is, since there is nothing to lose: libraries that are
        being imported take a KeyboardInterrupt for a fault of their own, or miss it.
        """
        is_main = threading.current_thread() is threading.main_thread()
        if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return

        def leave(*_: object) -> None:
            if self._stderr.isatty():
                os.write(2, b"\r\x1b[2K\x1b[?25h")  # the spinner's line, and the cursor that it hides
            os._exit(INTERRUPTED)

        signal.signal(signal.SIGINT, leave)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _say(self, text: str, prefix: str = "") -> None:
        plain = f"{prefix}: {text}" if prefix else text
        if self._bars.print_above(plain.translate(_UNSAFE)):
            return
        self._put(self._stderr, plain + "\n", prefix)

    def _put(self, stream: IO[str], text: str, prefix: str = "") -> None:
        if stream.isatty():
            text = text.translate(_UNSAFE)
            if prefix and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
                text = f"\x1b[{_STYLES[prefix]}m{prefix}:\x1b[0m{text.removeprefix(prefix + ':')}"
        try:
            stream.write(text)
            stream.flush()
        except BrokenPipeError:
            raise SystemExit(BROKEN_PIPE) from None
        except OSError as error:
            kind = CapacityError if error.errno in (errno.ENOSPC, errno.EDQUOT) else MoeinfError
            raise kind(f"the output cannot be written: {error.strerror}") from error


def unexpected(error: Exception) -> MoeinfError:
    """What to say of an error that nobody has foreseen."""
    return MoeinfError(f"{type(error).__name__}: {error}", hint="MOEINF_DEBUG=1 shows where this comes from")


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose first row is its head."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
