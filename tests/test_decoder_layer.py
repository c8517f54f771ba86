"""Whole decoder layers natively, against the layers' own code: to the last bit where they are taken, not taken where
they are others, and told of as if each part had been called.
"""

from __future__ import annotations

import ctypes
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.models.qwen3_moe import modeling_qwen3_moe

import moeinf
from engines import Load, engines_of, pulled
from moeinf.engine import Engine
from moeinf.errors import MoeinfError
from moeinf.forecast import WHOLE_LAYERS
from moeinf.gate import GatePredictor
from moeinf.kernels import decoder_layer
from moeinf.kernels.attending import NativeAttending
from moeinf.kernels.attention import NativeAttention
from moeinf.kernels.decoder_layer import DecoderLayers, LayerRun, NativeDecoderLayer
from moeinf.kernels.feed_forward import TIED, Choosing
from moeinf.kernels.native import NativePool
from moeinf.kvcache import make_cache
from moeinf.metamodel import CACHE
from moeinf.token_forward import TokenForward
from readers import SlowReader, use_reader
from test_native import LIBRARY, TORCH_S

SHARES = ["of all", "normalised", "of chosen"]
AWAY = decoder_layer._AWAY

pytestmark = [
    pytest.mark.skipif(TORCH_S is None, reason="torch may add in another order on such a processor"),
    pytest.mark.filterwarnings("ignore"),  # what transformers says about families of its
]

EXPERTS = {"num_experts": 32}
MLA = {"kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32, "head_dim": 32}
SIZES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"n_routed_experts": 32, **MLA},
    "deepseek_v3": {"n_routed_experts": 32, **MLA},
    "ernie4_5_moe": {},
    "glm4_moe": {"n_routed_experts": 32},
    "gpt_oss": {},
    "hunyuan_v1_moe": {},
    "lfm2_moe": {},
    "mellum": EXPERTS,
    "phimoe": {},
    "mixtral": {"num_local_experts": 32},
    "olmoe": EXPERTS,
    "qwen3_moe": EXPERTS,
    "granitemoe": {"num_local_experts": 32, "residual_multiplier": 0.22},
    "minimax_m2": {"num_local_experts": 32},
    "qwen2_moe": EXPERTS,
    "qwen3_5_moe_text": EXPERTS,
    "qwen3_next": EXPERTS,
}
LEFT = {"phimoe"}
"""The families whose layers are left alone: their norms are unknown to the library, or in other places."""

SAMPLING = moeinf.Sampling(max_tokens=24, temperature=0)
PROMPT = [5, 17, 30, 8, 99, 41]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return pulled(
        tmp_path_factory.mktemp("models"), lambda family: {"hidden_size": 256, "head_dim": 64, **SIZES[family]}
    )


