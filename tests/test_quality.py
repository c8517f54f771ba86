"""What quantised experts cost: the figures, against plain sums; where they are kept, and when they are believed."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import moeinf
from moeinf.engine import Engine
from moeinf.errors import CapacityError, IntegrityError, UsageError
from moeinf.forms import ExpertForm
from moeinf.prompts import Prompt
from moeinf.quality import compare
from moeinf.qualityfile import QUALITY_FILE, Quality, read_quality, write_quality
from moeinf.quantizing import quantize_model
from moeinf.store import TRACES_FOLDER, Store, StoredModel

TEXTS = ["Once upon a time there was a model.", "x", "It had eight experts in every layer, and asked two of them."]
PROMPTS = [Prompt("", text) for text in TEXTS]
QUALITY = Quality("whole", "default-held-out", 2, 100, 9.5, 9.25, 0.0125, 0.75, 0.975)


@pytest.fixture
def models(tiny: str, tiny_home: Path) -> Iterator[tuple[StoredModel, StoredModel, Store]]:
    store = Store(tiny_home)
    yield quantize_model(store.open(tiny), "small", ExpertForm("int4", 32), store=store), store.open(tiny), store
    store.remove("small")


def load(name: str, **options: Any) -> AbstractContextManager[Engine]:
    return moeinf.load(name, experts="50%", kernels="torch", **options)


def logits_of(name: str, max_tokens: int) -> tuple[list[torch.Tensor], list[list[int]]]:
    with load(name) as engine, torch.inference_mode():
        ids = [engine.tokenizer(text)["input_ids"][:max_tokens] for text in TEXTS]
        ids = [tokens for tokens in ids if len(tokens) > 1]
        return [engine.model(torch.tensor([tokens])).logits[0].double() for tokens in ids], ids


def test_the_figures_are_what_plain_sums_give(models: tuple[StoredModel, StoredModel, Store]) -> None:
    small, whole, store = models
    found = compare(small, whole, PROMPTS, "three", load, store=store, max_tokens=20)
    (of_small, ids), (of_whole, _) = logits_of("small", 20), logits_of("tiny", 20)
    kl, agreed, losses = [], [], {"small": 0.0, "tiny": 0.0}
    for text, tokens in enumerate(ids):
        for place, following in enumerate(tokens[1:]):
            q, p = (logits[text][place].softmax(-1) for logits in (of_small, of_whole))
            kl.append(float((p * (p / q).log()).sum()))
            agreed.append(bool(p.argmax() == q.argmax()))
            losses["small"] -= float(q[following].log())
            losses["tiny"] -= float(p[following].log())
    assert (found.against, found.dataset, found.prompts, found.tokens) == ("tiny", "three", 2, 38)
    assert found.agreement == sum(agreed) / 38
    assert found.agreement < 1
    wanted = [sum(kl) / 38, max(kl), *(torch.tensor(loss / 38).exp().item() for loss in losses.values())]
    figures = [found.mean_kl, found.worst_kl, found.perplexity, found.against_perplexity]
    assert figures == pytest.approx(wanted, rel=1e-5)


def test_a_model_beside_itself_costs_nothing(models: tuple[StoredModel, StoredModel, Store]) -> None:
    _, whole, store = models
    found = compare(whole, whole, PROMPTS, "three", load, store=store)
    assert (found.agreement, found.mean_kl, found.worst_kl) == (1, 0, 0)
    assert found.perplexity == found.against_perplexity


def test_models_of_two_vocabularies_are_not_compared(models: tuple[StoredModel, StoredModel, Store]) -> None:
    small, whole, store = models

    def load_other(name: str) -> AbstractContextManager[Engine]:
        engine = load(name)
        if name == "small":
            engine.tokenizer.add_tokens(["upon"])  # type: ignore[attr-defined]
        return engine

    with pytest.raises(UsageError, match="small and tiny do not have the same vocabulary"):
        compare(small, whole, PROMPTS, "three", load_other, store=store)


def test_texts_of_one_token_predict_nothing(models: tuple[StoredModel, StoredModel, Store]) -> None:
    small, whole, store = models
    with pytest.raises(UsageError, match="no text has two tokens"):
        compare(small, whole, [Prompt("", "x")], "one", load, store=store)


def test_the_disk_is_asked_first(
    models: tuple[StoredModel, StoredModel, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    small, whole, store = models
    before = sorted(store.home.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(CapacityError, match=r"the logits take .* of disk for a while"):
        compare(small, whole, PROMPTS, "three", load, store=store)
    assert sorted(store.home.iterdir()) == before


# The file


def test_what_is_written_is_read_back_for_that_model_alone(
    models: tuple[StoredModel, StoredModel, Store], tmp_path: Path
) -> None:
    small, whole, _ = models
    path = tmp_path / "folder" / QUALITY_FILE
    assert read_quality(path, small.manifest) is None
    write_quality(QUALITY, path, small.manifest)
    assert read_quality(path, small.manifest) == QUALITY
    assert read_quality(path, whole.manifest) is None, "the model has been replaced"


@pytest.mark.parametrize(
    ("old", "new"),
    [("{", "["), ('"tokens": 100', '"tokens": 1.5'), ('"agreement": 0.975', '"agreement": NaN'), ('"mean_kl"', '"kl"')],
)
def test_a_damaged_file_is_said_and_not_believed(
    models: tuple[StoredModel, StoredModel, Store], old: str, new: str
) -> None:
    small, _, _ = models
    path = small.path / TRACES_FOLDER / QUALITY_FILE
    write_quality(QUALITY, path, small.manifest)
    text = path.read_text().replace(old, new, 1)
    path.write_text(text)
    with pytest.raises(IntegrityError, match=r"quality\.json is damaged"):
        read_quality(path, small.manifest)
    with load("small") as engine:
        assert engine.quality is None
        assert "quality.json is damaged" in engine.notes[0]
    path.unlink()


def test_an_engine_knows_what_was_measured(models: tuple[StoredModel, StoredModel, Store]) -> None:
    small, _, _ = models
    path = small.path / TRACES_FOLDER / QUALITY_FILE
    write_quality(QUALITY, path, small.manifest)
    with load("small") as engine:
        assert engine.stats().to_dict()["quality"] == dataclasses.asdict(QUALITY)
    path.unlink()
    with load("tiny") as engine:
        assert (engine.stats().quantization, engine.stats().quality) == ("", None)
