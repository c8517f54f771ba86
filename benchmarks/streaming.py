"""Decode from a model that does not fit: moeinf against transformers with its weights mapped or offloaded, in one
memory cgroup.

    python benchmarks/streaming.py                       # the small shape; needs root, for the cgroup
    python benchmarks/streaming.py --shape mixtral-8x7b

Writes a random checkpoint with the shapes of a real model, pulls it, and lets each system decode the same tokens from
it in turn, as processes of their own in a memory cgroup that holds the dense weights, a quarter of the experts and
1 GiB. Before and after each run it measures how fast the disk gives whole experts to direct reads, which bounds the
time per token: bytes that were asked for and not in memory, prefetched or not / that rate. The page cache is dropped
before each run. Last, in one process without a limit, everything resident: moeinf against plain transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from cgroups import memory_limit, run_in
from moeinf.hardware import read_ahead_file
from moeinf.settings import DEFAULT_POLICY
from shapes import SHAPES, write_checkpoint

GIB = 1 << 30
MIB = 1 << 20
PROMPT = list(range(5, 21))
WARM_UP_TOKENS = 4
"""Decoded before anything is measured: the first tokens also page in the libraries' code."""
SYSTEMS = ("moeinf", "mmap", "offload")


@dataclass(frozen=True)
class Run:
    """What one worker reports. `token_s`: one time per decoded token; `missed_bytes`: expert bytes per decoded token
    that were asked for and had to come from the disk; `read_bytes`: what was read per decoded token, wrong guesses too.
    """

    system: str
    ttft_s: float
    token_s: list[float]
    tokens: list[int]
    hit_rate: float = 0.0
    missed_bytes: float = 0.0
    read_bytes: float = 0.0
    precision: float = 0.0
    slots: int = 0

    @property
    def tpot_s(self) -> float:
        return statistics.mean(self.token_s)


class Stopwatch:
    """A streamer for `generate` that only takes the time."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def intervals(self) -> tuple[float, list[float]]:
        """(time to the first token, times per token after it). The first `put` is the prompt."""
        _, begin, *tokens = self.times
        return tokens[0] - begin, [after - before for before, after in pairwise(tokens)]


def generate(model: Any, new_tokens: int) -> tuple[Stopwatch, list[int]]:
    """Sample with a fixed seed: greedy decoding of a random model falls into a loop, and a loop has a locality all its
    own.
    """
    watch = Stopwatch()
    torch.manual_seed(1)
    prompt = torch.tensor([PROMPT])
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        eos_token_id=None,
        pad_token_id=0,
        streamer=watch,
    )
    return watch, output[0, len(PROMPT) :].tolist()


def run_moeinf(name: str, new_tokens: int, **options: Any) -> Run:
    import moeinf

    with moeinf.load(name, **options) as engine, torch.inference_mode():
        generate(engine.model, WARM_UP_TOKENS)
        engine.runtime.reset_counters()
        watch, tokens = generate(engine.model, new_tokens)
        ttft, intervals = watch.intervals()
        stats, steps = engine.stats(), len(intervals)
        found, prefill = stats.experts, engine.runtime.prefill
        fetched = found.decode_requests - found.decode_hits + found.prefetch_used - found.waits
        size = engine.manifest.layout.nbytes
        return Run(
            "moeinf",
            ttft,
            intervals,
            tokens,
            hit_rate=found.decode_hits / found.decode_requests,
            missed_bytes=fetched * size / steps,
            read_bytes=(stats.bytes.disk_to_host - prefill.misses * size) / steps,
            precision=found.prefetch_used / found.prefetched if found.prefetched else 0.0,
            slots=found.slots,
        )


def run_transformers(system: str, checkpoint: Path, new_tokens: int) -> Run:
    """mmap: weights mapped, paged in by the kernel. offload: experts on disk for three layers of four, loaded by
    accelerate.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {}
    if system == "offload":
        layers = AutoConfig.from_pretrained(checkpoint).num_hidden_layers
        auto: Any = AutoModelForCausalLM
        with torch.device("meta"):
            blank = auto.from_config(AutoConfig.from_pretrained(checkpoint))
        on_disk = {
            name
            for name, module in blank.named_modules()
            if hasattr(module, "has_gate") and int(name.split(".")[2]) >= layers // 4
        }
        options = {"device_map": _device_map(blank, on_disk), "offload_folder": str(checkpoint / "offload")}
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, **options)
    with torch.inference_mode():
        generate(model, WARM_UP_TOKENS)
        watch, tokens = generate(model, new_tokens)
    return Run(system, *watch.intervals(), tokens)


