"""What is written where: modes, terminals, colours, progress."""

from __future__ import annotations

import io
import json
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from moeinf.cli.answers import Interrupts
from moeinf.cli.output import Mode, Output, columns
from moeinf.errors import MoeinfError, UsageError

DATA = {"models": ["größer"]}


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")


def on_files(mode: Mode = Mode.HUMAN, clock: Clock | None = None) -> tuple[Output, io.StringIO, io.StringIO]:
    stdout, stderr = io.StringIO(), io.StringIO()
    return Output(mode, stdin=io.StringIO(), stdout=stdout, stderr=stderr, clock=clock or Clock()), stdout, stderr


def on_screen(mode: Mode = Mode.HUMAN, typed: str = "") -> tuple[Output, Screen, Screen]:
    stdout, stderr = Screen(), Screen()
    return Output(mode, stdin=Screen(typed), stdout=stdout, stderr=stderr), stdout, stderr


def without_escapes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@pytest.mark.parametrize(
    ("mode", "shown"),
    [
        (Mode.HUMAN, "a line\nanother\n"),
        (Mode.JSON, '{"schema": 1, "models": ["größer"]}\n'),
        (Mode.QUIET, "größer\n"),
    ],
)
def test_a_result_in_each_mode(mode: Mode, shown: str) -> None:
    output, stdout, stderr = on_files(mode)
    output.result(DATA, lines=["a line", "another"], names=["größer"])
    assert (stdout.getvalue(), stderr.getvalue()) == (shown, "")


def test_a_result_without_names_is_shown_when_quiet_too() -> None:
    output, stdout, _ = on_files(Mode.QUIET)
    output.result(DATA, lines=["a line"])
    output.result(DATA, lines=["another"], names=[])
    assert stdout.getvalue() == "a line\n"


def test_json_is_json_in_any_encoding() -> None:
    data = io.BytesIO()
    stream = io.TextIOWrapper(data, "latin-1", errors="replace")
    Output(Mode.JSON, stdout=stream).result({"text": "größer — 你好"}, lines=())
    assert json.loads(data.getvalue())["text"] == "größer — 你好"


@pytest.mark.parametrize(("mode", "said"), [(Mode.HUMAN, "n\n"), (Mode.JSON, "n\n"), (Mode.QUIET, "")])
def test_notes_go_to_stderr_and_errors_are_never_quiet(mode: Mode, said: str) -> None:
    output, stdout, stderr = on_files(mode)
    output.note("n")
    output.warn("w")
    output.error(MoeinfError("e", hint="h"))
    output.error(MoeinfError("f"))
    assert (stdout.getvalue(), stderr.getvalue()) == ("", said + "warning: w\nerror: e\nhint: h\nerror: f\n")


@pytest.mark.parametrize(
    ("variable", "value", "shown"),
    [
        ("OTHER", "1", "\x1b[31;1merror:\x1b[0m error: twice\n"),
        ("NO_COLOR", "1", "error: error: twice\n"),
        ("NO_COLOR", "", "\x1b[31;1merror:\x1b[0m error: twice\n"),
        ("TERM", "dumb", "error: error: twice\n"),
    ],
)
def test_colours_on_a_terminal(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, shown: str) -> None:
    monkeypatch.setenv(variable, value)
    output, _, stderr = on_screen()
    output.error(MoeinfError("error: twice"))
    assert stderr.getvalue() == shown


def test_control_characters_do_not_reach_a_terminal() -> None:
    text = "a\x1b[2Jb\x07\x9b\x7f\r\n\tc"
    output, stdout, stderr = on_screen()
    output.write(text)
    output.note(text)
    assert stdout.getvalue() == "a\ufffd[2Jb\ufffd\ufffd\ufffd\n\tc"
    assert stderr.getvalue() == "a\ufffd[2Jb\ufffd\ufffd\ufffd\n\tc\n"
    output, file, _ = on_files()
    output.write(text)
    assert file.getvalue() == text


def test_a_line_is_ended_once() -> None:
    output, stdout, _ = on_files()
    for text in ("", "a", "", "b\n", "c"):
        output.end_line()
        output.write(text)
    output.end_line()
    output.end_line()
    assert stdout.getvalue() == "a\nb\nc\n"


@pytest.mark.parametrize(
    ("typed", "is_yes"),
    [("y\n", True), (" YES \n", True), ("\n", False), ("", False), ("n\n", False), ("yesterday\n", False)],
)
def test_only_yes_is_yes(typed: str, is_yes: bool) -> None:
    output, stdout, stderr = on_screen(typed=typed)
    assert output.confirm("really?", hint="-y") is is_yes
    assert (stdout.getvalue(), stderr.getvalue()) == ("", "really? [y/N] ")


