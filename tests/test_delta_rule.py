"""The gated delta rule of one token: what the family's function gives, to the last bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

from families import make_model
from moeinf import hooks
from moeinf.kernels import NativeAttention
from moeinf.kernels.delta_rule import NativeDeltaRule
from moeinf.kernels.native import NativePool
from test_native import LIBRARY, TORCH_S

KINDS = [(8, 16, 128, 128), (4, 4, 128, 64), (2, 4, 64, 32), (1, 2, 256, 64), (2, 6, 16, 64)]
"""Heads of queries and keys, and of values; numbers of a key, and of a value."""

pytestmark = [
    pytest.mark.skipif(TORCH_S is None, reason="torch may add in another order on such a processor"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture
def pool() -> Iterator[NativePool]:
    pool = NativePool(2, TORCH_S, LIBRARY)
    yield pool
    pool.close()


def make(kind: tuple[int, ...], tokens: int = 1, seed: int = 0) -> tuple[list[torch.Tensor], dict[str, Any]]:
    key_heads, heads, keys, values = kind
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    states = [numbers(1, tokens, *each).bfloat16() for each in ((key_heads, keys),) * 2 + ((heads, values),)]
    named = {
        "g": -numbers(1, tokens, heads).abs(),
        "beta": numbers(1, tokens, heads).sigmoid().bfloat16(),
        "initial_state": numbers(1, heads, keys, values) * 3,
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": True,
    }
    return states, named


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One for each time that the library computes, but for its trials."""
    found: list[int] = []
    call: Any = NativeDeltaRule._compute

    def tell(self: Any, *args: Any, **named: Any) -> Any:
        found.append(1)
        return call(self, *args, **named)

    monkeypatch.setattr(NativeDeltaRule, "_compute", tell)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_is_the_functions(kind: tuple[int, ...], pool: NativePool, computed: list[int]) -> None:
    rule = NativeDeltaRule(torch_recurrent_gated_delta_rule, pool)
    with torch.inference_mode():
        for seed in range(3):
            states, named = make(kind, seed=seed)
            kept = named["initial_state"].clone()
            for _ in range(4):  # one token after the other
                theirs = torch_recurrent_gated_delta_rule(*states, **named)
                computed.clear()
                ours = rule(*states, **named, cu_seqlens=None)
                assert computed
                assert all(map(torch.equal, ours, theirs))
                named = {**named, "initial_state": ours[1]}
            assert torch.equal(make(kind, seed=seed)[1]["initial_state"], kept)  # nobody's state is written over


@pytest.mark.parametrize(
    "change",
    [
        {"initial_state": None},
        {"use_qk_l2norm_in_kernel": False},
        {"output_final_state": False},
        {"beta": torch.ones(1, 1, 4)},
        {"initial_state": torch.ones(1, 4, 32, 64).transpose(2, 3)},
    ],
)
def test_anything_else_is_the_functions(change: dict[str, Any], pool: NativePool, computed: list[int]) -> None:
    rule = NativeDeltaRule(torch_recurrent_gated_delta_rule, pool)
    states, named = make((2, 4, 64, 32))
    named |= change
    with torch.inference_mode():
        rule(*states, **named)
        computed.clear()
        theirs, ours = torch_recurrent_gated_delta_rule(*states, **named), rule(*states, **named)
    assert not computed
    assert torch.equal(ours[0], theirs[0])
    assert (ours[1] is None) == (theirs[1] is None)


def test_several_tokens_are_the_functions(pool: NativePool, computed: list[int]) -> None:
    rule = NativeDeltaRule(torch_recurrent_gated_delta_rule, pool)
    states, named = make((2, 4, 64, 32), tokens=3)
    with torch.inference_mode():
        theirs, ours = torch_recurrent_gated_delta_rule(*states, **named), rule(*states, **named)
    assert not computed
    assert all(map(torch.equal, ours, theirs))


def test_another_rule_is_left_alone(pool: NativePool, computed: list[int]) -> None:
    def doubled(*args: Any, **named: Any) -> Any:
        output, state = torch_recurrent_gated_delta_rule(*args, **named)
        return output * 2, state

    rule = NativeDeltaRule(doubled, pool)
    states, named = make((2, 4, 64, 32))
    with torch.inference_mode():
        rule(*states, **named)
        computed.clear()
        assert torch.equal(rule(*states, **named)[0], doubled(*states, **named)[0])
    assert not computed


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_moe_text"])
def test_attention_of_the_family_has_it(family: str, pool: NativePool) -> None:
    model = make_model(family)
    hooks.attend(model, NativeAttention(pool))
    modules: list[Any] = [module for module in model.modules() if "GatedDeltaNet" in type(module).__name__]
    assert modules
    for module in modules:
        assert isinstance(module.forward.__globals__["torch_recurrent_gated_delta_rule"], NativeDeltaRule)
