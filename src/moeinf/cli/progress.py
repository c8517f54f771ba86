"""How a running step is drawn: a bar on a terminal, single lines elsewhere. Implements `moeinf.progress.Task` twice."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

from moeinf.progress import Unit
from moeinf.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from rich.text import Text

__all__ = ["Bars", "LineTask"]

_LINE_INTERVAL_S = 10.0


class LineTask:
    """A line when the step starts, one every ten seconds, and one at the end of a step that took longer than that."""

    def __init__(
        self, say: Callable[[str], None], clock: Callable[[], float], label: str, total: int, unit: Unit, done: int
    ) -> None:
        self._say = say
        self._clock = clock
        self._label = label
        self._total = total
        self._unit: Unit = unit
        self._begun_with = done
        self._done = done
        self._started = self._last_line = clock()
        self._lock = threading.Lock()
        say(f"{label}: {_amount(total, unit)}" + (f", {_amount(done, unit)} there already" if done else ""))

    def advance(self, amount: int) -> None:
        with self._lock:
            self._done += amount
            now = self._clock()
            if now - self._last_line < _LINE_INTERVAL_S:
                return
            self._last_line = now
            rate = (self._done - self._begun_with) / (now - self._started)
            share = f" ({self._done / self._total:.0%})" if self._total else ""
            text = f"{self._label}: {_of(self._done, self._total, self._unit)}{share}, {_rate(rate, self._unit)}"
            if rate and self._done < self._total:
                text += f", {format_seconds((self._total - self._done) / rate)} left"
            self._say(text)

    def finish(self) -> None:
        taken_s = self._clock() - self._started
        if taken_s >= _LINE_INTERVAL_S:
            self._say(f"{self._label}: done in {format_seconds(taken_s)}")


class _Bar:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def advance(self, amount: int) -> None:
        self._progress.advance(self._task, amount)


class Bars:
    """The bars of all running steps, drawn together at the foot of a terminal while there is one."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._progress: Progress | None = None
        self._running = 0
        self._lock = threading.Lock()

    @contextmanager
    def task(self, label: str, total: int, unit: Unit, done: int) -> Iterator[_Bar]:
        progress = self._open()
        try:
            task = progress.add_task(label, total=total, completed=done, unit=unit)
            yield _Bar(progress, task)
            progress.stop_task(task)
        finally:
            self._close()

    @contextmanager
    def spinner(self, label: str) -> Iterator[None]:
        """A sign of life for a step of unknown length; it leaves nothing behind."""
        from rich.console import Console

        with Console(file=self._stream).status(_text(label)):
            yield

    def print_above(self, text: str) -> bool:
        """Print a line above the bars, if there are any; whether there are."""
        with self._lock:
            if self._progress is None:
                return False
            self._progress.console.print(_text(text), highlight=False)
            return True

    def _open(self) -> Progress:
        with self._lock:
            if self._progress is None:
                self._progress = _make_progress(self._stream)
                self._progress.start()
            self._running += 1
            return self._progress

    def _close(self) -> None:
        with self._lock:
            self._running -= 1
            if self._progress is not None and not self._running:
                self._progress.stop()
                self._progress = None


def _make_progress(stream: IO[str]) -> Progress:
    from rich import progress
    from rich.console import Console
    from rich.text import Text

    class Amount(progress.ProgressColumn):
        def render(self, task: progress.Task) -> Text:
            speed = task.finished_speed or task.speed
            done = _of(int(task.completed), int(task.total or 0), task.fields["unit"])
            return Text(f"{done}  {_rate(speed, task.fields['unit'])}" if speed else done)

    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(bar_width=24),
        Amount(),
        progress.TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(file=stream),
        redirect_stdout=False,
        redirect_stderr=False,
    )


def _text(text: str) -> Text:
    from rich.text import Text

    return Text(text)


def _amount(value: int, unit: Unit) -> str:
    return format_bytes(value) if unit == "bytes" else f"{value:,} {unit}"


def _of(done: int, total: int, unit: Unit) -> str:
    return f"{format_bytes(done)} of {format_bytes(total)}" if unit == "bytes" else f"{done:,} of {total:,} {unit}"


def _rate(per_second: float, unit: Unit) -> str:
    return f"{format_bytes(int(per_second))}/s" if unit == "bytes" else f"{per_second:.1f} {unit}/s"
