"""Layers that torch compiles: the same output, and the same few pieces of code for all layers. Most tests let torch
record the code and run it as it is; what its compiler makes of it is tested where there is a C++ compiler.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

import moeinf
from families import make_checkpoint
from moeinf import compiling, engine
from moeinf.errors import UnsupportedError
from moeinf.evidence import owner, read_runs
from moeinf.pull import pull
from moeinf.store import TRACES_FOLDER, Store

pytestmark = pytest.mark.filterwarnings("ignore")  # what torch's compiler says of its own code

PROMPT = list(range(5, 25))


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def only_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "compile_layers", functools.partial(compiling.compile_layers, backend="eager"))


def answer(loaded: moeinf.Engine) -> tuple[int, ...]:
    """Of two turns: the second is a short prompt behind a cache."""
    loaded.generation_config.eos_token_id = None
    session, sampling = loaded.session(), moeinf.Sampling(max_tokens=5, temperature=0)
    first = session.generate(PROMPT, sampling).tokens
    return (*first, *session.generate([*PROMPT, *first, 7, 8], sampling).tokens)


@pytest.mark.usefixtures("only_recorded")
def test_layers_share_code_and_give_the_same_tokens(home: Path, tmp_path: Path) -> None:
    graphs = []
    for layers, experts in ((2, "100%"), (7, "50%")):
        folder = tmp_path / str(layers)
        make_checkpoint("mixtral", folder, num_hidden_layers=layers)
        pull(str(folder), store=Store(home), name=folder.name)
        with moeinf.load(folder.name, kernels="torch", compile="off") as plain:
            expected = answer(plain)
        counters.clear()
        torch.compiler.reset()
        with moeinf.load(folder.name, experts=experts, prefetch="off", kernels="torch", compile="on") as loaded:
            assert answer(loaded) == expected
        graphs.append(counters["stats"]["unique_graphs"])
        assert not any("recompile limit" in reason for reason in counters["unimplemented"])
    assert graphs[0] == graphs[1] > 3


@pytest.mark.usefixtures("only_recorded")
def test_hooks_stay_outside(home: Path, tmp_path: Path) -> None:
    """The next router is asked by hooks inside of layers, and names experts as it does without a compiler."""
    make_checkpoint("qwen3_moe", tmp_path)
    pull(str(tmp_path), store=Store(home), name="model")
    named = []
    for compile_ in ("off", "on"):
        with moeinf.load("model", experts="50%", prefetch="gate", kernels="torch", compile=compile_) as loaded:
            tokens = answer(loaded)
            named.append((tokens, loaded.runtime.prefetch.named, loaded.runtime.prefetch.right))
    assert named[0] == named[1]
    assert named[0][1] > 0


@pytest.mark.usefixtures("only_recorded")
def test_such_answers_are_no_evidence(home: Path, tmp_path: Path) -> None:
    """What the first of them takes is torch's compiler's time, of which no forecast knows."""
    make_checkpoint("qwen3_moe", tmp_path)
    pull(str(tmp_path), store=Store(home), name="model")
    noted = []
    for compile_ in ("on", "off"):
        with moeinf.load("model", kernels="torch", compile=compile_) as loaded:
            loaded.generation_config.eos_token_id = None
            loaded.session().generate(PROMPT, moeinf.Sampling(max_tokens=20))
        stored = Store(home).open("model")
        noted.append(len(read_runs(stored.path / TRACES_FOLDER, owner(stored.manifest))))
    assert noted == [0, 1]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles C++ here")
def test_compiled_code_rounds_as_the_model_does(home: Path, tmp_path: Path) -> None:
    make_checkpoint("mixtral", tmp_path, num_hidden_layers=1)
    pull(str(tmp_path), store=Store(home), name="model")
    prompt, logits = torch.tensor([PROMPT]), []
    for compile_ in ("auto", "on"):
        with moeinf.load("model", kernels="torch", compile=compile_) as loaded, torch.inference_mode():
            logits.append(loaded.model(prompt).logits)
            assert any("torch compiles layers" in note for note in loaded.notes) is (compile_ == "on")
    assert torch.equal(*logits)


def test_without_a_compiler_it_says_what_to_install(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("\nno C++ compiler was found\nand more")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(UnsupportedError, match="torch cannot compile for cpu here: no C") as caught:
        moeinf.load(tiny, compile="on")
    assert "leave --compile out" in str(caught.value.hint)
