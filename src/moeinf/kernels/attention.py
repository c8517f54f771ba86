"""Attention of one token over its KV cache by the native library, in torch's order of adding up, and the rotary
embedding before it.

torch's kernel for processors spends 10 times as long on a single token (csrc/attention.c), and the embedding takes it a
dozen small operations. Knows the tensors that transformers hands to such functions, and nothing of models.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F

from .native import DTYPES, NativePool

__all__ = ["AttentionCall", "NativeAttention", "NativeRotation", "order_trials"]

_LANES = 16
_MOST_SIZE = 256
"""Heads that are larger take another way through transformers."""
_TRIALS = (1, 7, 40, 100, 530)
"""Tokens in the caches that are tried: a few, whole vectors, more than a block."""
_ORDER_TRIALS = (*range(1, 18), 40, 530)
"""Tokens in the caches that tell orders apart, with all that whole vectors may leave over."""
_ORDER_HEADS = 5, 1
"""The order is that of every head. Of heads that share keys the library takes four together, or one."""
_SPREAD = 24
"""Powers of two that numbers which cancel out have: as many as float32 has bits."""
_WIDE_TRIALS, _WIDE_ORDER_TRIALS = (1, 7, 100), (*range(1, 18), 40, 530, 1027)
_WIDE_SCALE = 0.3
"""The same where values are of another size than keys: the order goes by what four tokens leave over, and products are
of a root that is rounded."""
_SOFTENED = 24, 1021
"""Rows of chances, of which each shows in which order exponentials are added up."""
_TORCHS_LANES = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
_ONE_THREAD = 1 << 21
"""Fewer numbers than this in the keys of all heads are attended to sooner by one of torch's threads."""
_SUM_TRIAL = 8, 530, 128
"""KV heads, tokens, and size of a head where the sums of chances are tried."""

States = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class AttentionCall(ctypes.Structure):
    """`moe_attention` of moe.h."""

    _fields_ = (
        *((name, c_int64) for name in ("heads", "kv_heads", "size", "value_size", "tokens")),
        *((name, c_int64) for name in ("key_head", "key_token", "value_head", "value_token")),
        *((name, c_void_p) for name in ("query", "keys", "values")),
        ("scale", c_float),
        ("lanes", c_int32),
    )

    def point_to(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Attend to these, both [1, KV heads, tokens, size]."""
        self.tokens, self.keys, self.values = keys.shape[2], keys.data_ptr(), values.data_ptr()
        self.value_size = values.shape[3]
        _, self.key_head, self.key_token, _ = keys.stride()
        _, self.value_head, self.value_token, _ = values.stride()


class NativeAttention:
    """`scaled_dot_product_attention` for one query, without a mask, where the library gives its results to the last
    bit. That is tried once for each number and size of heads, when they are first met.
    """

    def __init__(self, pool: NativePool) -> None:
        self.pool = pool
        self._is_exact: dict[tuple[int, int, int, int], bool] = {}

    def rotation(self, function: Callable[..., Any]) -> NativeRotation:
        """What rotates queries and keys as `function` does."""
        return NativeRotation(function, self.pool)

    def takes(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
        """Whether `compute` can do it: query [1, heads, 1, size], key [1, KV heads, tokens, size], and value of as many
        tokens, whose size may be another.
        """
        batch, heads, queries, size = query.shape
        if batch * queries > 1 or self.pool.handle is None or key.shape[:3] != value.shape[:3]:
            return False
        if {query.dtype, key.dtype, value.dtype} != {torch.bfloat16} or key.stride(3) != 1 or value.stride(3) != 1:
            return False
        return self.knows(heads, key.shape[1], size, value.shape[3])

    def knows(self, heads: int, kv_heads: int, size: int, value_size: int | None = None) -> bool:
        """Whether it is torch's attention for so many heads of this size, whose values are of that one, or the same."""
        value_size = value_size or size
        if size % _LANES or value_size % _LANES or max(size, value_size) > _MOST_SIZE:
            return False
        if heads % kv_heads or heads == 1:  # torch cuts one among its threads
            return False
        kind = heads, kv_heads, size, value_size
        if kind not in self._is_exact:
            self._is_exact[kind] = self._try(*kind)
        return self._is_exact[kind]

    def compute(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        """What weighs the values [1, 1, heads, value size]."""
        heads, size, value_size = query.shape[1], query.shape[3], value.shape[3]
        query = query.contiguous()
        output = query.new_empty(1, 1, heads, value_size)
        scale = scale if value_size == size else math.sqrt(scale)
        what = AttentionCall(heads, key.shape[1], size, query=query.data_ptr(), scale=scale, lanes=_TORCHS_LANES)
        what.point_to(key, value)
        if self.pool.lib.moe_attend(self.pool.handle, ctypes.addressof(what), output.data_ptr()):
            raise MemoryError("no memory for the scores of attention")
        return output

    @staticmethod
    def is_small(query: torch.Tensor, tokens: int) -> bool:
        """Whether one thread of torch attends to so many tokens by this query as several would, and sooner."""
        is_token = len(query) * query.shape[2] == 1 and query.dtype == torch.bfloat16
        return is_token and query.shape[1] > 1 and query.numel() * tokens < _ONE_THREAD  # one head is cut among all

    def _try(self, heads: int, kv_heads: int, size: int, value_size: int) -> bool:
        if value_size != size:
            trials = order_trials(heads, kv_heads, size, _WIDE_TRIALS, _WIDE_ORDER_TRIALS, value_size=value_size)
            return self._softens_alike and all(self._attends_alike(states, _WIDE_SCALE) for states in trials)
        if not self.pool.adds_as_torch_does or not self._sums_chances_alike:
            return False
        return all(self._attends_alike(states, 1.0) for states in order_trials(heads, kv_heads, size))

    def _attends_alike(self, states: States, scale: float) -> bool:
        wanted = _attend_as_torch_does(*states, scale)
        return torch.equal(self.compute(*states, scale), wanted)

    @cached_property
    def _softens_alike(self) -> bool:
        """Whether its softmax of float32 is torch's."""
        rows = torch.randn(_SOFTENED, generator=torch.Generator().manual_seed(0)) * 3
        wanted = F.softmax(rows, dim=-1)
        for row in rows:
            if self.pool.lib.moe_soften(DTYPES[row.dtype], 1, len(row), _TORCHS_LANES, row.data_ptr()):
                return False
        return torch.equal(rows, wanted)

    @cached_property
    def _sums_chances_alike(self) -> bool:
        """Whether chances have torch's sum to the last bit, whatever the order of products.

        Their sum divides the totals of a head. These lie around where the quotient, rounded, goes from 1 to the number
        after it, and closer together in every round; in the last one they follow each other in float32.
        """
        heads, tokens, size = _SUM_TRIAL
        generator = torch.Generator().manual_seed(0)
        query, key, value = (torch.zeros(1, heads, length, size).bfloat16() for length in (1, tokens, tokens))
        query[..., 0] = 1
        key[..., 0] = torch.rand(1, heads, tokens, generator=generator) * -3
        key[..., :3, 0] = 0  # the chances of these are 1, and a float32 is a sum of three bfloat16
        least, most = torch.full((heads, 1), 1.0), torch.full((heads, 1), 2.0 * tokens)
        for _ in range(4):
            totals = torch.lerp(least, most, torch.linspace(0, 1, size))
            rest = totals
            for token in range(3):
                value[0, :, token] = rest.bfloat16()
                rest = rest - value[0, :, token].float()
            expected = _attend_as_torch_does(query, key, value)
            if not torch.equal(self.compute(query, key, value, 1.0), expected):
                return False
            first_above = (expected[0, 0] <= 1).sum(1, keepdim=True).clamp(1, size - 1)
            least, most = totals.gather(1, first_above - 1), totals.gather(1, first_above)
        return True


def _attend_as_torch_does(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float = 1.0
) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=True).transpose(1, 2)


def order_trials(
    heads: int,
    kv_heads: int,
    size: int,
    lengths: Sequence[int] = _TRIALS,
    order_lengths: Sequence[int] = _ORDER_TRIALS,
    value_size: int | None = None,
) -> Iterator[States]:
    """Queries, keys and values, for a scale of 1; values of the keys' size, or another.

    Another order changes one of some 10,000 ordinary results, because they are rounded to bfloat16. Where numbers
    cancel out nothing but errors of rounding remains, and each order makes its own.
    """
    generator = torch.Generator().manual_seed(0)
    value_size = value_size or size

    def ordinary(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=generator).bfloat16()

    def cancelling(*shape: int, dim: int) -> torch.Tensor:
        """Sums along `dim` are 0."""
        x = ordinary(*shape)
        x *= 2.0 ** torch.randint(_SPREAD, x.shape, generator=generator)
        return (x - x.flip(dim)).index_select(dim, torch.randperm(x.shape[dim], generator=generator))

    for tokens in lengths:
        yield ordinary(heads, 1, size) / 5, ordinary(kv_heads, tokens, size), ordinary(kv_heads, tokens, value_size)
    heads, kv_heads = _ORDER_HEADS
    for tokens in order_lengths:
        query = torch.ones(1, heads, 1, size).bfloat16()
        yield query, cancelling(kv_heads, tokens, size, dim=3), ordinary(kv_heads, tokens, value_size)
        yield 0 * query, ordinary(kv_heads, tokens, size), cancelling(kv_heads, tokens, value_size, dim=2)


class NativeRotation:
    """A family's `apply_rotary_pos_emb` for one token, where the library gives its results to the last bit. That is
    tried once for each size of heads, when it is first met. Else it is the `function` itself.
    """

    def __init__(self, function: Callable[..., Any], pool: NativePool) -> None:
        self._function = function
        self._pool = pool
        self._is_exact: dict[int, bool] = {}

    def __call__(self, *args: Any, **named: Any) -> Any:
        if named or len(args) != 4 or not self._takes(*args):
            return self._function(*args, **named)
        query, key, cos, sin = args
        return self._turn(query, cos, sin), self._turn(key, cos, sin)

    def _takes(self, query: Any, key: Any, cos: Any, sin: Any) -> bool:
        """Whether these are queries [1, heads, 1, size] and keys [1, KV heads, 1, size] in bfloat16, to be turned by
        the angles of `cos` and `sin`, both [1, 1, size].
        """
        if {type(each) for each in (query, key, cos, sin)} != {torch.Tensor} or self._pool.handle is None:
            return False
        if not query.dtype == key.dtype == cos.dtype == sin.dtype == torch.bfloat16:
            return False
        size = cos.shape[-1]
        if not cos.shape == sin.shape == (1, 1, size) or size % 2:
            return False
        if not all(x.dim() == 4 and x.shape == (1, x.shape[1], 1, size) for x in (query, key)):
            return False
        if size not in self._is_exact:
            self._is_exact[size] = self._try(size)
        return self._is_exact[size]

    def _turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        output = torch.empty_like(x)
        addresses = (each.data_ptr() for each in (x, cos, sin, output))
        self._pool.lib.moe_rotate(x.shape[1], x.shape[3], *addresses)
        return output

    def _try(self, size: int) -> bool:
        generator = torch.Generator().manual_seed(0)
        query, key = (torch.randn(1, heads, 1, size, generator=generator).to(torch.bfloat16) for heads in (8, 3))
        cos, sin = (torch.randn(1, 1, size, generator=generator).to(torch.bfloat16) for _ in range(2))
        expected = self._function(query, key, cos, sin)
        return all(torch.equal(self._turn(x, cos, sin), each) for x, each in zip((query, key), expected, strict=True))
