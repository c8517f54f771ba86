"""The draw of a token against torch's: the same tokens by the same seeds, the same numbers left for what follows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moeinf import draw
from moeinf.draw import QuickDraw, draws_as_torch_does

SPREADS = {"all alike": 0.0, "flat": 0.5, "as text": 4.0, "nearly certain": 40.0}

is_torchs = pytest.mark.skipif(not draws_as_torch_does(), reason="torch makes its numbers in another way here")


@is_torchs
@pytest.mark.parametrize("spread", SPREADS.values(), ids=SPREADS)
@pytest.mark.parametrize("size", [1, 2, 333, 50_000])
def test_tokens_are_torchs(size: int, spread: float) -> None:
    ours, torchs = (torch.Generator().manual_seed(size) for _ in range(2))
    for _ in range(30):
        chances = (torch.randn(1, size) * spread).softmax(-1)
        assert torch.equal(draw.draw(chances, ours), torch.multinomial(chances, 1, generator=torchs))
    assert torch.equal(ours.get_state(), torchs.get_state())


@is_torchs
def test_quotients_that_are_nearly_alike_are_compared_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw, "_NEAR", 0.5)  # several tokens, every time
    ours, torchs = (torch.Generator().manual_seed(3) for _ in range(2))
    for _ in range(100):
        chances = torch.rand(1, 500).softmax(-1)
        assert torch.equal(draw.draw(chances, ours), torch.multinomial(chances, 1, generator=torchs))


@is_torchs
def test_a_token_without_a_chance_is_not_drawn() -> None:
    chances = torch.zeros(1, 1000)
    chances[0, 77] = 1.0
    assert all(draw.draw(chances).item() == 77 for _ in range(20))


def test_chances_that_are_none_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="nan"):
        draw.draw(torch.full((1, 10), torch.nan))


def test_another_way_to_make_numbers_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    multinomial = torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda *args, **named: multinomial(*args, **named) + 1)
    assert not draws_as_torch_does.__wrapped__()


@is_torchs
@pytest.mark.parametrize(
    "change", [{}, {"temperature": 1.7}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.9}]
)
def test_generate_makes_the_same_tokens_with_it(change: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    config = Qwen3MoeConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=4,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    model: Any = Qwen3MoeForCausalLM(config)
    make: Any = GenerationConfig
    options = make(**{"do_sample": True, "max_new_tokens": 20, "top_k": 0, "pad_token_id": 0, **change})
    drawn: list[torch.Tensor] = []

    def counted(chances: torch.Tensor) -> torch.Tensor:
        drawn.append(chances)
        return draw_one(chances)

    draw_one = draw.draw
    monkeypatch.setattr(draw, "draw", counted)
    answers: list[torch.Tensor] = []
    for processors in ([], [QuickDraw()]):
        torch.manual_seed(5)
        answers.append(
            model.generate(
                torch.tensor([[1, 2]]), generation_config=options, logits_processor=LogitsProcessorList(processors)
            )
        )
    assert torch.equal(*answers)
    assert type(answers[1]) is torch.Tensor
    assert len(drawn) == 20
