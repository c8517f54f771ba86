"""How fast each GPU gets bytes, reads its memory and computes experts.

`Accelerator` is the seam: CUDA through torch in the program, a stand-in in tests. What a GPU is asked to do is waited
for, so that times are of work done and not of work ordered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch

from moeinf.machine import Gpu, MathsRate
from moeinf.progress import Task
from moeinf.timing import Call, best_s

from .effort import Effort
from .maths import TOKENS, Experts

__all__ = ["GPU_RATES", "Accelerator", "Cuda", "measure_gpus"]

_WEIGHTS = "bfloat16"
GPU_RATES = 4 + len(TOKENS)
"""Rates that are measured of each."""
_MOST_MEMORY = 0.25
"""The share of a GPU's free memory that is used at once."""
_COPIES = 8
"""Within the GPU's memory, timed together: one takes hardly longer than to ask for it."""


class Accelerator(Protocol):
    """The GPUs of this machine, by their index. All but `count` raise RuntimeError when one is gone."""

    def count(self) -> int: ...

    def name(self, index: int) -> str: ...

    def memory(self, index: int) -> tuple[int, int]:
        """(free, total) bytes."""

    def device(self, index: int) -> torch.device: ...

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in host memory that the GPUs can reach by themselves."""

    def finish(self, index: int) -> None:
        """Return when the GPU has done what it was asked to."""

    def free(self) -> None:
        """Give memory that is no longer used back to the GPUs."""


class Cuda:
    """GPUs that torch calls CUDA, those of AMD included."""

    def count(self) -> int:
        return torch.cuda.device_count()

    def name(self, index: int) -> str:
        return torch.cuda.get_device_name(index)

    def memory(self, index: int) -> tuple[int, int]:
        return torch.cuda.mem_get_info(index)

    def device(self, index: int) -> torch.device:
        return torch.device("cuda", index)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory()

    def finish(self, index: int) -> None:
        torch.cuda.synchronize(index)

    def free(self) -> None:
        torch.cuda.empty_cache()


def measure_gpus(accelerator: Accelerator, effort: Effort, task: Task) -> tuple[tuple[Gpu, ...], tuple[str, ...]]:
    """Every GPU that lets itself be measured, and of each that does not, a sentence that says why."""
    gpus, left_out = [], []
    for index in range(accelerator.count()):
        try:
            gpus.append(_measure(accelerator, index, effort, task))
        except RuntimeError as error:  # what torch raises when a GPU is gone, is full, or belongs to somebody else
            left_out.append(f"GPU {index}: it failed while it was measured: {str(error).splitlines()[0]}")
    return tuple(gpus), tuple(left_out)


def _measure(accelerator: Accelerator, index: int, effort: Effort, task: Task) -> Gpu:
    free, total = accelerator.memory(index)
    device = accelerator.device(index)

    def rate(nbytes: int, work: Call) -> float:
        measured = nbytes / best_s([partial(_done, work, partial(accelerator.finish, index))], effort.maths_s)
        task.advance(1)
        return measured

    link = min(effort.link, int(free * _MOST_MEMORY) // 2)
    pageable = torch.ones(link, dtype=torch.uint8)
    pinned = accelerator.pin(pageable)
    there, beside = (torch.ones(link, dtype=torch.uint8, device=device) for _ in range(2))
    to_device = rate(link, partial(there.copy_, pinned, non_blocking=True))
    pageable_to_device = rate(link, partial(there.copy_, pageable))
    to_pinned = rate(link, partial(pinned.copy_, there, non_blocking=True))
    copies = _COPIES * [partial(beside.copy_, there)]
    memory_rate = rate(len(copies) * 2 * link, partial(_all, copies))
    experts = Experts(_WEIGHTS, min(effort.working_set, int(free * _MOST_MEMORY)), device)
    with torch.inference_mode():
        maths = [
            MathsRate("torch", _WEIGHTS, tokens, rate(experts.nbytes, partial(_all, calls)))
            for tokens in TOKENS
            for calls in [experts.calls(experts.maths(None), tokens)]
        ]
    del there, beside, experts
    accelerator.free()
    return Gpu(
        index=index,
        name=accelerator.name(index),
        total=total,
        free=free,
        bytes_per_s=memory_rate,
        pinned_to_device=to_device,
        pageable_to_device=pageable_to_device,
        device_to_pinned=to_pinned,
        maths=tuple(maths),
    )


def _done(work: Call, finish: Callable[[], None]) -> None:
    work()
    finish()


def _all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()
