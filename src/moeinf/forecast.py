"""How fast a model will run, from what was measured of the machine: time per token, time to the first one, and what
bounds both. Pure arithmetic; docs/planning.md has every formula.

Knows nothing of files or terminals, and measures nothing. A forecast is of a conversation that goes on: the slots are
full, and hold what decoding needs as often as the hit curve says.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from .ledger import MemoryPlan, ModelShape, Regime
from .machine import Machine
from .manifest import DTYPE_BYTES, ExpertLayout, Manifest

__all__ = [
    "EXPANDING",
    "PASS_S",
    "PUBLISHED",
    "SUSTAINED",
    "TOKEN_S",
    "Bound",
    "Correction",
    "Costs",
    "Forecast",
    "HitCurve",
    "PastRun",
    "Situation",
    "asked_experts",
    "correction",
    "disk_rate",
    "foretell",
    "waiting_s",
]

Bound = Literal["disk", "host", "link", "device"]

PASS_S = 100e-6
"""Taking the tokens of a step to one of their experts and their rows back, on a GPU."""
TOKEN_S = 1.2e-3
"""What transformers' `generate` takes per token beside the model."""
WHOLE_LAYERS = {"granitemoe", "mellum", "mixtral", "olmoe", "qwen3_moe"}
"""Model types whose layers are computed in one call where all experts are in memory (kernels.decoder_layer)."""
SUSTAINED = 0.8
"""A machine's rates are those of its best moments; over whole tokens weights are computed, and experts read, at this
share of them (docs/performance.md)."""
CACHED_BYTES = 32 << 20
"""A token that reads more weights than this pushes what Python works on out of the caches: a layer takes longer beside
them than the tiny ones that were measured.
"""
TRIM_S = 3.5e-3
"""Giving freed memory back, per layer of a long step (`runtime.MANY_TOKENS`)."""
ATTENTION = 2
"""Attention of a prompt takes torch so many times as long as products of as many numbers do, nothing being left out for
tokens that do not see each other (docs/planning.md)."""
BETWEEN_S = 8e-9
"""What norms, rotary embedding and sums take per layer and number in the hidden states of a prompt
(docs/planning.md)."""
PROGRAMS, FEW_ROWS = 2, 32
"""torch makes a program for each of an expert's products of a new number of rows; those of few it has met before."""
NUMBERS, TRIAL = 2, 2.5
"""A prompt's experts have so many different numbers of rows, as multiple of their mean; where the library tries torch's
order of each, that takes so many times as long as making a program does when nothing is read beside it
(docs/experiments.md)."""
MOST_TRIED_BYTES, ALIKE_INPUTS = 8 << 20, 448
"""It does not try those of larger matrices (kernels.orders.MOST_BYTES), nor, as a rule, of so few inputs
(kernels.native.NativePool.adds_rows_alike)."""
COPIES = 3
"""An expert that comes from the page cache is read and written by a copy, and read again by the maths."""

_FORESEEN = {"gate": 0.8, "auto": 0.8, "eam": 0.4, "off": 0.0}
"""Of a layer's choice, what each way of foreseeing names: the middle of the 72 to 89 % that are published for the next
router, and what tokens alike told of misses on the demo model (docs/experiments.md). As much of what is named is
right."""
EXPANDING = {"lossless": 45.0, "int8": 3.6, "int4": 6.7, "fp8": 9.8, "mxfp4": 8.0}
"""Expanding a packed expert takes torch so many times as long as computing the plain one for a token
(docs/planning.md)."""
EXPANDING_NATIVELY = {"lossless": 2.1, "int8": 0.5, "int4": 0.5, "fp8": 1.0, "mxfp4": 2.5}
"""As much where the library expands it."""

FEW_TOKENS = 64
"""For as many a packed linear layer is computed from what is packed (kernels.orders.MOST_ROWS), or for any number
(Processor.multiplies_any_rows)."""

_KINDS = {"BF16": "bfloat16", "F32": "float32", "F16": "float16"}
_WEIGHT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_LIKE_RUNS = 5


