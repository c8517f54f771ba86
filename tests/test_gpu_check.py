"""benchmarks/gpu.py without a GPU: whatever fails, what was measured is kept and printed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).resolve().parents[1] / "benchmarks/gpu.py"
FACTS = {"gpu": "a GPU", "built": "CUDA 13.0", "versions": {"torch": "2.11"}, "no_triton": "", "no_library": ""}
EXPECTED = {"tpot_s": 0.03, "factor": 1.5}
OURS = {
    "system": "moeinf",
    "error": "",
    "tpot_s": {"median": 0.02},
    "last": {"memory": {"experts": 800}, "slots": 8, "hits": 30, "token_bytes": 1000},
    "bytes_per_token": {"missed": 200},
    "stall_s_per_token": 1e-3,
    "hit_rate": 0.5,
}
THEIRS = {"error": "", "tpot_s": {"median": 0.06}}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("gpu_check", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)
    spec.loader.exec_module(module)
    handler = signal.getsignal(signal.SIGTERM)
    yield module
    signal.signal(signal.SIGTERM, handler)


def answer(gpu: Any, words: tuple[str, ...]) -> object:
    """What each of the programs prints."""
    if "-c" in words:
        return {gpu.FACTS_PROGRAM: FACTS, gpu.RATES_PROGRAM: {"link": 5e4, "memory": 4e6}}.get(words[2], [(7, 9)] * 200)
    if "profile" in words:
        return {"expected": EXPECTED}
    if "list" in words:
        return {"models": []}
    if "bench" in words:
        rival = {"system": words[words.index("--against") + 1], **THEIRS}
        return {"runs": [OURS, rival], "same_tokens": True}
    return "said\n30 passed"


def run(gpu: Any, monkeypatch: pytest.MonkeyPatch, folder: Path, fails: str, error: BaseException) -> int:
    """The exit code of a quick check in which the programs that `fails` names raise `error`."""

    def call(*command: str, env: dict[str, str], most_s: float, shows: bool = False) -> str:
        assert 0 < most_s <= gpu.QUICK.most_s
        if fails in " ".join(command):
            raise error
        made = answer(gpu, command)
        return made if isinstance(made, str) else json.dumps(made)

    monkeypatch.setattr(gpu, "call", call)
    monkeypatch.setattr("sys.argv", ["gpu.py", "--quick", "--folder", str(folder)])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    return int(str(ended.value.code))


@pytest.mark.parametrize(
    ("fails", "failures", "rows"),
    [
        ("nothing", [], 4),
        ("import torch, moeinf", ["requests: gone"], 4),
        ("-m pytest", ["tests: gone", "tests of Triton's kernels: gone"], 4),
        ("measure_gpus", ["rates: gone"], 4),
        ("moeinf.testing", ["deepseek-v2-lite:4, checkpoint: gone"], 0),
        (
            "bench deepseek-v2-lite-4 --device cuda --experts 25% --miss",
            ["deepseek-v2-lite:4 25% --miss auto: gone"],
            3,
        ),
        ("no_triton", ["facts: gone"], 0),
    ],
)
def test_what_fails_is_a_line_and_ends_nothing_else(
    fails: str,
    failures: list[str],
    rows: int,
    gpu: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(gpu, monkeypatch, tmp_path, fails, gpu.FailedError("gone")) == bool(failures)
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line.startswith("FAILED")] == [f"FAILED: {failure}" for failure in failures]
    assert sum(line.startswith("deepseek-v2-lite:4 ") for line in printed) == rows
    if not failures:
        assert printed[-4].split()[1:6] == ["25%", "20.00", "20.00", "50.0%", "0.20"]
    kept = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [f"{each['what']}: {each['failed']}" for each in kept if "failed" in each] == failures
    assert sum(isinstance(each["result"], dict) and "other_s" in each["result"] for each in kept) == rows


def test_an_interruption_prints_what_there_is(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(gpu, monkeypatch, tmp_path, "bench deepseek-v2-lite-4 --device cuda --experts 100%", KeyboardInterrupt())
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2].startswith("deepseek-v2-lite:4  25%")
    assert printed[-1] == "FAILED: deepseek-v2-lite:4 100%: interrupted"


def test_nothing_begins_when_the_time_is_over(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "QUICK_MINUTES", -1.0)
    assert run(gpu, monkeypatch, tmp_path, "", AssertionError()) == 1
    assert capsys.readouterr().out == "FAILED: facts: not begun: the time is over\n"


def test_a_program_that_fails_or_hangs_says_why(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PATIENCE_S", 0.2)

    def reason(program: str, most_s: float = 60.0) -> str:
        with pytest.raises(gpu.FailedError) as failed:
            gpu.call("/bin/sh", "-c", program, env=dict(os.environ), most_s=most_s)
        return str(failed.value)

    assert gpu.call("/bin/sh", "-c", "echo made; echo said >&2", env={}, most_s=60.0) == "made\n"
    assert reason("echo first >&2; echo last >&2; exit 3") == "last"
    assert reason("echo 'error: no room' >&2; echo 'hint: make some' >&2; exit 5") == "no room"
    assert reason("exit 7") == "it ended with 7"
    alive = tmp_path / "alive"
    late = reason(f"trap '' INT; echo begun >&2; (sleep 3; echo > '{alive}') & wait; wait", 1.0)
    assert late == "not done after 1 s: begun"
    time.sleep(2.5)
    assert not alive.exists()  # what it had started has ended, too
