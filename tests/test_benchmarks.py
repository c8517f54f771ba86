"""What is run by hand begins, at least."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NEEDS = {"to_gguf": "gguf"}


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_a_benchmark_says_what_it_does(path: Path) -> None:
    if (needed := NEEDS.get(path.stem)) and find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    environ = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    process = subprocess.run(
        [sys.executable, str(path), "--help"], capture_output=True, text=True, check=False, env=environ
    )
    assert process.returncode == 0, process.stderr
    assert "usage:" in process.stdout
