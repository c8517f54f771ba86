"""What a person types or pipes in: a whole prompt at once, or a chat line by line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from moeinf.errors import UsageError

if TYPE_CHECKING:
    from prompt_toolkit.history import History

__all__ = ["LineReader", "Reader", "TerminalReader", "read_piped_text"]


class Reader(Protocol):
    """Where a chat's lines come from."""

    @property
    def is_interactive(self) -> bool:
        """Whether a person is asked, who can try again after a mistake."""

    def read(self, prompt: str) -> str:
        """The next line, without its end. Raises EOFError at the end, KeyboardInterrupt on Ctrl-C."""


class LineReader:
    """Lines of standard input, where it is no terminal."""

    is_interactive = False

    def read(self, prompt: str) -> str:
        line = sys.stdin.buffer.readline()
        if not line:
            raise EOFError
        return _decode(line).rstrip("\r\n")


class TerminalReader:
    """A line editor with history (a private file), and Tab for the words in `commands`."""

    is_interactive = True

    def __init__(self, history: Path, commands: Sequence[str]) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter

        self._session: PromptSession[str] = PromptSession(
            history=_open_history(history),
            completer=WordCompleter(list(commands), sentence=True),
            complete_while_typing=False,
        )

    def read(self, prompt: str) -> str:
        return self._session.prompt(prompt)


def read_piped_text() -> str | None:
    """All of standard input without its last line end, or None if it is a terminal."""
    if sys.stdin.isatty():
        return None
    return _decode(sys.stdin.buffer.read()).removesuffix("\n").removesuffix("\r")


def _decode(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not valid UTF-8: byte {error.object[error.start]:#04x}") from error


def _open_history(path: Path) -> History:
    """History in a file that only this user can read; in memory where the file cannot be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class Kept(FileHistory):
        def store_string(self, string: str) -> None:
            with suppress(OSError):  # what is said goes on without its history
                super().store_string(string)

    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        path.chmod(0o600)
    except OSError:
        return InMemoryHistory()
    return Kept(path)
