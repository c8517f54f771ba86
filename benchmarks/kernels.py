"""One token's experts: native kernels against torch's, in the expert shapes of real models, beside the rate at which
this machine reads memory.

    python benchmarks/kernels.py
    python benchmarks/kernels.py --shapes small --busy 2     # two other programs want the cores

Every step takes the next experts of a working set far beyond the cache. Reading, torch and native take turns, so what
else the machine does meets all three. Prints the median time per layer and the rate at which weights are read.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, islice

import torch
import torch.nn.functional as F
from torch import nn

from moeinf.kernels import ExpertMaths, Tensors
from moeinf.kernels.native import NativeMaths, NativePool
from moeinf.manifest import ExpertLayout, TensorSpec
from moeinf.transfer import SlotPool

GB = 1e9
TURN = 16
"""Layers that each computes before it is another's turn."""


@dataclass(frozen=True)
class Shape:
    """One MoE layer: widths, experts per token, and whether weights are [in, out] with gates and ups in turn."""

    hidden: int
    inner: int
    top_k: int
    is_transposed: bool = False

    @property
    def layout(self) -> ExpertLayout:
        up, down = (2 * self.inner, self.hidden), (self.hidden, self.inner)
        if self.is_transposed:
            up, down = up[::-1], down[::-1]
        return ExpertLayout(
            0,
            (TensorSpec("gate_up_proj", "BF16", up, 0), TensorSpec("down_proj", "BF16", down, 4 * up[0] * up[1] // 2)),
        )


SHAPES = {
    "small": Shape(1024, 512, 8),
    "qwen3-30b-a3b": Shape(2048, 768, 8),
    "deepseek-v2-lite": Shape(2048, 1408, 6),
    "mixtral-8x7b": Shape(4096, 14336, 2),
    "gpt-oss-20b": Shape(2880, 2880, 4, is_transposed=True),
}


class Experts(nn.Module):
    """An experts module as transformers has them, without weights."""

    has_gate, has_bias, has_post_expert_norm = True, False, False

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.is_transposed, self.is_concatenated = shape.is_transposed, not shape.is_transposed

    def _apply_gate(self, both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, dim=-1) if self.is_concatenated else (both[..., ::2], both[..., 1::2])
        return F.silu(gate) * up


@dataclass(frozen=True)
class Result:
    """Medians of one shape: bytes per second of reading, and seconds per layer of torch and native maths."""

    shape: str
    layer_bytes: int
    read_rate: float
    torch_s: float
    native_s: float

    @property
    def share_of_read_rate(self) -> float:
        return self.layer_bytes / self.native_s / self.read_rate


def token(maths: ExpertMaths, hidden: torch.Tensor, weights: torch.Tensor, experts: list[Tensors]) -> torch.Tensor:
    places = range(len(experts))
    step = maths.token(hidden, weights)
    step.compute(places, experts)
    return step.total(places)


def measure(name: str, shape: Shape, pool: NativePool, working_set: int, repeats: int) -> Result:
    layout = shape.layout
    slots = SlotPool(layout, max(2 * shape.top_k, working_set // layout.nbytes))
    experts: list[Tensors] = [slots.tensors(slot) for slot in range(working_set // layout.nbytes)]
    generator = torch.Generator().manual_seed(0)
    for expert in experts:
        for tensor in expert.values():
            tensor.normal_(0, 0.02, generator=generator)
    size, layer_bytes = slots.slot_bytes * len(experts), shape.top_k * slots.slot_bytes
    memory = torch.frombuffer(slots._buffer, dtype=torch.uint8, count=size)
    module = Experts(shape)
    hidden = torch.randn(1, shape.hidden, generator=generator).to(torch.bfloat16)
    weights = torch.full((1, shape.top_k), 1 / shape.top_k)
    starts = range(0, len(experts) - shape.top_k + 1, shape.top_k)

    def compute(maths: ExpertMaths) -> Iterator[Callable[[], object]]:
        for start in cycle(starts):
            yield partial(token, maths, hidden, weights, experts[start : start + shape.top_k])

    turns: dict[str, Iterator[Callable[[], object]]] = {
        "read": (
            partial(pool.read, memory[at : at + layer_bytes])
            for at in cycle(range(0, size - layer_bytes + 1, layer_bytes))
        ),
        "torch": compute(ExpertMaths(module)),
        "native": compute(NativeMaths(module, layout, pool)),
    }
    times: dict[str, list[float]] = {kind: [] for kind in turns}
    for _ in range(repeats):
        for kind, calls in turns.items():
            times[kind] += [timed(call) for call in islice(calls, TURN)]
    read_s, torch_s, native_s = (statistics.median(figures) for figures in times.values())
    return Result(name, layer_bytes, layer_bytes / read_s, torch_s, native_s)


def timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def spin() -> None:
    while True:
        pass


@contextmanager
def busy(count: int) -> Iterator[None]:
    """`count` other programs that never rest."""
    others = [multiprocessing.get_context("spawn").Process(target=spin, daemon=True) for _ in range(count)]
    for other in others:
        other.start()
    time.sleep(0.5 if count else 0)
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--working-set", type=float, default=2.0, metavar="GB")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--busy", type=int, default=0, help="programs beside it that never rest")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pool = NativePool(arguments.threads)
    results = []
    with torch.inference_mode(), busy(arguments.busy):
        for name in arguments.shapes:
            size = int(arguments.working_set * GB)
            results.append(measure(name, SHAPES[name], pool, size, arguments.repeats))
    pool.close()
    if arguments.json:
        print(json.dumps([asdict(result) for result in results]))
        return
    print(f"{pool.variant}, {arguments.threads} threads, {arguments.busy} busy programs beside it")
    for found in results:
        rate = found.layer_bytes / found.native_s / GB
        print(
            f"{found.shape:17} read {found.read_rate / GB:5.1f} GB/s   torch {found.torch_s * 1e3:6.2f} ms"
            f"   native {found.native_s * 1e3:6.2f} ms = {rate:5.1f} GB/s, {found.share_of_read_rate:4.0%} of reading,"
            f" {found.torch_s / found.native_s:4.2f} times as fast as torch"
        )


if __name__ == "__main__":
    main()
