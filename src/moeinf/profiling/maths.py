"""How fast this machine computes experts and dense layers.

Weights come from a working set far beyond the caches, in huge pages where there are any, as they do in a model, and the
engine's own kernels compute.
"""

from __future__ import annotations

import statistics
import time
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import nn

from moeinf import memory
from moeinf.dtypes import SAFETENSORS_NAMES, TORCH_DTYPES
from moeinf.kernels import ExpertMaths, Tensors
from moeinf.kernels.dense import speed_up
from moeinf.kernels.native import NativeMaths, NativePool
from moeinf.lossless import LosslessPacker
from moeinf.machine import MathsRate
from moeinf.manifest import GROUPS, LOSSLESS, RELEASED_BITS, ExpertLayout, TensorSpec
from moeinf.progress import Task
from moeinf.quantized import Encoder, Packer, Quantizer, fill_randomly
from moeinf.timing import Call, best_of_each, best_s
from moeinf.transfer import allocate_buffer

from .effort import Effort

__all__ = [
    "MATHS",
    "TOKENS",
    "Experts",
    "measure_dense",
    "measure_maths",
    "measure_program",
]

HIDDEN, INNER, TOP_K = 2048, 768, 8
"""The experts measured are those of Qwen3-30B-A3B: 9 MiB in bfloat16, 8 for a token."""
TOKENS = (1, 16, 256)
MANY_ROWS = 250
"""The most for which the making of programs is measured; others are fewer."""
_PACKED = (LOSSLESS, *GROUPS, *RELEASED_BITS)
_TRANSPOSED = {"mxfp4"}
"""Released in these are models whose weights lie [in, out], which torch multiplies in an order of its own (gpt-oss)."""
_DISTINCT = 2
"""Experts of a working set that differ; the others are copies of them, each with memory of its own."""

_FREE_SHARE = 2
"""Of what is free, experts take at most a half: making them takes some more."""

MATHS = (
    *(("native", weights, tokens) for weights in ("bfloat16", "float32") for tokens in TOKENS),
    *(("native", weights, tokens) for weights in _PACKED for tokens in TOKENS),
    *(("torch", weights, tokens) for weights in ("bfloat16", "float32") for tokens in TOKENS),
)
"""(kernels, weights, tokens) that are measured. Tokens are those of one expert; torch expands packed weights, which is
not measured.
"""


def measure_maths(
    pool: NativePool | None, working_set: int, effort: Effort, task: Task
) -> tuple[tuple[MathsRate, ...], tuple[str, ...]]:
    """The rates of MATHS, those of native kernels where there is a `pool`, and in sentences those left out."""
    end = time.perf_counter() + effort.experts_s
    rates: list[MathsRate] = []
    late = []
    with torch.inference_mode():
        for weights in ("bfloat16", "float32", *_PACKED):
            wanted = [(kernels, tokens) for kernels, kind, tokens in MATHS if kind == weights]
            wanted = [each for each in wanted if pool is not None or each[0] == "torch"]
            if not wanted:
                continue
            if rates and time.perf_counter() > end:
                late.append(f"experts in {weights}: there was no time for them")
                continue
            experts = Experts(weights, working_set)
            if rates and experts.nbytes > memory.available_bytes() // _FREE_SHARE:
                late.append(f"experts in {weights}: there was no memory for them")
                continue
            works = [experts.calls(experts.maths(pool if kernels == "native" else None), n) for kernels, n in wanted]
            times = best_of_each(works, effort.maths_s)
            for (kernels, tokens), work, taken_s in zip(wanted, works, times, strict=True):
                rates.append(MathsRate(kernels, weights, tokens, experts.nbytes / len(work) / taken_s))
            del experts, works, work  # their memory is the next ones'
            task.advance(len(wanted))
    return tuple(rates), tuple(late)


