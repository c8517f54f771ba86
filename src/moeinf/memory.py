"""How much memory there is, how much this process holds, and how it will be divided. No other module asks the operating
system about that.
"""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from .errors import CapacityError
from .ledger import Libraries, MemoryPlan, ModelShape, make_device_plan, make_plan
from .manifest import Manifest
from .settings import EngineOptions
from .units import KIB, MIB, format_bytes

__all__ = [
    "available_bytes",
    "cgroup_folders",
    "cgroup_headrooms",
    "cgroup_limit",
    "limit_bytes",
    "peak_rss_bytes",
    "plan_device_memory",
    "plan_memory",
    "return_free_memory",
    "rss_bytes",
    "swap_bytes",
    "total_bytes",
]

_GROUPS = Path("/proc/self/cgroup")
_NO_LIMIT = 1 << 62
"""From here on, a limit of cgroup v1 says that there is none."""


def available_bytes() -> int:
    """Bytes that this process may still take without pushing others out: free memory, less under a cgroup limit."""
    rooms = [int(psutil.virtual_memory().available)]
    if _GROUPS.exists():
        rooms += cgroup_headrooms(_GROUPS.read_text(encoding="utf-8"))
    return max(0, min(rooms))


def total_bytes() -> int:
    """Bytes of memory that the machine has."""
    return int(psutil.virtual_memory().total)


def limit_bytes() -> int | None:
    """Bytes that a cgroup allows this process and those beside it in it; None where none says less than all memory."""
    limit = cgroup_limit(_GROUPS.read_text(encoding="utf-8")) if _GROUPS.exists() else None
    return limit if limit is not None and limit < total_bytes() else None


def swap_bytes() -> tuple[int, int]:
    """(total, free) bytes of swap."""
    swap = psutil.swap_memory()
    return int(swap.total), int(swap.free)


def plan_memory(
    manifest: Manifest,
    shape: ModelShape,
    options: EngineOptions,
    widening: int = 1,
    libraries: Libraries = Libraries(),
) -> MemoryPlan:
    """The plan for this machine as it is now; the engine keeps to it, and `profile` shows it. Raises as `make_plan`,
    and CapacityError for a plan of more than there can be.
    """
    free, limit = available_bytes(), limit_bytes()
    plan = make_plan(
        manifest,
        shape,
        available_bytes=free,
        host_memory=options.host_memory,
        experts=options.experts,
        context=options.context,
        widening=widening,
        libraries=libraries,
    )
    if plan.total > (limit or total_bytes()):
        there_is = f"its cgroup allows {format_bytes(limit)}" if limit else f"there are {format_bytes(total_bytes())}"
        raise CapacityError(
            f"with --host-memory {options.host_memory} the model would hold {format_bytes(plan.total)} of memory, and"
            f" {there_is}",
            hint=f"give it --host-memory {free // MIB}MiB or less, as much as is free now",
        )
    return plan


def plan_device_memory(
    manifest: Manifest, shape: ModelShape, options: EngineOptions, device_bytes: int, widening: int
) -> MemoryPlan:
    """The same with a GPU of which `device_bytes` are free. Raises as `make_device_plan`."""
    return make_device_plan(
        manifest,
        shape,
        device_bytes=device_bytes,
        host_bytes=available_bytes(),
        device_memory=options.device_memory,
        host_memory=options.host_memory,
        experts=options.experts,
        context=options.context,
        widening=widening,
        computes_on_host=options.computes_on_host,
    )


def rss_bytes() -> int:
    """Bytes of memory that this process holds now."""
    return int(psutil.Process().memory_info().rss)


def peak_rss_bytes() -> int:
    """The most memory that this process ever held, in bytes."""
    if sys.platform == "linux":  # getrusage would include what the parent held before exec
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) * KIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def return_free_memory() -> None:
    """Give memory that was freed back to the system, where the C library keeps it for itself otherwise (glibc)."""
    _malloc_trim(0)


def _find_malloc_trim() -> Callable[[int], object]:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):  # another C library
        return lambda _: None


_malloc_trim = _find_malloc_trim()


def cgroup_folders(groups: str, controller: str, root: Path = Path("/sys/fs/cgroup")) -> list[tuple[Path, int]]:
    """The folders that say what `controller` ("memory", "cpu") allows this process, and all above them, each with the
    version of its cgroup, 1 or 2. They need not exist.

    `groups` is the text of /proc/self/cgroup.
    """
    found = []
    for line in groups.splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            top, version = root, 2
        elif controller in controllers.split(","):
            top, version = root / controller, 1
        else:
            continue
        folder = top / group.lstrip("/")
        found += [(level, version) for level in (folder, *folder.parents) if level == top or top in level.parents]
    return found


def cgroup_headrooms(groups: str, root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes that each memory cgroup above this process still allows, v1 and v2; none for a group without a limit.

    `groups` is the text of /proc/self/cgroup. Page cache that the kernel would drop counts as free.
    """
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }
    folders = cgroup_folders(groups, "memory", root)
    return [room for folder, version in folders if (room := _headroom(folder, *names[version])) is not None]


def cgroup_limit(groups: str, root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that the tightest memory cgroup above this process allows in all; None where none has a limit."""
    names = {1: "memory.limit_in_bytes", 2: "memory.max"}
    limits = []
    for folder, version in cgroup_folders(groups, "memory", root):
        with suppress(OSError, ValueError):  # no such group on this machine, or its limit is "max"
            limits.append(int((folder / names[version]).read_text(encoding="ascii")))
    return min((limit for limit in limits if limit < _NO_LIMIT), default=None)


def _headroom(folder: Path, limit: str, used: str, droppable: str) -> int | None:
    try:
        most = int((folder / limit).read_text(encoding="ascii"))
        taken = int((folder / used).read_text(encoding="ascii"))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):  # no such group on this machine, or its limit is "max"
        return None
    return most - taken + int(stat.get(droppable, 0))
