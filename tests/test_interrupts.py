"""Ctrl-C: kept while something is half done, and never lost."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from moeinf.interrupts import KeptInterrupt, kept_interrupt


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_it_is_kept_for_a_while() -> None:
    done: list[str] = []

    @kept_interrupt()
    def import_something() -> None:
        press()
        done.append("imported")

    with pytest.raises(KeyboardInterrupt):
        import_something()
    assert done == ["imported"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("ask", [KeptInterrupt.check, KeptInterrupt.release])
def test_it_is_kept_and_raised_once(ask: object) -> None:
    kept = KeptInterrupt()
    kept.hold()
    kept.check()
    press()
    with pytest.raises(KeyboardInterrupt):
        ask(kept)  # type: ignore[operator]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    kept.check()
    kept.release()
    with pytest.raises(KeyboardInterrupt):
        press()


def test_a_second_one_is_not_kept() -> None:
    kept = KeptInterrupt()
    kept.hold()
    press()
    with pytest.raises(KeyboardInterrupt):
        press()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    kept.release()


def test_holding_twice_is_as_holding_once() -> None:
    """A pass that ended by what no hook hears of is followed by the next."""
    kept = KeptInterrupt()
    kept.hold()
    kept.hold()
    kept.release()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_whoever_has_a_handler_keeps_it() -> None:
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda *_: came.append(1))
    kept = KeptInterrupt()
    kept.hold()
    press()
    kept.release()
    assert came == [1]


def test_other_threads_leave_signals_alone() -> None:
    kept = KeptInterrupt()
    thread = threading.Thread(target=kept.hold)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_one_thread_keeps_no_other_takes() -> None:
    kept, raised = KeptInterrupt(), []

    def other() -> None:
        try:
            kept.check()
            kept.release()
        except BaseException as error:
            raised.append(error)

    kept.hold()
    press()
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert raised == []
    with pytest.raises(KeyboardInterrupt):
        kept.release()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
