"""Rates around a run: that they are rates, and where they come from."""

from __future__ import annotations

import dataclasses

import pytest

from moeinf import timing
from moeinf.errors import IntegrityError
from moeinf.manifest import expert_path
from moeinf.rates import disk_rate, memory_rate
from moeinf.shared_library import NotNativeError
from moeinf.store import Store


def test_disk_rate(tiny: str) -> None:
    assert 1e4 < disk_rate(Store().open(tiny), seconds=0.05) < 1e12


def test_a_disk_that_fails_says_so(tiny: str) -> None:
    stored = Store().open(tiny)
    missing = dataclasses.replace(stored, path=stored.path / "nowhere")
    with pytest.raises(IntegrityError, match=f"nowhere/{expert_path(0, 0)[:10]}.* is missing"):
        disk_rate(missing, seconds=0.05)


def test_memory_rate_with_and_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_pool(_threads: int) -> None:
        raise NotNativeError("not built")

    assert memory_rate(1, seconds=0.01) > 1e8
    monkeypatch.setattr(timing, "NativePool", no_pool)
    assert memory_rate(1, seconds=0.01) > 1e8
