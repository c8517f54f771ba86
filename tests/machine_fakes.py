"""Machines that nobody measured, and a stand-in for GPUs."""

from __future__ import annotations

from typing import Any

import torch

from moeinf.machine import Disk, Gpu, HostMemory, Machine, MathsRate, Processor, ReadRate
from moeinf.units import GIB, MIB

__all__ = ["FakeGpus", "make_gpu", "make_machine"]


def make_machine(**changes: Any) -> Machine:
    """A good machine with nothing to complain about, `changes` made."""
    machine: dict[str, Any] = {
        "measured_at": "2026-03-01T12:00:00+00:00",
        "processor": Processor(
            name="A Processor",
            cores=8,
            threads=8,
            features=("avx2", "avx512f", "avx512_bf16"),
            kernels="avx512bf16",
            governor="performance",
            adds_as_torch_does=True,
        ),
        "memory": HostMemory(
            total=64 * GIB,
            available=60 * GIB,
            limit=None,
            swap_total=0,
            swap_free=0,
            bytes_per_s=40e9,
            fresh_bytes_per_s=8e9,
            huge_pages="madvise",
        ),
        "disk": Disk(
            path="/models",
            device="/dev/nvme0n1p2",
            filesystem="ext4",
            reads_direct=True,
            read_ahead=128 << 10,
            free=500 * GIB,
            rates=(ReadRate(1 * MIB, 8, True, 3e9), ReadRate(10 * MIB, 8, True, 3e9), ReadRate(MIB, 8, False, 2e9)),
            rotates=False,
        ),
        "maths": (MathsRate("native", "bfloat16", 1, 38e9), MathsRate("torch", "bfloat16", 1, 20e9)),
        "dense_bytes_per_s": 20e9,
        "layer_s": 0.0005,
        "whole_layer_s": 0.0003,
        "fetch_s": 0.0001,
        "foresee_s": 0.0002,
        "program_s": 0.001,
    }
    return Machine(**{**machine, **changes})


def make_gpu() -> Gpu:
    return Gpu(
        index=0,
        name="A GPU",
        total=24 * GIB,
        free=23 * GIB,
        bytes_per_s=900e9,
        pinned_to_device=25e9,
        pageable_to_device=6e9,
        device_to_pinned=24e9,
        maths=(MathsRate("torch", "bfloat16", 1, 500e9), MathsRate("torch", "bfloat16", 256, 90e9)),
    )


class FakeGpus:
    """An `Accelerator` whose GPUs are the processor. `fails_at`: the number of the wait at which a GPU is gone."""

    def __init__(self, count: int, *, fails_at: int = 0, name: str = "A GPU") -> None:
        self._count, self._fails_at, self._name = count, fails_at, name
        self.waits = 0

    def count(self) -> int:
        return self._count

    def name(self, index: int) -> str:
        return f"{self._name} {index}"

    def memory(self, index: int) -> tuple[int, int]:
        return 64 * MIB, 128 * MIB

    def device(self, index: int) -> torch.device:
        return torch.device("cpu")

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    def finish(self, index: int) -> None:
        self.waits += 1
        if self.waits == self._fails_at:
            raise RuntimeError("CUDA error: the device is gone\nmore about it")

    def free(self) -> None:
        pass