def _device_map(model: torch.nn.Module, on_disk: set[str], prefix: str = "") -> dict[str, str]:
    """Modules named in `on_disk` there, all others in memory, no module named that holds both."""
    devices: dict[str, str] = {}
    for name, child in model.named_children():
        path = f"{prefix}{name}"
        if path in on_disk:
            devices[path] = "disk"
        elif any(other.startswith(f"{path}.") for other in on_disk):
            devices |= _device_map(child, on_disk, f"{path}.")
        else:
            devices[path] = "cpu"
    return devices


def resident(name: str, checkpoint: Path, new_tokens: int) -> tuple[list[float], list[float]]:
    """Times per token, (moeinf, plain transformers), in turn in this process with everything in memory."""
    from transformers import AutoModelForCausalLM

    import moeinf

    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    plain.load_state_dict({key: tensor.clone() for key, tensor in plain.state_dict().items()}, assign=True)
    ours, theirs = [], []
    with moeinf.load(name, experts="100%") as engine, torch.inference_mode():
        for model in (engine.model, plain):
            generate(model, new_tokens)  # every expert it will need is in memory afterwards
        for _ in range(3):
            ours += generate(engine.model, new_tokens)[0].intervals()[1]
            theirs += generate(plain, new_tokens)[0].intervals()[1]
    return ours, theirs


def disk_rate(name: str, seconds: float = 3.0) -> float:
    """Bytes per second of direct reads of whole experts in random order, as many in flight as the engine has, in one
    request each.
    """
    from moeinf import engine, transfer
    from moeinf.manifest import expert_path
    from moeinf.store import Store

    stored = Store().open(name)
    layout, layers = stored.manifest.layout, stored.manifest.layers
    paths = [stored.path / expert_path(layer, e) for layer, its in enumerate(layers) for e in range(its.num_experts)]
    random.Random(0).shuffle(paths)
    depth = engine.READERS
    piece, transfer.PIECE_BYTES = transfer.PIECE_BYTES, layout.nbytes
    pool = transfer.SlotPool(layout, depth)
    reader = transfer.Reader(threads=depth, direct=True)
    try:
        begin, done = time.perf_counter(), 0
        for number in range(depth):
            reader.fetch(number, paths[number], layout.data_offset, layout.file_bytes, pool.memory(number))
        while time.perf_counter() - begin < seconds:
            slot = reader.wait().key
            done += 1
            path = paths[(done + depth) % len(paths)]
            reader.fetch(slot, path, layout.data_offset, layout.file_bytes, pool.memory(slot))
        return done * layout.nbytes / (time.perf_counter() - begin)
    finally:
        reader.close()
        transfer.PIECE_BYTES = piece


def work(arguments: argparse.Namespace) -> None:
    """What a process inside the cgroup does."""
    torch.set_num_threads(arguments.threads)
    if arguments.worker == "moeinf":
        options = {"policy": arguments.policy, "prefetch": arguments.prefetch, "context": arguments.context}
        run = run_moeinf(arguments.shape, arguments.tokens, **options)
    else:
        run = run_transformers(arguments.worker, arguments.folder / arguments.shape, arguments.tokens)
    print(json.dumps(asdict(run)))


def measure(arguments: argparse.Namespace, limit_bytes: int) -> list[tuple[float, Run | str]]:
    """(disk rate around the run, run or what went wrong) for each system in turn, `repeats` times."""
    results: list[tuple[float, Run | str]] = []
    for _ in range(arguments.repeats):
        for system in arguments.systems:
            before = disk_rate(arguments.shape)
            Path("/proc/sys/vm/drop_caches").write_text("3")
            command = [sys.executable, __file__, "--worker", system, "--shape", arguments.shape]
            command += ["--folder", str(arguments.folder), "--tokens", str(arguments.tokens)]
            command += ["--threads", str(arguments.threads), "--context", str(arguments.context)]
            command += ["--policy", arguments.policy, "--prefetch", arguments.prefetch]
            with memory_limit(limit_bytes) as cgroup:
                done = run_in(cgroup, command)
            lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["no output"]
            ended = (
                Run(**json.loads(lines[-1]))
                if done.returncode == 0
                else f"{system}: exit {done.returncode}: {lines[-1]}"
            )
            results.append((2 / (1 / before + 1 / disk_rate(arguments.shape)), ended))
    return results


