"""The table of input embeddings on disk: what tokens find there, what is held of it, and what goes wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moeinf
from families import make_checkpoint
from moeinf.embedding import EmbeddingTable
from moeinf.engine import Engine
from moeinf.errors import IntegrityError
from moeinf.pull import pull
from moeinf.store import Store
from standin import PLACE, use_device

NAME = "model.embed_tokens.weight"


@pytest.fixture
def engine(tiny: str) -> Iterator[Engine]:
    """One that streams, so that its table is on disk."""
    with moeinf.load(tiny, experts="4") as engine:
        assert engine.plan.looked_up
        yield engine


def whole(tiny: str) -> nn.Embedding:
    """The table of an engine that has it in memory."""
    with moeinf.load(tiny, experts="100%") as engine:
        assert not engine.plan.looked_up
        return make_embedding(nn.Embedding, engine.model.get_input_embeddings().weight.detach().clone())  # type: ignore[operator]


def make_embedding(kind: Any, weight: Any) -> nn.Embedding:
    embedding: nn.Embedding = kind.from_pretrained(weight)
    return embedding


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 3), (0,), (1, 500)])
def test_tokens_find_their_rows(engine: Engine, tiny: str, shape: tuple[int, ...]) -> None:
    table, found = whole(tiny), engine.model.get_input_embeddings()
    ids = torch.randint(table.num_embeddings, shape)
    assert torch.equal(found(ids), table(ids))
    assert torch.equal(found.weight, table.weight)  # type: ignore[arg-type]  # whoever wants all of it has that, too


def test_a_token_that_there_is_not_is_refused(engine: Engine) -> None:
    embedding: Any = engine.model.get_input_embeddings()
    for token in (-1, embedding.num_embeddings):
        with pytest.raises(IndexError, match=str(token)):
            embedding(torch.tensor([[0, token]]))


def test_what_a_family_does_with_its_rows_is_done(tiny: str) -> None:
    """Some scale what they look up, and a token that fills gaps may be any."""

    class Scaled(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * 3

    stored, table = Store().open(tiny), whole(tiny)
    with EmbeddingTable(stored.path, stored.manifest, NAME) as on_disk:
        module = make_embedding(Scaled, on_disk.weight)
        module.padding_idx = 7
        on_disk.serve(module)
        assert torch.equal(module(torch.tensor([[1, 2]])), table(torch.tensor([[1, 2]])) * 3)


def test_a_gpu_has_no_memory_for_it(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = moeinf.Sampling(max_tokens=20, temperature=0)
    with moeinf.load(tiny, experts="4") as engine:
        expected = engine.session().generate([5, 6, 7], sampling).tokens
    table = whole(tiny)
    with use_device(monkeypatch), moeinf.load(tiny, experts="4") as engine:
        assert engine.plan.looked_up == table.weight.nbytes
        assert engine.plan.dense + engine.plan.looked_up == engine.manifest.dense_bytes
        embedding: Any = engine.model.get_input_embeddings()
        ids = torch.tensor([[3, 1, 3]], device=PLACE)
        assert embedding(ids).device == PLACE
        assert torch.equal(embedding(ids).cpu(), table(ids.cpu()))
        assert (embedding.weight.device, embedding.weight.shape) == (PLACE, table.weight.shape)
        assert embedding.weight.stride() == (0, 0)
        assert embedding.weight[0].cpu().isnan().all()
        assert engine.session().generate([5, 6, 7], sampling).tokens == expected


def test_a_table_that_no_file_has_is_damage(tiny: str) -> None:
    stored = Store().open(tiny)
    with pytest.raises(IntegrityError, match=r"embed_what\.weight"):
        EmbeddingTable(stored.path, stored.manifest, "embed_what.weight")


def test_a_file_that_ends_too_early_is_named(engine: Engine, tiny: str) -> None:
    manifest = Store().open(tiny).manifest
    file = Store().path(tiny) / manifest.dense_files[0]
    data = file.read_bytes()
    try:
        with file.open("r+b") as opened:
            opened.truncate(4096)
        with pytest.raises(IntegrityError, match=file.name):
            engine.session().generate([5, 6, 7], moeinf.Sampling(max_tokens=4))
    finally:
        file.write_bytes(data)


@pytest.mark.parametrize("experts", ["bf16", "lossless"])
@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_answers_are_the_same(experts: str, kernels: str, home: Path, tmp_path: Path) -> None:
    """Whatever lies around the table in its file, and whether that is unpacked or not."""
    make_checkpoint("glm4_moe", tmp_path)
    stored = pull(str(tmp_path), store=Store(home), name="made", experts=experts)
    answers = []
    for share, stays in (("4", True), ("100%", False)):
        with moeinf.load("made", experts=share, kernels=kernels) as engine:
            assert bool(engine.plan.looked_up) == stays
            assert engine.plan.dense + engine.plan.looked_up in (
                stored.manifest.dense_bytes,
                stored.manifest.unpacked.dense_bytes,
            )
            engine.generation_config.eos_token_id = None
            answers.append(engine.session().generate([5, 6, 7], moeinf.Sampling(max_tokens=20, temperature=0)).tokens)
    assert answers[0] == answers[1]


def test_a_table_that_is_the_output_layer_too_is_in_memory(home: Path, tmp_path: Path) -> None:
    make_checkpoint("lfm2_moe", tmp_path)
    pull(str(tmp_path), store=Store(home), name="tied")
    with moeinf.load("tied", experts="4") as engine:
        assert engine.plan.looked_up == 0
        model: Any = engine.model
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
