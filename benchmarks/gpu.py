"""What a GPU makes of moeinf: its own tests, then times beside transformers and accelerate, then a thousand requests.

    scripts/gpu_check.sh --quick                  # a first look, in eight minutes at most
    scripts/gpu_check.sh                          # everything, in perhaps an hour
    python benchmarks/gpu.py --folder FOLDER --parts shapes --shapes deepseek-v2-lite:10 qwen3-30b-a3b:12

Each shape (with so many layers, about a gigabyte each) is a random checkpoint, kept in FOLDER. At a quarter and half of
the experts on the GPU moeinf runs beside accelerate, which keeps the others in host memory too, once more at a quarter
with `--miss auto`; with all of them there, beside transformers alone, with torch's maths, with Triton's kernels, and
with layers compiled around these; `moeinf bench` takes the times. The bound is the larger of what the link and the
GPU's memory need, at the rates that were measured just before; what is hidden is the share of the link's time in which
nothing waited for it; what `moeinf profile` foretold, before past runs correct it, stands beside what was measured.

What fails is said and left behind, and nothing else ends for it. Every result is a line of JSON in FOLDER/results.jsonl
as soon as it is there. Prints a short table last, also after Ctrl-C, SIGTERM, or when the time is over.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, is_dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import IO, Any, NamedTuple, TypeVar

ROOT = Path(__file__).resolve().parents[1]
T = TypeVar("T")


class Setting(NamedTuple):
    """A share of the experts, what is measured beside, and options of moeinf."""

    share: str
    other: str
    options: tuple[str, ...] = ()


QUARTER, HALF = Setting("25%", "accelerate"), Setting("50%", "accelerate")
AUTO = Setting("25%", "accelerate", ("--miss", "auto"))
ALL = Setting("100%", "transformers")
TRITON = Setting("100%", "transformers", ("--kernels", "triton"))
COMPILED = Setting("100%", "transformers", ("--kernels", "triton", "--compile", "on"))
NOT_FORETOLD = ("--miss", "--compile")


@dataclass(frozen=True)
class Extent:
    """What is measured, what matters most first, and the seconds that one program may take."""

    shapes: tuple[str, ...]
    settings: tuple[Setting, ...]
    prompts: int
    tokens: int
    repeat: int
    requests: int
    most_s: float


FULL = Extent(
    ("deepseek-v2-lite:8", "qwen3-30b-a3b:8", "mixtral-8x7b:3"),
    (QUARTER, AUTO, HALF, ALL, TRITON, COMPILED),
    prompts=2,
    tokens=48,
    repeat=3,
    requests=1000,
    most_s=3600,
)
QUICK = Extent(
    ("deepseek-v2-lite:4",), (QUARTER, ALL, TRITON, AUTO), prompts=1, tokens=16, repeat=1, requests=200, most_s=180
)
QUICK_MINUTES = 8.0
PARTS = ("tests", "triton", "requests", "shapes", "long")
PATIENCE_S = 5
WARM = 100
TEST_WORKERS = min(8, os.cpu_count() or 1)

FACTS_PROGRAM = """
import importlib.metadata, json, sys
import torch
if not torch.cuda.is_available():
    sys.exit("there is no GPU that torch can use")
from moeinf.shared_library import NotNativeError, load_library
try:
    import triton
    from moeinf.kernels.triton_maths import add_up
    add_up(torch.ones(1, 8, device="cuda"), torch.zeros(1, 2, dtype=torch.int64, device="cuda"))
    no_triton = ""
except Exception as error:
    no_triton = " ".join(f"{type(error).__name__}: {error}".split())[:500]
try:
    load_library(())
    no_library = ""
except NotNativeError as error:
    no_library = str(error)
versions = {}
for name in ("torch", "transformers", "triton", "accelerate"):
    try:
        versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        versions[name] = "none"