@dataclass(frozen=True, slots=True)
class HitCurve:
    """Which share of the experts asked for is found in memory that holds a share of all experts.

    `points` are (share, hit rate) with ascending shares, on straight lines between and to (0, 0) and (1, 1); more
    memory never finds less. `source` says where it is from. `foreseen` is the share of a layer's choice that its router
    names one layer early, if that was recorded.
    """

    points: tuple[tuple[float, float], ...]
    source: str
    foreseen: float | None = None

    def at(self, share: float) -> float:
        """The hit rate when memory holds `share` of all experts."""
        before, low = 0.0, 0.0
        for after, high in (*self.points, (1.0, 1.0)):
            high = max(low, high)
            if share < after:
                return low + (high - low) * (share - before) / (after - before)
            before, low = after, high
        return 1.0


PUBLISHED = HitCurve(
    ((0.1, 0.309), (0.25, 0.537), (0.5, 0.769), (0.75, 0.913)),
    "published locality: mean of traces of gpt-oss-20b, DeepSeek-V2-Lite and Mixtral-8x7B (docs/planning.md)",
)


@dataclass(frozen=True, slots=True)
class Situation:
    """All that a forecast depends on beside the plan. `kernels` and `prefetch` are the engine's options. With
    `reads_files` the experts that are not in slots come from the page cache, which has room for all of them.
    """

    machine: Machine
    manifest: Manifest
    shape: ModelShape
    curve: HitCurve
    kernels: str = "auto"
    prefetch: str = "auto"
    reads_files: bool = False

    @property
    def device(self) -> str:
        """The name of the GPU that computes, "" where the processor does."""
        return ""

    @property
    def foreseen(self) -> float:
        """Of a layer's choice, the share that is named while the layer before is computed."""
        of_router = self.curve.foreseen if self.prefetch in ("gate", "auto") else None
        return _FORESEEN[self.prefetch] if of_router is None else of_router

    def layer_s(self, regime: Regime) -> float:
        """What a layer of a token takes beside its weights."""
        is_native = not self.device and self.kernels != "torch" and self.prefetch in ("auto", "off")
        is_whole = is_native and regime == "resident" and self.manifest.model_type in WHOLE_LAYERS
        return self.machine.whole_layer_s if is_whole else self.machine.layer_s

    def costs(self, plan: MemoryPlan) -> Costs:
        """What the parts of a token take with `plan`."""
        return _ProcessorCosts(self, plan)


class Costs(Protocol):
    """Seconds that the parts of a token take in one situation, at a hit rate where they depend on it. `token_bytes` are
    those of the experts that it asks for.
    """

    token_bytes: int
    dense_s: float
    layers_s: float
    experts_s: float

    def bookkeeping_s(self, hits: float) -> float:
        """Of the misses; what a hit takes is in the measured time of a layer."""

    def read_s(self, hits: float) -> float:
        """Until the misses are there, if nothing else is done."""

    def stall_s(self, hits: float) -> float:
        """The part of `read_s` that is waited for."""

    def bound(self, hits: float) -> tuple[float, Bound]:
        """What nothing can beat, and the resource by which."""

    def prompt_s(self, tokens: int) -> float:
        """A prompt that is the first thing asked: no expert is in memory, and each is read once per piece."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What to expect. Times in seconds, `prompt_tokens` for `ttft_s`, everything else per token.

    `dense_s`, `layers_s`, `experts_s` and `bookkeeping_s` (of misses) add up with `stall_s`, the part of `read_s` that
    nothing hides, to `tpot_s` before `factor`, the correction by past runs. `bound_s` is what no program can beat at
    this `hit_rate` in the machine's best moments, by the resource named `by`.
    """

    regime: Regime
    hit_rate: float
    dense_s: float
    layers_s: float
    experts_s: float
    bookkeeping_s: float
    read_s: float
    stall_s: float
    missed_bytes: float
    bound_s: float
    by: Bound
    tpot_s: float
    ttft_s: float
    prompt_tokens: int
    factor: float = 1.0

    @property
    def tokens_per_s(self) -> float:
        return 1 / self.tpot_s

    def times(self, factor: float) -> Forecast:
        """The same with a corrected time per token, which is never below the bound."""
        return dataclasses.replace(self, tpot_s=max(self.bound_s, self.tpot_s * factor), factor=factor)