def report(results: list[tuple[float, Run | str]], systems: list[str]) -> None:
    for _, failed in results:
        if isinstance(failed, str):
            print(failed)
    runs = [(rate, run) for rate, run in results if isinstance(run, Run)]
    ours = [(rate, run) for rate, run in runs if run.system == "moeinf"]
    print(f"{'system':9} {'ms/token':>9} {'tokens/s':>9} {'min..max ms':>15} {'first token s':>14}")
    for system in systems:
        mine = [run for _, run in runs if run.system == system]
        if mine:
            tpots = [run.tpot_s * 1e3 for run in mine]
            middle = statistics.median(tpots)
            spread = f"{min(tpots):.0f}..{max(tpots):.0f}"
            first = statistics.median(run.ttft_s for run in mine)
            print(f"{system:9} {middle:9.1f} {1e3 / middle:9.2f} {spread:>15} {first:14.2f}")
    for rate, run in ours:
        bound = run.missed_bytes / rate
        print(
            f"moeinf: {run.slots} slots, hit rate {run.hit_rate:.3f}, {run.missed_bytes / MIB:.0f} MiB a token missed"
            f" ({run.read_bytes / MIB:.0f} read; {run.precision:.0%} of guesses right),"
            f" disk {rate / 1e9:.2f} GB/s: bound {bound * 1e3:.1f} ms, measured {run.tpot_s * 1e3:.1f} ms,"
            f" ratio {run.tpot_s / bound:.2f}"
        )
    for system in systems:
        others = [run.tpot_s for _, run in runs if run.system == system]
        if ours and others and system != "moeinf":
            ratio = statistics.median(others) / statistics.median(run.tpot_s for _, run in ours)
            print(f"{system} / moeinf: {ratio:.2f} times the time per token")
    print(f"all produced the same tokens: {len({tuple(run.tokens) for _, run in runs}) == 1}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--folder", type=Path, default=Path("bench-data"), help="where checkpoints and the store go")
    parser.add_argument("--tokens", type=int, default=24, help="tokens per run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--policy", default=DEFAULT_POLICY)
    parser.add_argument("--prefetch", default="auto")
    parser.add_argument("--context", type=int, default=512, help="tokens that moeinf keeps a KV cache for")
    parser.add_argument("--read-ahead", type=int, metavar="KIB", help="set the block device's read-ahead for the runs")
    parser.add_argument("--no-resident", action="store_true", help="leave out the comparison with everything in memory")
    parser.add_argument("--worker", choices=SYSTEMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.folder = arguments.folder.resolve()
    os.environ["MOEINF_HOME"] = str(arguments.folder / "home")
    if arguments.worker:
        work(arguments)
        return

    write_checkpoint(SHAPES[arguments.shape](), arguments.folder / arguments.shape)
    checkpoint = arguments.folder / arguments.shape
    if not (arguments.folder / "home/models" / arguments.shape).exists():
        subprocess.run(
            [sys.executable, "-m", "moeinf", "pull", str(checkpoint), "--name", arguments.shape, "-q"], check=True
        )
    from moeinf.store import Store

    manifest = Store().open(arguments.shape).manifest
    limit = manifest.dense_bytes + manifest.experts_bytes // 4 + GIB
    if arguments.shape == "small":
        limit = 1600 * MIB
    setting = read_ahead_file(arguments.folder)
    before = setting.read_text() if setting else "unknown"
    print(
        f"{arguments.shape}: {len(manifest.layers)} layers x {manifest.layers[0].num_experts} experts of"
        f" {manifest.layout.nbytes / MIB:.1f} MiB, {manifest.layers[0].top_k} per token;"
        f" dense {manifest.dense_bytes / MIB:.0f} MiB; cgroup {limit / MIB:.0f} MiB; {arguments.threads} threads"
    )
    try:
        if setting and arguments.read_ahead is not None:
            setting.write_text(str(arguments.read_ahead))
        print(f"read-ahead of the block device: {setting.read_text().strip() if setting else 'unknown'} KiB")
        report(measure(arguments, limit), arguments.systems)
    finally:
        if setting and arguments.read_ahead is not None:
            setting.write_text(before)
    if not arguments.no_resident:
        torch.set_num_threads(arguments.threads)
        ours, theirs = resident(arguments.shape, checkpoint, arguments.tokens)
        ratio = statistics.median(ours) / statistics.median(theirs)
        print(
            f"all resident, in one process: moeinf {statistics.median(ours) * 1e3:.1f} ms, transformers"
            f" {statistics.median(theirs) * 1e3:.1f} ms per token: ratio {ratio:.2f}"
        )


if __name__ == "__main__":
    main()
