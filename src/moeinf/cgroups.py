"""Programs that get less memory than the machine has, for real: a memory cgroup counts the page cache too.

Linux, cgroup v1 or v2, and the right to make a group, which is mostly root's. Knows nothing of what the programs do.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from .errors import UnsupportedError

__all__ = ["memory_limit", "run_in"]

_ROOT = Path("/sys/fs/cgroup")


@contextlib.contextmanager
def memory_limit(limit_bytes: int, root: Path = _ROOT) -> Iterator[Path]:
    """A cgroup whose programs hold at most `limit_bytes` together, without swap; removed at the end.

    Raises UnsupportedError, which says why, where none can be made.
    """
    is_v1 = (root / "memory").is_dir()
    folder = (root / "memory" if is_v1 else root) / f"moeinf-bench-{os.getpid()}"
    files = ("memory.limit_in_bytes", "memory.swappiness") if is_v1 else ("memory.max", "memory.swap.max")
    try:
        with contextlib.suppress(OSError):
            folder.rmdir()  # of a process that had this one's number, and was killed
        folder.mkdir()
    except OSError as error:
        raise _refused(folder, error) from error
    try:
        try:
            for file, value in zip(files, (limit_bytes, 0), strict=True):
                if file == files[0] or (folder / file).exists():  # a kernel may have no accounting of swap
                    (folder / file).write_text(str(value), encoding="ascii")
        except OSError as error:
            raise _refused(folder / file, error) from error
        yield folder
    finally:
        _remove(folder)


def run_in(
    folder: Path | None, command: Sequence[str], given: str = "", environ: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    """Run `command` inside the cgroup, or outside any if None, with `given` on its standard input; returns what it
    printed.
    """
    enter = "" if folder is None else f"echo $$ > '{folder}/cgroup.procs' && "
    return subprocess.run(
        ["/bin/sh", "-c", f'{enter}exec "$@"', "sh", *command],
        input=given,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )


def _refused(path: Path, error: OSError) -> UnsupportedError:
    return UnsupportedError(
        f"no memory cgroup can be made (that mostly takes root): {path}: {error.strerror}",
        hint="run this as root, on Linux",
    )


def _remove(folder: Path) -> None:
    for _ in range(50):  # the kernel takes a moment to let go of a program that has ended
        with contextlib.suppress(OSError):
            folder.rmdir()
            return
        time.sleep(0.1)
