"""The store as a checkpoint for transformers: that it loads as it lies, and is the same model."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from families import make_checkpoint, make_config
from moeinf.errors import CapacityError
from moeinf.fused import find_fused, write_fused
from moeinf.pull import pull
from moeinf.store import Store, StoredModel
from moeinf.testing import write_checkpoint


def logits(folder: Path) -> torch.Tensor:
    auto: Any = AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model.set_experts_implementation("eager")
    with torch.inference_mode():
        found: torch.Tensor = model(torch.arange(5, 21)[None]).logits
    return found


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe", "deepseek_v2", "gpt_oss", "granitemoe"])
def test_it_is_the_same_model(family: str, home: Path, tmp_path: Path) -> None:
    make_checkpoint(family, tmp_path / "source")
    stored = pull(str(tmp_path / "source"), store=Store(home), name="model")
    (tmp_path / "fused").mkdir()
    write_fused(stored, tmp_path / "fused")
    assert torch.equal(logits(tmp_path / "fused"), logits(tmp_path / "source"))


def test_no_room(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=1, f_frsize=4096))
    with pytest.raises(CapacityError, match=r"has 4\.00 KiB left"):
        write_fused(Store().open(tiny), tmp_path)
    assert list(tmp_path.iterdir()) == []


def pulled(folder: Path, home: Path) -> StoredModel:
    return pull(str(folder), store=Store(home), name="model")


def test_a_source_of_this_form_is_found(home: Path, tmp_path: Path) -> None:
    config = make_config("qwen3_moe")
    config.dtype = torch.bfloat16
    write_checkpoint(config, tmp_path / "random", "tiny")
    manifest = pulled(tmp_path / "random", home).manifest
    assert find_fused(manifest) == tmp_path / "random"
    (tmp_path / "random").rename(tmp_path / "elsewhere")
    assert find_fused(manifest) is None


def test_a_source_of_another_form_is_not(tiny: str) -> None:
    assert find_fused(Store().open(tiny).manifest) is None
