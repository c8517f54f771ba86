"""The contract of the project: moeinf's output is transformers' output, for every family, whatever the cache holds and
whatever order the experts arrive in. Through save, pull and load, against transformers' eager experts, bit for bit.
With torch's maths: tests/test_native.py has that of the native library, whose last bits depend on the processor.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import moeinf
from families import FAMILIES, make_checkpoint
from moeinf.policies import POLICIES
from moeinf.pull import pull
from moeinf.store import Store
from readers import SlowReader, use_reader

PROMPT = torch.randint(5, 100, (1, 21), generator=torch.Generator().manual_seed(1))
NEW_TOKENS = 32
EVERY_FAMILY = pytest.mark.parametrize("family", sorted(FAMILIES))


def reference(folder: Path, dtype: torch.dtype) -> tuple[torch.Tensor, list[int]]:
    """Logits [1, tokens, vocabulary] and greedy tokens of the checkpoint in plain transformers.

    Its weights are moved out of the mapped file, which lays them wherever its header ends: on some processors float32
    products with one column are rounded differently when a weight does not begin at a multiple of 64 bytes.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    with torch.inference_mode():
        return model(PROMPT).logits, greedy(model)


def greedy(model: PreTrainedModel) -> list[int]:
    tokens: torch.Tensor = model.generate(  # type: ignore[operator]
        PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return tokens[0, PROMPT.shape[1] :].tolist()


@EVERY_FAMILY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.filterwarnings("ignore")  # what transformers and torch say about families of theirs
def test_logits_and_tokens_are_those_of_transformers(
    family: str, dtype: torch.dtype, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_reader(monkeypatch, SlowReader)
    make_checkpoint(family, tmp_path, str(dtype).removeprefix("torch."))
    logits, tokens = reference(tmp_path, dtype)
    manifest = pull(str(tmp_path), store=Store(home), name="model").manifest
    fewest = max(layer.top_k for layer in manifest.layers)
    for experts, prefetch in ((str(fewest), "gate"), ("25%", "eam"), ("50%", "auto"), ("100%", "off")):
        loaded = moeinf.load("model", experts=experts, prefetch=prefetch, kernels="torch")
        with loaded as engine, torch.inference_mode():
            assert torch.equal(engine.model(PROMPT).logits, logits), f"logits with {experts} slots"
            engine.generation_config.eos_token_id = None
            sampling = moeinf.Sampling(max_tokens=NEW_TOKENS, temperature=0)
            completion = engine.session().generate(PROMPT[0].tolist(), sampling)
            assert list(completion.tokens) == tokens, f"tokens with {experts} slots"
            engine.runtime.cache.check_integrity()


def test_the_model_itself_generates_as_transformers_does(tiny: str, tiny_home: Path) -> None:
    _, tokens = reference(tiny_home.parent / "checkpoint", torch.bfloat16)
    with moeinf.load(tiny, experts="25%", kernels="torch") as engine:
        assert greedy(engine.model) == tokens


@pytest.mark.parametrize("prefetch", ["off", "gate", "eam", "auto"])
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_no_policy_and_no_guess_changes_the_output(
    policy: str, prefetch: str, tiny: str, tiny_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits too, the second time with a cache that is warmed while the disk is slow."""
    use_reader(monkeypatch, SlowReader)
    logits, tokens = reference(tiny_home.parent / "checkpoint", torch.bfloat16)
    for experts in ("2", "40%"):
        for _ in range(2):
            loaded = moeinf.load(tiny, experts=experts, policy=policy, prefetch=prefetch, kernels="torch")
            with loaded as engine, torch.inference_mode():
                assert torch.equal(engine.model(PROMPT).logits, logits)
                engine.generation_config.eos_token_id = None
                sampling = moeinf.Sampling(max_tokens=NEW_TOKENS, temperature=0)
                assert list(engine.session().generate(PROMPT[0].tolist(), sampling).tokens) == tokens
                engine.runtime.cache.check_integrity()


def test_the_list_of_families_in_the_docs_is_this_one() -> None:
    script = runpy.run_path(str(Path(__file__).parents[1] / "scripts/generate_family_docs.py"))
    page = (Path(__file__).parents[1] / "docs/families.md").read_text(encoding="utf-8")
    assert page == script["render"](), "docs/families.md is stale: run scripts/generate_family_docs.py"