@dataclass(frozen=True, slots=True)
class PastRun:
    """An answer of a model that is long enough to be measured. `hit_rate` leaves out what was foreseen.
    `predicted_s` is what was expected, None where the machine had not been measured. `device` is the name of the GPU
    that computed, with `host_slots` behind it, and "" where the processor did. `model` says whose it is
    (`evidence.owner`), and `best` the way of prefetching that `auto` had found by then, or "".
    """

    date: str
    slots: int
    budget: int
    tokens: int
    hit_rate: float
    reads_files: bool
    policy: str
    prefetch: str
    kernels: str
    threads: int | None
    tpot_s: float
    predicted_s: float | None = None
    device: str = ""
    host_slots: int = 0
    model: str = ""
    best: str = ""


@dataclass(frozen=True, slots=True)
class Correction:
    """Forecasts are multiplied by `factor`, the median of measured / predicted over so many `runs`."""

    factor: float = 1.0
    runs: int = 0


def foretell(
    situation: Situation, plan: MemoryPlan, *, prompt_tokens: int = 512, hit_rate: float | None = None
) -> Forecast:
    """What to expect of `plan`, at the hit rate of the curve or at a given one."""
    costs = situation.costs(plan)
    slots = plan.slots_at(min(prompt_tokens, plan.context))
    hits = situation.curve.at(slots / plan.all_experts) if hit_rate is None else hit_rate
    busy_s = costs.dense_s + costs.layers_s + costs.experts_s + costs.bookkeeping_s(hits)
    stall_s = costs.stall_s(hits)
    bound_s, by = costs.bound(hits)
    return Forecast(
        regime=plan.regime,
        hit_rate=hits,
        dense_s=costs.dense_s,
        layers_s=costs.layers_s,
        experts_s=costs.experts_s,
        bookkeeping_s=costs.bookkeeping_s(hits),
        read_s=costs.read_s(hits),
        stall_s=stall_s,
        missed_bytes=(1 - hits) * costs.token_bytes,
        bound_s=bound_s,
        by=by,
        tpot_s=max(bound_s, busy_s + stall_s),
        ttft_s=costs.prompt_s(min(prompt_tokens, plan.context)),
        prompt_tokens=min(prompt_tokens, plan.context),
    )


def correction(situation: Situation, plan: MemoryPlan, runs: Sequence[PastRun], threads: int | None) -> Correction:
    """By what to multiply a forecast of `plan`: what like runs took, over what they should have taken with the hit
    rate that they had. Like are those with the same options, on the same device, in the same regime and off the same
    place; of these, the nearest in slots, the later first.
    """
    options = (situation.device, situation.prefetch, situation.kernels, threads)
    is_resident = plan.regime == "resident"
    like = [
        (run, then)
        for run in reversed(runs)
        for then in [_plan_of(run, plan)]
        if (run.device, run.prefetch, run.kernels, run.threads) == options
        and then.regime == plan.regime
        and (is_resident or run.reads_files == situation.reads_files)
    ]
    like.sort(key=lambda each: abs(each[0].slots - plan.slots))
    ratios = [run.tpot_s / foretell(situation, then, hit_rate=run.hit_rate).tpot_s for run, then in like[:_LIKE_RUNS]]
    return Correction(statistics.median(ratios), len(ratios)) if ratios else Correction()


def _plan_of(run: PastRun, plan: MemoryPlan) -> MemoryPlan:
    """The plan with the slots that a run had."""
    host = plan.host and dataclasses.replace(plan.host, slots=min(run.host_slots, plan.all_experts))
    return dataclasses.replace(plan, slots=min(run.slots, plan.all_experts), host=host)


