"""Rates around a run: that they are rates, and where they come from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from moeinf import rates
from moeinf.errors import IntegrityError
from moeinf.kernels.native import NotNativeError
from moeinf.machine import Disk, HostMemory, Machine, Processor
from moeinf.manifest import expert_path
from moeinf.rates import disk_rate, memory_rate, read_ahead
from moeinf.store import Store

MACHINE = Machine(
    "2026-01-01T00:00:00Z",
    Processor("cpu", 1, 1, (), ""),
    HostMemory(1, 1, None, 0, 0, 12.5e9),
    Disk("/", "sda", "ext4", True, None, 1, ()),
    (),
    1.0,
    1.0,
)


def test_disk_rate(tiny: str) -> None:
    assert 1e4 < disk_rate(Store().open(tiny), seconds=0.05) < 1e12


def test_a_disk_that_fails_says_so(tiny: str) -> None:
    stored = Store().open(tiny)
    missing = dataclasses.replace(stored, path=stored.path / "nowhere")
    with pytest.raises(IntegrityError, match=f"nowhere/{expert_path(0, 0)[:10]}.* is missing"):
        disk_rate(missing, seconds=0.05)


def test_memory_rate_is_the_native_library_s_or_the_profile_s(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_pool(_threads: int) -> None:
        raise NotNativeError("not built")

    measured = memory_rate(1, seconds=0.01)
    assert measured is None or measured > 1e8
    monkeypatch.setattr(rates, "NativePool", no_pool)
    assert memory_rate(1) is None
    (home / rates.MACHINE_FILE).write_text("{}")
    assert memory_rate(1) is None
    (home / rates.MACHINE_FILE).write_text(json.dumps(MACHINE.to_dict()))
    assert memory_rate(1) == 12.5e9


def test_read_ahead_is_of_a_disk(tmp_path: Path) -> None:
    found = read_ahead(tmp_path)
    assert found is None or (found[0].name == "read_ahead_kb" and found[1] >= 0)
