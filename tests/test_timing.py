"""Times of calls, on a clock that is a fake; and that memory is read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest

from moeinf import timing
from moeinf.kernels.native import NativePool
from moeinf.shared_library import built_library
from moeinf.timing import best_of_each, measure_memory, undisturbed
from moeinf.units import MIB


def test_disturbed_times_do_not_count() -> None:
    assert undisturbed([2.0, 9.0, 1.0, 2.0, 7.0, 2.0, 8.0, 2.0]) == 2.0


class Work:
    """Calls that note their names and take a second each, on a clock of their own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.order = ""
        clock = SimpleNamespace(perf_counter=lambda: float(len(self.order)))
        monkeypatch.setattr(timing, "time", clock)

    def calls(self, names: str) -> list[Callable[[], object]]:
        return [partial(self._note, name) for name in names]

    def _note(self, name: str) -> None:
        self.order += name


def test_what_is_timed_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(monkeypatch)
    assert best_of_each([work.calls("ab"), work.calls("c")], 6.0) == [1.0, 1.0]
    assert work.order == "aba" + "ccc" + "bab" + "ccc" + "a" + "c"


def test_what_takes_longer_than_its_time_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(monkeypatch)
    assert best_of_each([work.calls("a"), work.calls("b")], 0.1) == [1.0, 1.0]
    assert work.order == "ab"


def test_memory_is_read_by_the_library_and_by_torch() -> None:
    assert measure_memory(None, MIB, 0.01) > 0
    if built_library():
        pool = NativePool(1)
        assert measure_memory(pool, MIB, 0.01) > 0
        pool.close()
