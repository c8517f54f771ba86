"""What a forecast of a model needs, gathered: its manifest and shape, pulled or not, and its hit curve.

Owns where these facts come from. The forecasts themselves are arithmetic (`forecast`, `outlook`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import evidence
from .analysis import foreseen_share
from .checkpoint import CONFIG_NAME
from .collectionfile import COLLECTION_FILE
from .errors import ModelNotFoundError, MoeinfError
from .files import explained
from .forecast import PUBLISHED, HitCurve
from .ledger import ModelShape
from .manifest import Manifest
from .progress import NO_PROGRESS, Progress
from .pull import preview
from .simulate import Event, events, replay
from .sizing import shorten, slots_of
from .store import TRACES_FOLDER, Store
from .trace import ModelIdentity, Trace, concatenate
from .tracefile import read_trace

__all__ = ["Subject", "find_curve", "find_subject"]

_SHARES = (0.05, 0.1, 0.25, 0.5, 0.75)
_REPLAYED_USES = 80_000
"""So much of the traces is replayed at each size; it takes about ten seconds in all."""
_LEAST_DECODED = 64


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to be planned for. `traces` is where it keeps what was learned, None if it is not pulled."""

    name: str
    manifest: Manifest
    shape: ModelShape
    traces: Path | None


def find_subject(model: str, store: Store) -> Subject:
    """The stored model that is meant, or else what a pull of it would store, from its configuration and index alone.

    Raises what `Store.resolve` and `pull.preview` raise.
    """
    from .metamodel import load_config, model_shape

    try:
        stored = store.resolve(model)
    except ModelNotFoundError:
        from .kernels import computes_from_packed

        seen = preview(model, store=store, packs=computes_from_packed)
        with tempfile.TemporaryDirectory(prefix="moeinf-") as folder, explained(Path(folder)):
            Path(folder, CONFIG_NAME).write_text(seen.config, encoding="utf-8")
            shape = model_shape(load_config(Path(folder)).config, seen.manifest)
        return Subject(seen.name, seen.manifest, shape, None)
    shape = model_shape(load_config(stored.path).config, stored.manifest)
    return Subject(stored.name, stored.manifest, shape, stored.path / TRACES_FOLDER)


def find_curve(subject: Subject, policy: str, progress: Progress = NO_PROGRESS) -> HitCurve:
    """How often `policy` finds an expert in memory: by a replay of the model's traces, which is kept beside them, or as
    published where there are none.
    """
    if subject.traces is None:
        return PUBLISHED
    paths = sorted(path for path in subject.traces.glob("*.safetensors") if _may_be_trace(path))
    found = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    model = evidence.owner(subject.manifest)
    if (kept := evidence.read_curve(subject.traces, model, policy, found)) is not None:
        return kept
    traces = _read(paths, ModelIdentity.of(subject.name, subject.manifest))
    part = shorten(concatenate(traces), _REPLAYED_USES) if traces else None
    if part is None or int(np.count_nonzero(~part.is_prefill)) < _LEAST_DECODED:
        return PUBLISHED
    curve = _replayed(part, policy, progress)
    with suppress(MoeinfError):
        evidence.write_curve(subject.traces, model, policy, found, curve)
    return curve


def _may_be_trace(path: Path) -> bool:
    return path.name != COLLECTION_FILE and not path.name.endswith(".draft.safetensors")


def _read(paths: Sequence[Path], identity: ModelIdentity) -> list[Trace]:
    """The traces of this model; what is damaged or another's is left out."""
    traces = []
    for path in paths:
        with suppress(MoeinfError):
            trace = read_trace(path)
            trace.check_model(identity)
            traces.append(trace)
    return traces


def _replayed(part: Trace, policy: str, progress: Progress) -> HitCurve:
    history, sizes = list(events(part)), part.layer_sizes
    points = []
    with progress.task("replay traces", len(_SHARES), "replays") as task:
        for slots in sorted({slots_of(part, share) for share in _SHARES}):
            points.append((slots / sum(sizes), _steady_rate(history, sizes, policy, slots)))
            task.advance(1)
    decoded = int(np.count_nonzero(~part.is_prefill))
    source = f"traces of this model: {decoded:,} decoded tokens replayed with {policy}"
    return HitCurve(tuple(points), source, foreseen_share([part]))


def _steady_rate(history: list[Event], sizes: tuple[int, ...], policy: str, slots: int) -> float:
    """The hit rate of the second half, after the first has filled the cache."""
    first, whole = (replay(part, sizes, policy, slots) for part in (history[: len(history) // 2], history))
    requests = whole.requests - first.requests
    return (whole.hits - first.hits) / requests if requests else whole.hit_rate
