from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import moeinf
from moeinf import memory
from moeinf.errors import CapacityError
from moeinf.memory import (
    available_bytes,
    cgroup_headrooms,
    cgroup_limit,
    limit_bytes,
    peak_rss_bytes,
    rss_bytes,
    swap_bytes,
    total_bytes,
)

MIB = 1 << 20


def make_group(folder: Path, files: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(f"{content}\n")


def test_the_tightest_group_counts_and_cache_that_can_go_is_free(tmp_path: Path) -> None:
    make_group(tmp_path, {"memory.stat": "inactive_file 0"})
    make_group(tmp_path / "user", {"memory.max": "max", "memory.current": 5, "memory.stat": "inactive_file 0"})
    make_group(
        tmp_path / "user/app",
        {"memory.max": 900 * MIB, "memory.current": 300 * MIB, "memory.stat": f"anon 7\ninactive_file {100 * MIB}"},
    )
    assert cgroup_headrooms("0::/user/app\n", tmp_path) == [700 * MIB]


def test_v1_has_names_of_its_own_and_every_level_counts(tmp_path: Path) -> None:
    for folder, limit in (("memory", 2000), ("memory/a", 1000), ("memory/a/b", 1500)):
        make_group(
            tmp_path / folder,
            {
                "memory.limit_in_bytes": limit * MIB,
                "memory.usage_in_bytes": 400 * MIB,
                "memory.stat": "total_inactive_file 0",
            },
        )
    assert cgroup_headrooms("5:cpu:/x\n4:memory:/a/b\n", tmp_path) == [1100 * MIB, 600 * MIB, 1600 * MIB]


def test_no_cgroups_no_limits(tmp_path: Path) -> None:
    assert cgroup_headrooms("1:name=systemd:/\n0::/\n", tmp_path) == []


def test_the_limit_is_that_of_the_tightest_group(tmp_path: Path) -> None:
    make_group(tmp_path / "user/app", {"memory.max": 900 * MIB})
    make_group(tmp_path / "user", {"memory.max": 800 * MIB})
    assert cgroup_limit("0::/user/app/inner\n", tmp_path) == 800 * MIB
    make_group(tmp_path / "memory/a", {"memory.limit_in_bytes": 9223372036854771712})
    assert cgroup_limit("4:memory:/a\n", tmp_path) is None
    make_group(tmp_path / "free", {"memory.max": "max"})
    assert cgroup_limit("0::/free\n", tmp_path) is None


def test_the_peak_is_this_process_alone() -> None:
    code = (
        "from moeinf.memory import *; before = peak_rss_bytes(); block = bytearray(b'x') * (64 << 20); del block;"
        "print(before, rss_bytes(), peak_rss_bytes())"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    before, after, peak = map(int, output.split())
    assert 60 * MIB < peak - before < 80 * MIB
    assert after - before < 16 * MIB


def test_numbers_of_this_machine_make_sense() -> None:
    assert 0 < rss_bytes() <= peak_rss_bytes() + MIB
    assert available_bytes() > 0
    assert total_bytes() > available_bytes() // 2
    limit, (swap, free_swap) = limit_bytes(), swap_bytes()
    assert limit is None or 0 < limit < total_bytes()
    assert 0 <= free_swap <= swap


@pytest.mark.parametrize(("limit", "there_is"), [(None, "there are 20.0 MiB"), (19 * MIB, "allows 19.0 MiB")])
def test_a_plan_of_more_than_there_can_be_is_refused(
    tiny: str, monkeypatch: pytest.MonkeyPatch, limit: int | None, there_is: str
) -> None:
    monkeypatch.setattr(memory, "total_bytes", lambda: 20 * MIB)
    monkeypatch.setattr(memory, "limit_bytes", lambda: limit)
    with pytest.raises(CapacityError, match=there_is) as error:
        moeinf.load(tiny, host_memory="1GiB")
    assert error.value.hint is not None
    assert "MiB or less" in error.value.hint
