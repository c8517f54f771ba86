"""What Linux says of processors and disks, read from folders that look like /proc and /sys."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from moeinf import hardware
from moeinf.hardware import Mount


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def test_a_processor_of_x86(tmp_path: Path) -> None:
    info = (
        "processor\t: 0\nmodel name\t: A Fast One\nflags\t\t: fpu avx512_bf16 avx2 avx\n\nprocessor\t: 1\nflags : sve"
    )
    root = write(tmp_path, {"proc/cpuinfo": info})
    assert hardware.processor_name(root) == "A Fast One"
    assert hardware.processor_features(root) == ("avx", "avx2", "avx512_bf16")


def test_a_processor_of_arm_has_no_name_but_its_kind(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/cpuinfo": "processor : 0\nFeatures : fp asimd i8mm\nCPU part : 0xd4f"})
    assert hardware.processor_name(root)
    assert hardware.processor_features(root) == ("asimd", "i8mm")


def test_hardware_threads_of_one_core_count_once(tmp_path: Path) -> None:
    topology = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    pairs = {0: "0,4", 1: "1,5", 2: "2,6", 4: "0,4", 5: "1,5"}
    root = write(tmp_path, {topology.format(number): pair for number, pair in pairs.items()})
    assert hardware.usable_cores(root, [0, 1, 2, 4, 5]) == 3
    assert hardware.usable_cores(root, [0, 4]) == 1
    assert hardware.usable_cores(root, [0, 4, 8, 9]) == 3  # of 8 and 9 nothing is known


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"proc/self/cgroup": "0::/box", "sys/fs/cgroup/box/cpu.max": "250000 100000"}, 2),
        ({"proc/self/cgroup": "0::/box", "sys/fs/cgroup/box/cpu.max": "max 100000"}, 4),
        ({"proc/self/cgroup": "0::/box", "sys/fs/cgroup/box/cpu.max": "20000 100000"}, 1),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "300000 100000"}, 3),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/box",
                "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "100000",
                "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000",
            },
            1,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/box",
                "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000",
            },
            4,
        ),
    ],
)
def test_a_share_of_time_is_worth_so_many_cores(tmp_path: Path, files: dict[str, str], cores: int) -> None:
    assert hardware.usable_cores(write(tmp_path, files), range(4)) == cores


def test_the_mount_that_holds_a_folder_is_the_deepest_and_the_last(tmp_path: Path) -> None:
    lines = [
        "22 1 254:0 / / rw - ext4 /dev/vda rw",
        "23 22 8:1 / /mnt rw shared:1 - xfs /dev/sda1 rw",
        r"24 22 8:2 / /mnt/my\040models rw - btrfs /dev/sdb1 rw",
        "25 22 0:50 / /mnt rw - tmpfs tmpfs rw",
    ]
    root = write(tmp_path, {"proc/self/mountinfo": "\n".join(lines)})
    assert hardware.find_mount(Path("/home/me"), root) == Mount("/dev/vda", "ext4")
    assert hardware.find_mount(Path("/mnt/other"), root) == Mount("tmpfs", "tmpfs")
    assert hardware.find_mount(Path("/mnt/my models/home"), root) == Mount("/dev/sdb1", "btrfs")
    nothing = write(tmp_path / "jail", {"proc/self/mountinfo": "23 22 8:1 / /mnt rw - xfs /dev/sda1 rw"})
    assert hardware.find_mount(Path("/home"), nothing) == Mount("", "")


@pytest.mark.parametrize("is_partition", [False, True])
def test_settings_of_the_block_device(tmp_path: Path, is_partition: bool) -> None:
    number = tmp_path.stat().st_dev
    folder = tmp_path / "sys/devices/disk" / ("part1" if is_partition else "")
    folder.mkdir(parents=True)
    write(tmp_path / "sys/devices/disk", {"queue/read_ahead_kb": "8192", "queue/rotational": "1"})
    link = tmp_path / f"sys/dev/block/{os.major(number)}:{os.minor(number)}"
    link.parent.mkdir(parents=True)
    link.symlink_to(folder, target_is_directory=True)
    assert hardware.read_ahead_bytes(tmp_path, tmp_path) == 8 << 20
    assert hardware.is_rotating(tmp_path, tmp_path) is True


def test_what_cannot_be_read_is_not_guessed(tmp_path: Path) -> None:
    (tmp_path / "sys/kernel/mm/transparent_hugepage/enabled").mkdir(parents=True)  # no file that can be read
    assert hardware.huge_pages(tmp_path) is None
    assert hardware.clock_governor(tmp_path) is None
    assert hardware.processor_features(tmp_path) == ()
    assert hardware.read_ahead_bytes(tmp_path, tmp_path) is None
    assert hardware.is_rotating(tmp_path, tmp_path) is None


def test_a_file_that_others_may_read_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path, {"sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never"})
    assert hardware.huge_pages(root) == "madvise"

    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    assert hardware.huge_pages(root) is None


def test_this_machine_has_a_processor_and_a_disk(tmp_path: Path) -> None:
    assert hardware.processor_name()
    assert 1 <= hardware.usable_cores() <= (os.cpu_count() or 1)
    assert hardware.find_mount(tmp_path.resolve()).filesystem


def test_work_is_counted_and_waiting_is_not() -> None:
    before, begin = hardware.worked_s(), time.perf_counter()
    while time.perf_counter() < begin + 0.3:
        pass
    worked_s, passed_s = hardware.worked_s() - before, time.perf_counter() - begin
    assert 0 < worked_s <= (passed_s + 0.1) * (os.cpu_count() or 1)
