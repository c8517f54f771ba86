"""What the bookkeeping costs per expert request: lease, lookup, policy, statistics. No maths, no input or output.

    python benchmarks/overhead.py

Drives the engine's own path for one token, with stand-ins that compute nothing and read nothing, over a model of 48
layers of 128 experts, 8 per token. Prints microseconds per request: all experts resident, and a quarter of them with
random routing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence

sys.path.pop(0)  # or transformers takes the kernels.py beside this for the package of that name

import torch

from moeinf.cache import ExpertCache
from moeinf.collection import ActivationCollection, RequestCounter
from moeinf.kernels import ExpertMaths, Tensors
from moeinf.manifest import ExpertLayout, Manifest, MoeLayer, Source, TensorSpec
from moeinf.policies import make_policy
from moeinf.profiling.layer import NoDisk
from moeinf.runtime import ExpertRuntime
from moeinf.settings import DEFAULT_POLICY
from moeinf.transfer import SlotPool

LAYERS, EXPERTS, TOP_K = 48, 128, 8
HIDDEN = 4


class NoMaths(ExpertMaths):
    """Experts whose output is there already."""

    def __init__(self) -> None:
        self._total = torch.ones(1, HIDDEN)

    def token(self, hidden: torch.Tensor, weights: torch.Tensor) -> NoMaths:
        return self

    def compute(self, places: Sequence[int], experts: Sequence[Tensors]) -> None:
        pass

    def receive(self, places: Sequence[int], rows: torch.Tensor) -> None:
        pass

    def total(self, places: Sequence[int]) -> torch.Tensor:
        return self._total


def make_runtime(slots: int, policy: str) -> ExpertRuntime:
    layout = ExpertLayout(4096, (TensorSpec("down_proj", "BF16", (1,), 0),))
    manifest = Manifest(
        source=Source("benchmark"),
        architecture="Benchmark",
        model_type="benchmark",
        dtype="bfloat16",
        precision="bfloat16",
        layers=tuple(MoeLayer(f"layers.{layer}", EXPERTS, TOP_K) for layer in range(LAYERS)),
        layout=layout,
        dense_files=(),
        dense_bytes=0,
        kv_token_bytes=0,
        kv_fixed_bytes=0,
        max_context=1,
        files={},
    )
    cache = ExpertCache(manifest.num_experts, slots, make_policy(policy, [EXPERTS] * LAYERS))
    pool = SlotPool(layout, slots)
    sizes = [EXPERTS] * LAYERS
    counter = RequestCounter(sizes, ActivationCollection(sizes))
    return ExpertRuntime(manifest, [NoMaths()] * LAYERS, cache=cache, pool=pool, fetcher=NoDisk(), counter=counter)


def microseconds_per_request(slots: int, policy: str, tokens: int) -> list[float]:
    """One figure per token, after as many tokens to fill the cache."""
    runtime = make_runtime(slots, policy)
    generator = torch.Generator().manual_seed(0)
    hidden, weights = torch.zeros(1, HIDDEN), torch.ones(1, TOP_K)
    figures = []
    for _ in range(2 * tokens):
        routing = [torch.randperm(EXPERTS, generator=generator)[None, :TOP_K] for _ in range(LAYERS)]
        begin = time.perf_counter()
        for layer, chosen in enumerate(routing):
            runtime.forward(layer, hidden, chosen, weights)
        figures.append((time.perf_counter() - begin) / (LAYERS * TOP_K) * 1e6)
    return figures[tokens:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--policy", default=DEFAULT_POLICY)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{LAYERS} layers x {EXPERTS} experts, {TOP_K} per token, policy {arguments.policy};"
        " microseconds per expert request"
    )
    for label, slots in (
        ("all experts resident", LAYERS * EXPERTS),
        ("a quarter, random routing", LAYERS * EXPERTS // 4),
    ):
        with torch.inference_mode():
            figures = microseconds_per_request(slots, arguments.policy, arguments.tokens)
        print(
            f"{label:28} median {statistics.median(figures):5.1f}   min {min(figures):5.1f}   max {max(figures):6.1f}"
        )


if __name__ == "__main__":
    main()
