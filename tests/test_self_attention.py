"""All of a layer's attention natively, against the module's own: to the last bit where it is taken, and not taken where
it is another one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.models.olmoe import OlmoeConfig, modeling_olmoe
from transformers.models.qwen3_moe import Qwen3MoeConfig, modeling_qwen3_moe

from families import make_model
from moeinf import hooks
from moeinf.kernels.attention import NativeAttention
from moeinf.kernels.dense import speed_up
from moeinf.kernels.native import NativePool
from moeinf.kernels.self_attention import NativeSelfAttention
from moeinf.kvcache import make_cache
from moeinf.metamodel import CACHE
from test_native import LIBRARY, TORCH_S

pytestmark = [
    pytest.mark.skipif(TORCH_S is None, reason="torch may add in another order on such a processor"),
    pytest.mark.filterwarnings("ignore"),  # what transformers says about families of its
]

SIZES: dict[str, Any] = {"hidden_size": 256, "head_dim": 64}
"""The library knows heads of 16 numbers and more, and matrices of more than 4096."""

WHOLE = {
    "aria_text", "dots1", "exaone_moe", "glm4_moe", "granitemoe", "granitemoeshared", "hy_v3", "kolibri1", "mellum",
    "minimax_m2", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "solar_open",
}  # fmt: skip
"""The families of which some layers are taken whole."""

OTHERS = {"cohere2_moe", "ernie4_5_moe", "flex_olmo", "gpt_oss", "hunyuan_v1_moe", "lfm2_moe", "qwen3_next"}
"""They turn pairs of numbers, have sinks, gates, or other parts or names."""


@pytest.fixture
def pool() -> Iterator[NativePool]:
    opened = NativePool(2, TORCH_S, LIBRARY)
    is_taken = isinstance(speed_up_copy(make_attention(), opened).forward, NativeSelfAttention)
    if is_taken:
        yield opened
    opened.close()
    if not is_taken:
        pytest.skip("torch adds in another order on this processor")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens in the cache, for every time that the library attended for a model, and not on trial."""
    counts: list[int] = []
    compute: Any = NativeSelfAttention._compute

    def count(native: NativeSelfAttention, **named: Any) -> torch.Tensor | None:
        output: torch.Tensor | None = compute(native, **named)
        if output is not None:
            counts.append(native._what.tokens)
        return output

    monkeypatch.setattr(NativeSelfAttention, "_compute", count)
    return counts


def speed_up_copy(model: PreTrainedModel, pool: NativePool) -> PreTrainedModel:
    native = copy.deepcopy(model)
    speed_up(native, pool)
    hooks.attend(native, NativeAttention(pool))
    return native


def hold_the_same(model: Any, native: Any, pieces: list[int], context: int = 256) -> None:
    """Both give the same logits for pieces of so many tokens, one after the other."""
    config = model.config.get_text_config(decoder=True)
    caches: list[Any] = [DynamicCache(config=config), make_cache(config, context)]
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for tokens in pieces:
            ids = torch.randint(4, 100, (1, tokens), generator=generator)
            theirs, ours = (
                each(input_ids=ids, use_cache=True, **{CACHE: cache}).logits
                for each, cache in zip((model, native), caches, strict=True)
            )
            assert torch.isfinite(theirs).all()
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", sorted(WHOLE | OTHERS))
def test_logits_are_the_familys(family: str, pool: NativePool, asked: list[int]) -> None:
    model = make_model(family, **SIZES)
    native = speed_up_copy(model, pool)
    hold_the_same(model, native, [9, *[1] * 20, 3, *[1] * 10])
    assert bool(asked) == (family in WHOLE)
    assert 10 in asked or not asked


