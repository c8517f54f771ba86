"""What was measured of a machine: the numbers that plans and bounds are made from. Pure data.

Sizes are in bytes, times in seconds, rates in bytes per second unless a name says otherwise.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from .errors import IntegrityError

__all__ = ["MEASURED_BYTES", "Disk", "Gpu", "HostMemory", "Machine", "MathsRate", "Processor", "ReadRate"]

SCHEMA = 9
MEASURED_BYTES = 3 * 2048 * 768 * 2
"""Of an expert whose maths is measured: one of Qwen3-30B-A3B's, in bfloat16."""


@dataclass(frozen=True, slots=True)
class ReadRate:
    """Pieces of `size` bytes, in random order, as the engine reads experts: by `depth` threads, each of which has a
    request of 1 MiB in flight. `direct` ones go past the page cache; the others find nothing in it.
    """

    size: int
    depth: int
    direct: bool
    bytes_per_s: float

    def __post_init__(self) -> None:
        _check_rates(self.bytes_per_s)


@dataclass(frozen=True, slots=True)
class Disk:
    """The disk that holds the models. `device` and `filesystem` are "" where they cannot be known; `read_ahead`, of the
    block device, and `rotates`, what the device says of itself, are None there.
    """

    path: str
    device: str
    filesystem: str
    reads_direct: bool
    read_ahead: int | None
    free: int
    rates: tuple[ReadRate, ...]
    rotates: bool | None = None

    def rate(self, size: int, *, depth: int = 8, direct: bool = True) -> float:
        """Bytes per second of reads of `size` bytes, between the sizes measured at the depth nearest to `depth`, the
        smaller one of two.

        Raises ValueError when nothing like it was measured.
        """
        alike = [rate for rate in self.rates if rate.direct == direct]
        if not alike:
            raise ValueError(f"no {'direct' if direct else 'buffered'} reads were measured")
        nearest = min((rate.depth for rate in alike), key=lambda each: (abs(math.log(each / depth)), each))
        points = sorted((rate.size, rate.bytes_per_s) for rate in alike if rate.depth == nearest)
        return _between(points, size)


@dataclass(frozen=True, slots=True)
class Processor:
    """`cores` that this process may use, hardware threads of one core counted once; `threads` that torch computes with.

    `features`: the vector instructions that expert maths can use. `kernels`: the native library's best instruction
    set here, or "" where there is no library, and then `no_kernels` says why. `governor`: what sets the clock, None
    where that cannot be known. `adds_as_torch_does`: whether the library adds products of bfloat16 up in torch's order.
    """

    name: str
    cores: int
    threads: int
    features: tuple[str, ...]
    kernels: str
    no_kernels: str = ""
    governor: str | None = None
    adds_as_torch_does: bool = False

    @property
    def tries_orders(self) -> bool:
        """Whether that takes a trial of every large number of rows (kernels/orders.py)."""
        return self.kernels == "avx512amx"

    @property
    def multiplies_any_rows(self) -> bool:
        """Whether linear layers of the dense part are the library's for any number of tokens."""
        return self.adds_as_torch_does and self.kernels == "avx2"


@dataclass(frozen=True, slots=True)
class HostMemory:
    """`limit`: of the cgroup, None where there is none. `bytes_per_s`: reading far more than the caches hold.
    `fresh_bytes_per_s`: the system handing out memory that nobody used before. `huge_pages`: when memory lies in them
    (always, madvise, never), None where that cannot be known.
    """

    total: int
    available: int
    limit: int | None
    swap_total: int
    swap_free: int
    bytes_per_s: float
    fresh_bytes_per_s: float
    huge_pages: str | None = None

    def __post_init__(self) -> None:
        _check_rates(self.bytes_per_s, self.fresh_bytes_per_s)

    @property
    def usable(self) -> int:
        """What this process may hold at most."""
        return self.total if self.limit is None else min(self.total, self.limit)


@dataclass(frozen=True, slots=True)
class MathsRate:
    """Experts of `weights` (bfloat16, float32, int8, int4) computed for `tokens` tokens each by `kernels` (native,
    torch): `bytes_per_s` of their weights.
    """

    kernels: str
    weights: str
    tokens: int
    bytes_per_s: float

    def __post_init__(self) -> None:
        _check_rates(self.bytes_per_s)


@dataclass(frozen=True, slots=True)
class Gpu:
    """Rates: of its memory, and of its link from pinned and from ordinary host memory, and back to pinned memory."""

    index: int
    name: str
    total: int
    free: int
    bytes_per_s: float
    pinned_to_device: float
    pageable_to_device: float
    device_to_pinned: float
    maths: tuple[MathsRate, ...]

    def __post_init__(self) -> None:
        _check_rates(self.bytes_per_s, self.pinned_to_device, self.pageable_to_device, self.device_to_pinned)

    @property
    def most_tokens(self) -> int:
        """The most for which maths was measured."""
        return max((rate.tokens for rate in self.maths), default=1)

    def maths_rate(self, tokens: float) -> float:
        """Bytes per second of experts in bfloat16, between the numbers of tokens measured; where none was, as its
        memory is read.
        """
        points = sorted((rate.tokens, rate.bytes_per_s) for rate in self.maths)
        return _between(points, tokens) if points else self.bytes_per_s