class _ProcessorCosts:
    """Of a processor. Weights are computed no faster than memory is read."""

    def __init__(self, situation: Situation, plan: MemoryPlan) -> None:
        machine, manifest, shape = situation.machine, situation.manifest, situation.shape
        self._machine, self._manifest, self._shape, self._plan = machine, manifest, shape, plan
        self.expert_bytes = manifest.layout.nbytes
        self.token_bytes = manifest.token_experts * self.expert_bytes
        self.dense_bytes = max(0, manifest.dense_bytes - shape.lookup_bytes)
        self._plain_dense_bytes = max(0, manifest.unpacked.dense_bytes - shape.lookup_bytes)
        self._prefetch, self._foreseen = situation.prefetch, situation.foreseen
        self._reads_files = situation.reads_files
        self._kernels = situation.kernels
        self._best_fetch_rate = disk_rate(machine, self.expert_bytes)
        self._disk_rate = self._fetch_rate = SUSTAINED * self._best_fetch_rate
        if situation.reads_files:
            self._best_fetch_rate = max(self._best_fetch_rate, machine.memory.bytes_per_s / COPIES)
            self._fetch_rate = max(self._disk_rate, machine.memory.bytes_per_s / COPIES)
        self._kind = _kind_of(manifest.layout)
        self._dense_rate = SUSTAINED * min(machine.dense_bytes_per_s, machine.memory.bytes_per_s)
        self._head_s = min(self.dense_bytes, shape.head_bytes) / self._dense_rate + TOKEN_S
        self.dense_s = self.dense_bytes / self._dense_rate
        is_cached = self.dense_bytes + self.token_bytes <= CACHED_BYTES
        self.layers_s = shape.layers * situation.layer_s(plan.regime) / (1 if is_cached else SUSTAINED) + TOKEN_S
        best = min(_token_rate(machine, manifest.layout, situation.kernels), machine.memory.bytes_per_s)
        self._expert_rate = SUSTAINED * best
        self.experts_s = self.token_bytes / self._expert_rate

    def bookkeeping_s(self, hits: float) -> float:
        return self._manifest.token_experts * (1 - hits) * self._machine.fetch_s / SUSTAINED

    def read_s(self, hits: float) -> float:
        return (1 - hits) * self.token_bytes / self._fetch_rate

    def stall_s(self, hits: float) -> float:
        """A disk works beside the maths; copies from the page cache take the cores from it."""
        if self._reads_files:
            return self.read_s(hits)
        layers = len(self._manifest.layers)
        missing = (1 - hits) * self._manifest.token_experts / layers
        return waiting_s(
            self._foreseen,
            layers,
            is_optional=self._prefetch == "auto",
            read_s=self.read_s(hits) / layers,
            experts_s=self.experts_s / layers,
            last_s=self.experts_s / self._manifest.token_experts * min(1.0, missing),
            other_s=(self.dense_s + self.layers_s + self.bookkeeping_s(hits) - self._head_s) / layers,
            asking_s=self._machine.foresee_s / SUSTAINED,
        )

    def bound(self, hits: float) -> tuple[float, Bound]:
        read_s = (1 - hits) * self.token_bytes / self._best_fetch_rate
        compute_s = (self.dense_bytes + hits * self.token_bytes) / self._machine.memory.bytes_per_s
        return max(compute_s, read_s), "disk" if read_s > compute_s and not self._reads_files else "host"

    def _expert_s(self, tokens: float) -> float:
        """An expert for so many tokens of a prompt: by the library, or by torch, which expands a packed one first, and
        makes programs, since each expert has another number of tokens.
        """
        layout, machine = self._manifest.layout, self._machine
        if _takes_prompts(machine, layout, self._kernels):
            return layout.nbytes / _step_rate(machine, _weights_of(layout), tokens, "native") / SUSTAINED
        makes_programs = self._kind == "bfloat16" and tokens > FEW_ROWS
        programs_s = PROGRAMS * machine.program_s if makes_programs else 0.0
        expanding_s = _expanding_s(machine, layout, self._kernels)
        at_once_s = (layout.plain_bytes / _step_rate(machine, self._kind, tokens) + expanding_s) / SUSTAINED
        at_once_s += programs_s
        return at_once_s if layout.is_exact else min(at_once_s, tokens * layout.nbytes / self._expert_rate)

    def prompt_s(self, tokens: int) -> float:
        piece = self._plan.prefill_tokens(self._plan.slots, tokens)
        return sum(self._step_s(min(piece, tokens - begin), begin) for begin in range(0, tokens, piece))

    def _step_s(self, tokens: int, before: int) -> float:
        """Many tokens at once, with so many `before` them, that ask for experts as if each chose by chance.

        What is read first goes into slots that were never used, and the cores that compute also get that memory ready.
        """
        slots = self._plan.slots_at(before + tokens, min(tokens, self._plan.step_tokens))
        held = min(1.0, slots / self._plan.all_experts) if before else 0.0
        asked_of = [asked_experts(layer.num_experts, layer.top_k, tokens) for layer in self._manifest.layers]
        fresh = 0.0 if before else min(1.0, slots / sum(asked_of))
        dense_s = self._dense_s(tokens)
        scores = tokens * (before + tokens) * self._shape.hidden * self._shape.layers
        attention_s = ATTENTION * 4 * scores / _operations_rate(self._machine, self._kind, self._many_rows_by)
        between_s = BETWEEN_S * tokens * self._shape.hidden * self._shape.layers
        total = dense_s + attention_s + between_s + self.layers_s + len(self._manifest.layers) * TRIM_S
        for layer, asked in zip(self._manifest.layers, asked_of, strict=True):
            maths_s = asked * self._expert_s(tokens * layer.top_k / asked)
            touching_s = asked * fresh * self.expert_bytes / self._machine.memory.fresh_bytes_per_s
            read_s = asked * (1 - held) * self.expert_bytes / self._disk_rate
            total += max(maths_s + touching_s, read_s)
        return total + (0.0 if before else self._trials_s(tokens, asked_of))

    def _trials_s(self, tokens: int, asked_of: Sequence[float]) -> float:
        """Finding in which order torch adds up the products of a prompt's experts, where that has to be tried."""
        layout, processor = self._manifest.layout, self._machine.processor
        if not (processor.tries_orders and layout.is_exact and _takes_prompts(self._machine, layout, self._kernels)):
            return 0.0
        rows = tokens * self._manifest.token_experts / sum(asked_of)
        numbers = min(sum(asked_of), max(0.0, NUMBERS * rows - FEW_ROWS / 2))
        tried = sum(inputs > ALIKE_INPUTS for inputs in _inputs(layout))
        return numbers * tried * TRIAL * self._machine.program_s

    @property
    def _many_rows_by(self) -> str:
        """What multiplies many rows of the dense part; where that is the library, torch's attention is as fast."""
        is_native = self._kernels != "torch" and self._machine.processor.multiplies_any_rows
        return "native" if is_native and self._kind == "bfloat16" else "torch"

    def _dense_s(self, tokens: int) -> float:
        """The dense part for many tokens at once; what is packed is unpacked for more than a few."""
        rate = _step_rate(self._machine, self._kind, tokens, self._many_rows_by)
        total = max(self.dense_bytes / self._dense_rate, self._plain_dense_bytes / rate / SUSTAINED)
        if tokens > FEW_TOKENS and self._many_rows_by == "torch":
            packed_bytes = sum(2 * rows * width for rows, width in self._manifest.packed_dense.values())
            rate = _rate(self._machine, self._kind, 1, "torch")
            total += EXPANDING_NATIVELY["lossless"] * packed_bytes / rate / SUSTAINED
        return total


