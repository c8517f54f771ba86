"""Run a program with less memory than the machine has, for real: a memory cgroup counts the page cache too.

Linux with cgroup v1 or v2, as root. With v2 the memory controller must be enabled for the root group's children.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["memory_limit", "run_in"]

_ROOT = Path("/sys/fs/cgroup")


@contextlib.contextmanager
def memory_limit(limit_bytes: int) -> Iterator[Path]:
    """A cgroup whose programs hold at most `limit_bytes` together, without swap; removed at the end."""
    is_v1 = (_ROOT / "memory").is_dir()
    folder = (_ROOT / "memory" if is_v1 else _ROOT) / f"moeinf-bench-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        sys.exit(f"cannot make a memory cgroup at {folder}: {error.strerror}; run this as root on Linux")
    try:
        if is_v1:
            (folder / "memory.limit_in_bytes").write_text(str(limit_bytes))
            (folder / "memory.swappiness").write_text("0")
        else:
            (folder / "memory.max").write_text(str(limit_bytes))
            (folder / "memory.swap.max").write_text("0")
        yield folder
    finally:
        _remove(folder)


def run_in(folder: Path | None, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run `command` inside the cgroup, or outside any if None, and return what it printed."""
    enter = "" if folder is None else f"echo $$ > {folder}/cgroup.procs && "
    return subprocess.run(
        ["/bin/sh", "-c", f'{enter}exec "$@"', "sh", *command], capture_output=True, text=True, check=False
    )


def _remove(folder: Path) -> None:
    for _ in range(50):  # the kernel takes a moment to let go of a program that has ended
        with contextlib.suppress(OSError):
            folder.rmdir()
            return
        time.sleep(0.1)
