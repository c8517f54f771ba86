"""What was measured before, and is kept for forecasts: the machine, the hit curve of a model's traces, and past runs.

    $MOEINF_HOME/machine.json                             what `moeinf profile` measured
    $MOEINF_HOME/models/<name>/traces/hit-curve.json      how often memory of some sizes held what the traces ask for
    $MOEINF_HOME/models/<name>/traces/runs.jsonl          what the last answers took, one a line

Owns these files. One that cannot be read is as good as none: it is measured anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from .errors import IntegrityError
from .files import publish
from .forecast import HitCurve, PastRun
from .machine import Machine
from .manifest import Manifest
from .trace import ModelIdentity

__all__ = [
    "CURVE_FILE",
    "MACHINE_FILE",
    "RUNS_FILE",
    "add_runs",
    "owner",
    "read_curve",
    "read_machine",
    "read_runs",
    "write_curve",
]

CURVE_FILE = "hit-curve.json"
MACHINE_FILE = "machine.json"
RUNS_FILE = "runs.jsonl"

_KEPT_RUNS = 100


def read_machine(home: Path) -> Machine | None:
    """What was measured of this machine, if it was."""
    try:
        return Machine.from_json((home / MACHINE_FILE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, IntegrityError):
        return None


def owner(manifest: Manifest) -> str:
    """Whose a curve or a run is: another one when a model of the same name takes the place of one with this manifest,
    which leaves its `traces` folder behind.
    """
    return hashlib.sha256(repr(ModelIdentity.of("", manifest)).encode()).hexdigest()[:16]


def read_curve(folder: Path, model: str, policy: str, traces: Sequence[Sequence[Any]] | None = None) -> HitCurve | None:
    """The curve in a model's `traces` folder, if it is of this `owner` and policy; and of these `traces` (name, bytes,
    time), if they are given.
    """
    try:
        kept = _loads((folder / CURVE_FILE).read_text(encoding="utf-8"))
        if (kept["model"], kept["policy"]) != (model, policy) or (
            traces is not None and kept["traces"] != [list(trace) for trace in traces]
        ):
            return None
        foreseen = None if kept["foreseen"] is None else float(kept["foreseen"])
        points = tuple((float(share), float(rate)) for share, rate in kept["points"])
        if not all(0 <= part <= 1 for part in chain(*points, [foreseen or 0])):
            return None
        return HitCurve(points, str(kept["source"]), foreseen)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def write_curve(folder: Path, model: str, policy: str, traces: Sequence[Sequence[Any]], curve: HitCurve) -> None:
    """Keep `curve` for `read_curve`. Raises CapacityError or UsageError where that is not possible."""
    kept = {"model": model, "policy": policy, "traces": traces, **dataclasses.asdict(curve)}
    publish(folder / CURVE_FILE, [json.dumps(kept).encode()])


def read_runs(folder: Path, model: str) -> list[PastRun]:
    """The runs of this `owner` in a model's `traces` folder, the oldest first."""
    try:
        lines = (folder / RUNS_FILE).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    runs = [run for line in lines if (run := _decode(line)) is not None]
    return [run for run in runs if run.model == model]


def add_runs(folder: Path, runs: Sequence[PastRun]) -> None:
    """Keep `runs` too, all of one model; of its runs the last hundred stay. Raises CapacityError or UsageError where
    that is not possible.
    """
    kept = [*read_runs(folder, runs[0].model), *runs][-_KEPT_RUNS:]
    publish(folder / RUNS_FILE, [f"{json.dumps(dataclasses.asdict(run))}\n".encode() for run in kept])


def _decode(line: str) -> PastRun | None:
    """The run in a line; None for what is none, or could not have been."""
    try:
        run = PastRun(**_loads(line))
        is_sound = 0 < run.tpot_s < math.inf and 0 <= run.hit_rate <= 1 and run.slots > 0
    except (ValueError, TypeError, RecursionError):
        return None
    return run if is_sound else None


def _loads(text: str) -> Any:
    """What JSON says. Raises ValueError for numbers that are none."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number")

    return json.loads(text, parse_constant=refuse)
