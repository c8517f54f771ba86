"""One token's experts: native kernels against torch's, in the expert shapes of real models, beside the rate at which
this machine reads memory.

    python benchmarks/kernels.py
    python benchmarks/kernels.py --weights lossless
    python benchmarks/kernels.py --weights int4
    python benchmarks/kernels.py --weights fp8
    python benchmarks/kernels.py --weights mxfp4 --shapes gpt-oss-20b
    python benchmarks/kernels.py --shapes small --busy 2     # two other programs want the cores

Every step takes the next experts of a working set far beyond the cache. Reading, torch and native take turns, so what
else the machine does meets all three. Prints the median time per layer and the rate at which weights are read. With
whole numbers for weights, torch's side is its own kernels for them, and the two projections alone; with lossless ones
it is the plain weights. torch has none for fp8 and mxfp4: its side expands weights and multiplies, as `--kernels torch`
does.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, islice

if __name__ == "__main__":
    sys.path.pop(0)  # or transformers takes the kernels.py beside this for the package of that name

import torch
import torch.nn.functional as F
from torch import nn

from moeinf.dtypes import TORCH_DTYPES
from moeinf.kernels import ExpertMaths, Tensors
from moeinf.kernels.native import NativeMaths, NativePool
from moeinf.lossless import LosslessPacker
from moeinf.manifest import GROUPS, LOSSLESS, NUMBER_BITS, ExpertLayout, TensorSpec
from moeinf.quantized import Packer, Quantizer, fill_randomly
from moeinf.transfer import allocate_buffer

GB = 1e9
TURN = 16
"""Layers that each computes before it is another's turn."""
BITS = {"bf16": 16} | NUMBER_BITS
RELEASED = ("fp8", "mxfp4")
GROUP = 64
"""Of torch's own int4."""
COPIES = 4
"""Experts that differ; the others are copies of them, each with memory of its own."""

Call = Callable[[], object]


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
        first = TensorSpec("gate_up_proj", "BF16", up, 0)
        return ExpertLayout(0, (first, TensorSpec("down_proj", "BF16", down, first.nbytes)))


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
    weights: str
    layer_bytes: int
    read_rate: float
    torch_s: float
    native_s: float

    @property
    def share_of_read_rate(self) -> float:
        return self.layer_bytes / self.native_s / self.read_rate