built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
facts = {"gpu": torch.cuda.get_device_name(0), "capability": torch.cuda.get_device_capability(0), "built": built}
print(json.dumps({**facts, "versions": versions, "no_triton": no_triton, "no_library": no_library}))
"""

RATES_PROGRAM = """
import json, sys
from moeinf.profiling.effort import Effort
from moeinf.profiling.gpu import Cuda, measure_gpus
from moeinf.progress import NO_PROGRESS
with NO_PROGRESS.task("GPU", 0, "rates") as task:
    gpus, left_out = measure_gpus(Cuda(), Effort(), task)
if not gpus:
    sys.exit("; ".join(left_out))
print(json.dumps({"link": gpus[0].pinned_to_device, "memory": gpus[0].bytes_per_s}))
"""

REQUESTS_PROGRAM = """
import json, sys
import torch, moeinf
held = []
with moeinf.load("demo", device="cuda", experts="25%", context=256) as engine:
    engine.generation_config.eos_token_id = None
    for number in range(int(sys.argv[1])):
        prompt = torch.randint(5, 1000, (1 + number % 100,), generator=torch.Generator().manual_seed(number)).tolist()
        engine.session().generate(prompt, moeinf.Sampling(max_tokens=4))
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        held.append((torch.cuda.memory_allocated(), total - free))
print(json.dumps(held))
"""


@dataclass(frozen=True)
class Rates:
    """Bytes per second: from pinned memory to the GPU, and of the GPU's own memory."""

    link: float
    memory: float


@dataclass(frozen=True)
class Row:
    """One measurement of moeinf, beside one other. What could not be known is None."""

    shape: str
    share: str
    tpot_s: float
    foretold_s: float | None
    other: str
    other_s: float | None
    hit_rate: float
    eta: float | None
    hidden: float | None
    same_tokens: bool

    @property
    def cells(self) -> tuple[str, ...]:
        ratio = "failed" if self.other_s is None else f"{self.other_s / self.tpot_s:.2f}"
        tokens = "same" if self.same_tokens else "OTHER"
        times = ("-" if seconds is None else f"{seconds * 1e3:.2f}" for seconds in (self.tpot_s, self.foretold_s))
        eta = "-" if self.eta is None else f"{self.eta:.2f}"
        hidden = "-" if self.hidden is None else f"{self.hidden:.0%}"
        shares = (f"{self.hit_rate:.1%}", eta, hidden)
        return (self.shape, self.share, *times, *shares, f"{self.other} takes {ratio} times as long", tokens)


HEAD = ("SHAPE:LAYERS", "EXPERTS", "MS/TOKEN", "FORETOLD", "HITS", "ETA", "LINK HIDDEN", "BESIDE", "TOKENS")


class FailedError(Exception):
    """A program of the repository failed; the message says why, in one line. `printed` is what it printed before."""

    def __init__(self, message: str, printed: str = "") -> None:
        super().__init__(message)
        self.printed = printed


def call(*command: str, env: dict[str, str], most_s: float, shows: bool = False) -> str:
    """What a program of the repository prints, which with `shows` goes to stderr as it comes, as its own messages do.

    Raises FailedError, also when it takes more than `most_s` seconds: then it is ended, with all that it has started.
    """
    printed: list[str] = []
    said: list[str] = []

    def follow(stream: IO[str], lines: list[str], is_shown: bool) -> None:
        with stream:
            for line in stream:
                lines.append(line)
                if is_shown:
                    print(line, end="", file=sys.stderr, flush=True)

    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    streams = (process.stdout, printed, shows), (process.stderr, said, True)
    threads = [Thread(target=follow, args=stream, daemon=True) for stream in streams]
    for thread in threads:
        thread.start()
    late = ""
    try:
        process.wait(most_s)
    except subprocess.TimeoutExpired:
        late = f"not done after {most_s:.0f} s: "
        end(process)
    except BaseException:
        end(process)
        raise
    finally:
        for thread in threads:
            thread.join(PATIENCE_S)
    if late or process.returncode:
        words = [line.strip() for lines in ((said, printed) if shows else (printed, said)) for line in lines]
        errors = [line.removeprefix("error: ") for line in words if line.startswith("error: ") and not shows]
        reason = errors or [line for line in words if line] or [f"it ended with {process.returncode}"]
        raise FailedError(late + reason[-1], "".join(printed))
    return "".join(printed)


