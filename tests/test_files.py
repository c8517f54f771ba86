"""Files that are published: whole or not at all, whatever fails."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from faults import FailingDisk, PowerLossDisk
from moeinf.errors import CapacityError, MoeinfError, UsageError
from moeinf.files import Bytes, publish

SOURCE = Path(__file__).parents[1] / "src"
NEW: list[Bytes] = [b"new", memoryview(b"er")]


@pytest.mark.parametrize("kind", [FailingDisk, PowerLossDisk])
def test_whatever_fails_the_file_is_the_old_one_or_the_new_one(
    kind: type[FailingDisk] | type[PowerLossDisk], tmp_path: Path
) -> None:
    for number in itertools.count(1):
        path, disk = tmp_path / f"{number}" / "page.html", kind(number)
        publish(path, [b"old"])
        try:
            publish(path, NEW, disk=disk)
        except MoeinfError:
            assert disk.has_failed
            assert path.read_bytes() in (b"old", b"newer")
        else:
            break
    assert path.read_bytes() == b"newer"
    assert number > 4


def test_a_disk_that_is_full_is_told_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match="no room left to write") as caught:
        publish(tmp_path / "page.html", NEW, disk=FailingDisk(1, errno.ENOSPC))
    assert caught.value.hint == "save it in a folder that you may write to and that has room"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        publish(tmp_path, NEW)


def test_an_interrupt_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    publish(path, [b"old"])

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        publish(path, NEW)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_write_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    script = """
import os, signal, sys
from pathlib import Path
from moeinf.files import publish
os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
publish(Path(sys.argv[1]), [b"new"])
"""
    path = tmp_path / "page.html"
    publish(path, [b"old"])
    line = [sys.executable, "-c", script, str(path)]
    killed = subprocess.run(line, env={**os.environ, "PYTHONPATH": str(SOURCE)}, check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = [found for found in tmp_path.iterdir() if found != path]
    assert path.read_bytes() == b"old"
    running = tmp_path / f"page.html.{os.getpid()}-01234567.part"
    unrelated = tmp_path / "page.html.part"
    for other in (running, unrelated):
        other.write_bytes(b"")
    publish(path, NEW)
    assert not left.exists()
    assert running.exists()
    assert unrelated.exists()
