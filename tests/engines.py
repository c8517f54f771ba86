"""Engines of tiny models of several families, pulled once for all tests of a module and closed when a test ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import moeinf
from families import make_checkpoint
from moeinf.engine import Engine
from moeinf.pull import pull
from moeinf.store import Store
from test_native import LIBRARY

__all__ = ["Load", "engines_of", "pulled"]

Load = Callable[..., Engine]


def pulled(folder: Path, sizes: Callable[[str], dict[str, Any]]) -> Callable[[str], Path]:
    """Has a model of a family, of these sizes, under the family's name in a home in `folder`, which it returns."""

    def have(family: str) -> Path:
        if family not in Store(folder / "home").names():
            make_checkpoint(family, folder / family, **sizes(family))
            pull(str(folder / family), store=Store(folder / "home"), name=family)
        return folder / "home"

    return have


def engines_of(
    models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, default: str, **usual: Any
) -> Iterator[Load]:
    """Loads models by their family, with the library that the tests have built, and with the `usual` options. Nothing
    stops an answer, and nothing is learned.
    """
    engines: list[Engine] = []
    monkeypatch.setattr("moeinf.shared_library.built_library", lambda: LIBRARY)

    def load(family: str = default, **options: Any) -> Engine:
        monkeypatch.setenv("MOEINF_HOME", str(models(family)))
        engines.append(moeinf.load(family, **{"prefetch": "off", **usual, **options}))
        engines[-1].generation_config.eos_token_id = None
        return engines[-1]

    yield load
    for engine in engines:
        engine.learns = False
        engine.close()
