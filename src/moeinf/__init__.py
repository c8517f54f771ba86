"""Run Mixture-of-Experts language models that do not fit in memory, exactly.

    import moeinf
    with moeinf.load("trial", experts="25%") as engine:
        print(engine.tokenizer.decode(engine.session().generate([1, 2, 3]).tokens))

Only this file's names are the public Python interface; torch is imported when one of them is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import MoeinfError

if TYPE_CHECKING:
    from .engine import Engine, load
    from .generation import Completion, Sampling, Session
    from .stats import Stats

__all__ = ["Completion", "Engine", "MoeinfError", "Sampling", "Session", "Stats", "load"]

_HOMES = {
    "Completion": "generation",
    "Engine": "engine",
    "Sampling": "generation",
    "Session": "generation",
    "Stats": "stats",
    "load": "engine",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    from .settings import tune_libraries

    tune_libraries()
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
