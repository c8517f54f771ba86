"""Native attention and rotary embedding of one token against torch's, to the last bit, and left to torch where it is
not known to be so.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3_moe import Qwen3MoeConfig, modeling_qwen3_moe

from moeinf import hooks
from moeinf.kernels import attention as attention_module
from moeinf.kernels.attention import NativeAttention
from moeinf.kernels.native import NativePool
from test_native import LIBRARY, TORCH_S

pytestmark = pytest.mark.skipif(TORCH_S is None, reason="torch may add in another order on such a processor")

SHAPES = [(4, 4, 16), (8, 2, 64), (12, 4, 80), (32, 4, 128), (2, 1, 256)]
"""Heads, KV heads, size."""


@pytest.fixture
def attention() -> Iterator[NativeAttention]:
    pool = NativePool(2, TORCH_S, LIBRARY)
    yield NativeAttention(pool)
    pool.close()


def tensors(heads: int, kv_heads: int, size: int, tokens: int, spread: float = 1.0) -> tuple[torch.Tensor, ...]:
    shapes = (1, heads, 1, size), (1, kv_heads, tokens, size), (1, kv_heads, tokens, size)
    query, key, value = (torch.randn(shape).to(torch.bfloat16) for shape in shapes)
    return query * spread, key, value


def expected(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    result = F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=True)
    return result.transpose(1, 2).contiguous()


def skip_unless_known(attention: NativeAttention, heads: int, kv_heads: int, size: int) -> None:
    if not attention.knows(heads, kv_heads, size):
        pytest.skip("torch adds in another order on this processor")


@pytest.mark.parametrize("tokens", [1, 3, 15, 16, 17, 33, 48, 63, 255, 511, 512, 513, 700, 1024, 1100, 2051])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), SHAPES)
def test_it_is_torchs(heads: int, kv_heads: int, size: int, tokens: int, attention: NativeAttention) -> None:
    skip_unless_known(attention, heads, kv_heads, size)
    torch.manual_seed(tokens)
    query, key, value = tensors(heads, kv_heads, size, tokens, random.Random(tokens).choice([0.3, 1, 4]))
    scale = size**-0.5
    assert attention.takes(query, key, value)
    assert torch.equal(attention.compute(query, key, value, scale), expected(query, key, value, scale))


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [*SHAPES, (6, 2, 48), (9, 1, 112)])
def test_errors_of_rounding_are_torchs(
    heads: int, kv_heads: int, size: int, attention: NativeAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What remains of numbers that cancel out: there no other order could hide."""
    skip_unless_known(attention, heads, kv_heads, size)
    monkeypatch.setattr(attention_module, "_ORDER_HEADS", (heads, kv_heads))
    monkeypatch.setattr(attention_module, "_ORDER_TRIALS", random.Random(size).sample(range(1, 1100), 15))
    for states in attention_module.order_trials(heads, kv_heads, size):
        assert torch.equal(attention.compute(*states, 1.0), expected(*states, 1.0))


WIDE = [(16, 16, 192, 128), (3, 3, 32, 48), (8, 2, 64, 32), (5, 5, 80, 16), (2, 2, 128, 256)]
"""Heads, KV heads, size of keys and of values: torch computes such in float32."""


@pytest.mark.parametrize("tokens", [*range(1, 20), 33, 255, 512, 513, 1026, 1027, 2051])
@pytest.mark.parametrize(("heads", "kv_heads", "size", "value_size"), WIDE)
def test_values_may_have_another_size_than_keys(
    heads: int, kv_heads: int, size: int, value_size: int, tokens: int, attention: NativeAttention
) -> None:
    if not attention.knows(heads, kv_heads, size, value_size):
        pytest.skip("torch adds in another order on this processor")
    torch.manual_seed(tokens)
    query, key, _ = tensors(heads, kv_heads, size, tokens + 9, random.Random(tokens).choice([0.3, 1, 4]))
    _, _, value = tensors(heads, kv_heads, value_size, tokens + 9)
    key, value = key[:, :, 4:-5], value[:, :, 5:-4]  # as they lie in a cache that has room for more
    for scale in (size**-0.5, 0.1147, 1.0):
        assert attention.takes(query, key, value)
        assert torch.equal(attention.compute(query, key, value, scale), expected(query, key, value, scale))