def make_expert(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {
        spec.name: torch.empty(spec.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        for spec in shape.layout.tensors
    }


def torch_weights(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(numbers, factors) as torch's own kernels want them: a factor per row of int8, or per group of int4."""
    rows, width = weight.shape
    if bits == 8:
        factors = weight.float().abs().amax(1) / 127
        return (weight.float() / factors[:, None]).round().to(torch.int8), factors.bfloat16()
    numbers = torch.randint(0, 16, (rows, width), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1)
    return packed, torch.full((width // GROUP, rows, 2), 0.01, dtype=torch.bfloat16)


def torch_numbers(hidden: torch.Tensor, experts: list[list[tuple[torch.Tensor, torch.Tensor]]]) -> None:
    for (up, up_factors), (down, down_factors) in experts:
        if up.dtype == torch.int8:
            both = torch.ops.aten._weight_int8pack_mm(hidden, up, up_factors)
        else:
            both = torch.ops.aten._weight_int4pack_mm_for_cpu(hidden, up, GROUP, up_factors)
        gate, inner = both.chunk(2, dim=-1)
        inner = F.silu(gate) * inner
        if up.dtype == torch.int8:
            torch.ops.aten._weight_int8pack_mm(inner, down, down_factors)
        else:
            torch.ops.aten._weight_int4pack_mm_for_cpu(inner, down, GROUP, down_factors)


def token(maths: ExpertMaths, hidden: torch.Tensor, weights: torch.Tensor, experts: list[Tensors]) -> torch.Tensor:
    places = range(len(experts))
    step = maths.token(hidden, weights)
    step.compute(places, experts)
    return step.total(places)


def released(layout: ExpertLayout, generator: torch.Generator) -> torch.Tensor:
    """A random expert as it lies packed."""
    image = torch.empty(layout.nbytes, dtype=torch.uint8)
    fill_randomly(views(layout, image), layout.quantization, generator)
    return image


def measure(name: str, weights: str, pool: NativePool, working_set: int, repeats: int) -> Result:
    shape, bits = SHAPES[name], BITS.get(weights, 16)
    generator = torch.Generator().manual_seed(0)
    layout = shape.layout
    samples = [make_expert(shape, generator) for _ in range(COPIES)]
    images = [torch.cat([tensor.flatten().view(torch.uint8) for tensor in sample.values()]) for sample in samples]
    if weights == LOSSLESS or weights in NUMBER_BITS:
        encoder = (
            LosslessPacker(layout, shape.is_transposed)
            if weights == LOSSLESS
            else Quantizer(layout, shape.is_transposed, weights, GROUPS[weights][0])
        )
        layout = encoder.layout
        images = [
            torch.frombuffer(bytearray(b"".join(encoder.encode(sample, "an expert"))), dtype=torch.uint8)
            for sample in samples
        ]
    elif weights in RELEASED:
        layout = Packer(layout, shape.is_transposed, weights).layout
        images = [released(layout, generator) for _ in range(COPIES)]
    size = images[0].numel()
    count = max(2, working_set // (size * shape.top_k)) * shape.top_k
    memory = torch.frombuffer(allocate_buffer(count * size), dtype=torch.uint8).view(count, size)  # as slots have it
    for number in range(count):
        memory[number] = images[number % COPIES]
    hidden = torch.randn(1, shape.hidden, generator=generator).bfloat16()
    shares = torch.full((1, shape.top_k), 1 / shape.top_k)
    groups = [range(start, start + shape.top_k) for start in range(0, count, shape.top_k)]

    def native() -> Iterator[Call]:
        maths = NativeMaths(Experts(shape), layout, pool)
        experts = [views(layout, image) for image in memory]
        for group in cycle(groups):
            yield partial(token, maths, hidden, shares, [experts[number] for number in group])

    def reference() -> Iterator[Call]:
        if bits < 16:
            made = [[torch_weights(tensor, bits) for tensor in sample.values()] for sample in samples]
            all_numbers = [
                [(numbers.clone(), factors.clone()) for numbers, factors in made[number % COPIES]]
                for number in range(count)
            ]
            for group in cycle(groups):
                yield partial(torch_numbers, hidden, [all_numbers[number] for number in group])
        if weights == LOSSLESS:
            maths = ExpertMaths(Experts(shape))
            experts: list[Tensors] = [
                {name: tensor.clone() for name, tensor in samples[number % COPIES].items()} for number in range(count)
            ]
        else:
            maths = ExpertMaths(Experts(shape), layout.quantization)
            experts = [views(layout, image) for image in memory]
        for group in cycle(groups):
            yield partial(token, maths, hidden, shares, [experts[number] for number in group])

    turns: dict[str, Iterator[Call]] = {
        "read": (partial(pool.read, memory[group.start : group.stop]) for group in cycle(groups)),
        "torch": reference(),
        "native": native(),
    }
    times: dict[str, list[float]] = {kind: [] for kind in turns}
    for _ in range(repeats):
        for kind, calls in turns.items():
            times[kind] += [timed(call) for call in islice(calls, TURN)]
    read_s, torch_s, native_s = (statistics.median(figures) for figures in times.values())
    layer_bytes = shape.top_k * size
    return Result(name, weights, layer_bytes, layer_bytes / read_s, torch_s, native_s)


def views(layout: ExpertLayout, image: torch.Tensor) -> Tensors:
    return {
        spec.name: image[spec.offset : spec.offset + spec.nbytes].view(TORCH_DTYPES[spec.dtype]).view(spec.shape)
        for spec in layout.tensors
    }


def timed(call: Call) -> float:
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
    parser.add_argument("--weights", choices=(*BITS, LOSSLESS, *RELEASED), default="bf16")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--variant", help="another set of instructions than the one that adds as torch does, or the best"
    )
    parser.add_argument("--working-set", type=float, default=2.0, metavar="GB")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--busy", type=int, default=0, help="programs beside it that never rest")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.weights in ("fp8", LOSSLESS, "int8", "int4"):
        arguments.shapes = [name for name in arguments.shapes if not SHAPES[name].is_transposed]
    torch.set_num_threads(arguments.threads)
    pool = NativePool(arguments.threads, arguments.variant)
    results = []
    with torch.inference_mode(), busy(arguments.busy):
        for name in arguments.shapes:
            size = int(arguments.working_set * GB)
            results.append(measure(name, arguments.weights, pool, size, arguments.repeats))
    pool.close()
    if arguments.json:
        print(json.dumps([asdict(result) for result in results]))
        return
    print(f"{arguments.weights}, {pool.variant}, {arguments.threads} threads, {arguments.busy} busy programs beside it")
    for found in results:
        rate = found.layer_bytes / found.native_s / GB
        print(
            f"{found.shape:17} read {found.read_rate / GB:5.1f} GB/s   torch {found.torch_s * 1e3:6.2f} ms"
            f"   native {found.native_s * 1e3:6.2f} ms = {rate:5.1f} GB/s, {found.share_of_read_rate:4.0%} of reading,"
            f" {found.torch_s / found.native_s:4.2f} times as fast as torch"
        )


if __name__ == "__main__":
    main()