def test_a_question_needs_a_terminal() -> None:
    output, _, _ = on_files()
    with pytest.raises(UsageError, match="really") as caught:
        output.confirm("really?", hint="say -y")
    assert caught.value.hint == "say -y"


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert columns([("NAME", "SIZE"), ("a", "1 B"), ("longer", "")]) == ["NAME    SIZE", "a       1 B", "longer"]


def test_progress_in_lines() -> None:
    clock = Clock()
    output, stdout, stderr = on_files(clock=clock)
    with output.task("shard", 4 << 20, "bytes", done=1 << 20) as task:
        for _ in range(4):
            clock.now += 6
            task.advance(512 << 10)
    assert stdout.getvalue() == ""
    assert stderr.getvalue().splitlines() == [
        "shard: 4.00 MiB, 1.00 MiB there already",
        "shard: 2.00 MiB of 4.00 MiB (50%), 85.3 KiB/s, 24.0 s left",
        "shard: 3.00 MiB of 4.00 MiB (75%), 85.3 KiB/s, 12.0 s left",
        "shard: done in 24.0 s",
    ]


def test_a_short_step_is_one_line_and_a_failed_one_is_not_done() -> None:
    clock = Clock()
    output, _, stderr = on_files(clock=clock)
    with output.task("look", 3, "files") as task:
        task.advance(3)
    with suppress(KeyError), output.task("fail", 1200, "experts") as task:
        clock.now += 60
        raise KeyError
    with output.task("nothing", 0, "prompts") as task:
        clock.now += 20
        task.advance(0)
    assert stderr.getvalue().splitlines() == [
        "look: 3 files",
        "fail: 1,200 experts",
        "nothing: 0 prompts",
        "nothing: 0 of 0 prompts, 0.0 prompts/s",
        "nothing: done in 20.0 s",
    ]


def test_no_progress_when_quiet() -> None:
    output, stdout, stderr = on_screen(Mode.QUIET)
    with output.task("shard", 10, "experts") as task, output.busy("loading"):
        task.advance(10)
    assert (stdout.getvalue(), stderr.getvalue()) == ("", "")


def test_progress_from_many_threads_loses_nothing() -> None:
    clock = Clock()
    output, _, stderr = on_files(clock=clock)
    with output.task("shard", 4000, "experts") as task:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(task.advance, [1] * 3996))
        clock.now += 10
        task.advance(4)
    assert "shard: 4,000 of 4,000 experts (100%), 400.0 experts/s" in stderr.getvalue().splitlines()


def test_bars_on_a_terminal() -> None:
    output, stdout, stderr = on_screen()
    with output.task("shard [bold]\x1b[2J", 4 << 20, "bytes", done=1 << 20) as first:
        with output.task("fetch", 10, "files") as second:
            second.advance(10)
            output.note("note [red] \x1b[2J")
        first.advance(1 << 20)
    shown = without_escapes(stderr.getvalue())
    assert stdout.getvalue() == ""
    assert "shard [bold]\ufffd[2J" in shown
    assert "2.00 MiB of 4.00 MiB" in shown
    assert "10 of 10 files" in shown
    assert "note [red] \ufffd[2J\n" in shown
    assert stderr.getvalue().endswith("\x1b[?25h")  # the cursor is back
    output.note("after")
    assert stderr.getvalue().endswith("\x1b[?25hafter\n")


def test_bars_are_gone_after_a_failure() -> None:
    output, _, stderr = on_screen()
    with suppress(KeyError), output.task("shard", 3, "experts"):
        raise KeyError
    output.warn("plain again")
    assert stderr.getvalue().endswith("\x1b[33;1mwarning:\x1b[0m plain again\n")


def test_busy_is_a_line_where_there_is_no_terminal() -> None:
    output, _, stderr = on_files()
    with output.busy("loading tiny"):
        pass
    assert stderr.getvalue() == "loading tiny\n"
    output, _, stderr = on_screen()
    with output.busy("loading [b]"):
        pass
    assert "loading [b]" in stderr.getvalue()


def test_two_interrupts_count_only_within_a_second() -> None:
    clock = Clock()
    interrupts = Interrupts(clock)
    pressed = []
    for wait in (0.0, 1.5, 0.5, 1.0, 1.1):
        clock.now += wait
        pressed.append(interrupts.press())
    assert pressed == [False, False, True, True, False]


def test_watching_takes_one_interrupt_and_gives_the_handler_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupts(Clock()).watch() as should_stop:
        assert not should_stop()
        signal.raise_signal(signal.SIGINT)
        assert should_stop()
    assert signal.getsignal(signal.SIGINT) is before


def test_an_answer_that_does_not_stop_is_left_at_the_second_interrupt() -> None:
    clock = Clock()
    with Interrupts(clock).watch():
        signal.raise_signal(signal.SIGINT)
        clock.now += 30
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
