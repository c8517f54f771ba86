"""Keys and values that are kept, of families whose KV cache has latents in their place: the logits are the family's to
the last bit, whatever becomes of the cache meanwhile.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Cache, DynamicCache, PreTrainedModel

import moeinf
from families import make_checkpoint, make_model
from moeinf import hooks
from moeinf.generation import Sampling
from moeinf.kernels import NativeLinear
from moeinf.kernels.attention import NativeAttention
from moeinf.kernels.dense import speed_up
from moeinf.kernels.native import NativePool
from moeinf.kvcache import make_cache
from moeinf.latents import _Expanded, keep_expanded
from moeinf.metamodel import CACHE
from moeinf.pull import pull
from moeinf.store import Store
from test_native import LIBRARY, TORCH_S

pytestmark = [
    pytest.mark.skipif(TORCH_S is None, reason="torch may add in another order on such a processor"),
    pytest.mark.filterwarnings("ignore"),  # what transformers says about families of its
]

SIZES: dict[str, Any] = {"hidden_size": 256, "kv_lora_rank": 64, "v_head_dim": 32, "moe_intermediate_size": 64}
"""So that the projection of latents has more than 4096 numbers, and experts are native with AMX, too."""

KEPT = {"axk1", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_linear"}
OTHERS = {"axk2", "deepseek_v32", "glm_moe_dsa", "hy_v4"}
"""Their KV cache has layers of other kinds, for an indexer's keys."""
CONTEXT = 128


class Pair:
    """A model and its twin that keeps what it expands, each with a cache, which are given the same tokens."""

    def __init__(self, family: str, pool: NativePool, tokens: int = CONTEXT) -> None:
        self.model = make_model(family, **SIZES)
        self.twin: Any = copy.deepcopy(self.model)
        speed_up(self.twin, pool)
        hooks.attend(self.twin, NativeAttention(pool))
        heads: list[Any] = [module for module in self.twin.modules() if hasattr(module, "expand_kv")]
        config: Any = self.model.config
        per_head = config.qk_nope_head_dim + config.qk_rope_head_dim + SIZES["v_head_dim"]
        token_bytes = len(heads) * config.num_attention_heads * per_head * 2
        assert keep_expanded(self.twin, tokens * token_bytes) == tokens
        self.expanded: list[int] = []
        for module in heads:
            native = module.expand_kv
            native._expand = self._count(native._expand)
        self.generator = torch.Generator().manual_seed(0)

    def _count(self, expand: Any) -> Any:
        def counting(latents: torch.Tensor, turned: torch.Tensor) -> Any:
            self.expanded.append(latents.shape[2])
            return expand(latents, turned)

        return counting

    def caches(self) -> list[Cache]:
        config = self.model.config.get_text_config(decoder=True)
        return [DynamicCache(config=config), make_cache(config, CONTEXT)]

    def go_on(self, caches: list[Cache], tokens: int, mode: Any = torch.inference_mode) -> None:
        ids = torch.randint(4, 100, (1, tokens), generator=self.generator)
        with mode():
            theirs, ours = (
                each(input_ids=ids, use_cache=True, **{CACHE: cache}).logits
                for each, cache in zip((self.model, self.twin), caches, strict=True)
            )
        assert torch.isfinite(theirs).all()
        assert torch.equal(ours, theirs)


@pytest.fixture
def pool() -> Iterator[NativePool]:
    opened = NativePool(2, TORCH_S, LIBRARY)
    yield opened
    opened.close()


@pytest.mark.parametrize("family", sorted(KEPT | OTHERS))
def test_logits_are_the_familys(family: str, pool: NativePool) -> None:
    pair = Pair(family, pool)
    caches = pair.caches()
    for tokens in (9, *[1] * 20, 3, *[1] * 5, 70, 1):
        pair.expanded.clear()
        pair.go_on(caches, tokens)
        assert set(pair.expanded) == ({tokens} if family in KEPT else {caches[0].get_seq_length()})


def test_what_is_cut_off_and_written_over_is_expanded_anew(pool: NativePool) -> None:
    pair = Pair("deepseek_v2", pool)
    caches: Any = pair.caches()
    pair.go_on(caches, 20)
    for removed, added in ((5, 5), (12, 1), (3, 8)):
        for cache in caches:
            cache.crop(-removed)
        pair.expanded.clear()
        pair.go_on(caches, added)
        assert set(pair.expanded) == {added}
    for cache in caches:
        cache.reset()
    pair.go_on(caches, 11)
    assert pair.expanded[-1] == 11


def test_conversations_do_not_mix(pool: NativePool) -> None:
    pair = Pair("deepseek_v3", pool)
    first, second = pair.caches(), pair.caches()
    for caches in (first, second):
        pair.go_on(caches, 10)
    pair.expanded.clear()
    pair.go_on(first, 1)
    assert set(pair.expanded) == {11}
    pair.expanded.clear()
    pair.go_on(first, 1)
    assert set(pair.expanded) == {1}
    pair.go_on(second, 1)
    del second
    pair.go_on(pair.caches(), 11)
    pair.go_on(pair.caches(), 12, torch.no_grad)


