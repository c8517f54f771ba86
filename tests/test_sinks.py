"""Attention with sinks natively, against what transformers computes step by step: to the last bit where it is taken,
and not taken where it is another one.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from families import make_model
from moeinf.kernels.native import DTYPES, NativePool
from moeinf.kernels.sinks import NativeSinks
from test_native import LIBRARY, TORCH_S
from test_self_attention import hold_the_same, speed_up_copy

pytestmark = [
    pytest.mark.skipif(TORCH_S is None, reason="torch may add in another order on such a processor"),
    pytest.mark.filterwarnings("ignore"),  # what transformers says about families of its
]

LANES = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8


@pytest.fixture
def pool() -> Iterator[NativePool]:
    opened = NativePool(2, TORCH_S, LIBRARY)
    is_taken = NativeSinks(eager_attention_forward, opened)._find_lanes(8, 2, 64, False) > 0
    if is_taken:
        yield opened
    opened.close()
    if not is_taken:
        pytest.skip("torch multiplies matrices of bfloat16 in another order on this processor")


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens in the cache, for every time that the library attended, and not on trial."""
    counts: list[int] = []
    compute: Any = NativeSinks._compute
    find_lanes: Any = NativeSinks._find_lanes

    def count(native: Any, query: Any, key: torch.Tensor, *more: Any) -> Any:
        counts.append(key.shape[2])
        return compute(native, query, key, *more)

    def leave_out(native: Any, *shape: Any) -> Any:
        before = len(counts)
        lanes = find_lanes(native, *shape)
        del counts[before:]
        return lanes

    monkeypatch.setattr(NativeSinks, "_compute", count)
    monkeypatch.setattr(NativeSinks, "_find_lanes", leave_out)
    return counts