def waiting_s(
    foreseen: float,
    layers: int,
    *,
    is_optional: bool,
    read_s: float,
    experts_s: float,
    last_s: float,
    other_s: float,
    asking_s: float,
) -> float:
    """What a token waits in all of its MoE `layers`, when one of them takes `read_s` to read its misses, `experts_s` to
    compute all of its experts, `last_s` for the one that arrives last, and `other_s` for the rest of its work. This
    share of a layer's choice is `foreseen` by `asking_s` of asking, unless that is optional and not worth it.
    """
    foreseeing = _waiting_s(foreseen, layers, read_s, experts_s, last_s, other_s, asking_s if foreseen else 0.0)
    if not is_optional:
        return foreseeing
    return min(_waiting_s(0.0, layers, read_s, experts_s, last_s, other_s, 0.0), foreseeing)


def _waiting_s(
    foreseen: float, layers: int, read: float, experts: float, last: float, other: float, asking: float
) -> float:
    """Waiting, and asking, when this share of a layer's choice is `foreseen` while the layer before is computed.

    Between two choices what fetches brings what was not foreseen, and what is left of what was; in the time after that,
    guesses, of which the same share is right. The first layer's choice cannot be foreseen.
    """
    idle = max(0.0, other + asking) + last
    behind = (1 - foreseen) * read + max(0.0, foreseen * read - foreseen * idle)
    return max(0.0, read + last - experts) + (layers - 1) * (max(0.0, behind + last - experts) + asking)


def asked_experts(experts: int, top_k: int, tokens: int) -> float:
    """Experts of a layer that so many tokens ask for."""
    return experts * (1 - (1 - min(1.0, top_k / experts)) ** tokens)