@dataclass(frozen=True, slots=True)
class Machine:
    """`dense_bytes_per_s`: weights of the dense part, computed for one token. `layer_s`: what one layer of a forward
    pass of one token takes beside reading weights, and `whole_layer_s` where all of it is one call of the library, its
    experts being in memory; `fetch_s`: what an expert that it misses takes beside its reading:
    room made, the file handed to the readers, its arrival noticed; `foresee_s`: asking the next layer's router early.
    `program_s`: what torch takes to make the program of a product of bfloat16, which it does for each number of rows
    that it has not met, or not lately. `measured_at`: ISO 8601, UTC. `left_out`: what was not measured, and why, in
    sentences. `load`: cores that other programs took meanwhile, on average. `seen_gpus`: the names of all GPUs that
    were there, also of those that could not be measured.
    """

    measured_at: str
    processor: Processor
    memory: HostMemory
    disk: Disk
    maths: tuple[MathsRate, ...]
    dense_bytes_per_s: float
    layer_s: float
    whole_layer_s: float
    fetch_s: float
    foresee_s: float
    program_s: float
    gpus: tuple[Gpu, ...] = ()
    left_out: tuple[str, ...] = ()
    load: float = 0.0
    seen_gpus: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_rates(self.dense_bytes_per_s)
        for seconds in (self.layer_s, self.whole_layer_s, self.fetch_s, self.foresee_s, self.program_s):
            if not 0 <= seconds < math.inf:
                raise ValueError(f"{seconds} is no time")

    def age_s(self, now: datetime) -> float:
        """How old the figures are, in seconds; never below 0, whatever the clock says."""
        return max(0.0, (now - datetime.fromisoformat(self.measured_at)).total_seconds())

    def maths_rate(self, weights: str, tokens: int = 1, *, kernels: str = "native") -> float:
        """Bytes per second of expert weights of such a kind, between the numbers of tokens measured; by torch where
        `kernels` were not measured.

        Raises ValueError when the kind of weights was not measured at all.
        """
        for name in (kernels, "torch"):
            points = sorted((r.tokens, r.bytes_per_s) for r in self.maths if (r.kernels, r.weights) == (name, weights))
            if points:
                return _between(points, tokens)
        raise ValueError(f"experts of {weights} were not measured")

    def to_dict(self) -> dict[str, Any]:
        """As JSON shows it."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, text: str) -> Machine:
        """What `to_dict` made. Raises IntegrityError for anything else."""
        try:
            values = json.loads(text)
            if values.pop("schema") != SCHEMA:
                raise ValueError("it is of another version")
            if datetime.fromisoformat(values["measured_at"]).tzinfo is None:
                raise ValueError("the time has no zone")
            if not math.isfinite(values.get("load", 0.0)):
                raise ValueError("the load is no number")
            disk = values.pop("disk")
            rates = tuple(ReadRate(**rate) for rate in disk.pop("rates"))
            if not rates or not all(rate.size >= 1 and rate.depth >= 1 for rate in rates):
                raise ValueError("the disk was not measured")
            processor = values.pop("processor")
            features = tuple(processor.pop("features"))
            return cls(
                processor=Processor(**processor, features=features),
                memory=HostMemory(**values.pop("memory")),
                disk=Disk(**disk, rates=rates),
                maths=_maths(values.pop("maths")),
                gpus=tuple(Gpu(**{**gpu, "maths": _maths(gpu["maths"])}) for gpu in values.pop("gpus")),
                left_out=tuple(values.pop("left_out")),
                seen_gpus=tuple(values.pop("seen_gpus", ())),
                **values,
            )
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise IntegrityError(f"these are no measurements of a machine: {error}") from error


def _check_rates(*rates: float) -> None:
    for rate in rates:
        if not 0 < rate < math.inf:
            raise ValueError(f"{rate} is no rate")


def _maths(rates: Sequence[dict[str, Any]]) -> tuple[MathsRate, ...]:
    found = tuple(MathsRate(**rate) for rate in rates)
    if not found or not all(rate.tokens >= 1 for rate in found):
        raise ValueError("the maths of no token was measured")
    return found


def _between(points: Sequence[tuple[int, float]], at: float) -> float:
    """The value at `at`, on straight lines between `points` over the logarithm of their first numbers; beyond the ends,
    that of the end.
    """
    (before, low), (after, high) = points[0], points[-1]
    for size, value in points:
        if size <= at:
            before, low = size, value
    for size, value in reversed(points):
        if size >= at:
            after, high = size, value
    if before >= after:
        return low if at >= before else high
    return low + (high - low) * math.log(at / before) / math.log(after / before)
