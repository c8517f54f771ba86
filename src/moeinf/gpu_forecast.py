"""How fast a model will run with a GPU: what the parts of a token take where experts come along a link, from host
memory or from the disk through it. Pure arithmetic on what was measured of the GPU and of the machine around it;
docs/planning.md has every formula.

No forecast of it was ever compared with a time measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from .errors import MoeinfError
from .forecast import (
    EXPANDING,
    PASS_S,
    SUSTAINED,
    TOKEN_S,
    Bound,
    Costs,
    Situation,
    asked_experts,
    disk_rate,
    waiting_s,
)
from .ledger import MemoryPlan
from .machine import MEASURED_BYTES, Gpu

__all__ = ["GpuSituation", "on_gpu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSituation(Situation):
    """The same where `gpu` computes. Plans are those of `ledger.make_device_plan`."""

    gpu: Gpu

    @property
    def device(self) -> str:
        return self.gpu.name

    def costs(self, plan: MemoryPlan) -> Costs:
        return _GpuCosts(self, plan)


def on_gpu(situation: Situation, index: int, name: str) -> GpuSituation:
    """The same on this GPU. Raises MoeinfError where it was not measured."""
    gpu = next((gpu for gpu in situation.machine.gpus if (gpu.index, gpu.name) == (index, name)), None)
    if gpu is None:
        raise MoeinfError(
            f"{name} was not measured, so nothing can be foretold of it",
            hint="run `moeinf profile --refresh`, or give --device cpu",
        )
    return GpuSituation(**{field.name: getattr(situation, field.name) for field in fields(Situation)}, gpu=gpu)


class _GpuCosts:
    """Of a GPU. Of what it misses, host memory has the share of all experts that it holds: so it was when a trace was
    replayed through two tiers (docs/experiments.md). The rest is read from disk first.
    """

    def __init__(self, situation: GpuSituation, plan: MemoryPlan) -> None:
        assert plan.host is not None, "a plan without a GPU"
        machine, manifest, shape = situation.machine, situation.manifest, situation.shape
        self._gpu, self._manifest, self._shape, self._plan = situation.gpu, manifest, shape, plan
        self._fetch_s, self._foresee_s = machine.fetch_s / SUSTAINED, machine.foresee_s / SUSTAINED
        self._prefetch, self._foreseen = situation.prefetch, situation.foreseen
        self._is_grouped = situation.kernels == "triton"
        self._widening = (plan.dense + plan.looked_up) // manifest.dense_bytes if manifest.dense_bytes else 1
        self._expert_bytes = manifest.layout.nbytes
        self.token_bytes = manifest.token_experts * self._expert_bytes
        self._dense_bytes = self._widening * max(0, manifest.dense_bytes - shape.lookup_bytes)
        self._link_rate = situation.gpu.pinned_to_device
        self._disk_rate = disk_rate(machine, self._expert_bytes)
        self._host_rate = machine.memory.bytes_per_s
        self._read_share = 1 - min(1.0, plan.host.slots / plan.all_experts)
        self.dense_s = self._weights_s(self._dense_bytes, 1)
        self._head_s = self._weights_s(min(self._dense_bytes, self._widening * shape.head_bytes), 1) + TOKEN_S
        self.layers_s = shape.layers * machine.layer_s + TOKEN_S
        self.experts_s = sum(self._experts_s(layer.top_k, 1) for layer in manifest.layers)

    def bookkeeping_s(self, hits: float) -> float:
        return self._manifest.token_experts * (1 - hits) * self._fetch_s

    def read_s(self, hits: float) -> float:
        return max(self._fetching((1 - hits) * self.token_bytes, self._read_share).values()) / SUSTAINED

    def stall_s(self, hits: float) -> float:
        layers = len(self._manifest.layers)
        missing = (1 - hits) * self._manifest.token_experts / layers
        copying_s = self._expert_bytes / self._link_rate / SUSTAINED
        last_s = min(1.0, missing) * self._experts_s(1, 1) + min(1.0, missing * self._read_share) * copying_s
        return waiting_s(
            self._foreseen,
            layers,
            is_optional=self._prefetch == "auto",
            read_s=self.read_s(hits) / layers,
            experts_s=self.experts_s / layers,
            last_s=last_s,
            other_s=(self.dense_s + self.layers_s + self.bookkeeping_s(hits) - self._head_s) / layers,
            asking_s=self._foresee_s,
        )

    def bound(self, hits: float) -> tuple[float, Bound]:
        computed = self._dense_bytes + hits * self._widening * self.token_bytes
        fetching = self._fetching((1 - hits) * self.token_bytes, self._read_share)
        needed: dict[Bound, float] = {"device": computed / self._gpu.bytes_per_s, **fetching}
        by = max(needed, key=lambda resource: needed[resource])
        return needed[by], by

    def prompt_s(self, tokens: int) -> float:
        piece = self._plan.prefill_tokens(self._plan.slots, tokens)
        return sum(self._step_s(min(piece, tokens - begin), begin) for begin in range(0, tokens, piece))

    def _fetching(self, nbytes: float, read_share: float) -> dict[Bound, float]:
        """What each resource needs, at its best, to bring experts of so many bytes, of which this share is read."""
        return {
            "link": nbytes / self._link_rate,
            "disk": nbytes * read_share / self._disk_rate,
            "host": nbytes * (1 + read_share) / self._host_rate,
        }

    def _step_s(self, tokens: int, before: int) -> float:
        """Many tokens at once, with so many `before` them, that ask for experts as if each chose by chance."""
        held = min(1.0, self._plan.slots / self._plan.all_experts) if before else 0.0
        read_share = self._read_share if before else 1.0
        scores = tokens * (before + tokens) * self._shape.hidden * self._shape.layers
        attention_s = 4 * scores / self._operations_rate / SUSTAINED
        total = self._weights_s(self._dense_bytes, tokens) + attention_s + self.layers_s
        for layer in self._manifest.layers:
            asked = asked_experts(layer.num_experts, layer.top_k, tokens)
            fetching = self._fetching(asked * (1 - held) * self._expert_bytes, read_share)
            passing_s = PASS_S if self._is_grouped else asked * PASS_S
            maths_s = self._experts_s(asked, tokens * layer.top_k / asked) + passing_s
            total += max(maths_s, max(fetching.values()) / SUSTAINED)
        return total

    def _experts_s(self, experts: float, tokens: float) -> float:
        """So many experts of a layer for so many tokens each; by Triton's kernels, as if all of them were one."""
        layout = self._manifest.layout
        plain = self._widening * layout.plain_bytes
        if self._is_grouped:
            return self._expert_s(experts * plain, tokens)
        expanding = EXPANDING[layout.quantization.kind] * self._expert_s(plain, 1) if layout.quantization else 0.0
        return experts * (self._expert_s(plain, tokens) + expanding)

    def _expert_s(self, nbytes: float, tokens: float) -> float:
        """An expert of so many bytes, which takes as long as the one that was measured, and what its further bytes
        take. A smaller one takes its share of that, but no less than the measured one for one token, since that may be
        the time of asking for it.
        """
        share = min(1.0, nbytes / MEASURED_BYTES)
        more_s = self._weights_s(max(0.0, nbytes - MEASURED_BYTES), tokens)
        return max(self._measured_s(1), share * self._measured_s(tokens)) + more_s

    def _measured_s(self, tokens: float) -> float:
        measured = min(tokens, self._gpu.most_tokens)
        return MEASURED_BYTES / self._gpu.maths_rate(measured) * tokens / measured / SUSTAINED

    def _weights_s(self, nbytes: float, tokens: float) -> float:
        """So many bytes of weights for many tokens, which memory or arithmetic limits."""
        return nbytes / min(self._gpu.bytes_per_s, self._operations_rate / tokens) / SUSTAINED

    @property
    def _operations_rate(self) -> float:
        """Additions and multiplications per second in large products: two per weight of two bytes and token."""
        most = self._gpu.most_tokens
        return self._gpu.maths_rate(most) * most
