"""What was measured before, and is kept for forecasts: the machine, the hit curve of a model's traces, and past runs.

    $MOEINF_HOME/machine.json                             what `moeinf profile` measured
    $MOEINF_HOME/models/<name>/traces/hit-curve.json      how often memory of some sizes held what the traces ask for
    $MOEINF_HOME/models/<name>/traces/runs.jsonl          what the last answers took, one a line

Owns these files. One that cannot be read is as good as none: it is measured anew.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import IntegrityError
from .files import publish
from .forecast import HitCurve, PastRun
from .machine import Machine

__all__ = [
    "CURVE_FILE",
    "MACHINE_FILE",
    "RUNS_FILE",
    "add_runs",
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


def read_curve(folder: Path, policy: str, traces: Sequence[Sequence[Any]] | None = None) -> HitCurve | None:
    """The curve in a model's `traces` folder, if it is of this policy; and of these `traces` (name, bytes, time), if
    they are given.
    """
    try:
        kept = json.loads((folder / CURVE_FILE).read_text(encoding="utf-8"))
        if kept["policy"] != policy or (traces is not None and kept["traces"] != [list(trace) for trace in traces]):
            return None
        foreseen = None if kept["foreseen"] is None else float(kept["foreseen"])
        points = tuple((float(share), float(rate)) for share, rate in kept["points"])
        return HitCurve(points, str(kept["source"]), foreseen)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_curve(folder: Path, policy: str, traces: Sequence[Sequence[Any]], curve: HitCurve) -> None:
    """Keep `curve` for `read_curve`. Raises CapacityError or UsageError where that is not possible."""
    kept = {"policy": policy, "traces": traces, **dataclasses.asdict(curve)}
    publish(folder / CURVE_FILE, [json.dumps(kept).encode()])


def read_runs(folder: Path) -> list[PastRun]:
    """The runs in a model's `traces` folder, the oldest first."""
    try:
        lines = (folder / RUNS_FILE).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    return [run for line in lines if (run := _decode(line)) is not None]


def add_runs(folder: Path, runs: Sequence[PastRun]) -> None:
    """Keep `runs` too; of all, the last hundred stay. Raises CapacityError or UsageError where that is not possible."""
    kept = [*read_runs(folder), *runs][-_KEPT_RUNS:]
    publish(folder / RUNS_FILE, [f"{json.dumps(dataclasses.asdict(run))}\n".encode() for run in kept])


def _decode(line: str) -> PastRun | None:
    """The run in a line; None for what is none, or could not have been."""
    try:
        run = PastRun(**json.loads(line))
        is_sound = run.tpot_s > 0 and 0 <= run.hit_rate <= 1 and run.slots > 0
    except (ValueError, TypeError):
        return None
    return run if is_sound else None
