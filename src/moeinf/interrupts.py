"""Ctrl-C, kept until nothing is half done.

Python raises KeyboardInterrupt between any two steps of its code, also between taking a slot and noting who has it. So
a forward pass keeps the first Ctrl-C until it has come to a place where that does no harm. Owns the process's handler
of SIGINT meanwhile.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["KeptInterrupt", "kept_interrupt"]


@contextmanager
def kept_interrupt() -> Iterator[None]:
    """While this is open, one Ctrl-C is kept: for imports, of which libraries make something else of it."""
    kept = KeptInterrupt()
    kept.hold()
    try:
        yield
    finally:
        kept.release()


class KeptInterrupt:
    """From `hold` to `release` one Ctrl-C is kept. A second one raises KeyboardInterrupt at once, for whoever cannot
    wait. Whoever has a handler of his own for SIGINT keeps it, and so does every thread but the main one.
    """

    def __init__(self) -> None:
        self._came = self._holds = False

    def hold(self) -> None:
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._holds = True
            signal.signal(signal.SIGINT, self._keep)

    def check(self) -> None:
        """Raise what was kept, if anything was: here it does no harm."""
        if self._came and threading.current_thread() is threading.main_thread():
            self.release()

    def release(self) -> None:
        """Keep no more. Raises KeyboardInterrupt if one was kept."""
        if threading.current_thread() is not threading.main_thread():
            return
        if self._holds:
            self._holds = False
            signal.signal(signal.SIGINT, signal.default_int_handler)
        came, self._came = self._came, False
        if came:
            raise KeyboardInterrupt

    def _keep(self, *_: object) -> None:
        self.check()
        self._came = True
