"""Machines that nobody measured: one that could be a small computer, and random ones."""

from __future__ import annotations

import dataclasses
import random
from functools import partial

from moeinf.ledger import ModelShape
from moeinf.machine import Disk, Gpu, HostMemory, Machine, MathsRate, Processor, ReadRate
from moeinf.manifest import ExpertLayout, Manifest, MoeLayer, Source, TensorSpec

__all__ = [
    "make_machine",
    "make_manifest",
    "make_shape",
    "random_gpu",
    "random_machine",
    "random_model",
    "with_faster_disk",
]

GB = 1e9
MIB = 1 << 20


def make_machine(
    *, disk: float = 2.0 * GB, memory: float = 30 * GB, native: float = 28 * GB, fresh: float = 4 * GB
) -> Machine:
    return Machine(
        measured_at="2026-01-01T00:00:00+00:00",
        processor=Processor("Test", 2, 4, ("avx512_bf16",), "avx512bf16", adds_as_torch_does=True),
        memory=HostMemory(32 << 30, 24 << 30, None, 0, 0, memory, fresh),
        disk=Disk("/models", "sda", "ext4", True, 131072, 1 << 40, (ReadRate(MIB, 8, True, disk),)),
        maths=(
            MathsRate("native", "bfloat16", 1, native),
            MathsRate("torch", "bfloat16", 1, 15 * GB),
            MathsRate("torch", "bfloat16", 64, 3 * GB),
        ),
        dense_bytes_per_s=15 * GB,
        layer_s=5e-4,
        whole_layer_s=3e-4,
        fetch_s=8e-5,
        foresee_s=2e-4,
        program_s=1e-3,
    )


def make_manifest(
    *,
    layers: int = 16,
    experts: int = 64,
    top_k: int = 8,
    inner: int = 512,
    dense: int = 200 * MIB,
    dtype: str = "BF16",
) -> Manifest:
    up = TensorSpec("gate_up_proj", dtype, (2 * inner, 1024), 0)
    return Manifest(
        source=Source("test/model"),
        architecture="TestForCausalLM",
        model_type="test",
        dtype="bfloat16",
        precision="bfloat16",
        layers=tuple(MoeLayer(f"layers.{layer}", experts, top_k) for layer in range(layers)),
        layout=ExpertLayout(4096, (up, TensorSpec("down_proj", dtype, (1024, inner), up.nbytes))),
        dense_files=("dense.safetensors",),
        dense_bytes=dense,
        kv_token_bytes=16384,
        kv_fixed_bytes=0,
        max_context=32768,
        files={},
    )


def make_shape(layers: int = 16) -> ModelShape:
    table = 62 * MIB
    return ModelShape(1024, 2048, 32000, 0, 4, layers=layers, head_bytes=table, lookup_bytes=table)


def random_machine(chance: random.Random) -> Machine:
    """Anything that could be measured, in parts that need not go together."""
    rate = partial(_rate, chance)
    kinds = chance.sample(["bfloat16", "float32", "int8", "int4"], chance.randint(0, 4))
    steps = sorted({1, *chance.sample([2, 16, 64, 512], chance.randint(0, 4))})
    is_direct, has_library = chance.random() < 0.8, chance.random() < 0.7
    machine = make_machine(memory=rate(3 * GB, 800 * GB), fresh=rate(0.1 * GB, 40 * GB))
    reads = tuple(
        ReadRate(size, depth, direct, rate(0.02 * GB, 14 * GB))
        for size in chance.sample([64 << 10, MIB, 16 * MIB, 350 * MIB], chance.randint(1, 4))
        for depth in (1, 8)
        for direct in ((False, True) if is_direct else (False,))
    )
    return dataclasses.replace(
        machine,
        processor=dataclasses.replace(
            machine.processor,
            kernels=chance.choice(["avx2", "avx512bf16"]) if has_library else "",
            adds_as_torch_does=has_library and chance.random() < 0.7,
        ),
        disk=dataclasses.replace(machine.disk, reads_direct=is_direct, rates=reads),
        maths=tuple(
            MathsRate(kernels, kind, tokens, rate(0.1 * GB, 300 * GB))
            for kind in kinds
            for kernels in chance.choice([("torch",), ("native", "torch")])
            for tokens in steps
        ),
        dense_bytes_per_s=rate(1 * GB, 300 * GB),
        layer_s=rate(1e-6, 1e-2),
        whole_layer_s=rate(1e-6, 1e-2),
        fetch_s=rate(1e-6, 1e-3),
        foresee_s=rate(1e-6, 1e-3),
        program_s=rate(1e-5, 1e-2),
    )


def random_gpu(chance: random.Random) -> Gpu:
    """The same of a GPU."""
    rate = partial(_rate, chance)
    return Gpu(
        index=0,
        name="Random",
        total=1 << 40,
        free=1 << 40,
        bytes_per_s=rate(50 * GB, 5000 * GB),
        pinned_to_device=rate(1 * GB, 100 * GB),
        pageable_to_device=rate(1 * GB, 100 * GB),
        device_to_pinned=rate(1 * GB, 100 * GB),
        maths=tuple(
            MathsRate("torch", "bfloat16", tokens, rate(0.1 * GB, 5000 * GB))
            for tokens in sorted(chance.sample([1, 2, 16, 256], chance.randint(0, 4)))
        ),
    )


def _rate(chance: random.Random, least: float, most: float) -> float:
    return float(least * (most / least) ** chance.random())


def random_model(chance: random.Random) -> tuple[Manifest, ModelShape]:
    layers = chance.randint(1, 60)
    experts = chance.choice([1, 2, 8, 64, 256])
    dense = chance.randint(1, 4000) * MIB
    manifest = make_manifest(
        layers=layers,
        experts=experts,
        top_k=chance.randint(1, min(experts, 8)),
        inner=chance.choice([16, 512, 14336]),
        dense=dense,
        dtype=chance.choice(["BF16", "F16", "F32", "I8"]),
    )
    shape = dataclasses.replace(
        make_shape(layers + chance.randint(0, 3)),
        lookup_bytes=chance.choice([0, 62 * MIB]),
        score_heads=chance.choice([0, 32]),
    )
    return manifest, shape


def with_faster_disk(machine: Machine, times: float) -> Machine:
    rates = (dataclasses.replace(rate, bytes_per_s=times * rate.bytes_per_s) for rate in machine.disk.rates)
    return dataclasses.replace(machine, disk=dataclasses.replace(machine.disk, rates=tuple(rates)))
