"""The next layer's router is asked about the state as it will be: what is learned of that, and what is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moeinf
from families import make_checkpoint
from moeinf.gate import _RETRY_TOKENS, GatePredictor, _Change, _Share
from moeinf.pull import pull
from moeinf.store import Store

SIZE = 16


def rows(count: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(count, SIZE, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("count", [1, 8, 64])
def test_a_share_of_what_is_added_and_a_mean_are_learned(count: int) -> None:
    """From single tokens as from prompts, whatever else varies."""
    change, mean, usual = _Change(), rows(1, 0, 3.0), rows(1, 1)
    for step in range(2000 // count):
        before, added = rows(count, 3 * step + 2), usual + rows(count, 3 * step + 3)
        change.learn(before, added, before + 0.25 * added + mean + rows(count, 3 * step + 4, 0.01))
    before, added = rows(1, 10_000), rows(1, 10_001)
    assert torch.allclose(change.expect(before, added), before + 0.25 * added + mean, atol=0.25)
    assert torch.allclose(change.expect(before, None), before + 0.25 * usual + mean, atol=0.4)


def test_before_anything_is_known_all_of_what_is_added_counts() -> None:
    before, added = rows(1, 0).bfloat16(), rows(1, 1).bfloat16()
    assert torch.equal(_Change().expect(before, added), before.float() + added.float())
    assert torch.equal(_Change().expect(before, None), before.float())


def test_what_seldom_comes_true_is_asked_for_now_and_then() -> None:
    share = _Share()
    assert share.is_enough
    for _ in range(40):
        assert share.is_worth_asking()
        share.count([1, 2], [2, 1])
    for _ in range(60):
        share.count([1, 2, 3, 4], [4, 5, 6, 7])
    assert not share.is_enough
    assert sum(share.is_worth_asking() for _ in range(128)) == 4
    for _ in range(60):
        share.count([1, 2], [2, 1])
    assert share.is_enough
    assert all(share.is_worth_asking() for _ in range(128))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "deepseek_v3"])
def test_the_right_experts_are_named_where_all_is_known(family: str, home: Path, tmp_path: Path) -> None:
    """Without attention, dense layers and shared experts nothing but the experts lies between two routers (or a share
    of what they give, in granitemoe), and before the first router there is the token alone.
    """
    make_checkpoint(family, tmp_path)
    pull(str(tmp_path), store=Store(home), name="model")
    with moeinf.load("model", experts="100%", prefetch="off", kernels="torch") as engine, torch.inference_mode():
        for name, parameter in engine.model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
        modules = engine.experts_modules
        gate = GatePredictor(engine.model, modules)
        named: dict[int, list[int]] = {}
        chosen: dict[int, list[int]] = {}

        def computed(layer: int, output: torch.Tensor) -> None:
            named[layer + 1] = gate.predict(layer, lambda: output)

        for layer, module in enumerate(modules.values()):
            module.register_forward_hook(lambda _, args, output, layer=layer: computed(layer, output))
        engine.runtime.observer = lambda layer, _, index, __: chosen.update({layer: index[0].tolist()})
        engine.runtime.token_enters = lambda: computed(-1, torch.zeros(1))  # type: ignore[method-assign]
        engine.model(torch.arange(5, 45)[None])
        for token in range(60, 80):
            named.clear()
            engine.model(torch.tensor([[token]]))
            assert named.pop(len(modules)) == []
            assert named.keys() == chosen.keys()
            assert {layer: sorted(it) for layer, it in named.items()} == {
                layer: sorted(it) for layer, it in chosen.items()
            }


def test_nothing_is_named_of_a_layer_that_never_ran_and_for_many_tokens(tiny: str) -> None:
    with moeinf.load(tiny, experts="50%", prefetch="gate") as engine, torch.inference_mode():
        gate = GatePredictor(engine.model, engine.experts_modules)
        answers: list[list[int]] = []
        modules = list(engine.experts_modules.values())
        for layer, module in enumerate(modules):
            module.register_forward_hook(lambda _, args, output, layer=layer: answers.append(gate.predict(layer)))
        assert gate.predict(-1) == []
        engine.model(torch.tensor([[7]]))
        engine.model(torch.tensor([[7, 8]]))
        assert not any(answers)
        engine.model(torch.tensor([[7]]))
        assert answers[-2] != []
        assert gate.predict(0) == []  # the token is behind the last layer
        assert all(module.moeinf[0] is engine.runtime for module in gate._experts)
        gate._right[1]._share, gate._right[1]._refused = 0.0, _RETRY_TOKENS - 1
        engine.model(torch.tensor([[7]]))
        assert (answers[-2], gate._named != []) == ([], True)  # asked, to see whether it comes true again
        modules[0].register_forward_pre_hook(lambda *_: gate.forget())
        engine.model(torch.tensor([[7]]))
        assert (answers[-2], gate._right[1].is_enough) == ([], True)


@pytest.mark.parametrize("family", ["flex_olmo", "zaya"])
def test_before_the_first_layer_a_router_that_is_given_more_than_a_normed_state_is_not_asked(
    family: str, home: Path, tmp_path: Path
) -> None:
    """In flex_olmo it is given a state without a norm, in zaya what the router before it found too. Later ones go by
    what the layer before was given.
    """
    make_checkpoint(family, tmp_path)
    pull(str(tmp_path), store=Store(home), name="model")
    with moeinf.load("model", experts="100%", prefetch="off", kernels="torch") as engine, torch.inference_mode():
        gate = GatePredictor(engine.model, engine.experts_modules)
        named: dict[int, list[int]] = {}
        for layer, module in enumerate(engine.experts_modules.values()):
            module.register_forward_hook(
                lambda _, args, output, layer=layer: named.update({layer: gate.predict(layer, lambda: output)})
            )
        engine.runtime.token_enters = lambda: named.update({-1: gate.predict(-1)})  # type: ignore[method-assign]
        engine.model(torch.arange(5, 45)[None])
        for token in range(60, 64):
            engine.model(torch.tensor([[token]]))
            assert named[-1] == []
            assert named[0] != []