def _kind_of(layout: ExpertLayout) -> str:
    """What torch computes experts in, as machines name it: what most of an expert's bytes are, or are expanded to."""
    largest = max(layout.tensors, key=lambda tensor: tensor.nbytes)
    dtype = layout.quantization.dtype if layout.quantization else largest.dtype
    return _KINDS.get(dtype, f"int{8 * DTYPE_BYTES[dtype]}")


def disk_rate(machine: Machine, size: int) -> float:
    """Bytes of whole experts per second, past the page cache where that is possible."""
    direct = machine.disk.reads_direct and any(rate.direct for rate in machine.disk.rates)
    return machine.disk.rate(size, direct=direct)


def _token_rate(machine: Machine, layout: ExpertLayout, kernels: str) -> float:
    """Bytes of experts per second for one token, with the kernels that the engine would choose."""
    kind, quantization = _kind_of(layout), layout.quantization
    is_exact = kind == "bfloat16" and machine.processor.adds_as_torch_does
    is_native = kernels == "native" or (kernels == "auto" and (is_exact or not layout.is_exact))
    if quantization is None:
        return _rate(machine, kind, 1, "native" if is_native else "torch")
    if is_native and quantization.kind in {rate.weights for rate in machine.maths if rate.kernels == "native"}:
        return machine.maths_rate(quantization.kind)
    plain_s = layout.plain_bytes / _rate(machine, kind, 1, "torch")
    return layout.nbytes / (plain_s + _expanding_s(machine, layout, kernels))


def _weights_of(layout: ExpertLayout) -> str:
    """What an expert is stored in, as machines name it."""
    return layout.quantization.kind if layout.quantization else _kind_of(layout)


def _inputs(layout: ExpertLayout) -> list[int]:
    """Those of an expert's matrices, which lie [out, in]."""
    if layout.quantization is not None:
        return list(layout.quantization.widths.values())
    return [spec.shape[1] for spec in layout.tensors if len(spec.shape) == 2]


def _takes_prompts(machine: Machine, layout: ExpertLayout, kernels: str) -> bool:
    """Whether the library would compute the experts of prompts, and was measured doing it."""
    processor = machine.processor
    if kernels == "torch" or not processor.adds_as_torch_does or _kind_of(layout) != "bfloat16":
        return False
    if processor.tries_orders and layout.is_exact and layout.largest_bytes > MOST_TRIED_BYTES:
        return False
    return any(r.kernels == "native" and r.weights == _weights_of(layout) and r.tokens > 1 for r in machine.maths)


def _expanding_s(machine: Machine, layout: ExpertLayout, kernels: str) -> float:
    """What an expert takes beside torch's maths. The library does not expand lossless ones where it has its own."""
    has_own = kernels != "torch" and machine.processor.adds_as_torch_does
    if layout.quantization is None or (layout.quantization.is_lossless and has_own):
        return 0.0
    has_library = kernels != "torch" and any(rate.kernels == "native" for rate in machine.maths)
    times = EXPANDING | (EXPANDING_NATIVELY if has_library else {})
    return times[layout.quantization.kind] * layout.plain_bytes / _rate(machine, _kind_of(layout), 1, "torch")


def _step_rate(machine: Machine, weights: str, tokens: float, kernels: str = "torch") -> float:
    """Bytes of weights per second for many tokens; beyond the most that was measured, arithmetic is the limit."""
    most = _most_tokens(machine)
    return _rate(machine, weights, max(1, min(round(tokens), most)), kernels) * min(1.0, most / tokens)


def _operations_rate(machine: Machine, kind: str, kernels: str) -> float:
    """Additions and multiplications per second in large products: two per weight and token."""
    most = _most_tokens(machine)
    return _rate(machine, kind, most, kernels) * most * 2 / _WEIGHT_BYTES.get(kind, 1)


def _most_tokens(machine: Machine) -> int:
    return max((rate.tokens for rate in machine.maths if rate.kernels == "torch"), default=1)


def _rate(machine: Machine, kind: str, tokens: int, kernels: str) -> float:
    """As measured; for a kind that was not, as the slowest of the others, and at worst as memory is read."""
    kinds = sorted({rate.weights for rate in machine.maths})
    if kind in kinds:
        return machine.maths_rate(kind, tokens, kernels=kernels)
    others = (machine.maths_rate(other, tokens, kernels="torch") for other in kinds)
    return min(others, default=machine.memory.bytes_per_s)
