"""What an engine's answers took, beside what was expected of them: kept for later forecasts.

Predicting takes what `moeinf profile` measured before, and measures nothing.
"""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from pathlib import Path

from . import evidence
from .cache import CacheCounters
from .device import Device
from .errors import MoeinfError
from .forecast import PUBLISHED, PastRun, Situation, foretell
from .gpu_forecast import on_gpu
from .ledger import MemoryPlan, ModelShape
from .manifest import Manifest
from .settings import EngineOptions, home_path

__all__ = ["RunLog"]

_LEAST_TOKENS = 16
"""Shorter answers say more about their beginning than about a token."""


class RunLog:
    """The answers of one engine.

    Args:
        folder: the model's `traces` folder.
        manifest, shape, plan, options: what the engine was loaded with.
        device: the GPU that computes, None being the processor.
        reads_files: whether experts come from the page cache.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        shape: ModelShape,
        plan: MemoryPlan,
        options: EngineOptions,
        *,
        device: Device | None,
        reads_files: bool,
    ) -> None:
        self._folder = folder
        self._manifest, self._shape, self._plan, self._options = manifest, shape, plan, options
        self._device, self._reads_files = device, reads_files
        self._owner = evidence.owner(manifest)
        self._runs: list[tuple[MemoryPlan, PastRun]] = []

    def add(self, plan: MemoryPlan, tpot_s: float, decode: CacheCounters) -> None:
        """Note an answer that took `tpot_s` per token, and met the cache like this while decoding; `plan` is what goes
        where by now. An answer in which that has changed is left out, and so is what is not foretold: compiled layers,
        and experts that the processor computed for a GPU.
        """
        if plan != self._plan:
            self._plan = plan
            return
        tokens = decode.requests // plan.token_experts
        if tokens < _LEAST_TOKENS or not tpot_s or decode.passed_by or self._options.compiles:
            return
        run = PastRun(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            slots=plan.slots,
            budget=plan.budget,
            tokens=tokens,
            hit_rate=max(0.0, 1 - (decode.misses + decode.prefetch_used) / decode.requests),
            reads_files=self._reads_files,
            policy=self._options.policy,
            prefetch=self._options.prefetch,
            kernels=self._options.kernels,
            threads=self._options.threads,
            tpot_s=tpot_s,
            device=self._device.name if self._device else "",
            host_slots=plan.host.slots if plan.host else 0,
            model=self._owner,
        )
        self._runs.append((plan, run))

    def save(self) -> None:
        """Write what was noted since the last time beside the model. Raises CapacityError or UsageError."""
        if self._runs:
            predicted_s = {plan: self._predict(plan) for plan, _ in self._runs}
            runs = [dataclasses.replace(run, predicted_s=predicted_s[plan]) for plan, run in self._runs]
            self._runs = []
            evidence.add_runs(self._folder, runs)

    def _predict(self, plan: MemoryPlan) -> float | None:
        """What `plan` expects of a token before it is corrected."""
        machine = evidence.read_machine(home_path())
        if machine is None:
            return None
        curve = evidence.read_curve(self._folder, self._owner, self._options.policy) or PUBLISHED
        situation = Situation(
            machine,
            self._manifest,
            self._shape,
            curve,
            kernels=self._options.kernels,
            prefetch=self._options.prefetch,
            reads_files=self._reads_files,
        )
        if self._device is not None:
            try:
                situation = on_gpu(situation, self._device.place.index or 0, self._device.name)
            except MoeinfError:  # it was not measured
                return None
        return foretell(situation, plan).tpot_s
