"""The model that ships with the package: found everywhere, without a pull, and a checkpoint like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moeinf
from moeinf import demo
from moeinf.chat import Conversation
from moeinf.errors import UsageError
from moeinf.manifest import MANIFEST_NAME
from moeinf.prompts import demo_prompts
from moeinf.pull import plan_pull, pull, resolve
from moeinf.store import Store

GREEDY = moeinf.Sampling(max_tokens=40, temperature=0)


@pytest.fixture(scope="module")
def demo_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("demo")
    assert resolve("demo", Store(home)).name == "demo"
    return home


def test_it_needs_no_pull(home: Path) -> None:
    store = Store(home)
    assert store.names() == []
    manifest = resolve("demo", store).manifest
    assert (manifest.source.repo, manifest.source.commit) == (demo.NAME, demo.VERSION)
    assert store.verify("demo") == []
    assert resolve("demo", store).manifest == manifest
    assert pull("demo", store=store).manifest == manifest
    assert plan_pull("demo", store=store).is_stored


def test_that_of_another_version_is_replaced(home: Path) -> None:
    store = Store(home)
    path = resolve("demo", store).path / MANIFEST_NAME
    older = json.loads(path.read_text(encoding="utf-8"))
    older["source"]["commit"] = "0"
    path.write_text(json.dumps(older), encoding="utf-8")
    assert store.open("demo").manifest.source.commit == "0"
    assert resolve("demo", store).manifest.source.commit == demo.VERSION


def test_somebody_s_own_model_of_that_name_is_theirs(home: Path, tiny_home: Path) -> None:
    store = Store(home)
    own = pull(str(tiny_home.parent / "checkpoint"), store=store, name="demo")
    assert resolve("demo", store).manifest == own.manifest
    assert pull("demo", store=store).manifest == own.manifest


@pytest.mark.parametrize(("source", "revision"), [("demo@main", None), ("demo", "2")])
def test_it_has_no_revisions(home: Path, source: str, revision: str | None) -> None:
    with pytest.raises(UsageError, match="demo ships with the program, and has no revisions"):
        pull(source, store=Store(home), revision=revision)


def test_it_loads_with_plain_transformers_and_says_the_same(demo_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEINF_HOME", str(demo_home))
    auto_tokenizer: Any = AutoTokenizer
    auto_model: Any = AutoModelForCausalLM
    tokenizer = auto_tokenizer.from_pretrained(demo.CHECKPOINT)
    model = auto_model.from_pretrained(demo.CHECKPOINT, dtype=torch.bfloat16, experts_implementation="eager")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    with torch.inference_mode():
        expected = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    with moeinf.load("demo", experts="25%") as engine:
        reply = Conversation(engine, GREEDY, None).send(question[0]["content"])
    assert list(reply.completion.tokens) == expected.tolist()
    assert "Paris" in reply.text
    assert reply.completion.finish_reason == "stop"


def test_its_prompt_sets_are_disjoint_and_say_where_they_come_from() -> None:
    calibration, evaluation = demo_prompts("calibration"), demo_prompts("evaluation")
    assert {prompt.domain for prompt in calibration} == {prompt.domain for prompt in evaluation}
    assert len({prompt.domain for prompt in evaluation}) >= 10
    texts = [prompt.text for prompt in (*calibration, *evaluation)]
    assert len(set(texts)) == len(texts)
    assert all(prompt.source and prompt.licence for prompt in (*calibration, *evaluation))


def test_the_package_stays_small() -> None:
    folder = demo.CHECKPOINT.parent
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 29e6
    assert {"LICENSE", "README.md"} & {path.name for path in demo.CHECKPOINT.iterdir()}
