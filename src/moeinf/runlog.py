"""What an engine's answers took, beside what was expected of them: kept for later forecasts.

Predicting takes what `moeinf profile` measured before, and measures nothing.
"""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from pathlib import Path

from . import evidence
from .cache import CacheCounters
from .forecast import PUBLISHED, PastRun, Situation, foretell
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
        reads_files: bool,
    ) -> None:
        self._folder = folder
        self._manifest, self._shape, self._plan, self._options = manifest, shape, plan, options
        self._reads_files = reads_files
        self._runs: list[PastRun] = []

    def add(self, tpot_s: float, decode: CacheCounters) -> None:
        """Note an answer that took `tpot_s` per token, and met the cache like this while decoding."""
        tokens = decode.requests // self._plan.token_experts
        if tokens < _LEAST_TOKENS or not tpot_s:
            return
        run = PastRun(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            slots=self._plan.slots,
            budget=self._plan.budget,
            tokens=tokens,
            hit_rate=max(0.0, 1 - (decode.misses + decode.prefetch_used) / decode.requests),
            reads_files=self._reads_files,
            policy=self._options.policy,
            prefetch=self._options.prefetch,
            kernels=self._options.kernels,
            threads=self._options.threads,
            tpot_s=tpot_s,
        )
        self._runs.append(run)

    def save(self) -> None:
        """Write what was noted since the last time beside the model. Raises CapacityError or UsageError."""
        if self._runs:
            predicted_s = self._predict()
            runs = [dataclasses.replace(run, predicted_s=predicted_s) for run in self._runs]
            self._runs = []
            evidence.add_runs(self._folder, runs)

    def _predict(self) -> float | None:
        """What a plan for this engine expects of a token before it is corrected."""
        machine = evidence.read_machine(home_path())
        if machine is None:
            return None
        curve = evidence.read_curve(self._folder, self._options.policy) or PUBLISHED
        situation = Situation(
            machine,
            self._manifest,
            self._shape,
            curve,
            kernels=self._options.kernels,
            prefetch=self._options.prefetch,
            reads_files=self._reads_files,
        )
        return foretell(situation, self._plan).tpot_s
