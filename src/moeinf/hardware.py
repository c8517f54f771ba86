"""What the operating system says of the processor and of the disk that holds a folder. Measures nothing.

Linux tells it in /proc and /sys, macOS through `sysctl`. What cannot be read is None or empty, and never guessed. Where
a function takes `root`, that is the folder in which /proc and /sys lie: tests give one of their own.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from .memory import cgroup_folders
from .units import KIB

__all__ = [
    "FEATURES",
    "Mount",
    "clock_governor",
    "find_mount",
    "huge_pages",
    "is_rotating",
    "processor_features",
    "processor_name",
    "read_ahead_bytes",
    "read_ahead_file",
    "usable_cores",
    "worked_s",
]

FEATURES = (
    *("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("avx_vnni", "amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2", "sme"),
)
"""Instructions that matter to the maths of experts, as Linux names them on x86 and on ARM."""

_OF_APPLE = {
    "hw.optional.AdvSIMD": "asimd",
    "hw.optional.arm.FEAT_FP16": "asimdhp",
    "hw.optional.arm.FEAT_DotProd": "asimddp",
    "hw.optional.arm.FEAT_BF16": "bf16",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_SME": "sme",
    "hw.optional.avx1_0": "avx",
    "hw.optional.avx2_0": "avx2",
    "hw.optional.fma": "fma",
    "hw.optional.f16c": "f16c",
    "hw.optional.avx512f": "avx512f",
}
_ROOT = Path("/")


@dataclass(frozen=True, slots=True)
class Mount:
    """Where a file system comes from and what kind it is, "" where that cannot be known."""

    device: str
    filesystem: str


def processor_name(root: Path = _ROOT) -> str:
    """What the processor calls itself, or else its kind (`aarch64`)."""
    for line in (_read(root / "proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    brand = _sysctl().get("machdep.cpu.brand_string") if root == _ROOT else None
    return brand or platform.processor() or platform.machine()


def processor_features(root: Path = _ROOT) -> tuple[str, ...]:
    """Which of FEATURES the processor has, in that order."""
    known: set[str] = set()
    for line in (_read(root / "proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            known = set(value.split())
            break
    else:
        said = _sysctl() if root == _ROOT else {}
        known = {name for key, name in _OF_APPLE.items() if said.get(key) == "1"}
    return tuple(name for name in FEATURES if name in known)


def usable_cores(root: Path = _ROOT, processors: Iterable[int] | None = None) -> int:
    """Cores that this process may use: those of its affinity, as many as its cgroup's share of time is worth; several
    hardware threads of one core are one. `processors` stands for the affinity.
    """
    allowed = _affinity() if processors is None else list(processors)
    folder = root / "sys/devices/system/cpu"
    siblings = {_read(folder / f"cpu{number}/topology/thread_siblings_list") or f"{number}" for number in allowed}
    return max(1, int(min([len(siblings), *_shares(root)])))


def worked_s() -> float:
    """Seconds that the processors which this process may use have worked so far, for whomever."""
    times = psutil.cpu_times(percpu=True)
    allowed = [times[number] for number in _affinity() if number < len(times)]
    return float(sum(sum(each) - each.idle - _waiting_s(each) for each in allowed))


def clock_governor(root: Path = _ROOT) -> str | None:
    """What sets the first core's clock ("performance", "powersave", ...)."""
    return _read(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def huge_pages(root: Path = _ROOT) -> str | None:
    """When memory lies in huge pages: always, madvise (where a program asks for them) or never."""
    text = _read(root / "sys/kernel/mm/transparent_hugepage/enabled")
    chosen = re.search(r"\[(\w+)\]", text or "")
    return chosen[1] if chosen else None


def find_mount(path: Path, root: Path = _ROOT) -> Mount:
    """The file system that holds `path`, an absolute one without links."""
    text = _read(root / "proc/self/mountinfo")
    if text is None:
        mounts = [(part.mountpoint, part.device, part.fstype) for part in psutil.disk_partitions(all=True)]
    else:
        mounts = [_parse_mount(line) for line in text.splitlines()]
    holding = [mount for mount in mounts if path.is_relative_to(mount[0])]
    holding.sort(key=lambda mount: len(Path(mount[0]).parts))  # of several at one place, the last one is seen
    _, device, filesystem = holding[-1] if holding else ("", "", "")
    return Mount(device, filesystem)


def read_ahead_file(folder: Path, root: Path = _ROOT) -> Path | None:
    """The setting of the block device that holds `folder`, which decides how fast mapped weights are read."""
    return _queue_file(folder, "read_ahead_kb", root)


def read_ahead_bytes(folder: Path, root: Path = _ROOT) -> int | None:
    text = _read(read_ahead_file(folder, root))
    return int(text) * KIB if text is not None and text.isdigit() else None


def is_rotating(folder: Path, root: Path = _ROOT) -> bool | None:
    """Whether the block device says that it spins; virtual ones say so without spinning."""
    return {"0": False, "1": True}.get(_read(_queue_file(folder, "rotational", root)) or "")


def _queue_file(folder: Path, name: str, root: Path) -> Path | None:
    """A setting of the device itself, or where `folder` lies on a partition, of the device that this is a part of."""
    device = folder.stat().st_dev
    base = root / f"sys/dev/block/{os.major(device)}:{os.minor(device)}"
    places = (base / "queue" / name, base.resolve().parent / "queue" / name)
    return next((place for place in places if place.exists()), None)


def _waiting_s(times: Any) -> float:
    """Of a processor's seconds, as psutil has them: idle ones that wait for a disk, and those that Linux counts twice,
    as a guest's and as a user's.
    """
    return sum(getattr(times, name, 0.0) for name in ("iowait", "guest", "guest_nice"))


def _affinity() -> list[int]:
    if sys.platform == "linux":
        return sorted(os.sched_getaffinity(0))
    return list(range(psutil.cpu_count(logical=False) or os.cpu_count() or 1))


def _shares(root: Path) -> list[float]:
    """Of how many cores the time is, that each CPU cgroup above this process allows; none for a group without limit."""
    shares = []
    for folder, version in cgroup_folders(_read(root / "proc/self/cgroup") or "", "cpu", root / "sys/fs/cgroup"):
        if version == 2:
            words = (_read(folder / "cpu.max") or "").split()
        else:
            words = [_read(folder / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period")]
        if len(words) == 2 and all(word.isdigit() and int(word) for word in words):
            shares.append(int(words[0]) / int(words[1]))
    return shares


def _parse_mount(line: str) -> tuple[str, str, str]:
    """(mount point, device, file system) of a line of /proc/self/mountinfo, see proc(5)."""
    before, _, after = line.partition(" - ")
    filesystem, device, *_ = after.split(" ")
    return _unescape(before.split(" ")[4]), _unescape(device), filesystem


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _read(path: Path | None) -> str | None:
    """The text of a file of the system; None if there is none, or none that this process may read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() if path else None
    except OSError:
        return None


def _sysctl() -> dict[str, str]:
    """What macOS says of its processor."""
    if sys.platform != "darwin":
        return {}
    told = subprocess.run(["sysctl", "hw.optional", "machdep.cpu"], capture_output=True, text=True, check=False)
    return dict(line.split(": ", 1) for line in told.stdout.splitlines() if ": " in line)
