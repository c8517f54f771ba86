"""What quantised experts cost: the figures, against plain sums; where they are kept, and when they are believed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import moeinf
from moeinf.engine import Engine
from moeinf.errors import CapacityError, IntegrityError, UnsupportedError, UsageError
from moeinf.forms import ExpertForm
from moeinf.manifest import Quantization
from moeinf.metamodel import is_experts_module
from moeinf.prompts import Prompt
from moeinf.quality import compare
from moeinf.qualityfile import QUALITY_FILE, Quality, read_quality, write_quality
from moeinf.quantized import dequantize, quantize
from moeinf.quantizing import quantize_model
from moeinf.store import TRACES_FOLDER, Store, StoredModel
from standin import use_device

TEXTS = ["Once upon a time there was a model.", "x", "It had eight experts in every layer, and asked two of them."]
PROMPTS = [Prompt("", text) for text in TEXTS]
QUALITY = Quality("whole", "default-held-out", 2, 100, 9.5, 9.25, 0.0125, 0.75, 0.975, "float32")


@pytest.fixture
def models(tiny: str, tiny_home: Path) -> Iterator[tuple[StoredModel, StoredModel, Store]]:
    store = Store(tiny_home)
    yield quantize_model(store.open(tiny), "small", ExpertForm("int4", 16), store=store), store.open(tiny), store
    store.remove("small")


def load(name: str, **options: Any) -> AbstractContextManager[Engine]:
    return moeinf.load(name, experts="50%", kernels="torch", **options)


def logits_of(name: str, max_tokens: int) -> tuple[list[torch.Tensor], list[list[int]]]:
    with load(name) as engine, torch.inference_mode():
        ids = [engine.tokenizer(text)["input_ids"][:max_tokens] for text in TEXTS]
        ids = [tokens for tokens in ids if len(tokens) > 1]
        return [engine.model(torch.tensor([tokens])).logits[0].double() for tokens in ids], ids


def test_a_device_is_no_hindrance(
    models: tuple[StoredModel, StoredModel, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    small, whole, store = models
    found = [compare(small, whole, PROMPTS, "three", load, store=store, max_tokens=20)]
    with use_device(monkeypatch):
        found.append(compare(small, whole, PROMPTS, "three", load, store=store, max_tokens=20))
    assert found[0] == found[1]


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


def test_in_float32_nothing_is_rounded_but_the_numbers(models: tuple[StoredModel, StoredModel, Store]) -> None:
    """Both models compute as transformers does in float32, one of them with what its numbers stand for."""
    small, whole, store = models

    def load_wide(name: str) -> AbstractContextManager[Engine]:
        return load(name, dtype="float32")

    found = compare(small, whole, PROMPTS, "three", load_wide, store=store, max_tokens=20)
    assert found.dtype == "float32"
    assert "in float32" in found.text
    auto: Any = AutoModelForCausalLM  # untyped
    reference = auto.from_pretrained(store.home.parent / "checkpoint", dtype=torch.float32).eval()
    kl = []
    with torch.inference_mode():
        texts = logits_of("tiny", 20)[1]
        of_whole = [reference(torch.tensor([ids])).logits[0, :-1] for ids in texts]
        with load_wide("tiny") as engine:
            for ids, wanted in zip(texts, of_whole, strict=True):
                assert (engine.model.dtype, engine.learns) == (torch.float32, False)
                assert torch.equal(engine.model(torch.tensor([ids])).logits[0, :-1], wanted)
        for module in filter(is_experts_module, reference.modules()):
            for parameter in module.parameters(recurse=False):
                for weight in parameter.data:
                    about = Quantization("int4", 16, "F32", {})
                    weight.copy_(dequantize(*quantize(weight, 4, 16), about, weight.shape[1], torch.float32))
        for ids, wanted in zip(texts, of_whole, strict=True):
            logits = reference(torch.tensor([ids])).logits[0, :-1]
            p, q = (both.double().log_softmax(-1) for both in (wanted, logits))
            kl += (p.exp() * (p - q)).sum(-1).tolist()
    assert found.mean_kl == pytest.approx(sum(kl) / len(kl), rel=1e-3)
    assert found.worst_kl == pytest.approx(max(kl), rel=1e-3)


def test_other_dtypes_are_refused(tiny: str) -> None:
    with pytest.raises(UsageError, match="--dtype float16 is not known"):
        load(tiny, dtype="float16")
    with pytest.raises(UnsupportedError, match="--kernels native compute in the model's own dtype"):
        moeinf.load(tiny, kernels="native", dtype="float32")


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


@pytest.mark.parametrize("broken", ["small", "tiny"])
def test_logits_that_are_no_numbers_are_not_compared(
    models: tuple[StoredModel, StoredModel, Store], broken: str
) -> None:
    small, whole, store = models

    def spoil(module: torch.nn.Module, _: Any, output: Any) -> None:
        output.logits[:, 0] = torch.nan

    def load_broken(name: str) -> AbstractContextManager[Engine]:
        engine = load(name)
        if name == broken:
            engine.model.register_forward_hook(spoil)  # type: ignore[attr-defined]
        return engine

    with pytest.raises(IntegrityError, match="are no numbers"):
        compare(small, whole, PROMPTS, "three", load_broken, store=store)


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
    old = json.loads(path.read_bytes())
    del old["dtype"]
    path.write_text(json.dumps(old))
    measured = read_quality(path, small.manifest)
    assert measured == dataclasses.replace(QUALITY, dtype=small.manifest.dtype), "there was no other"
    path.unlink()
    with load("tiny") as engine:
        assert (engine.stats().quantization, engine.stats().quality) == ("", None)
