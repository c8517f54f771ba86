"""Models calibrated on texts: what is kept of what experts are given, against transformers; and the store that comes of
it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import moeinf
from families import make_checkpoint
from moeinf.calibrated import Calibration
from moeinf.engine import Engine
from moeinf.errors import CapacityError, IntegrityError, UsageError
from moeinf.forms import ExpertForm, name_calibration
from moeinf.manifest import expert_path
from moeinf.metamodel import MetaModel, choose_dtype, load_config
from moeinf.progress import NO_PROGRESS
from moeinf.prompts import Prompt
from moeinf.pull import plan_pull, pull
from moeinf.quality import compare
from moeinf.quantizing import quantize_model
from moeinf.store import Store, StoredModel
from packing import rewrite

INT4 = ExpertForm("int4", 16)
TEXTS = [Prompt("", "".join(chr(33 + (7 * n * n + 3 * n + k) % 90) for k in range(60 + n))) for n in range(12)]
FAMILIES = ("gpt_oss", "inkling2_text", "mixtral", "nemotron_h", "qwen3_moe")
"""Weights the other way round and biases, a norm behind experts, gates and none."""


@contextmanager
def load(name: str, **options: Any) -> Iterator[Engine]:
    with moeinf.load(name, experts="50%", kernels="torch", **options) as engine:
        engine.learns = False
        yield engine


def load_wide(name: str) -> AbstractContextManager[Engine]:
    return load(name, dtype="float32")


def calibrate(model: StoredModel, texts: list[Prompt] = TEXTS) -> Calibration:
    return Calibration.read(model, texts, "twelve", load)


@pytest.fixture
def store(home: Path) -> Store:
    return Store(home)


@pytest.fixture
def plain(tmp_path: Path, store: Store) -> StoredModel:
    make_checkpoint("mixtral", tmp_path / "mix")
    return pull(str(tmp_path / "mix"), store=store)


def meta_model(model: StoredModel) -> MetaModel:
    loaded = load_config(model.path)
    return MetaModel(loaded, choose_dtype(model.manifest.dtype, loaded.dtype))


def contents(model: StoredModel) -> dict[str, bytes]:
    return {path: (model.path / path).read_bytes() for path in model.manifest.files}


# What experts are given


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore")  # what transformers and torch say about families of theirs
def test_moments_are_those_of_what_transformers_multiplies(family: str, tmp_path: Path, store: Store) -> None:
    """Up to what is added to their diagonals."""
    make_checkpoint(family, tmp_path, "float32")
    model = pull(str(tmp_path), store=store, name="model")
    calibration = calibrate(model)
    auto: Any = AutoModelForCausalLM  # untyped
    reference = auto.from_pretrained(tmp_path, dtype=torch.float32, experts_implementation="eager")
    module = reference.get_submodule(model.manifest.layers[1].module)
    seen: list[tuple[torch.Tensor, ...]] = []
    module.register_forward_pre_hook(lambda _, args, kwargs: seen.append((*args, *kwargs.values())), with_kwargs=True)
    with torch.inference_mode():
        for ids in calibration.inputs:
            reference(torch.tensor([list(ids)]))
    hidden, index, weights = (torch.cat([step[part] for step in seen]) for part in range(3))
    expert = int(index.flatten().bincount().argmax())
    token, place = torch.where(index == expert)
    parameters = {name: parameter[expert].detach() for name, parameter in module.named_parameters(recurse=False)}
    up = "gate_up_proj" if module.has_gate else "up_proj"
    rows = hidden[token]
    inner = rows @ (parameters[up] if module.is_transposed else parameters[up].t()) + parameters.get(f"{up}_bias", 0)
    inner = (module._apply_gate if module.has_gate else module.act_fn)(inner)
    with calibration.moments(model, meta_model(model), store.home, [1], NO_PROGRESS) as moments_of:
        found = moments_of(1, expert, parameters)
    assert found.keys() == {up, "down_proj"}
    for name, inputs in ((up, rows), ("down_proj", inner)):
        weighted = inputs * weights[token, place, None]
        wanted = weighted.t() @ weighted
        wanted /= wanted.diagonal().mean()
        added = (found[name] - wanted).diagonal()
        assert (added - added.mean()).abs().max() < 1e-3, name
        assert added.mean() > 0.01
        assert (found[name] - wanted - added.diag()).abs().max() < 1e-3


def test_an_expert_that_no_token_chose_has_moments_too(plain: StoredModel, store: Store) -> None:
    calibration = Calibration.read(plain, [Prompt("", "ab")], "one", load)
    assert calibration.tokens < 8
    made = quantize_model(plain, "small", INT4, store=store, calibration=calibration)
    assert store.verify("small") == []
    assert name_calibration(made.manifest.precision) == f"{calibration.tokens} tokens of one"


def test_texts_without_tokens_are_refused(plain: StoredModel) -> None:
    with pytest.raises(UsageError, match="the texts of none have no tokens"):
        Calibration.read(plain, [Prompt("", "")], "none", load)


# What becomes of it


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"])
@pytest.mark.filterwarnings("ignore")  # transformers on the rotary embedding of a context as short as this
def test_answers_come_nearer_to_the_model_s(family: str, tmp_path: Path, store: Store) -> None:
    make_checkpoint(family, tmp_path / "mix")
    plain = pull(str(tmp_path / "mix"), store=store)
    searched = quantize_model(plain, "searched", INT4, store=store)
    fitted = quantize_model(plain, "fitted", INT4, store=store, calibration=calibrate(plain))
    costs = [compare(model, plain, TEXTS, "twelve", load_wide, store=store).mean_kl for model in (searched, fitted)]
    assert costs[1] < 0.9 * costs[0]


def test_it_lies_as_any_other_and_says_what_it_is(plain: StoredModel, store: Store) -> None:
    before = contents(plain)
    notes: list[str] = []
    searched = quantize_model(plain, "searched", INT4, store=store)
    calibration = calibrate(plain)
    fitted = quantize_model(plain, "fitted", INT4, store=store, calibration=calibration, notify=notes.append)
    assert contents(plain) == before
    assert store.verify("fitted") == []
    assert fitted.manifest.layout == searched.manifest.layout
    assert notes[0].startswith(f"calibrating on {calibration.tokens} tokens of twelve, which takes ")
    ending = f", from bfloat16, calibrated on {calibration.tokens} tokens of twelve"
    assert fitted.manifest.precision == f"int4 experts (groups of 16){ending}"
    for name, other in (("searched", calibration), ("fitted", None), ("fitted", calibrate(plain, TEXTS[:3]))):
        with pytest.raises(UsageError, match=f"{name} is here already, and is"):
            quantize_model(plain, name, INT4, store=store, calibration=other)
    assert quantize_model(plain, "fitted", INT4, store=store, calibration=calibration) == fitted


class Interrupted:
    """A person who presses Ctrl-C after so many steps of a task."""

    def __init__(self, label: str, steps: int) -> None:
        self.label, self.left = label, steps
        self.done: list[tuple[str, int]] = []

    @contextmanager
    def task(self, label: str, total: int, unit: str, *, done: int = 0) -> Iterator[Interrupted | Any]:
        self.done.append((label, done))
        yield self if label == self.label else SimpleNamespace(advance=lambda _: None)

    def advance(self, amount: int) -> None:
        self.left -= amount
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("label", "steps"), [("read", 3), ("quantize", 3), ("quantize", 11)])
def test_an_interrupted_run_goes_on_to_the_same_bytes(label: str, steps: int, plain: StoredModel, store: Store) -> None:
    whole = contents(quantize_model(plain, "whole", INT4, store=store, calibration=calibrate(plain)))
    before = sorted(store.home.iterdir())
    with pytest.raises(KeyboardInterrupt):
        quantize_model(
            plain, "small", INT4, store=store, calibration=calibrate(plain), progress=Interrupted(label, steps)
        )
    assert (store.names(), store.unfinished()) == (["mix", "whole"], ["small"])
    assert sorted(store.home.iterdir()) == before
    going_on = Interrupted("", 0)
    made = quantize_model(plain, "small", INT4, store=store, calibration=calibrate(plain), progress=going_on)
    assert dict(going_on.done)["quantize"] == (steps if label == "quantize" else 0)
    assert contents(made) == whole


def test_other_texts_start_afresh(plain: StoredModel, store: Store) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize_model(
            plain, "small", INT4, store=store, calibration=calibrate(plain), progress=Interrupted("quantize", 3)
        )
    notes: list[str] = []
    quantize_model(plain, "small", INT4, store=store, calibration=calibrate(plain, TEXTS[:5]), notify=notes.append)
    assert not any(note.startswith("going on") for note in notes)


def test_what_is_refused(plain: StoredModel, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = calibrate(plain)
    with pytest.raises(UsageError, match="lossless experts lose nothing"):
        quantize_model(plain, "small", ExpertForm.read("lossless", None), store=store, calibration=calibration)
    needed = 16 * 8192 + calibration.scratch_bytes(plain, meta_model(plain), [0, 1])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed // 2))
    with pytest.raises(CapacityError, match=r"small needs .* more disk, .* of it for a while") as caught:
        quantize_model(plain, "small", INT4, store=store, calibration=calibration)
    assert "fewer --max-prompts" in (caught.value.hint or "")


def test_weights_that_are_not_finite_are_named(plain: StoredModel, store: Store) -> None:
    data = (plain.path / expert_path(1, 3)).read_bytes()
    plain = rewrite(plain, expert_path(1, 3), data[:-2] + b"\xc0\x7f")  # NaN in bfloat16
    with pytest.raises(IntegrityError, match=r"down_proj of expert 3 of .* holds NaN"):
        quantize_model(plain, "small", INT4, store=store, calibration=calibrate(plain))


def test_the_disk_takes_as_much_as_was_said(plain: StoredModel, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration, meta = calibrate(plain), meta_model(plain)
    files: list[IO[bytes]] = []

    def open_file(**options: Any) -> IO[bytes]:
        files.append(make_file(**options))
        return files[-1]

    make_file = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", open_file)
    for layers in ([0, 1], [1]):
        with calibration.moments(plain, meta, store.home, layers, NO_PROGRESS):
            assert files[-1].seek(0, 2) == calibration.scratch_bytes(plain, meta, layers)
        files.clear()


def test_a_pull_is_no_way_to_make_it_again(plain: StoredModel, store: Store) -> None:
    made = quantize_model(plain, "small", INT4, store=store, calibration=calibrate(plain))
    assert pull("small", store=store) == made
    pull(plain.manifest.source.repo, store=store, experts="int4", force=True)
    assert store.open("small") == made
    for ask in (plan_pull, pull):
        with pytest.raises(UsageError, match=r"small is calibrated on \d+ tokens of twelve, and a pull") as caught:
            ask("small", store=store, force=True)
        again = f"moeinf quantize {plain.manifest.source.repo} --experts int4 --name small --calibrate DATASET --force"
        assert caught.value.hint == again