@pytest.fixture
def load(models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    yield from engines_of(models, monkeypatch, "qwen3_moe")


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What `moe_decode` found for models, and not on trial, a number per MoE layer: 0 where it did all."""
    results: list[int] = []
    decode: Any = LayerRun.decode
    attempt: Any = NativeDecoderLayer._try

    def count(run: LayerRun, state: torch.Tensor, begin: int, end: int, **named: bool) -> tuple[int, int]:
        result, done = decode(run, state, begin, end, **named)
        results.extend(0 for layer in run._layers[begin : begin + done] if layer and layer._feed.experts is not None)
        results.extend([result] * (result != 0))
        return result, done

    def leave_out(*args: Any) -> Any:
        before = len(results)
        choosing = attempt(*args)
        del results[before:]
        return choosing

    monkeypatch.setattr(LayerRun, "decode", count)
    monkeypatch.setattr(NativeDecoderLayer, "_try", leave_out)
    return results


def logits(engine: Engine, pieces: list[int]) -> list[torch.Tensor]:
    """Those of pieces of so many tokens, one after the other."""
    config = engine.model.config.get_text_config(decoder=True)
    cache, generator = make_cache(config, 128), torch.Generator().manual_seed(0)
    model: Any = engine.model
    with torch.inference_mode():
        pieces_of_ids = [torch.randint(4, 100, (1, tokens), generator=generator) for tokens in pieces]
        return [model(input_ids=ids, use_cache=True, **{CACHE: cache}).logits for ids in pieces_of_ids]


def hold_the_same(ours: Engine, theirs: Engine, pieces: list[int]) -> None:
    for each, other in zip(logits(ours, pieces), logits(theirs, pieces), strict=True):
        assert torch.isfinite(other).all()
        assert torch.equal(each, other)


def does_all(engine: Engine) -> bool:
    """Whether the library attends, and chooses, in all layers, and nobody is asked for anything in between."""
    layers = [layer.forward for layer in engine.model.get_submodule("model.layers").children()]
    return all(
        isinstance(layer, NativeDecoderLayer)
        and isinstance(layer.attention, NativeAttending)
        and (layer._feed.experts is None or (layer._choosing and layer._choosing.lanes and layer._feed.share is None))
        for layer in layers
    )


PIECES = [9, *[1] * 20, 3, *[1] * 10]


@pytest.mark.parametrize("family", sorted(SIZES))
def test_logits_are_the_familys(family: str, load: Load, found: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    use_reader(monkeypatch, SlowReader)
    theirs = load(family, kernels="torch")
    for experts, expected in (("6", AWAY), ("50%", AWAY), ("100%", 0)):
        ours = load(family, experts=experts)
        hold_the_same(ours, theirs, PIECES)
        hold_the_same(ours, theirs, PIECES)
        ours.runtime.cache.check_integrity()
        assert (expected in found) == (family not in LEFT)
        found.clear()
    logits(ours, [3, 1])
    assert does_all(ours) == (family in WHOLE_LAYERS)


def test_torch_attends_where_the_library_does_not(
    load: Load, found: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def knows(*_: object) -> bool:
        return False

    theirs = load(kernels="torch")
    monkeypatch.setattr(NativeAttention, "knows", knows)
    hold_the_same(load(experts="100%"), theirs, PIECES)
    assert 0 in found


def test_everybody_is_told_the_same(load: Load, found: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters, what is learned of requests, and whom the policy would evict: by layers, and by parts."""

    def run(engine: Engine) -> list[Any]:
        seen: list[Any] = []
        session = engine.session()
        for prompt in (PROMPT, [*PROMPT, 3, 7]):
            session.generate(prompt, moeinf.Sampling(max_tokens=16, temperature=0))
            seen += [engine.runtime.decode, engine.runtime.prefill]
        engine.runtime.begin_request(0)
        seen += [engine.runtime.counter.collection.popularity().tolist(), engine.runtime.cache.lend(20)]
        return seen

    for experts in ("40%", "100%"):
        ours = run(load(experts=experts))
        assert 0 in found
        with monkeypatch.context() as patch:
            patch.setattr(DecoderLayers, "find", lambda *_: None)
            found.clear()
            assert run(load(experts=experts)) == ours
            assert not found


def test_slots_may_be_lent_between_tokens(load: Load, found: list[int]) -> None:
    theirs, ours = load(kernels="torch"), load(experts="100%")
    chance = random.Random(0)

    def lend(*_: object) -> None:
        ours.runtime.lend(chance.randrange(40))

    hold_the_same(ours, theirs, PIECES)
    ours.model.register_forward_pre_hook(lend)
    hold_the_same(ours, theirs, PIECES)
    assert {0, AWAY} <= set(found)
    ours.runtime.cache.check_integrity()


@pytest.mark.parametrize("breaks_ties", [True, False])
def test_experts_that_are_alike(
    breaks_ties: bool, load: Load, found: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library takes those that torch takes, or leaves them to torch where that does it in another way."""
    if not breaks_ties:
        router: Any = Choosing.router
        monkeypatch.setattr(Choosing, "router", lambda *args: without_ties(router(*args)))
    ours, theirs = load(experts="100%"), load(kernels="torch")
    for engine in (ours, theirs):
        for layer in engine.manifest.layers:
            block: Any = engine.model.get_submodule(layer.module.rpartition(".")[0])
            with torch.no_grad():
                block.gate.weight[8:24] = block.gate.weight[:8].repeat(2, 1)
    hold_the_same(ours, theirs, PIECES)
    assert found
    assert (TIED in found) == (not breaks_ties)


def without_ties(router: Any) -> Any:
    router.breaks_ties = 0
    return router


@pytest.mark.parametrize(
    "part", ["self_attn", "self_attn.k_norm", "post_attention_layernorm", "mlp", "mlp.gate", "mlp.experts"]
)
def test_hooks_are_called(part: str, load: Load, found: list[int]) -> None:
    """Those of the layer's parts, too: what they do with an output is done."""
    engines = load(experts="100%"), load(kernels="torch")
    calls = [0, 0]
    for number, engine in enumerate(engines):
        layer: Any = engine.model.get_submodule(engine.manifest.layers[1].module.rpartition(".mlp")[0])

        def double(_module: Any, _args: Any, output: Any, number: int = number) -> Any:
            calls[number] += 1
            return output * 2 if isinstance(output, torch.Tensor) else (output[0] * 2, *output[1:])

        layer.get_submodule(part).register_forward_hook(double)
    hold_the_same(*engines, [5, *[1] * 3])
    assert calls == [4, 4]
    assert found


def test_who_watches_is_told_before_experts_are_computed(load: Load, found: list[int]) -> None:
    engine = load(experts="100%")
    logits(engine, PIECES)
    assert found
    found.clear()
    seen: list[int] = []
    engine.runtime.observer = lambda layer, *_: seen.append(layer)
    logits(engine, [5, 1])
    assert seen == 2 * list(range(len(engine.manifest.layers)))
    assert set(found) == {AWAY}


@pytest.mark.parametrize("experts", ["20%", "100%"])
def test_who_only_watches_sees_the_same(
    experts: str, load: Load, found: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The router that is asked early: tokens' states on their way, and what experts add; and what it makes of them."""
    seen: list[Any] = []
    for name in ("_begin", "_enter", "_keep_added"):
        told: Any = getattr(GatePredictor, name)

        def tell(self: GatePredictor, *args: Any, name: str = name, told: Any = told) -> None:
            tensors = [
                each for each in (*args, *(args[1] if name == "_begin" else ())) if isinstance(each, torch.Tensor)
            ]
            seen.append((name, [each.tolist() for each in tensors]))
            told(self, *args)

        monkeypatch.setattr(GatePredictor, name, tell)

    def run(engine: Engine) -> list[Any]:
        seen.clear()
        session = engine.session()
        tokens = [session.generate(prompt, SAMPLING).tokens for prompt in (PROMPT, [*PROMPT, 3, 7])]
        prefetch = engine.runtime.prefetch  # what was there in time is another matter
        return [*seen, tokens, engine.runtime.decode.requests, prefetch.named, prefetch.right]

    ours = run(load(experts=experts, prefetch="gate"))
    assert found
    assert set(found) <= {AWAY, TIED}
    assert len(seen) == 2 * 24 * (1 + 2 * 2)
    monkeypatch.setattr(DecoderLayers, "find", lambda *_: None)
    monkeypatch.setattr(TokenForward, "find", lambda *_: None)
    found.clear()
    assert run(load(experts=experts, prefetch="gate")) == ours
    assert not found


def test_a_layer_that_does_more_is_left_alone(load: Load, found: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    forward = modeling_qwen3_moe.Qwen3MoeDecoderLayer.forward
    block = modeling_qwen3_moe.Qwen3MoeSparseMoeBlock.forward

    def scaled(self: Any, hidden_states: torch.Tensor, **named: Any) -> torch.Tensor:
        return forward(self, hidden_states, **named) * 0.5

    def doubled(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        return block(self, hidden_states) * 2

    def asked_twice(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        return block(self, hidden_states) + block(self, hidden_states)

    for kind, other in (("DecoderLayer", scaled), ("SparseMoeBlock", doubled), ("SparseMoeBlock", asked_twice)):
        with monkeypatch.context() as patch:
            patch.setattr(getattr(modeling_qwen3_moe, f"Qwen3Moe{kind}"), "forward", other)
            hold_the_same(load(experts="100%"), load(kernels="torch"), PIECES)
            assert not found


def test_another_kv_cache_and_more_than_a_token_are_the_layers(load: Load, found: list[int]) -> None:
    engine = load(experts="100%")
    logits(engine, PIECES)
    found.clear()
    model: Any = engine.model
    with torch.inference_mode():
        for ids in ([[5, 6]], [[5]]):
            model(input_ids=torch.tensor(ids), use_cache=True, **{CACHE: DynamicCache(config=model.config)})
    assert not found


def test_ctrl_c_waits_for_the_end_of_the_token(load: Load, found: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load(experts="100%")
    expected = engine.session().generate(PROMPT, SAMPLING).tokens
    calls = tokens = 0
    decode: Any = LayerRun.decode

    def interrupted(*args: Any, **named: bool) -> tuple[int, int]:
        nonlocal calls
        calls += 1
        if calls == 3:
            signal.raise_signal(signal.SIGINT)
        result: tuple[int, int] = decode(*args, **named)
        return result

    def count(_token: int) -> None:
        nonlocal tokens
        tokens += 1

    session = engine.session()
    with monkeypatch.context() as patch:
        patch.setattr(LayerRun, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.generate(PROMPT, SAMPLING, on_token=count)
    assert 3 <= calls < len(expected)
    assert tokens < len(expected)
    assert session.generate(PROMPT, SAMPLING).tokens == expected
    engine.runtime.cache.check_integrity()


def test_after_the_end_it_says_so(load: Load) -> None:
    engine = load(experts="100%")
    logits(engine, PIECES)
    engine.close()
    with pytest.raises(MoeinfError, match="closed"):
        logits(engine, [1])


@pytest.mark.parametrize(
    ("count", "top_k"),
    [(4, 2), (8, 2), (9, 3), (32, 4), (60, 6), (64, 8), (72, 9), (160, 6), (512, 10), (64, 5), (64, 7), (64, 15)],
)
@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("breaks_ties", [True, False])
def test_a_choice_is_torchs(
    count: int, top_k: int, shares: str, dtype: torch.dtype, breaks_ties: bool, pool: NativePool
) -> None:
    generator = torch.Generator().manual_seed(count)
    results = []
    for spread, step in product((0.01, 1.0, 5.0, 50.0), (2**-9, 0.25)):
        for _ in range(50):
            row = ((torch.randn(1, count, generator=generator) * spread / step).round() * step).bfloat16()
            choosing = Choosing(TORCHS_LANES, SHARES.index(shares), breaks_ties, dtype)
            result, chosen, weights = choose(pool, row, top_k, choosing)
            wide = row.float() if shares == "of chosen" else F.softmax(row, dtype=torch.float32, dim=-1)
            best, _ = wide.topk(top_k + 1)
            knows = breaks_ties and top_k * 64 > count
            assert (result == TIED) == (bool(best[0, -1] == best[0, -2]) and not knows)
            results.append(result)
            if result == 0:
                wanted, index = wide.topk(top_k)
                if shares == "of chosen":
                    wanted = F.softmax(wanted, dim=-1)
                if shares == "normalised":
                    wanted /= wanted.sum(-1, keepdim=True)
                assert sorted(chosen[0].tolist()) == sorted(index[0].tolist())
                assert torch.equal(weights, wanted.to(dtype).float())
    assert 0 in results


TORCHS_LANES = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8


def choose(pool: NativePool, row: torch.Tensor, top_k: int, choosing: Any) -> tuple[int, torch.Tensor, torch.Tensor]:
    router = choosing.router(row.shape[1], top_k)
    chosen, weights, scores = torch.zeros(1, top_k, dtype=torch.int64), torch.zeros(1, top_k), torch.empty(row.shape)
    addresses = (x.data_ptr() for x in (row, scores, chosen, weights))
    return pool.lib.moe_route(ctypes.addressof(router), *addresses), chosen, weights


def test_a_choice_that_is_no_choice_is_left_to_torch(pool: NativePool) -> None:
    row = torch.tensor([[1.0, 2, 3, 3, 0, 0, 0, 0]]).bfloat16()
    choosing = Choosing(8, 1, False, torch.float32)
    assert choose(pool, row, 1, choosing)[0] == TIED
    assert choose(pool, row, 2, choosing)[0] == 0
    for value in (float("nan"), float("inf"), float("-inf")):
        row[0, 5] = value
        assert choose(pool, row, 2, replace(choosing, breaks_ties=True))[0] == TIED


@pytest.fixture
def pool() -> Iterator[NativePool]:
    opened = NativePool(1, TORCH_S, LIBRARY)
    yield opened
    opened.close()