def end(process: subprocess.Popen[str]) -> None:
    """End a program and all that it has started: as Ctrl-C does, so that it says what it has so far, then at once."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE_S)


class Check:
    """Runs one thing after the other within the time there is, and keeps what comes of each: in a file as soon as it is
    there, and for the end.
    """

    def __init__(self, folder: Path, results: Path, extent: Extent, minutes: float | None) -> None:
        self.folder = folder
        self.extent = extent
        self.facts: list[str] = []
        self.rows: list[Row] = []
        self.failures: list[str] = []
        self.env = {**os.environ, "MOEINF_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT / "src")}
        self.env |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}  # all there is to read is made here
        self.env |= {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"}  # as moeinf has it: what it is compared with attends alike
        self._results = results
        self._until = None if minutes is None else time.monotonic() + 60 * minutes

    def call(self, *command: str, shows: bool = False, **more_env: str) -> str:
        """What Python prints with these arguments."""
        left_s = self.extent.most_s if self._until is None else self._until - time.monotonic()
        most_s = max(1.0, min(self.extent.most_s, left_s))
        return call(sys.executable, *command, env={**self.env, **more_env}, most_s=most_s, shows=shows)

    def attempt(self, what: str, work: Callable[[], T]) -> T | None:
        """What `work` returns, or None if it fails, which is said."""
        if self._until is not None and time.monotonic() > self._until:
            self.fail(what, "not begun: the time is over")
            return None
        print(f"{what} ...", file=sys.stderr, flush=True)
        begin = time.monotonic()
        try:
            made = work()
        except Exception as error:  # whatever it is, the others go on
            self.fail(what, str(error) if isinstance(error, FailedError) else f"{type(error).__name__}: {error}")
            return None
        except KeyboardInterrupt:
            self.fail(what, "interrupted")
            raise
        took_s = time.monotonic() - begin
        print(f"{what}: done in {took_s:.0f} s", file=sys.stderr, flush=True)
        self.note(what, asdict(made) if is_dataclass(made) and not isinstance(made, type) else made, took_s=took_s)
        return made

    def fail(self, what: str, reason: str) -> None:
        self.failures.append(f"{what}: {reason}")
        print(f"FAILED: {self.failures[-1]}", file=sys.stderr, flush=True)
        self.note(what, None, failed=reason)

    def note(self, what: str, result: Any, **more: Any) -> None:
        with self._results.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"at": f"{datetime.now(UTC):%FT%TZ}", "what": what, **more, "result": result}) + "\n")

    def lines(self) -> Iterator[str]:
        """All of it, to be read."""
        yield from self.facts
        table = [HEAD, *(row.cells for row in self.rows)]
        widths = [max(len(row[column]) for row in table) for column in range(len(HEAD))]
        for row in table if self.rows else ():
            yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        yield from (f"FAILED: {failure}" for failure in self.failures)


def find_facts(check: Check) -> dict[str, Any]:
    """The GPU and what is installed, and whether Triton can launch a kernel."""
    facts: dict[str, Any] = json.loads(check.call("-c", FACTS_PROGRAM))
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    parts = (facts["gpu"], f"driver {driver()}", facts["built"], versions, f"{datetime.now(UTC):%F}")
    check.facts.append(", ".join(parts))
    if facts["no_library"]:
        check.facts.append(f"{facts['no_library']}: what the processor computes, torch does")
    return facts


def driver() -> str:
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        known = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        known = []
    return known[0] if known else "unknown"


def run_tests(check: Check, *chosen: str, workers: int = 1) -> str:
    """pytest's last line; plug-ins that the machine happens to have are left out."""
    command = ["-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore", "-o", "faulthandler_timeout=120"]
    if workers > 1 and find_spec("xdist"):
        command += ["-p", "xdist.plugin", "-n", str(workers), "--dist", "worksteal"]
    env = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return check.call(*command, *chosen, shows=True, **env).strip().splitlines()[-1]


