"""What all tests share: a home of their own, few threads, and one tiny model that is pulled once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # the models are tiny: threads would wait for each other


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point moeinf at an empty folder, whatever the machine has, and away from the network."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("MOEINF_HOME", str(folder))
    return folder


@pytest.fixture(autouse=True)
def unsaid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what an engine of another test has told libraries, which a plan would go by."""
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        monkeypatch.setenv(name, "")  # so that it is as it was, afterwards
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def as_released(monkeypatch: pytest.MonkeyPatch) -> None:
    """Store what the command line pulls as it was released, whatever this machine computes from."""
    monkeypatch.setattr("moeinf.kernels.computes_from_packed", lambda: False)


@pytest.fixture(scope="session")
def tiny_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which `tiny` is pulled: a random Qwen3-MoE of 2 layers of 8 experts, 2 per token."""
    from families import make_checkpoint
    from moeinf.pull import pull
    from moeinf.store import Store

    folder = tmp_path_factory.mktemp("tiny")
    make_checkpoint("qwen3_moe", folder / "checkpoint")
    pull(str(folder / "checkpoint"), store=Store(folder / "home"), name="tiny")
    return folder / "home"


@pytest.fixture
def tiny(tiny_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a pulled model that tests may load, and may not change; what is learned about it is forgotten, and
    a test that leaves another model beside it fails.
    """
    from moeinf.store import Store

    monkeypatch.setenv("MOEINF_HOME", str(tiny_home))
    yield "tiny"
    shutil.rmtree(tiny_home / "models/tiny/traces", ignore_errors=True)
    assert Store(tiny_home).names() == ["tiny"]


@pytest.fixture
def rounding_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch do without oneDNN where that rounds sums of bfloat16 after every 128 inputs, as on ARM with BF16. There
    not even torch's own results for some rows of a weight are those for all of it.
    """
    import torch
    import torch.nn.functional as F

    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 1024, generator=generator).bfloat16() for rows in (1, 1000))
    nearest = F.linear(x.float(), weight.float()).bfloat16()
    if (F.linear(x, weight) == nearest).float().mean() < 0.9:
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
