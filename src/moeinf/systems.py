"""What `bench` compares: the systems, what a process of one of them is told, and what it answers. Pure data, as JSON.

`worker` is that process; `bench` starts it.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

__all__ = ["RIVALS", "Counts", "Job", "Request", "Run", "Survey", "installed"]

RIVALS = {
    "transformers": ("transformers", "pip install transformers"),
    "accelerate": ("accelerate", "pip install accelerate"),
    "mmap": ("transformers", "pip install transformers"),
    "llama.cpp": ("llama_cpp", "pip install llama-cpp-python"),
}
"""What moeinf is compared with: the module that each needs, and how to install it.

    transformers   all weights in memory
    accelerate     transformers with the experts of as many layers in memory as fit, the others on disk
    mmap           transformers with weights mapped into memory, which the kernel reads when they are touched
    llama.cpp      llama-cpp-python with a GGUF file, mapped
"""


def installed(rival: str) -> bool:
    return find_spec(RIVALS[rival][0]) is not None


@dataclass(frozen=True, slots=True)
class Request:
    """Token ids to continue by `tokens` more. If `sequence` is not None, that one of the trace is replayed meanwhile,
    from its token `first` on.
    """

    prompt: list[int]
    tokens: int
    sequence: int | None = None
    first: int = 0


@dataclass(frozen=True, slots=True)
class Job:
    """One process. `warm_up` is answered before anything is measured.

    Args:
        system: `moeinf`, or one of RIVALS.
        model: its name in the store.
        engine: moeinf's options, by name.
        folder: the model as a checkpoint that transformers reads; for llama.cpp, a GGUF file.
        scratch: a folder to write to.
        resident_layers: MoE layers whose experts accelerate is to keep in memory.
        modules: the names of the experts modules, in forward order.
        trace: path of the trace that is replayed, or "".
        device: what torch calls the GPU that rivals are to compute on, or "" for the processor.
        routing: where moeinf is to leave what its routers chose, warming up too, as a trace.
    """

    system: str
    model: str
    warm_up: list[Request] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    temperature: float = 0.0
    threads: int | None = None
    engine: dict[str, Any] = field(default_factory=dict)
    folder: str = ""
    scratch: str = ""
    resident_layers: int = 0
    modules: list[str] = field(default_factory=list)
    trace: str = ""
    device: str = ""
    routing: str = ""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """What `to_json` made."""
        raw = json.loads(text)
        for name in ("warm_up", "requests"):
            raw[name] = [Request(**request) for request in raw[name]]
        return cls(**raw)


@dataclass(frozen=True, slots=True)
class Counts:
    """What moeinf counted, while decoding where nothing else is said, of all requests together.

    `missed_bytes` were asked for and had to be brought, foreseen or not; `read_bytes` were read, in vain too;
    `prefill_read_bytes` for prompts. `token_bytes`: the dense weights that a token reads.
    """

    requests: int
    hits: int
    waits: int
    missed_bytes: int
    read_bytes: int
    prefill_read_bytes: int
    stall_s: float
    prefill_stall_s: float
    prefetched: int
    prefetch_used: int
    token_bytes: int
    slots: int
    memory: dict[str, int]
    predictor: str
    kernels: str


@dataclass(frozen=True, slots=True)
class Run:
    """What one process measured: tokens and time to the first one per request, and the time of every later token."""

    tokens: list[list[int]]
    ttft_s: list[float]
    token_s: list[float]
    prompt_tokens: int
    load_s: float
    peak_rss: int
    counts: Counts | None = None

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Run:
        counts = raw.pop("counts")
        return cls(**raw, counts=Counts(**counts) if counts else None)


@dataclass(frozen=True, slots=True)
class Survey:
    """What the engine plans with the options of a job, and the prompts in tokens: `texts` cut to what may be read.

    `total` is all that the plan holds, `libraries` what the process holds beside it. `random` is whose shapes the model
    has, if its weights are random; `quantization` and `quality` are those of `stats.Stats`; `device` is the GPU that
    the engine takes, as in a job.
    """

    budget: int
    total: int
    libraries: int
    slots: int
    token_experts: int
    thrashes: bool
    regime: str
    context: int
    vocabulary: int
    random: str
    quantization: str
    quality: dict[str, Any] | None
    device: str
    notes: list[str]
    prompts: list[list[int]]