def measure_rates(check: Check) -> Rates:
    return Rates(**json.loads(check.call("-c", RATES_PROGRAM)))


def leak(check: Check) -> tuple[int, int]:
    """Bytes that torch, and all processes, held more after the last request than after WARM."""
    held = json.loads(check.call("-c", REQUESTS_PROGRAM, str(check.extent.requests)))
    return held[-1][0] - held[WARM - 1][0], held[-1][1] - held[WARM - 1][1]


def profile(check: Check) -> Any:
    """The figures of this machine, which forecasts are made from."""
    return json.loads(check.call("-m", "moeinf", "profile", "--json"))


def pull(check: Check, shape: str) -> str:
    """Write and store the checkpoint, unless that was done before; returns its name."""
    name, _, layers = shape.partition(":")
    checkpoint = check.folder / shape.replace(":", "-")
    check.call("-m", "moeinf.testing", name, str(checkpoint), "--layers", layers)
    stored = json.loads(check.call("-m", "moeinf", "list", "--json"))
    if checkpoint.name not in [model["name"] for model in stored["models"]]:
        check.call("-m", "moeinf", "pull", str(checkpoint), "--name", checkpoint.name, "--experts", "bf16")
    return checkpoint.name


def foretell(check: Check, model: str, *options: str) -> float:
    """Seconds per token."""
    command = ("-m", "moeinf", "profile", model, "--device", "cuda", *options, "--json")
    expected = json.loads(check.call(*command))["expected"]
    return float(expected["tpot_s"] / expected["factor"])


def bench(
    check: Check,
    shape: str,
    model: str,
    setting: Setting,
    bounded: tuple[str, str],
    foretold_s: float | None,
    rates: Rates | None,
) -> Row:
    extent, options = check.extent, setting.options
    share = " ".join((bounded[1], *options))
    command = ["-m", "moeinf", "bench", model, "--device", "cuda", *bounded, *options, "--against", setting.other]
    for name in ("prompts", "tokens", "repeat"):
        command += [f"--{name}", str(getattr(extent, name))]
    try:
        printed = check.call(*command, "--prompt-tokens", "64", "--warm", "--json")
    except FailedError as failed:  # it may have a reason of its own
        if not failed.printed.startswith("{"):
            raise
        printed = failed.printed
    report = json.loads(printed)
    check.note(f"{shape} {share}, report", report)
    ours, theirs = (
        next(run for run in report["runs"] if run["system"] == system) for system in ("moeinf", setting.other)
    )
    if not ours["tpot_s"]:
        raise FailedError(ours["error"])
    if theirs["error"]:
        check.fail(f"{shape} {share}, {setting.other}", theirs["error"])
    tpot_s = ours["tpot_s"]["median"]
    eta = hidden = None
    if rates is not None and "--miss" not in options:  # what the processor computes does not cross the link
        counts = ours["last"]
        expert_bytes = counts["memory"]["experts"] / counts["slots"]
        link_s = ours["bytes_per_token"]["missed"] / rates.link
        hit_bytes = counts["hits"] * expert_bytes / (extent.prompts * (extent.tokens - 1))
        eta = max((counts["token_bytes"] + hit_bytes) / rates.memory, link_s) / tpot_s
        hidden = max(0.0, 1 - ours["stall_s_per_token"] / link_s) if link_s else None
    return Row(
        shape,
        share,
        tpot_s,
        foretold_s,
        setting.other,
        theirs["tpot_s"]["median"] if theirs["tpot_s"] else None,
        ours["hit_rate"],
        eta,
        hidden,
        report["same_tokens"],
    )


