"""The forward for one token, against the model's own: to the last bit where it is taken over, left alone where the
model does anything else, or is asked for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.models.qwen3_moe import modeling_qwen3_moe

import moeinf
from engines import Load, engines_of, pulled
from moeinf import generation, hooks
from moeinf.engine import Engine
from moeinf.errors import MoeinfError
from moeinf.kvcache import make_cache, pretend_cache
from moeinf.metamodel import CACHE
from moeinf.token_forward import TokenForward, _Way
from test_native import TORCH_S

pytestmark = [
    pytest.mark.skipif(TORCH_S is None, reason="torch may add in another order on such a processor"),
    pytest.mark.filterwarnings("ignore"),  # what transformers says about families of its
]

TAKEN = [
    "deepseek_v2",
    "ernie4_5_moe",
    "glm4_moe",
    "granitemoe",
    "mellum",
    "mixtral",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
]
NOT_TAKEN = ["cohere2_moe", "gemma4_text", "gpt_oss", "jamba", "qwen3_next"]
"""With logits times a factor, layers in other places, masks for every token, and state of other kinds."""
SIZES: dict[str, dict[str, Any]] = {
    "granitemoe": {"embedding_multiplier": 3.0, "logits_scaling": 7.0, "residual_multiplier": 0.22},
    "phimoe": {
        "original_max_position_embeddings": 16,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 32,
            "long_factor": [3.0] * 32,
            "short_mscale": 1.1,
            "long_mscale": 1.2,
            "original_max_position_embeddings": 16,
        },
    },
    "qwen3_moe": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, "num_experts": 32},
}
PIECES = [5, *[1] * 12, 3, *[1] * 12]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return pulled(
        tmp_path_factory.mktemp("models"),
        lambda family: {"hidden_size": 256, "head_dim": 64, **SIZES.get(family, {})},
    )


@pytest.fixture
def load(models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    yield from engines_of(models, monkeypatch, "mixtral", experts="100%")


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Behind how many tokens those stood that went through a model here."""
    held: list[int] = []
    put_through: Any = _Way.put_through

    def count(way: _Way, token: Any, *more: Any) -> Any:
        held.append(token.cache.get_seq_length())
        return put_through(way, token, *more)

    monkeypatch.setattr(_Way, "put_through", count)
    return held


def logits(engine: Engine, pieces: list[int], **more: Any) -> list[torch.Tensor]:
    """Those of pieces of so many tokens, one after the other."""
    cache, generator = make_cache(engine.model.config, 128), torch.Generator().manual_seed(0)
    model: Any = engine.model
    with torch.inference_mode():
        ids = [torch.randint(4, 100, (1, tokens), generator=generator) for tokens in pieces]
        return [model(input_ids=each, use_cache=True, **{CACHE: cache}, **more).logits[:, -1] for each in ids]


def hold_the_same(ours: Engine, theirs: Engine, pieces: list[int] = PIECES) -> None:
    for each, other in zip(logits(ours, pieces), logits(theirs, pieces), strict=True):
        assert torch.isfinite(other).all()
        assert torch.equal(each, other)


@pytest.mark.parametrize("family", TAKEN + NOT_TAKEN)
def test_logits_are_the_familys(family: str, load: Load, passed: list[int]) -> None:
    ours, theirs = load(family), load(family, kernels="torch")
    hold_the_same(ours, theirs)
    hold_the_same(ours, theirs)
    assert bool(passed) == (family in TAKEN)


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.3, "seed": 3},
    {"temperature": 0.8, "top_k": 5, "top_p": 0.7, "seed": 4},
    {"temperature": 0, "max_tokens": 1},
]