def test_torch_attends_where_the_library_does_not(
    pool: NativePool, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def knows(*_: object) -> bool:
        return False

    monkeypatch.setattr(NativeAttention, "knows", knows)
    for family in ("olmoe", "phimoe", "qwen3_moe"):
        model = make_model(family, **SIZES)
        hold_the_same(model, speed_up_copy(model, pool), [9, *[1] * 20, 3, *[1] * 10])
        assert asked
        asked.clear()


@pytest.mark.parametrize("window", [12, 40])
def test_windows_move(window: int, pool: NativePool, asked: list[int]) -> None:
    model = make_model("mixtral", **SIZES, sliding_window=window)
    hold_the_same(model, speed_up_copy(model, pool), [5, *[1] * 60], context=128)
    assert max(asked) == window - 1  # then there is a mask


def test_heads_may_be_turned_in_part(pool: NativePool, asked: list[int]) -> None:
    model = make_model("glm4_moe", **SIZES)
    assert model.config.rope_parameters["partial_rotary_factor"] == 0.5
    hold_the_same(model, speed_up_copy(model, pool), [5, *[1] * 10])
    assert asked


def attend(module: Any, x: torch.Tensor, cache: Any = None, **more: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    angles = tuple(torch.randn(1, x.shape[1], 64, generator=generator).bfloat16() for _ in range(2))
    named = {"hidden_states": x, "position_embeddings": angles, "attention_mask": None, CACHE: cache}
    output: torch.Tensor = module(**{**named, **more})[0]
    return output


def make_attention(config: Any = Qwen3MoeConfig, **more: Any) -> Any:
    made = config(
        hidden_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_hidden_layers=1,
        attn_implementation="sdpa",
        **more,
    )
    kind: Any = modeling_olmoe.OlmoeAttention if config is OlmoeConfig else modeling_qwen3_moe.Qwen3MoeAttention
    torch.manual_seed(0)
    return kind(made, 0).to(torch.bfloat16).eval()


def test_what_it_does_not_take_is_the_modules(pool: NativePool, asked: list[int]) -> None:
    module = make_attention()
    native = speed_up_copy(module, pool)
    one, two = (torch.randn(1, tokens, 256).bfloat16() for tokens in (1, 2))
    mask = torch.zeros(1, 1, 1, 7).bfloat16()

    def filled(make: Any) -> Any:
        cache = make()
        cache.update(*(torch.ones(1, 2, 6, 64).bfloat16() for _ in range(2)), 0)
        return cache

    def ours() -> Any:
        return make_cache(module.config, 32)

    def theirs() -> Any:
        return DynamicCache(config=module.config)

    with torch.inference_mode():
        for x, make, more in (
            (one, lambda: None, {}),
            (two, lambda: filled(ours), {}),
            (one, lambda: filled(theirs), {}),
            (one, ours, {}),  # nothing is held yet
            (one, lambda: filled(ours), {"attention_mask": mask}),
            (one, lambda: filled(ours), {"dropout_scale": 1.0}),
        ):
            assert torch.equal(attend(native, x, make(), **more), attend(module, x, make(), **more))
            assert not asked
        expected = attend(module, one, filled(ours))
        assert torch.equal(attend(native, one, filled(ours), position_ids=torch.ones(1, 1), softcap=None), expected)
        assert asked == [7]
        pool.close()
        assert torch.equal(attend(native, one, filled(ours)), expected)
        assert asked == [7]


def test_a_limit_that_few_states_reach_is_found(pool: NativePool, asked: list[int]) -> None:
    for limit, is_taken in ((None, True), (5.0, False)):
        module = make_attention(OlmoeConfig, clip_qkv=limit)
        native = speed_up_copy(module, pool)
        x, asked[:] = torch.randn(1, 1, 256).bfloat16() / 100, []
        caches: list[Any] = [make_cache(module.config, 32) for _ in range(2)]
        for cache in caches:
            cache.update(*(torch.ones(1, 2, 6, 64).bfloat16() for _ in range(2)), 0)
        with torch.inference_mode():
            assert torch.equal(attend(native, x, caches[0]), attend(module, x, caches[1]))
        assert bool(asked) == is_taken


def test_modules_that_differ_in_a_setting_are_tried_apart(pool: NativePool, asked: list[int]) -> None:
    model = make_model("qwen3_moe", **SIZES)
    first, second, *_ = (layer.self_attn for layer in model.model.layers)
    first.scaling = 0.5

    class Doubled(type(second)):  # type: ignore[misc]  # of a class that is only known here
        def forward(
            self, hidden_states: Any, position_embeddings: Any, attention_mask: Any, past_key_values: Any, **more: Any
        ) -> Any:
            return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **more)[
                0
            ] * 2, None

    second.__class__ = Doubled
    hold_the_same(model, speed_up_copy(model, pool), [5, *[1] * 5])
    layers = len(model.model.layers)
    assert len(asked) == 5 * (layers - 1)


@pytest.mark.parametrize("part", ["self_attn", "self_attn.k_norm", "self_attn.o_proj"])
def test_hooks_are_called(part: str, pool: NativePool, asked: list[int]) -> None:
    """Those of attention's parts, too: what they do with an output is done."""
    model = make_model("qwen3_moe", **SIZES)
    native = speed_up_copy(model, pool)
    calls = [0, 0]
    for number, each in enumerate((model, native)):
        layer: Any = each.model.layers[1]

        def double(_module: Any, _args: Any, output: Any, number: int = number) -> Any:
            calls[number] += 1
            return output * 2 if isinstance(output, torch.Tensor) else (output[0] * 2, *output[1:])

        layer.get_submodule(part).register_forward_hook(double)
    hold_the_same(model, native, [5, *[1] * 3])
    assert calls == [4, 4]
    assert 6 in asked


def test_a_layer_that_cannot_grow_says_so() -> None:
    config: Any = Qwen3MoeConfig(num_hidden_layers=1)
    cache: Any = make_cache(config, 4)
    (layer,) = cache.layers
    assert layer.grow() is None
    cache.update(*(torch.ones(1, 2, 3, 16) for _ in range(2)), 0)
    keys, _ = layer.grow()
    assert keys.shape == (1, 2, 4, 16)
    assert cache.get_seq_length() == 4
    assert layer.grow() is None
    assert cache.get_seq_length() == 4