def measure(check: Check, parts: list[str], device_memory: str | None) -> None:
    facts = check.attempt("facts", partial(find_facts, check))
    if facts is None:
        return
    if facts["no_triton"]:
        check.fail("Triton, and all that needs it", facts["no_triton"])

    def run(name: str, *chosen: str, workers: int = 1) -> None:
        last = check.attempt(name, partial(run_tests, check, *chosen, workers=workers))
        check.facts.append(f"{name}: {last or 'failed'}")

    if "tests" in parts:
        run("tests", "tests/gpu", "-m", "not long")
    if "triton" in parts and not facts["no_triton"]:
        run("tests of Triton's kernels", "tests/test_triton.py", workers=TEST_WORKERS)
    if "requests" in parts and (grown := check.attempt("requests", partial(leak, check))) is not None:
        held = f"torch holds {grown[0]:+,} bytes, and the GPU {grown[1]:+,}, since request {WARM}"
        check.facts.append(f"after {check.extent.requests} requests {held}")
    if "shapes" in parts:
        rates = check.attempt("rates", partial(measure_rates, check))
        if rates is not None:
            check.facts.append(f"link {rates.link / 1e9:.1f} GB/s, GPU memory {rates.memory / 1e9:.0f} GB/s")
        check.attempt("profile", partial(profile, check))
        settings = [each for each in check.extent.settings if "triton" not in each.options or not facts["no_triton"]]
        if device_memory:
            settings = [each for each in settings if each.share == QUARTER.share]
        for shape in check.extent.shapes:
            model = check.attempt(f"{shape}, checkpoint", partial(pull, check, shape))
            for setting in settings if model is not None else ():
                assert model is not None
                bounded = ("--device-memory", device_memory) if device_memory else ("--experts", setting.share)
                what = " ".join((shape, bounded[1], *setting.options))
                foretold_s = None
                if not any(option in NOT_FORETOLD for option in setting.options):
                    forecast = partial(foretell, check, model, *bounded, *setting.options)
                    foretold_s = check.attempt(f"{what}, forecast", forecast)
                row = check.attempt(what, partial(bench, check, shape, model, setting, bounded, foretold_s, rates))
                if row is not None:
                    check.rows.append(row)
                    print(" ".join(row.cells), file=sys.stderr, flush=True)
    if "long" in parts:
        run("long tests", "tests/gpu", "-m", "long", workers=TEST_WORKERS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "gpu-check", help="for checkpoints and models")
    parser.add_argument("--results", type=Path, help="in place of FOLDER/results.jsonl; lines are appended")
    parser.add_argument("--quick", action="store_true", help=f"a first look: {QUICK_MINUTES:.0f} minutes, nothing long")
    parser.add_argument("--minutes", type=float, help="begin nothing later, and end what runs then")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all of them, with --quick all but long")
    parser.add_argument("--shapes", nargs="+", help="SHAPE:LAYERS ...")
    parser.add_argument("--device-memory", help="like 12GiB, in place of shares of the experts")
    arguments = parser.parse_args()
    extent, minutes = (QUICK, QUICK_MINUTES) if arguments.quick else (FULL, None)
    if arguments.shapes:
        extent = replace(extent, shapes=tuple(arguments.shapes))
    folder = arguments.folder.resolve()
    results = (arguments.results or folder / "results.jsonl").resolve()
    for each in (folder, results.parent):
        each.mkdir(parents=True, exist_ok=True)
    check = Check(folder, results, extent, minutes if arguments.minutes is None else arguments.minutes)
    parts = arguments.parts or [part for part in PARTS if part != "long" or not arguments.quick]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit ends this as Ctrl-C does
    try:
        measure(check, parts, arguments.device_memory)
    except KeyboardInterrupt:
        check.facts.append("interrupted: what follows is not all")
    finally:
        print("\n".join(check.lines()), flush=True)
    raise SystemExit(1 if check.failures else 0)


if __name__ == "__main__":
    main()
