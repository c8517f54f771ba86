"""The contract of the project on a device of its own memory: its output is transformers' output on that device, for
families of every kind, whatever either tier holds. On a stand-in, on which transformers computes what it would compute
on the CPU.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import moeinf
from families import EVERY_KIND, make_checkpoint
from moeinf.forms import ExpertForm
from moeinf.kernels import ExpertMaths, PromptMaths, Tensors
from moeinf.misses import MissChoice
from moeinf.pull import pull
from moeinf.quantizing import quantize_model
from moeinf.settings import DEFAULT_POLICY
from moeinf.stats import Stats
from moeinf.store import Store
from moeinf.tiers import HostTier
from readers import SlowReader, use_reader
from standin import PLACE, StandIn, use_device
from test_exact import PROMPT, reference

NEW_TOKENS = 12


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with use_device(monkeypatch) as found:
        yield found


def check(name: str, expected: tuple[torch.Tensor, list[int]], **options: str) -> Stats:
    """That logits and greedy tokens are the expected ones; returns what that cost."""
    with moeinf.load(name, **options) as engine, torch.inference_mode():  # type: ignore[arg-type]
        assert engine.model.device == PLACE
        logits = engine.model(PROMPT.to(PLACE)).logits
        assert torch.equal(logits.cpu(), expected[0]), f"logits with {options}"
        engine.generation_config.eos_token_id = None
        sampling = moeinf.Sampling(max_tokens=NEW_TOKENS, temperature=0)
        completion = engine.session().generate(PROMPT[0].tolist(), sampling)
        assert list(completion.tokens) == expected[1][:NEW_TOKENS], f"tokens with {options}"
        engine.runtime.cache.check_integrity()
        engine.runtime._settle(())  # what was foreseen for a token that did not come
        tier = engine.runtime._fetcher
        assert isinstance(tier, HostTier)
        tier.check_integrity()
    return completion.stats


@pytest.mark.parametrize("family", EVERY_KIND)
@pytest.mark.filterwarnings("ignore")  # what transformers and torch say about families of theirs
def test_logits_and_tokens_are_those_of_transformers(
    family: str, home: Path, tmp_path: Path, device: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With (slots on the device, in host memory): as few as can be, a quarter, a quarter and all, all."""
    use_reader(monkeypatch, SlowReader)
    make_checkpoint(family, tmp_path, "bfloat16")
    expected = reference(tmp_path, torch.bfloat16)
    manifest = pull(str(tmp_path), store=Store(home), name="model").manifest
    fewest, every = max(layer.top_k for layer in manifest.layers), manifest.num_experts
    quarter = max(fewest, every // 4)
    for experts, device.host_slots, prefetch in (
        (fewest, 2, "gate"), (quarter, quarter, "eam"), (quarter, every, "auto"), (every, fewest, "off"),
    ):  # fmt: skip
        check("model", expected, experts=str(experts), prefetch=prefetch)


def test_a_prompt_s_experts_may_be_computed_together(
    tiny: str, tiny_home: Path, device: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that are here at a time, as kernels for prompts have it; then what arrives, in slots that they leave."""
    use_reader(monkeypatch, SlowReader)
    expected = reference(tiny_home.parent / "checkpoint", torch.bfloat16)
    together: list[int] = []

    class Spy(ExpertMaths):
        most_at_once = 3

        def prompt(self, *args: Any) -> PromptMaths:
            prompt = super().prompt(*args)
            compute = prompt.compute

            def note(experts: Sequence[int], tensors: Sequence[Tensors]) -> None:
                together.append(len(experts))
                compute(experts, tensors)

            monkeypatch.setattr(prompt, "compute", note)
            return prompt

    monkeypatch.setattr("moeinf.kernels.ExpertMaths", Spy)
    for experts, device.host_slots in (("2", 16), ("40%", 3), ("100%", 2)):
        check(tiny, expected, experts=experts)
    assert {1, 3} <= set(together) <= {1, 2, 3}


@pytest.mark.parametrize("prefetch", ["off", "gate", "eam", "auto"])
@pytest.mark.parametrize("policy", ["layer-lru", DEFAULT_POLICY])
def test_no_policy_and_no_guess_changes_the_output(
    policy: str, prefetch: str, tiny: str, tiny_home: Path, device: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second time with device slots that are warmed while the disk is slow."""
    use_reader(monkeypatch, SlowReader)
    expected = reference(tiny_home.parent / "checkpoint", torch.bfloat16)
    for experts, device.host_slots in (("2", 16), ("40%", 3)):
        for _ in range(2):
            check(tiny, expected, experts=experts, policy=policy, prefetch=prefetch)


@pytest.mark.parametrize("family", EVERY_KIND)
@pytest.mark.filterwarnings("ignore")  # what transformers and torch say about families of theirs
def test_nothing_depends_on_where_a_missing_expert_is_computed(
    family: str, home: Path, tmp_path: Path, device: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every choice between the link and the processor, which here rounds as the device does."""
    use_reader(monkeypatch, SlowReader)
    chance = random.Random(0)
    monkeypatch.setattr(MissChoice, "on_host", lambda _, count: chance.randint(0, count))
    make_checkpoint(family, tmp_path, "bfloat16")
    expected = reference(tmp_path, torch.bfloat16)
    manifest = pull(str(tmp_path), store=Store(home), name="model").manifest
    fewest, every = max(layer.top_k for layer in manifest.layers), manifest.num_experts
    quarter = max(fewest, every // 4)
    for experts, device.host_slots, prefetch in (
        (fewest, every, "off"), (fewest, 2, "gate"), (quarter, quarter, "auto"), (every, fewest, "off"),
    ):  # fmt: skip
        for miss, kernels in (("host", "torch"), ("auto", "auto")):
            stats = check("model", expected, experts=str(experts), prefetch=prefetch, miss=miss, kernels=kernels)
            if experts == fewest and device.host_slots == every:
                assert 0 < stats.experts.computed_on_host <= stats.experts.misses


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_experts_give_what_they_give_on_the_processor(kind: str, tiny: str, device: StandIn) -> None:
    store = Store()
    quantize_model(store.open(tiny), kind, ExpertForm.read(kind, None), store=store)
    try:
        with moeinf.load(kind, device="cpu", kernels="torch") as engine, torch.inference_mode():
            expected, one = engine.model(PROMPT).logits, engine.model(PROMPT[:, :1]).logits
        for miss in ("fetch", "host"):
            with moeinf.load(kind, experts="2", miss=miss, kernels="torch") as engine, torch.inference_mode():
                assert torch.equal(engine.model(PROMPT.to(PLACE)).logits.cpu(), expected)
                assert torch.equal(engine.model(PROMPT[:, :1].to(PLACE)).logits.cpu(), one)
                assert (engine.stats().experts.computed_on_host > 0) == (miss == "host")
    finally:
        store.remove(kind)
