"""What a generation cost: the `stats` object of `run --json` and of `Engine.stats()`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from .qualityfile import Quality

__all__ = ["ByteStats", "ExpertStats", "MemoryStats", "PrefetchStats", "Stats"]


@dataclass(frozen=True, slots=True)
class ExpertStats:
    """Requests by how the cache met them; one request is one expert asked for by one layer in one step.

    hits + waits + misses = requests, over prefill and decode; `hit_rate` and the `decode_` counts are of decode alone.
    `slots` are those that the maths reads. Behind a GPU host memory has `host_slots`, in which `fetched_from_host` of
    the experts that were `fetched` for the GPU, asked for or foreseen, were found; of the misses, `computed_on_host`
    were not fetched, but computed there by the processor.
    """

    slots: int = 0
    host_slots: int = 0
    fetched: int = 0
    fetched_from_host: int = 0
    computed_on_host: int = 0
    requests: int = 0
    hits: int = 0
    waits: int = 0
    misses: int = 0
    hit_rate: float = 0.0
    decode_requests: int = 0
    decode_hits: int = 0
    prefetched: int = 0
    prefetch_used: int = 0
    evictions: int = 0


@dataclass(frozen=True, slots=True)
class ByteStats:
    """Bytes of expert weights moved between the tiers."""

    disk_to_host: int = 0
    host_to_device: int = 0


@dataclass(frozen=True, slots=True)
class PrefetchStats:
    """What foreseeing experts was worth while decoding.

    `recall`: of the experts asked for where something was predicted, the share that was named. `precision`: of those
    named, the share that was asked for. Most of them are in memory anyway; `read_bytes` were read for those that were
    not, and of these bytes `wasted_bytes` for experts that were not asked for before they left. `predictor` is the one
    in use at the end: `off`, `gate` or `eam`.
    """

    predictor: str = "off"
    recall: float = 0.0
    precision: float = 0.0
    read_bytes: int = 0
    wasted_bytes: int = 0


@dataclass(frozen=True, slots=True)
class MemoryStats:
    """The ledger, in bytes, beside what the process really held.

    `budget` bounds dense + kv_cache + workspace + experts. `libraries` is what the process held before the model
    (Python, torch, transformers, tokenizer), which the budget leaves out: `peak_rss` stays below libraries + budget.
    With a GPU these are of its memory, of which torch held `peak_device`; `host_budget` bounds what the process takes
    beside the libraries, `host_experts` and a workspace.
    """

    budget: int = 0
    dense: int = 0
    kv_cache: int = 0
    workspace: int = 0
    experts: int = 0
    host_budget: int = 0
    host_experts: int = 0
    libraries: int = 0
    peak_rss: int = 0
    peak_device: int = 0


@dataclass(frozen=True, slots=True)
class Stats:
    """Times in seconds. `ttft_s`: from the request to the first token. `tpot_s`: per token after the first. `stall_s`:
    waiting for bytes. `kernels`: what computed the experts of a token, and why if it was torch where it need not be.
    `quantization`: how experts are packed, empty where they are plain; `quality`: what that was measured to cost, if it
    was, which it is not where they are packed as they were released.
    """

    load_s: float = 0.0
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    stall_s: float = 0.0
    experts: ExpertStats = field(default_factory=ExpertStats)
    prefetch: PrefetchStats = field(default_factory=PrefetchStats)
    bytes: ByteStats = field(default_factory=ByteStats)
    memory: MemoryStats = field(default_factory=MemoryStats)
    kernels: str = ""
    quantization: str = ""
    quality: Quality | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON shows it."""
        return dataclasses.asdict(self)