def module(heads: int = 8, kv_heads: int = 2, seed: int = 0) -> Any:
    sinks = torch.randn(heads, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return SimpleNamespace(sinks=sinks, num_key_value_groups=heads // kv_heads, training=False, _forward_hooks={})


def states(tokens: int, heads: int = 8, kv_heads: int = 2, size: int = 64, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (1, heads, 1, size), (1, kv_heads, tokens, size), (1, kv_heads, tokens, size)
    return [(3 * torch.randn(shape, generator=generator)).bfloat16() for shape in shapes]


def attend(function: Any, about: Any, given: list[torch.Tensor], mask: Any = None, **more: Any) -> torch.Tensor:
    named = {"scaling": 0.125, "dropout": 0.0, "sliding_window": None, "s_aux": about.sinks, **more}
    output, _ = function(about, *given, mask, **named)
    assert isinstance(output, torch.Tensor)
    return output


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(8, 2, 64), (64, 8, 64), (6, 6, 32), (4, 1, 128), (3, 1, 80)])
def test_it_is_what_transformers_computes(
    heads: int, kv_heads: int, size: int, pool: NativePool, computed: list[int]
) -> None:
    native, about = NativeSinks(eager_attention_forward, pool), module(heads, kv_heads)
    lengths = [13, 16, 17, 31, 64, 100, 127, 128, 129, 500, 513, 1100]
    for tokens in lengths:
        given = states(tokens, heads, kv_heads, size, seed=tokens)
        assert torch.equal(attend(native, about, given), attend(eager_attention_forward, about, given))
    assert computed == lengths


@pytest.mark.parametrize("window", [1000, 128, 33, 5])
def test_prompts_are_what_transformers_computes(window: int, pool: NativePool, computed: list[int]) -> None:
    native, about = NativeSinks(eager_attention_forward, pool), module()
    shapes = [(2, 9), (16, 16), (17, 40), (64, 64), (100, 300), (1, 200), (3, 700), (257, 513)]
    for queries, tokens in shapes:
        last = torch.arange(tokens - queries, tokens)[:, None]
        other = torch.arange(tokens)[None]
        shown = (other <= last) & (other > last - window)
        mask = torch.where(shown, 0.0, torch.finfo(torch.bfloat16).min).bfloat16()[None, None]
        _, key, value = states(tokens)
        query = torch.cat([states(1, seed=seed)[0] for seed in range(queries)], 2)
        given = [query, key, value]
        for _ in range(2):  # the second layer has the same mask
            assert torch.equal(attend(native, about, given, mask), attend(eager_attention_forward, about, given, mask))
    assert computed == [tokens for _, tokens in shapes for _ in range(2)]


def test_masks_are_not_kept(pool: NativePool) -> None:
    native, about, given = NativeSinks(eager_attention_forward, pool), module(), states(40)
    for shown in (5, 9, 30):
        mask = torch.zeros(1, 1, 1, 40).bfloat16()
        mask[..., :-shown] = torch.finfo(torch.bfloat16).min
        assert torch.equal(attend(native, about, given, mask), attend(eager_attention_forward, about, given, mask))
        kept = weakref.ref(mask)
        del mask
        assert kept() is None


def test_sinks_take_their_share(pool: NativePool) -> None:
    native, about, given = NativeSinks(eager_attention_forward, pool), module(), states(40)
    for sink in (-1e30, 0.0, 20.0, 1e30):
        about.sinks = torch.full((8,), sink).bfloat16()
        ours = attend(native, about, given)
        assert torch.equal(ours, attend(eager_attention_forward, about, given))
    assert not ours.any()  # the last one takes all


def test_what_it_does_not_take_is_the_familys(pool: NativePool, computed: list[int]) -> None:
    native = NativeSinks(eager_attention_forward, pool)

    def hold(given: list[torch.Tensor], about: Any = None, mask: Any = None, **more: Any) -> bool:
        about, before = about or module(), len(computed)
        assert torch.equal(
            attend(native, about, given, mask, **more), attend(eager_attention_forward, about, given, mask, **more)
        )
        return len(computed) > before

    query, key, value = states(40)
    assert hold([query, key, value])
    assert hold([query, key, value], mask=torch.zeros(1, 1, 1, 40).bfloat16())
    hidden = torch.zeros(1, 1, 1, 40).bfloat16()
    hidden[..., :3] = float("-inf")
    assert hold([query, key, value], mask=hidden)
    hidden = hidden.clone()  # what a mask shows is looked up once
    hidden[..., 7] = float("-inf")
    assert not hold([query, key, value], mask=hidden)
    assert not hold(states(6))  # torch multiplies so few in another way
    weighed = torch.zeros(1, 1, 1, 40).bfloat16()
    weighed[..., 5] = 1
    assert not hold([query, key, value], mask=weighed)
    assert not hold([query.expand(2, 8, 1, 64), key.expand(2, 2, 40, 64), value.expand(2, 2, 40, 64)])
    assert not hold([query, *(each.transpose(2, 3).contiguous().transpose(2, 3) for each in (key, value))])
    assert not hold([query, key, value], softcap=3.0)
    watched = module()
    watched._forward_hooks = {1: print}
    assert not hold([query, key, value], watched)
    wide = module()
    wide.sinks = wide.sinks.float()
    assert not hold([each.float() for each in (query, key, value)], wide)
    pool.close()
    assert not hold([query, key, value])


def test_another_function_is_left_alone(pool: NativePool, computed: list[int]) -> None:
    def doubled(*args: Any, **named: Any) -> Any:
        output, weights = eager_attention_forward(*args, **named)
        return output * 2, weights

    def wants_more(about: Any, *args: Any, **named: Any) -> Any:
        return eager_attention_forward(about, *args, **named) if about.layer_idx else None

    about = module()
    about.layer_idx = 3
    for function in (doubled, wants_more):
        native, given = NativeSinks(function, pool), states(40)
        assert torch.equal(attend(native, about, given), attend(function, about, given))
    assert not computed


@pytest.mark.parametrize("window", [12, 40])
def test_logits_are_the_familys(window: int, pool: NativePool, computed: list[int]) -> None:
    model = make_model("gpt_oss", hidden_size=256, head_dim=64, sliding_window=window)
    hold_the_same(model, speed_up_copy(model, pool), [9, *[1] * 40, 3, *[1] * 10, 60, 40])
    assert {9, 10, 40, 122, 162} <= set(computed)  # prompts and tokens, sliding and full layers


def test_chances_are_torchs(pool: NativePool) -> None:
    for count in (1, 3, 8, 15, 16, 17, 75, 500, 1024):
        rows = torch.randn(200, count, generator=torch.Generator().manual_seed(count)).bfloat16() * 3
        wanted = F.softmax(rows, dim=-1, dtype=torch.bfloat16)
        assert pool.lib.moe_soften(DTYPES[rows.dtype], len(rows), count, LANES, rows.data_ptr()) == 0
        assert torch.equal(rows, wanted)
    rows = torch.zeros(3, 20).bfloat16()
    rows[0, 7], rows[1, 19], rows[2, 3] = float("nan"), float("nan"), float("-inf")
    wanted = F.softmax(rows, dim=-1, dtype=torch.bfloat16)
    assert pool.lib.moe_soften(DTYPES[rows.dtype], 3, 20, LANES, rows.data_ptr()) == 0
    assert torch.equal(rows.isnan(), wanted.isnan())
    assert torch.equal(rows[2], wanted[2])
    assert pool.lib.moe_soften(DTYPES[rows.dtype], 1, 1025, LANES, rows.data_ptr()) == -2
