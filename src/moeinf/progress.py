"""How long work tells somebody where it stands. The library reports; only the command line knows what a terminal is."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal, Protocol

__all__ = ["NO_PROGRESS", "Progress", "Task", "Unit"]

Unit = Literal["bytes", "files", "experts", "prompts", "replays", "rates", "runs", "matrices"]


class Task(Protocol):
    """One running step."""

    def advance(self, amount: int) -> None:
        """Say that `amount` more units are done. Cheap enough to call for every chunk, from any thread."""


class Progress(Protocol):
    """Where steps are shown, or not."""

    def task(self, label: str, total: int, unit: Unit, *, done: int = 0) -> AbstractContextManager[Task]:
        """Open a step of `total` units, of which `done` are there already; it closes with the context."""


class _Silent:
    def __enter__(self) -> Task:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def advance(self, amount: int) -> None:
        pass

    def task(self, label: str, total: int, unit: Unit, *, done: int = 0) -> AbstractContextManager[Task]:
        return self


NO_PROGRESS: Progress = _Silent()