def test_what_there_is_no_room_for_is_expanded_each_time(pool: NativePool) -> None:
    pair = Pair("glm4_moe_lite", pool, tokens=12)
    caches: Any = pair.caches()
    for tokens, expanded in ((11, 11), (1, 1), (1, 13), (1, 14)):
        pair.expanded.clear()
        pair.go_on(caches, tokens)
        assert set(pair.expanded) == {expanded}
    for cache in caches:
        cache.crop(-5)
    pair.expanded.clear()
    pair.go_on(caches, 1)
    assert set(pair.expanded) == {1}  # the first nine are as they were


def test_another_cache_and_none_are_the_familys(pool: NativePool) -> None:
    pair = Pair("deepseek_v2", pool)
    config = pair.model.config.get_text_config(decoder=True)
    pair.go_on([DynamicCache(config=config), DynamicCache(config=config)], 7)
    ids = torch.randint(4, 100, (2, 7), generator=pair.generator)
    with torch.inference_mode():
        for each in (ids, ids[:1]):
            assert torch.equal(pair.model(input_ids=each).logits, pair.twin(input_ids=each).logits)
    pair.go_on(pair.caches(), 7)


def test_sequences_side_by_side_are_the_familys(pool: NativePool) -> None:
    pair = Pair("deepseek_v2", pool)
    alone, together = pair.caches(), pair.caches()
    ids = torch.randint(4, 100, (2, 7), generator=pair.generator)
    for caches, given in ((alone, ids[:1]), (together, ids), (together, ids)):
        with torch.inference_mode():
            theirs, ours = (
                each(input_ids=given, use_cache=True, **{CACHE: cache}).logits
                for each, cache in zip((pair.model, pair.twin), caches, strict=True)
            )
        assert torch.equal(ours, theirs)


def test_latents_that_the_cache_does_not_hold_are_nobody_s(pool: NativePool) -> None:
    pair = Pair("deepseek_v2", pool)
    caches: Any = pair.caches()
    pair.go_on(caches, 9)
    native = next(module.expand_kv for module in pair.twin.modules() if hasattr(module, "expand_kv"))
    native._cache, layer = caches[1], caches[1].layers[0]
    assert native._find_layer(layer.keys) is layer
    for latents in (layer.keys.clone(), layer.keys[:, :, :-1], layer.keys[:, :, 1:]):
        assert native._find_layer(latents) is None


def test_an_error_in_attention_leaves_no_cache_behind(pool: NativePool) -> None:
    pair = Pair("deepseek_v2", pool)
    caches = pair.caches()
    pair.go_on(caches, 9)
    attention = next(module for module in pair.twin.modules() if hasattr(module, "expand_kv"))

    def fail(*_: object) -> None:
        raise MemoryError

    attention.o_proj.forward = fail
    with torch.inference_mode(), pytest.raises(MemoryError):
        pair.twin(input_ids=torch.tensor([[5]]), use_cache=True, **{CACHE: caches[1]})
    assert attention.expand_kv._cache is None


@pytest.mark.parametrize("family", sorted(KEPT | OTHERS))
def test_the_plan_has_room_for_the_whole_context(family: str, tmp_path: Path) -> None:
    make_checkpoint(family, tmp_path, **SIZES)
    pull(str(tmp_path), store=Store(), name=family)
    answers = []
    for kernels in ("auto", "torch"):
        with moeinf.load(family, kernels=kernels, context=100) as engine:
            kept = [module.expand_kv for module in engine.model.modules() if hasattr(module, "expand_kv")]
            rooms = [native._capacity for native in kept if isinstance(native, _Expanded)]
            assert rooms == ([100] * len(kept) if kernels == "auto" and family in KEPT else [])
            assert bool(engine.plan.expanded) == bool(rooms)
            session = engine.session()
            answers.append(session.generate(range(4, 60), Sampling(max_tokens=30, temperature=0)).tokens)
            assert all(native._memory is not None for native in kept if isinstance(native, _Expanded))
            session.clear()
            assert all(native._memory is None for native in kept if isinstance(native, _Expanded))
    assert answers[0] == answers[1]


def test_nothing_is_kept_where_there_is_no_room_or_no_such_attention(pool: NativePool) -> None:
    def twin(family: str, **sizes: Any) -> PreTrainedModel:
        model = make_model(family, **sizes)
        speed_up(model, pool)
        return model

    assert keep_expanded(twin("deepseek_v2", **SIZES), 100) == 0
    assert keep_expanded(twin("qwen3_moe"), 1 << 30) == 0
    assert keep_expanded(make_model("deepseek_v2", **SIZES), 1 << 30) == 0  # torch may add otherwise
    is_kept = keep_expanded(twin("deepseek_v2", **{**SIZES, "kv_lora_rank": 1040}), 1 << 30) > 0
    assert is_kept == pool.adds_rows_alike(1040), "one row of so wide a matrix may be added up otherwise than many"


def test_nothing_is_kept_of_attention_that_does_not_expand_alike(
    pool: NativePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twin() -> PreTrainedModel:
        model = make_model("deepseek_v2", **SIZES)
        speed_up(model, pool)
        return model

    model: Any = twin()
    assert keep_expanded(twin(), 1 << 30) > 0
    for module in model.modules():
        if hasattr(module, "expand_kv"):
            expand = module.expand_kv
            module.expand_kv = lambda latents, turned, expand=expand: [
                states * latents.shape[2] for states in expand(latents, turned)
            ]
    assert keep_expanded(model, 1 << 30) == 0
    monkeypatch.setattr(NativeLinear, "adds_rows_alike", False)
    assert keep_expanded(twin(), 1 << 30) == 0
