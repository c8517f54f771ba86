"""A program in a terminal of its own, driven key by key; run as a script, `moeinf` with a fake engine behind it."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["CTRL_C", "CTRL_D", "Terminal"]

CTRL_C, CTRL_D = "\x03", "\x04"
_PATIENCE_S = 30.0


class Terminal:
    """`moeinf ARGS` at the far end of a pseudo terminal, with an engine that counts 0, 1, 2, … until it is stopped, or
    breaks if it is told to.
    """

    def __init__(self, home: Path, *args: str, environ: dict[str, str] | None = None) -> None:
        here = Path(__file__).parent
        self._keyboard, far_end = pty.openpty()
        termios.tcsetwinsize(far_end, (24, 80))
        self.process = subprocess.Popen(
            [sys.executable, str(here / "cli_terminal.py"), *args],
            stdin=far_end,
            stdout=far_end,
            stderr=far_end,
            start_new_session=True,
            env={
                **os.environ,
                "PYTHONPATH": str(here.parent / "src"),
                "MOEINF_HOME": str(home),
                "PROMPT_TOOLKIT_NO_CPR": "1",
                "TERM": "xterm-256color",
                **(environ or {}),
            },
        )
        os.close(far_end)
        self.shown = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._keyboard)

    def expect(self, text: str) -> None:
        """Wait until `text` has been shown after what was expected before."""
        end = time.monotonic() + _PATIENCE_S
        while text not in self.shown:
            if not select.select([self._keyboard], [], [], max(0.0, end - time.monotonic()))[0]:
                raise AssertionError(f"{text!r} was not shown, but {self.shown!r}")
            self.shown += self._read(text)
        self.shown = self.shown.partition(text)[2]

    def press(self, keys: str) -> None:
        os.write(self._keyboard, keys.encode())

    def wait(self, pressing: str = "") -> int:
        """The exit code; shows what is still said. Keys may be pressed again and again until the end."""
        end = time.monotonic() + _PATIENCE_S
        next_press = time.monotonic()
        while self.process.poll() is None and time.monotonic() < end:
            if pressing and time.monotonic() >= next_press:
                self.press(pressing)
                next_press += 0.3
            if select.select([self._keyboard], [], [], 0.05)[0]:
                self.shown += self._read("the end", or_nothing=True)
        return self.process.wait(0)

    def _read(self, wanted: str, *, or_nothing: bool = False) -> str:
        try:
            data = os.read(self._keyboard, 65536)
        except OSError:  # the far end is closed, on Linux
            data = b""
        if not data and not or_nothing:
            raise AssertionError(f"the program ended before {wanted!r}: {self.shown!r}")
        return data.decode(errors="replace")


def _main() -> int:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C comes to whom the terminal belongs
    import moeinf
    from moeinf.cli import main

    vars(moeinf)["load"] = _load
    return main()


def _load(*_: object, **__: object) -> object:
    from cli_fakes import FakeEngine

    def step(_: int) -> None:
        if "<user>break<end>" in engine.prompts[-1]:
            raise RuntimeError("broken")
        time.sleep(0.002)

    numbers = " ".join(map(str, range(50_000)))
    engine = FakeEngine([numbers], context=1_000_000, max_context=2_000_000, on_step=step)
    return engine


if __name__ == "__main__":
    sys.exit(_main())
