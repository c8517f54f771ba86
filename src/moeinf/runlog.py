"""What an engine's answers took, beside what was expected of them: kept for later forecasts, and for later engines,
which begin as these ended.

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
_NEAR = 0.1
"""Numbers of slots that differ by this share of one of them are about the same."""


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

    def best_way(self) -> str:
        """The way of prefetching that was best when the last answer with these options and about as many slots ended;
        "" if that is not known.
        """
        runs = evidence.read_runs(self._folder, self._owner)
        now = self._run(self._plan)
        return next((run.best for run in reversed(runs) if run.best and _are_alike(run, now)), "")

    def add(self, plan: MemoryPlan, tpot_s: float, decode: CacheCounters, best: str) -> None:
        """Note an answer that took `tpot_s` per token, and met the cache like this while decoding; `plan` is what goes
        where by now, `best` the way of prefetching that was found to be that. An answer in which the plan has changed
        is left out, and so is what is not foretold: compiled layers, and experts that the processor computed for a GPU.
        """
        if plan != self._plan:
            self._plan = plan
            return
        tokens = decode.requests // plan.token_experts
        if tokens < _LEAST_TOKENS or not tpot_s or decode.passed_by or self._options.compiles:
            return
        hit_rate = max(0.0, 1 - (decode.misses + decode.prefetch_used) / decode.requests)
        run = dataclasses.replace(self._run(plan), tokens=tokens, hit_rate=hit_rate, tpot_s=tpot_s, best=best)
        self._runs.append((plan, run))

    def _run(self, plan: MemoryPlan) -> PastRun:
        """One that begins now."""
        return PastRun(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            slots=plan.slots,
            budget=plan.budget,
            tokens=0,
            hit_rate=0.0,
            reads_files=self._reads_files,
            policy=self._options.policy,
            prefetch=self._options.prefetch,
            kernels=self._options.kernels,
            threads=self._options.threads,
            tpot_s=0.0,
            device=self._device.name if self._device else "",
            host_slots=plan.host.slots if plan.host else 0,
            model=self._owner,
        )

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


def _are_alike(run: PastRun, other: PastRun) -> bool:
    """Whether one says how the other will go: memory that is free is not the same twice."""
    are_near = all(
        abs(before - now) <= _NEAR * now
        for before, now in ((run.slots, other.slots), (run.host_slots, other.host_slots))
    )
    return are_near and _conditions(run) == _conditions(other)


def _conditions(run: PastRun) -> tuple[object, ...]:
    return run.device, run.reads_files, run.policy, run.prefetch, run.kernels, run.threads
