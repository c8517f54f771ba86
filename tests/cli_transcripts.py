"""Transcripts of the command line: what was typed, all that came back, and the exit code, as text.

    $ moeinf list -q        the command
    < a line of standard input
    | a line of stdout
    ! a line of stderr
    = 0                     the exit code

A line of output that ends without a line end has `(no line end)` behind it.
"""

from __future__ import annotations

import io
import shlex
import signal
import sys
import textwrap
from pathlib import Path

import pytest

from moeinf.cli import main

__all__ = ["CommandLine"]


class CommandLine:
    """Runs commands in this process, with files for standard streams, and a home of its own."""

    def __init__(self, home: Path, patch: pytest.MonkeyPatch) -> None:
        self.home = home
        patch.setenv("MOEINF_HOME", str(home))
        patch.setenv("COLUMNS", "80")
        for name in ("MOEINF_DEBUG", "NO_COLOR"):
            patch.delenv(name, raising=False)

    def check(self, transcript: str) -> None:
        """Run what the transcript says was typed, and compare all the rest."""
        expected = textwrap.dedent(transcript).strip("\n")
        lines = expected.split("\n")
        given = "".join(line[2:] + "\n" for line in lines if line.startswith("<"))
        found = self.transcript(lines[0].removeprefix("$ "), given)
        if found != expected:
            pytest.fail(f"expected:\n{expected}\n\nfound:\n{found}", pytrace=False)

    def transcript(self, command: str, given: str = "") -> str:
        stdout, stderr, code = self.run(*shlex.split(command)[1:], given=given.encode())
        said = [*_lines("|", stdout), *_lines("!", stderr)]
        typed = [f"< {line}".rstrip() for line in given.splitlines()]
        return "\n".join([f"$ {command}", *typed, *said, f"= {code}"])

    def run(self, *args: str, given: bytes = b"") -> tuple[str, str, int]:
        """Standard output, standard error and exit code; the home is written HOME."""
        streams = [io.TextIOWrapper(io.BytesIO(data), "utf-8", newline="\n") for data in (given, b"", b"")]
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        with pytest.MonkeyPatch.context() as patch:
            for name, stream in zip(("stdin", "stdout", "stderr"), streams, strict=True):
                patch.setattr(sys, name, stream)
            try:
                code = main(args)
            except SystemExit as left:
                code = int(left.code or 0)
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        return _text(streams[1], self.home), _text(streams[2], self.home), code


def _text(stream: io.TextIOWrapper, home: Path) -> str:
    stream.flush()
    assert isinstance(stream.buffer, io.BytesIO)
    return stream.buffer.getvalue().decode().replace(str(home), "HOME")


def _lines(mark: str, text: str) -> list[str]:
    if not text:
        return []
    lines = [f"{mark} {line}".rstrip() for line in text.removesuffix("\n").split("\n")]
    return lines if text.endswith("\n") else [*lines[:-1], f"{lines[-1]} (no line end)"]
