"""Memory cgroups: what is written where, what is refused, and that a limit is one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moeinf import cgroups
from moeinf.cgroups import memory_limit, run_in
from moeinf.errors import UnsupportedError

MIB = 1 << 20


@pytest.fixture(autouse=True)
def removes_files_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real cgroup's folder can be removed although it has files in it."""

    def remove(folder: Path) -> None:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()

    real = cgroups._remove
    monkeypatch.setattr(cgroups, "_remove", lambda folder: (real if "/sys/" in str(folder) else remove)(folder))


def test_version_1(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    with memory_limit(7 * MIB, tmp_path) as folder:
        assert folder.parent == tmp_path / "memory"
        assert {file.name: file.read_text() for file in folder.iterdir()} == {"memory.limit_in_bytes": str(7 * MIB)}
    assert not folder.exists()


def test_version_2_without_swap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Path.mkdir

    def mkdir(path: Path) -> None:
        make(path)
        (path / "memory.swap.max").touch()

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with memory_limit(7 * MIB, tmp_path) as folder:
        found = {file.name: file.read_text() for file in folder.iterdir()}
    assert found == {"memory.max": str(7 * MIB), "memory.swap.max": "0"}


def test_no_permission_says_why(tmp_path: Path) -> None:
    refused = pytest.raises(UnsupportedError, match=r"no memory cgroup can be made .*: .*No such file")
    with refused as caught, memory_limit(MIB, tmp_path / "nothing"):
        pass
    assert caught.value.hint == "run this as root, on Linux"


def test_outside_a_cgroup_a_program_gets_its_input() -> None:
    done = run_in(None, [sys.executable, "-c", "import sys; print(sys.stdin.read() * 2); sys.exit(3)"], "ab")
    assert (done.stdout, done.returncode) == ("abab\n", 3)


def test_a_limit_is_one() -> None:
    hold = "data = bytearray({} << 20); data[::4096] = b'x' * len(data[::4096]); print('done')"
    try:
        with memory_limit(100 * MIB) as folder:
            fits = run_in(folder, [sys.executable, "-c", hold.format(20)])
            does_not = run_in(folder, [sys.executable, "-c", hold.format(300)])
    except UnsupportedError as error:
        pytest.skip(str(error))
    assert (fits.returncode, fits.stdout) == (0, "done\n")
    assert (does_not.returncode, does_not.stdout) == (-9, "")
    assert not folder.exists()