@pytest.mark.parametrize("family", ["mellum", "qwen3_moe"])
def test_the_loop_makes_the_tokens_that_generate_makes(
    family: str, load: Load, passed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with what the model's own generation config asks for, behind a longer prompt, and until a token stops it."""
    engine = load(family)
    results: list[list[Any]] = [[], []]
    for result in results:
        session = engine.session()
        for penalty, stops in ((1.0, None), (1.3, list(range(40, 60)))):
            engine.generation_config.repetition_penalty, engine.generation_config.eos_token_id = penalty, stops
            for settings in SETTINGS:
                for prompt in ([5, 6, 7], [5, 6, 7, 8] * 6, [5]):
                    seen: list[int] = []
                    answer = session.generate(
                        prompt, moeinf.Sampling(**{"max_tokens": 30, **settings}), on_token=seen.append
                    )
                    assert list(answer.tokens) == seen
                    result.append((seen, answer.finish_reason, session.cached_tokens))
        assert passed
        monkeypatch.setattr(generation, "_loop", lambda *_: None)
    assert results[0] == results[1]
    assert {reason for _, reason, _ in results[0]} == {"length", "stop"}


def test_the_loop_ends_when_it_is_asked_to(load: Load) -> None:
    seen: list[int] = []
    answer = load().session().generate([5, 6], on_token=seen.append, should_stop=lambda: len(seen) == 3)
    assert answer.finish_reason == "interrupted"
    assert len(seen) == 4


@pytest.mark.parametrize("family", ["gpt_oss", "jamba"])
def test_other_models_have_generate_s_loop(family: str, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(generation, "_loop", refuse)
    assert load(family).session().generate([5, 6], moeinf.Sampling(max_tokens=3, temperature=0)).tokens


def test_torchs_kernels_are_the_reference(load: Load) -> None:
    assert not isinstance(load(kernels="torch").model.forward, TokenForward)


def test_tokens_behind_a_full_window_are_the_models(load: Load, passed: list[int]) -> None:
    """There its sliding layers are handed masks."""
    ours, theirs = load("mellum"), load("mellum", kernels="torch")
    window = ours.model.config.sliding_window
    hold_the_same(ours, theirs, [3, *[1] * (2 * window)])
    assert max(passed) == window - 2


def test_a_forward_that_does_more_is_left_alone(load: Load, passed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    causal, base = modeling_qwen3_moe.Qwen3MoeForCausalLM.forward, modeling_qwen3_moe.Qwen3MoeModel.forward

    def doubled(self: Any, *args: Any, **named: Any) -> Any:
        output = causal(self, *args, **named)
        output.logits = output.logits * 2
        return output

    def shifted(self: Any, *args: Any, **named: Any) -> Any:
        output = base(self, *args, **named)
        output.last_hidden_state = output.last_hidden_state + 1
        return output

    def begun_elsewhere(self: Any, input_ids: Any = None, inputs_embeds: Any = None, **named: Any) -> Any:
        assert inputs_embeds is None
        return base(self, inputs_embeds=self.embed_tokens(input_ids) * 1.5, **named)

    def said_more(self: Any, *args: Any, **named: Any) -> Any:
        output = causal(self, *args, **named)
        output.aux_loss = torch.zeros(1)
        return output

    def by_position(self: Any, *args: Any, position_ids: Any = None, **named: Any) -> Any:
        is_far = position_ids is not None and position_ids[0, -1] > 500
        return base(self, *args, position_ids=position_ids // 2 if is_far else position_ids, **named)

    others = [("ForCausalLM", doubled), ("Model", shifted), ("Model", begun_elsewhere), ("ForCausalLM", said_more)]
    for kind, forward in [*others, ("Model", by_position)]:
        with monkeypatch.context() as patch:
            patch.setattr(getattr(modeling_qwen3_moe, f"Qwen3Moe{kind}"), "forward", forward)
            generate = [load("qwen3_moe", kernels=kernels).session() for kernels in ("native", "torch")]
            ours, theirs = (each.generate([5, 6, 7], moeinf.Sampling(max_tokens=6, temperature=0)) for each in generate)
            assert ours.tokens == theirs.tokens
            assert not passed, forward.__name__


def test_what_else_is_asked_for_is_given(load: Load, passed: list[int]) -> None:
    engine = load()
    model: Any = engine.model
    cache, ids = make_cache(model.config, 64), torch.tensor([[5]])

    def ask(**more: Any) -> Any:
        with torch.inference_mode():
            return model(**{"input_ids": ids, "use_cache": True, CACHE: cache, **more})

    ask(input_ids=torch.tensor([[5, 6, 7]]))
    assert ask()[CACHE] is cache
    ask(logits_to_keep=1, attention_mask=torch.ones(1, 5, dtype=torch.int64))
    assert len(passed) == 2
    assert len(ask(output_hidden_states=True).hidden_states) == model.config.num_hidden_layers + 1
    assert ask(output_router_logits=True).router_logits
    assert ask(labels=ids).loss is not None
    assert isinstance(ask(return_dict=False), tuple)
    assert ask(input_ids=None, inputs_embeds=model.get_input_embeddings()(ids)).logits.shape[1] == 1
    assert ask(**{CACHE: DynamicCache(config=model.config)}).logits.shape[1] == 1
    assert ask(input_ids=torch.tensor([[5], [6]]), **{CACHE: DynamicCache(config=model.config)}).logits.shape[0] == 2
    assert ask(use_cache=False, **{CACHE: None}).logits.shape[1] == 1
    assert len(passed) == 2


def test_masks_and_positions_are_heeded(load: Load, passed: list[int]) -> None:
    results = []
    for kernels in ("native", "torch"):
        engine = load(kernels=kernels)
        model: Any = engine.model
        given: dict[str, Any] = {"use_cache": True, CACHE: make_cache(model.config, 64)}
        with torch.inference_mode():
            model(input_ids=torch.tensor([[5, 6, 7, 8]]), **given)
            hidden = torch.tensor([[0, 0, 1, 1, 1]])
            results.append(
                [
                    model(input_ids=torch.tensor([[9]]), attention_mask=hidden, **given).logits,
                    model(input_ids=torch.tensor([[9]]), position_ids=torch.tensor([[40]]), **given).logits,
                ]
            )
    assert all(map(torch.equal, *results))
    assert len(passed) == 1


@pytest.mark.parametrize("part", ["model", "model.embed_tokens", "model.norm", "model.layers.0", "lm_head"])
def test_hooks_are_called(part: str, load: Load, passed: list[int]) -> None:
    engine = load()
    logits(engine, [5, 1])
    assert len(passed) == 1
    calls: list[Any] = []
    handle = engine.model.get_submodule(part).register_forward_pre_hook(lambda *_: calls.append(part))
    logits(engine, [5, 1])
    assert len(calls) == 2
    assert len(passed) == 1
    handle.remove()
    logits(engine, [5, 1])
    assert len(passed) == 2


def test_without_experts_none_are_computed(load: Load, passed: list[int]) -> None:
    engines = [load("qwen3_moe", kernels=kernels) for kernels in ("native", "torch")]
    for engine in engines:
        logits(engine, PIECES)
    before = [engine.runtime.decode.requests for engine in engines]
    results = []
    for engine in engines:
        with hooks.without_experts(engine.experts_modules.values()):
            results.append(logits(engine, [5, 1, 1]))
    assert all(map(torch.equal, *results))
    assert before == [engine.runtime.decode.requests for engine in engines]
    assert passed


def test_the_trial_leaves_nothing_behind(load: Load, passed: list[int]) -> None:
    """Neither in the model's layers, nor in angles that grow with the context."""
    engine = load("qwen3_moe")
    base: Any = engine.model.get_submodule("model")
    forwards = [layer.forward for layer in base.layers]
    logits(engine, [5, 1])
    assert passed
    assert [layer.forward for layer in base.layers] == forwards
    assert base.rotary_emb.max_seq_len_cached <= engine.model.config.max_position_embeddings
    assert "forward" not in vars(base.rotary_emb)


def test_it_is_told_apart_by_nobody(load: Load) -> None:
    """`generate` looks at what a model's forward takes."""
    ours, theirs = load(), load(kernels="torch")
    assert inspect.signature(ours.model.forward) == inspect.signature(theirs.model.forward)


def test_after_the_end_it_says_so(load: Load) -> None:
    engine = load()
    logits(engine, PIECES)
    engine.close()
    with pytest.raises(MoeinfError, match="closed"):
        logits(engine, [1])


def test_a_pretended_cache_says_what_a_full_one_says(load: Load) -> None:
    config = load("mellum").model.config
    for tokens in (1, 5, 8, 20):
        real, pretended = make_cache(config, 64), pretend_cache(config, tokens)
        for layer in range(len(real.layers)):
            real.update(torch.zeros(1, 2, tokens, 8), torch.zeros(1, 2, tokens, 8), layer)
            assert real.get_seq_length(layer) == pretended.get_seq_length(layer) == tokens
            assert real.get_mask_sizes(1, layer) == pretended.get_mask_sizes(1, layer)
