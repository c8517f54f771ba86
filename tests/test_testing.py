"""Random checkpoints: that they have the sizes of the models whose names they bear, and can be pulled and run."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import moeinf
from families import make_config
from moeinf.errors import UsageError
from moeinf.generation import Sampling
from moeinf.manifest import expert_path
from moeinf.metamodel import is_experts_module
from moeinf.pull import pull
from moeinf.store import Store
from moeinf.testing import RANDOM_KEY, SHAPES, write_checkpoint

MIB = 1 << 20
EXPERTS = {  # layers, experts of each, per token, MiB of an expert
    "small": (16, 64, 8, 3),
    "deepseek-v2-lite": (26, 64, 6, 16.5),
    "gpt-oss-20b": (24, 32, 4, 47.48),
    "mixtral-8x7b": (32, 8, 2, 336),
    "olmoe": (16, 64, 8, 12),
    "qwen3-30b-a3b": (48, 128, 8, 9),
}


@pytest.mark.parametrize("name", SHAPES)
def test_sizes(name: str) -> None:
    shape = SHAPES[name]
    with torch.device("meta"):
        auto: Any = AutoModelForCausalLM
        model = auto.from_config(shape.config(shape.layers))
    modules = [module for module in model.modules() if is_experts_module(module)]
    weights = list(modules[0].parameters())
    layers, experts, top_k, size = EXPERTS[name]
    assert (len(modules), weights[0].shape[0], model.config.num_experts_per_tok) == (layers, experts, top_k)
    assert sum(weight.nbytes for weight in weights) / experts / MIB == pytest.approx(size, abs=0.01)


def test_other_numbers() -> None:
    config = SHAPES["qwen3-30b-a3b"].config(layers=6, experts=32, top_k=4, vocabulary=1000)
    assert (config.num_hidden_layers, config.num_experts, config.num_experts_per_tok) == (6, 32, 4)
    assert config.vocab_size == 1000
    with pytest.raises(UsageError, match="a vocabulary of 255 has no room"):
        SHAPES["small"].config(vocabulary=255)
    for layers, experts, top_k in ((0, 32, 4), (1, 4, 5), (1, 4, 0)):
        with pytest.raises(UsageError, match=f"no model has {layers} layers of {experts} experts, {top_k} per token"):
            SHAPES["small"].config(layers, experts, top_k)


def test_a_checkpoint_says_that_it_is_random_and_runs(home: Path, tmp_path: Path) -> None:
    config = make_config("qwen3_moe")
    config.dtype, config.vocab_size = torch.bfloat16, 300
    write_checkpoint(config, tmp_path / "random-tiny", "tiny")
    stored = pull(str(tmp_path / "random-tiny"), store=Store(home))
    assert json.loads((stored.path / "config.json").read_text())[RANDOM_KEY] == "tiny"
    with moeinf.load("random-tiny", experts="100%", context=64) as engine:
        ids = engine.tokenizer("naïve")["input_ids"]
        assert len(ids) == len("naïve".encode())
        assert len(engine.session().generate(ids, Sampling(max_tokens=3)).tokens) == 3


def test_a_checkpoint_in_mxfp4_is_one_as_it_is_released(home: Path, tmp_path: Path) -> None:
    config = make_config("gpt_oss")
    config.dtype, config.vocab_size = torch.bfloat16, 300
    write_checkpoint(config, tmp_path / "random-oss", "tiny", packing="mxfp4")
    stored = pull(str(tmp_path / "random-oss"), store=Store(home))
    assert stored.manifest.precision == "mxfp4 experts (as released)"
    plain = pull(str(tmp_path / "random-oss"), store=Store(home), name="plain", experts="bf16")
    spread = torch.frombuffer(bytearray((plain.path / expert_path(0, 0)).read_bytes()[4096:]), dtype=torch.bfloat16)
    assert 0.01 < float(spread.float().std()) < 0.05
    with moeinf.load("random-oss", experts="50%", context=64) as engine:
        assert len(engine.session().generate([5, 6], Sampling(max_tokens=3)).tokens) == 3
    with pytest.raises(UsageError, match="qwen3_moe is not released in MXFP4"):
        write_checkpoint(make_config("qwen3_moe"), tmp_path / "other", "tiny", packing="mxfp4")
    assert not (tmp_path / "other").exists()


def test_a_checkpoint_in_float8_is_one_as_it_is_released(home: Path, tmp_path: Path) -> None:
    config = make_config("qwen3_moe")
    config.dtype, config.vocab_size = torch.bfloat16, 300
    write_checkpoint(config, tmp_path / "random-qwen", "tiny", packing="fp8")
    stored = pull(str(tmp_path / "random-qwen"), store=Store(home))
    assert stored.manifest.precision == "fp8 experts (as released)"
    plain = pull(str(tmp_path / "random-qwen"), store=Store(home), name="plain", experts="bf16")
    spread = torch.frombuffer(bytearray((plain.path / expert_path(0, 0)).read_bytes()[4096:]), dtype=torch.bfloat16)
    assert 0.01 < float(spread.float().std()) < 0.05
    with moeinf.load("random-qwen", experts="50%", context=64) as engine:
        assert len(engine.session().generate([5, 6], Sampling(max_tokens=3)).tokens) == 3
    with pytest.raises(UsageError, match="mixtral is not written in float8"):
        write_checkpoint(make_config("mixtral"), tmp_path / "other", "tiny", packing="fp8")
    assert not (tmp_path / "other").exists()


def test_the_same_seed_writes_the_same(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write_checkpoint(make_config("qwen3_moe"), tmp_path / folder, "tiny")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["testing", "small", str(tmp_path / "x"), "--top-k", "99"])
    monkeypatch.delitem(sys.modules, "moeinf.testing")
    with pytest.raises(SystemExit):
        runpy.run_module("moeinf.testing", run_name="__main__")
    assert "no model has 16 layers of 64 experts, 99 per token" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