@pytest.mark.parametrize(("heads", "kv_heads", "size", "value_size"), WIDE)
def test_errors_of_rounding_are_torchs_in_float32_too(
    heads: int, kv_heads: int, size: int, value_size: int, attention: NativeAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not attention.knows(heads, kv_heads, size, value_size):
        pytest.skip("torch adds in another order on this processor")
    monkeypatch.setattr(attention_module, "_ORDER_HEADS", (heads, kv_heads))
    lengths = random.Random(size).sample(range(1, 1100), 15)
    for states in attention_module.order_trials(heads, kv_heads, size, lengths, lengths, value_size):
        assert torch.equal(attention.compute(*states, 0.7), expected(*states, 0.7))


@pytest.mark.parametrize("turned", [0, 2, 3])
def test_another_order_is_not_taken_in_float32_either(
    turned: int, attention: NativeAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens, or inputs, in another order, or another exponential."""
    if not attention.knows(4, 4, 64, 32):
        pytest.skip("torch adds in another order on this processor")
    right = attention_module._attend_as_torch_does

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        if turned == 2:
            key, value = key.flip(2), value.flip(2)
        if turned == 3:
            query, key = query.flip(3), key.flip(3)
        return right(query, key, value, scale)

    if turned:
        monkeypatch.setattr(attention_module, "_attend_as_torch_does", attend)
    else:
        monkeypatch.setattr(attention_module, "_TORCHS_LANES", 24 - attention_module._TORCHS_LANES)
    assert not NativeAttention(attention.pool).knows(4, 4, 64, 32)


def test_another_order_is_not_taken(attention: NativeAttention, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens, or inputs, in another order: ordinary numbers seldom show it."""
    skip_unless_known(attention, 8, 2, 64)
    right = attention_module._attend_as_torch_does
    for dim in (2, 3):

        def attend(
            query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float = 1.0, turned: int = dim
        ) -> torch.Tensor:
            both = (value.flip(2), key.flip(2)) if turned == 2 else (value, key.flip(3))
            return right(query.flip(3) if turned == 3 else query, both[1], both[0], scale)

        monkeypatch.setattr(attention_module, "_attend_as_torch_does", attend)
        assert not NativeAttention(attention.pool).knows(8, 2, 64)


def test_the_order_is_known_where_mkl_has_no_kernels_for_the_processor() -> None:
    """With MKL_CBWR=COMPATIBLE it adds like that anywhere."""
    script = f"""
from pathlib import Path
from moeinf.kernels.attention import NativeAttention
from moeinf.kernels.native import NativePool
print(NativeAttention(NativePool(2, path=Path({str(LIBRARY)!r}))).knows(8, 2, 64))
"""
    environment = {**os.environ, "MKL_CBWR": "COMPATIBLE"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout == "True\n"


def test_sums_of_chances_in_another_order_are_not_taken(
    attention: NativeAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_unless_known(attention, 4, 4, 16)
    right, shuffled = attention_module._attend_as_torch_does, torch.arange(530)
    shuffled[:512] = torch.randperm(512, generator=torch.Generator().manual_seed(0))

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return right(query, key[:, :, shuffled], value[:, :, shuffled], scale)

    monkeypatch.setattr(attention_module, "_attend_as_torch_does", attend)
    assert not NativeAttention(attention.pool).knows(4, 4, 16)


def test_caches_need_not_be_contiguous(attention: NativeAttention) -> None:
    skip_unless_known(attention, 8, 4, 32)
    torch.manual_seed(0)
    query, key, value = tensors(8, 4, 32, 600)
    key, value = key[:, :, 77:500], value.transpose(1, 2).contiguous().transpose(1, 2)[:, :, 77:500]
    assert attention.takes(query, key, value)
    assert torch.equal(attention.compute(query, key, value, 0.25), expected(query, key, value, 0.25))


@pytest.mark.parametrize("tokens", [7, 32, 40, 600])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["one key", "all keys", "the query"])
@pytest.mark.parametrize("value_size", [64, 32])
def test_what_is_no_number_is_torchs_too(
    tokens: int, value: float, where: str, value_size: int, attention: NativeAttention
) -> None:
    """Whatever the order of sums is."""
    query, key, values = (torch.ones(1, 2, count, 64).bfloat16() for count in (1, tokens, tokens))
    values = values[..., :value_size]
    key *= 0
    {"one key": key[:, :, 3], "all keys": key, "the query": query}[where][..., 0] = value
    found, wanted = attention.compute(query, key, values, 1.0), expected(query, key, values, 1.0)
    torch.testing.assert_close(found, wanted, equal_nan=True)


def test_far_scores_weigh_nothing(attention: NativeAttention) -> None:
    skip_unless_known(attention, 4, 4, 64)
    torch.manual_seed(1)
    query, key, value = tensors(4, 4, 64, 530, spread=100.0)
    assert torch.equal(attention.compute(query, key, value, 1.0), expected(query, key, value, 1.0))


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (torch.cat([q, q], 2), k, v),
        lambda q, k, v: (torch.cat([q, q]), torch.cat([k, k]), torch.cat([v, v])),
        lambda q, k, v: (q.float(), k.float(), v.float()),
        lambda q, k, v: (q[..., :24], k[..., :24], v[..., :24]),
        lambda q, k, v: (q, k, v[..., :24]),
        lambda q, k, v: (q, k.transpose(2, 3).contiguous().transpose(2, 3), v),
        lambda q, k, v: (q[:, :1], k[:, :1], v[:, :1]),
        lambda q, k, v: (q[:, :3], k, v),
    ],
)
def test_what_it_does_not_take(change: Any, attention: NativeAttention) -> None:
    query, key, value = tensors(4, 2, 32, 40)
    assert attention.takes(query, key, value) == attention.knows(4, 2, 32)
    assert not attention.takes(*change(query, key, value))


def test_what_fails_its_trial_is_not_taken(attention: NativeAttention, monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention.compute
    monkeypatch.setattr(attention, "compute", lambda *args: right(*args) + 1)
    assert not attention.takes(*tensors(4, 2, 32, 40))


def test_transformers_asks_it_for_plain_attention_only(attention: NativeAttention) -> None:
    skip_unless_known(attention, 4, 4, 32)
    torch.manual_seed(2)
    query, key, value = tensors(4, 4, 32, 20)
    asked = []

    class Watching(NativeAttention):
        def compute(self, *args: Any) -> torch.Tensor:
            asked.append(len(args))
            return super().compute(*args)

    module, other = nn.Identity(), nn.Identity()
    hooks.attend(module, Watching(attention.pool))
    sdpa: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
    wanted, _ = sdpa(other, query, key, value, None, scaling=0.3)
    assert not asked
    assert torch.equal(sdpa(module, query, key, value, None, scaling=0.3, dropout=0.0)[0], wanted)
    trials = len(asked)
    assert trials > 1
    assert torch.equal(sdpa(module, query, key, value, None)[0], sdpa(other, query, key, value, None)[0])
    trials = len(asked)
    mask = torch.ones(1, 1, 1, 20, dtype=torch.bool)
    assert torch.equal(
        sdpa(module, query, key, value, mask, scaling=0.3)[0], sdpa(other, query, key, value, mask, scaling=0.3)[0]
    )
    bias = torch.randn(1, 4, 1, 20).to(torch.bfloat16)
    others: list[dict[str, Any]] = [{"position_bias": bias}, {"dropout": 0.5}, {"softcap": 30.0}, {"cache": object()}]
    for more in others:
        with suppress(AttributeError, ValueError):  # it has no softcap, and asks more of a cache
            sdpa(module, query, key, value, None, scaling=0.3, **more)
    assert len(asked) == trials


def angles(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    half = torch.rand(1, 1, size // 2) * 100
    both = torch.cat([half, half], 2)
    return both.cos().to(torch.bfloat16), both.sin().to(torch.bfloat16)


class Rotation:
    """What the tests turn with, and how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, *args: Any, **named: Any) -> Any:
        self.asked += 1
        return modeling_qwen3_moe.apply_rotary_pos_emb(*args, **named)


def test_angles_need_not_lie_together(attention: NativeAttention) -> None:
    torch.manual_seed(0)
    rotate = attention.rotation(modeling_qwen3_moe.apply_rotary_pos_emb)
    for _ in range(20):
        query, key, _ = tensors(8, 2, 64, 1)
        cos, sin = (torch.stack([each, torch.rand_like(each)], -1)[..., 0] for each in angles(64))
        assert not cos.is_contiguous()
        expected = modeling_qwen3_moe.apply_rotary_pos_emb(query, key, cos, sin)
        assert all(map(torch.equal, rotate(query, key, cos, sin), expected))


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 2), (7, 1, 30), (16, 4, 64), (32, 4, 128)])
def test_the_rotary_embedding_is_torchs(heads: int, kv_heads: int, size: int, attention: NativeAttention) -> None:
    torch.manual_seed(size)
    function = Rotation()
    rotate = attention.rotation(function)
    for _ in range(20):
        query, key, _ = tensors(heads, kv_heads, size, 1, spread=10.0)
        cos, sin = angles(size)
        expected = modeling_qwen3_moe.apply_rotary_pos_emb(query, key, cos, sin)
        assert all(map(torch.equal, rotate(query, key, cos, sin), expected))
    assert function.asked == 1  # by the trial


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, cos, sin: (q, k, cos.expand(2, 1, 64), sin.expand(2, 1, 64)),
        lambda q, k, cos, sin: (q.float(), k, cos, sin),
        lambda q, k, cos, sin: (torch.cat([q, q], 2), torch.cat([k, k], 2), cos, sin),
        lambda q, k, cos, sin: (q.transpose(1, 2), k.transpose(1, 2), cos, sin, 2),
        lambda q, k, cos, sin: (q[0], k[0], cos, sin),
    ],
)
def test_other_rotations_are_left_to_the_family(change: Any, attention: NativeAttention) -> None:
    query, key, _ = tensors(4, 2, 64, 1)
    function = Rotation()
    rotate = attention.rotation(function)
    rotate(query, key, *angles(64))
    args = change(query, key, *angles(64))
    expected = modeling_qwen3_moe.apply_rotary_pos_emb(*args)
    assert all(map(torch.equal, rotate(*args), expected))
    assert function.asked == 2


def test_a_rotation_that_fails_its_trial_is_the_familys(attention: NativeAttention) -> None:
    def turn_pairs(query: torch.Tensor, key: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return query.flip(3), key.flip(3)

    query, key, _ = tensors(4, 2, 64, 1)
    turned, _ = attention.rotation(turn_pairs)(query, key, *angles(64))
    assert torch.equal(turned, query.flip(3))


def test_one_model_rotates_natively_and_no_other_of_its_family(
    attention: NativeAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    make: Any = Qwen3MoeConfig
    config = make(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, attn_implementation="sdpa")
    module, other = (modeling_qwen3_moe.Qwen3MoeAttention(config, 0).to(torch.bfloat16) for _ in range(2))
    module.load_state_dict(other.state_dict())
    function = Rotation()
    monkeypatch.setattr(attention, "rotation", lambda _: function)
    hooks.attend(module, attention)
    x, position = torch.randn(1, 1, 64).to(torch.bfloat16), angles(16)
    with torch.inference_mode():
        for each, asked in ((module, 1), (other, 1)):
            each(x, position_embeddings=position, attention_mask=None)
            assert function.asked == asked