def measure_dense(pool: NativePool | None, working_set: int, seconds: float) -> float:
    """Bytes per second of bfloat16 weights of linear layers, computed for one token as the engine does it."""
    wide, narrow = 2 * HIDDEN, HIDDEN
    pairs = max(1, working_set // (2 * 2 * wide * narrow))
    with torch.inference_mode():
        weights = _allocate(pairs * 2 * 2 * wide * narrow).view(torch.bfloat16).view(2, pairs, -1)
        ups = _layers(weights[0].view(pairs, wide, narrow).copy_(_noise((wide, narrow))))
        downs = _layers(weights[1].view(pairs, narrow, wide).copy_(_noise((narrow, wide))))
        both = nn.ModuleList([nn.Sequential(up, down) for up, down in zip(ups, downs, strict=True)])
        if pool is not None:
            speed_up(both, pool)
        calls = [partial(pair, _noise((1, narrow))) for pair in both]
        return 2 * weights[0, 0].nbytes / best_s(calls, seconds)


def measure_program(seconds: float) -> float:
    """Seconds that torch takes to make the program of a product of bfloat16 whose number of rows is new to it: the mean
    of an expert's two.
    """
    end = time.perf_counter() + seconds
    pairs = [
        (_noise((2 * INNER, HIDDEN)), _noise((MANY_ROWS, HIDDEN))),
        (_noise((HIDDEN, INNER)), _noise((MANY_ROWS, INNER))),
    ]
    making: list[list[float]] = [[] for _ in pairs]
    with torch.inference_mode():
        for rows in range(MANY_ROWS, 1, -1):
            for (weight, hidden), taken in zip(pairs, making, strict=True):
                first, again = (_seconds(partial(F.linear, hidden[:rows], weight)) for _ in range(2))
                taken.append(first - again)
            if time.perf_counter() > end and len(making[0]) > 2:
                break
    return max(0.0, statistics.fmean(map(statistics.median, making)))


def _seconds(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _layers(weights: torch.Tensor) -> list[nn.Linear]:
    """A linear layer for each of `weights`, which it uses in place."""
    layers = []
    for weight in weights:
        with torch.device("meta"):
            layers.append(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
        layers[-1].weight = nn.Parameter(weight, requires_grad=False)
    return layers


class _Module(nn.Module):
    """An experts module as transformers has them, without weights."""

    has_gate, has_bias, has_post_expert_norm = True, False, False
    is_transposed, is_concatenated = False, True

    def _apply_gate(self, both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate) * up


class Experts:
    """A working set of experts of random `weights`, all of one kind, on a `device`. `nbytes`: of all of them."""

    def __init__(self, weights: str, working_set: int, device: torch.device | str = "cpu") -> None:
        self._dtype = torch.float32 if weights == "float32" else torch.bfloat16
        self._module = _Module()
        self._module.is_transposed = weights in _TRANSPOSED
        shapes = (2 * INNER, HIDDEN), (HIDDEN, INNER)
        up, down = (shape[::-1] if self._module.is_transposed else shape for shape in shapes)
        first = TensorSpec("gate_up_proj", SAFETENSORS_NAMES[self._dtype], up, 0)
        self._plain = ExpertLayout(0, (first, TensorSpec("down_proj", first.dtype, down, first.nbytes)))
        self._encoder: Encoder | None = None
        if weights in GROUPS:
            self._encoder = Quantizer(self._plain, False, weights, GROUPS[weights][0])
        elif weights == LOSSLESS:
            self._encoder = LosslessPacker(self._plain, False)
        elif weights in RELEASED_BITS:
            self._encoder = Packer(self._plain, self._module.is_transposed, weights)
        self._layout = self._encoder.layout if self._encoder else self._plain
        self._count = max(2, working_set // (self._layout.nbytes * TOP_K)) * TOP_K
        self._device = device
        self.nbytes = self._count * self._layout.nbytes

    @cached_property
    def _experts(self) -> list[Tensors]:
        images = [self._image(number).to(self._device) for number in range(_DISTINCT)]
        places = _allocate(self.nbytes, self._device).view(self._count, -1)
        for number, place in enumerate(places):
            place.copy_(images[number % _DISTINCT])
        return [self._tensors(place) for place in places]

    def maths(self, pool: NativePool | None) -> ExpertMaths:
        """What computes them: the library, or torch without `pool`."""
        if pool is None:
            return ExpertMaths(self._module, self._layout.quantization)
        native = NativeMaths(self._module, self._layout, pool)
        if self._dtype == torch.bfloat16:
            native.adds_alike(self._experts[0], 1)  # finds the order that the engine adds up one row in
        return native

    def calls(self, maths: ExpertMaths, tokens: int) -> list[Call]:
        """What computes all of them once, each for `tokens` tokens, in groups of as many as a token asks for."""
        hidden = _noise((tokens, HIDDEN), self._dtype).to(self._device)
        shares = torch.full((tokens, TOP_K), 1 / TOP_K, dtype=self._dtype, device=self._device)
        groups = [self._experts[at : at + TOP_K] for at in range(0, len(self._experts), TOP_K)]
        compute = _one_token if tokens == 1 else _many_tokens
        return [partial(compute, maths, hidden, shares, group) for group in groups]

    def _image(self, seed: int) -> torch.Tensor:
        """One expert's bytes."""
        tensors = {spec.name: _noise(spec.shape, self._dtype, seed) for spec in self._plain.tensors}
        if isinstance(self._encoder, Packer):
            image = torch.empty(self._layout.nbytes, dtype=torch.uint8)
            fill_randomly(self._tensors(image), self._layout.quantization, torch.Generator().manual_seed(seed))
            return image
        if self._encoder is not None:
            data = b"".join(self._encoder.encode(tensors, "an expert"))
            return torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return torch.cat([tensor.flatten().view(torch.uint8) for tensor in tensors.values()])

    def _tensors(self, place: torch.Tensor) -> Tensors:
        return {
            spec.name: place[spec.offset : spec.offset + spec.nbytes].view(TORCH_DTYPES[spec.dtype]).view(spec.shape)
            for spec in self._layout.tensors
        }


def _one_token(maths: ExpertMaths, hidden: torch.Tensor, shares: torch.Tensor, experts: list[Tensors]) -> torch.Tensor:
    places = range(len(experts))
    step = maths.token(hidden, shares)
    step.compute(places, experts)
    return step.total(places)


def _many_tokens(
    maths: ExpertMaths, hidden: torch.Tensor, shares: torch.Tensor, experts: list[Tensors]
) -> torch.Tensor:
    prompt = maths.prompt(hidden, torch.arange(TOP_K).expand(len(hidden), TOP_K), shares, TOP_K)
    for at in range(0, TOP_K, maths.most_at_once):
        some = range(at, min(TOP_K, at + maths.most_at_once))
        prompt.compute(some, [experts[expert] for expert in some])
    return prompt.total()


def _allocate(nbytes: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Bytes on `device`; on the processor in huge pages, as the engine has its slots and dense weights."""
    if torch.device(device).type == "cpu":
        return torch.frombuffer(allocate_buffer(nbytes), dtype=torch.uint8, count=nbytes)
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def _noise(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype).normal_(0, 0.02, generator=torch.Generator().manual_seed(seed))
