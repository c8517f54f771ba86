"""What a GPU makes of moeinf: its own tests, then times beside transformers and accelerate, then a thousand requests.

    scripts/gpu_check.sh                          # everything, in perhaps 45 minutes; installs what is missing
    python benchmarks/gpu.py --folder FOLDER --shapes deepseek-v2-lite:10 qwen3-30b-a3b:12

Each shape (with so many layers, about a gigabyte each) is a random checkpoint, kept in FOLDER. At a quarter and half of
the experts on the GPU moeinf runs beside accelerate, which keeps the others in host memory too, once more at a quarter
with `--miss auto`; with all of them there, beside transformers alone, with torch's maths, with Triton's kernels, and
with layers compiled around these; `moeinf bench` takes the times. The bound is the larger of what the link and the
GPU's memory need, at the rates that were measured just before; what is hidden is the share of the link's time in which
nothing waited for it; what `moeinf profile` foretold, before past runs correct it, stands beside what was measured.
Prints a short table last.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ("deepseek-v2-lite:8", "qwen3-30b-a3b:8", "mixtral-8x7b:3")
RUNS = (
    ("25%", "accelerate", ()),
    ("25%", "accelerate", ("--miss", "auto")),
    ("50%", "accelerate", ()),
    ("100%", "transformers", ()),
    ("100%", "transformers", ("--kernels", "triton")),
    ("100%", "transformers", ("--kernels", "triton", "--compile", "on")),
)
"""Shares of the experts, what is measured beside, and options of moeinf."""
NOT_FORETOLD = ("--miss", "--compile")
PROMPTS, TOKENS = 2, 48
REQUESTS, WARM = 1000, 100

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
    """One measurement of moeinf, beside one other."""

    shape: str
    share: str
    tpot_s: float
    foretold_s: float | None
    other: str
    other_s: float | None
    hit_rate: float
    eta: float
    hidden: float | None
    same_tokens: bool

    @property
    def cells(self) -> tuple[str, ...]:
        ratio = "failed" if self.other_s is None else f"{self.other_s / self.tpot_s:.2f}"
        hidden = "-" if self.hidden is None else f"{self.hidden:.0%}"
        tokens = "same" if self.same_tokens else "OTHER"
        times = ("-" if seconds is None else f"{seconds * 1e3:.2f}" for seconds in (self.tpot_s, self.foretold_s))
        shares = (f"{self.hit_rate:.1%}", f"{self.eta:.2f}", hidden)
        return (self.shape, self.share, *times, *shares, f"{self.other} takes {ratio} times as long", tokens)


HEAD = ("SHAPE:LAYERS", "EXPERTS", "MS/TOKEN", "FORETOLD", "HITS", "ETA", "LINK HIDDEN", "BESIDE", "TOKENS")


def call(*command: str, env: dict[str, str]) -> str:
    """What a program of the repository prints; its own messages go to stderr as they come."""
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def measure_rates() -> Rates:
    from moeinf.profiling.effort import Effort
    from moeinf.profiling.gpu import Cuda, measure_gpus
    from moeinf.progress import NO_PROGRESS

    with NO_PROGRESS.task("GPU", 0, "rates") as task:
        gpus, left_out = measure_gpus(Cuda(), Effort(), task)
    if not gpus:
        raise SystemExit("; ".join(left_out))
    return Rates(gpus[0].pinned_to_device, gpus[0].bytes_per_s)


def pull(shape: str, folder: Path, env: dict[str, str]) -> str:
    """Write and store the checkpoint, unless that was done before; returns its name."""
    name, _, layers = shape.partition(":")
    checkpoint = folder / shape.replace(":", "-")
    call(sys.executable, "-m", "moeinf.testing", name, str(checkpoint), "--layers", layers, env=env)
    stored = json.loads(call(sys.executable, "-m", "moeinf", "list", "--json", env=env))
    if checkpoint.name not in [model["name"] for model in stored["models"]]:
        call(sys.executable, "-m", "moeinf", "pull", str(checkpoint), "--name", checkpoint.name, env=env)
    return checkpoint.name


def foretell(model: str, *bounded: str, env: dict[str, str]) -> float:
    """Seconds per token; measures the machine the first time."""
    command = (sys.executable, "-m", "moeinf", "profile", model, "--device", "cuda", *bounded, "--json")
    expected = json.loads(call(*command, env=env))["expected"]
    return float(expected["tpot_s"] / expected["factor"])


def bench(
    shape: str,
    model: str,
    share: str,
    other: str,
    options: tuple[str, ...],
    device_memory: str | None,
    rates: Rates,
    env: dict[str, str],
) -> Row:
    bounded = ("--device-memory", device_memory) if device_memory else ("--experts", share)
    is_foretold = not any(option in NOT_FORETOLD for option in options)
    foretold_s = foretell(model, *bounded, *options, env=env) if is_foretold else None
    report = json.loads(
        call(
            *(sys.executable, "-m", "moeinf", "bench", model, "--device", "cuda", *bounded, *options),
            *(
                "--against",
                other,
                "--prompts",
                str(PROMPTS),
                "--tokens",
                str(TOKENS),
                "--prompt-tokens",
                "64",
                "--warm",
                "--json",
            ),
            env=env,
        )
    )
    ours, theirs = (next(run for run in report["runs"] if run["system"] == system) for system in ("moeinf", other))
    tpot_s = ours["tpot_s"]["median"]
    counts = ours["last"]
    expert_bytes = counts["memory"]["experts"] / counts["slots"]
    link_s = ours["bytes_per_token"]["missed"] / rates.link
    hit_bytes = counts["hits"] * expert_bytes / (PROMPTS * (TOKENS - 1))
    device_s = (counts["token_bytes"] + hit_bytes) / rates.memory
    return Row(
        shape,
        " ".join((device_memory or share, *options)),
        tpot_s,
        foretold_s,
        other,
        theirs["tpot_s"]["median"] if theirs["tpot_s"] else None,
        ours["hit_rate"],
        max(device_s, link_s) / tpot_s,
        max(0.0, 1 - ours["stall_s_per_token"] / link_s) if link_s else None,
        report["same_tokens"],
    )


def leak(env: dict[str, str]) -> tuple[int, int]:
    """Bytes that torch, and all processes, held more after REQUESTS requests than after WARM."""
    held = json.loads(call(sys.executable, "-c", REQUESTS_PROGRAM, str(REQUESTS), env=env))
    return held[-1][0] - held[WARM - 1][0], held[-1][1] - held[WARM - 1][1]


def lines(rows: list[Row]) -> Iterator[str]:
    table = [HEAD, *(row.cells for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(HEAD))]
    for row in table:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def system() -> str:
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    version: Any = torch.version
    built = f"CUDA {version.cuda}" if version.cuda else f"ROCm {version.hip}"
    name, known = torch.cuda.get_device_name(0), driver.stdout.split()
    parts = (name, f"driver {known[0] if known else 'unknown'}", f"torch {torch.__version__} ({built})")
    return ", ".join([*parts, f"{datetime.now(UTC):%F}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "gpu-check", help="for checkpoints and models")
    parser.add_argument("--shapes", nargs="*", default=SHAPES, help="SHAPE:LAYERS ...")
    parser.add_argument("--device-memory", help="like 12GiB, in place of shares of the experts")
    parser.add_argument("--skip-tests", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU that torch can use")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "MOEINF_HOME": str(arguments.folder.resolve() / "home"), "PYTHONPATH": str(ROOT / "src")}
    tests = "not run"
    if not arguments.skip_tests:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "tests/gpu", "tests/test_triton.py"],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        print(done.stdout, file=sys.stderr)
        tests = (done.stdout.strip().splitlines() or ["they said nothing"])[-1]
    rates, rows = measure_rates(), []
    torch.cuda.empty_cache()
    runs = [run for run in RUNS if run[0] == RUNS[0][0] or not arguments.device_memory]
    for shape in arguments.shapes:
        model = pull(shape, arguments.folder.resolve(), env)
        for share, other, options in runs:
            rows.append(bench(shape, model, share, other, options, arguments.device_memory, rates, env))
            print(" ".join(rows[-1].cells), file=sys.stderr)
    allocated, used = leak(env)
    print(system())
    print(f"tests: {tests}")
    print(f"link {rates.link / 1e9:.1f} GB/s, GPU memory {rates.memory / 1e9:.0f} GB/s")
    print("\n".join(lines(rows)))
    print(f"after {REQUESTS} requests torch holds {allocated:+,} bytes, and the GPU {used:+,}, since request {WARM}")


if __name__ == "__main__":
    main()
