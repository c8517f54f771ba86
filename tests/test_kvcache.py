"""The KV cache that grows in place holds what transformers' own one does, and copies and takes no more than it says."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import Cache, DynamicCache, JambaConfig, PreTrainedConfig, Qwen3MoeConfig

from moeinf.kvcache import can_crop, make_cache
from moeinf.memory import rss_bytes

CONTEXT = 512
WINDOW = 40
FULL = Qwen3MoeConfig(num_hidden_layers=1)
SLIDING = Qwen3MoeConfig(num_hidden_layers=1, sliding_window=WINDOW, use_sliding_window=True)
WIDE = Qwen3MoeConfig(num_hidden_layers=1, sliding_window=2 * CONTEXT, use_sliding_window=True)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def states(tokens: int, generator: torch.Generator, size: int = 8) -> torch.Tensor:
    return torch.randn(1, 2, tokens, size, generator=generator).to(torch.bfloat16)


def update(caches: list[Cache], tokens: int, generator: torch.Generator) -> None:
    """Give the caches the same new tokens, and hold that they return and say the same."""
    keys, values = states(tokens, generator), states(tokens, generator, size=24)
    sizes = [cache.get_mask_sizes(tokens, 0) for cache in caches]
    (our_keys, our_values), (their_keys, their_values) = (cache.update(keys, values, 0) for cache in caches)
    assert sizes[0] == sizes[1]
    assert torch.equal(our_keys, their_keys)
    assert torch.equal(our_values, their_values)
    assert caches[0].get_seq_length() == caches[1].get_seq_length()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("config", [FULL, SLIDING], ids=["full", "sliding"])
def test_it_holds_what_transformers_own_holds(config: PreTrainedConfig, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    caches: list[Any] = [make_cache(config, CONTEXT), DynamicCache(config=config)]
    while (held := caches[0].get_seq_length()) < CONTEXT:
        most = int(torch.tensor([1, 1, 1, 3, 50])[torch.randint(5, (1,), generator=generator)])
        update(caches, min(most, CONTEXT - held), generator)
        if torch.rand(1, generator=generator) < 0.2 and (can_crop(caches[0]) or held + most < WINDOW):
            removed = int(torch.randint(1, caches[1].get_seq_length() + 1, (1,), generator=generator))
            for cache in caches:
                cache.crop(-min(removed, 20, cache.get_seq_length() - 1))
        if torch.rand(1, generator=generator) < 0.1:
            caches = copy.deepcopy(caches)


def test_a_new_token_moves_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    cache: Any = make_cache(FULL, CONTEXT)
    places = {cache.update(states(1, generator), states(1, generator), 0)[0].data_ptr() for _ in range(CONTEXT)}
    assert len(places) == 1


def test_a_window_moves_once_in_a_sixteenth_of_it() -> None:
    generator = torch.Generator().manual_seed(0)
    config = Qwen3MoeConfig(num_hidden_layers=1, sliding_window=160, use_sliding_window=True)
    cache: Any = make_cache(config, CONTEXT)
    begins = [cache.update(states(1, generator), states(1, generator), 0)[0].data_ptr() for _ in range(CONTEXT)]
    moves = sum(after < before for before, after in pairwise(begins))
    assert moves == (CONTEXT - 170) // 11 + 1


@pytest.mark.parametrize(
    ("config", "most_tokens"), [(FULL, CONTEXT), (SLIDING, WINDOW + WINDOW // 16), (WIDE, CONTEXT)]
)
def test_no_more_memory_is_taken_than_is_counted(config: PreTrainedConfig, most_tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    cache: Any = make_cache(config, CONTEXT)
    for tokens in (100, 1, 1, 50, *[1] * 60):
        cache.update(states(tokens, generator), states(tokens, generator), 0)
        for held in (cache.layers[0].keys, cache.layers[0].values):
            assert held.untyped_storage().nbytes() == most_tokens * 2 * 8 * 2


def test_room_that_is_not_filled_is_not_held() -> None:
    context = 1 << 23
    cache: Any = make_cache(FULL, context)
    few = torch.zeros(1, 2, 3, 64, dtype=torch.bfloat16)
    before = rss_bytes()
    keys, _ = cache.update(few, few, 0)
    assert keys.untyped_storage().nbytes() == context * 256
    assert rss_bytes() - before < 16 << 20


def test_state_of_other_kinds_is_left_to_transformers() -> None:
    config = JambaConfig(num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1)
    ours, theirs = make_cache(config, CONTEXT), DynamicCache(config=config)
    kinds = [(type(our), type(their)) for our, their in zip(ours.layers, theirs.layers, strict=True)]
    assert [our is their for our, their in kinds] == [True, False, True, False]
    assert not can_crop(ours)
    assert can_crop(make_cache(FULL, CONTEXT))
