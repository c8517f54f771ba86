"""Small traces for tests: random ones of every shape, and how to tell whether two are the same."""

from __future__ import annotations

import random

import numpy as np

from moeinf.manifest import Source
from moeinf.trace import NO_EXPERT, ModelIdentity, Trace

__all__ = ["ARRAYS", "assert_same", "make_identity", "make_trace", "random_trace"]

ARRAYS = ("experts", "weights", "sequence_id", "position", "is_prefill", "foreseen")


def make_identity(sizes: tuple[int, ...] = (8, 4), top_k: tuple[int, ...] = (3, 2), commit: str = "c") -> ModelIdentity:
    return ModelIdentity("tiny", "TinyForCausalLM", Source("org/tiny", commit or None), sizes, top_k)


def make_trace(
    identity: ModelIdentity | None = None,
    tokens: int = 5,
    *,
    seed: int = 0,
    weights: bool = True,
    foreseen: bool = False,
) -> Trace:
    """One sequence; the first two tokens are prefill, and every place is filled."""
    identity, chance = identity or make_identity(), random.Random(seed)
    experts, named = np.full((2, *identity.shapes(tokens)["experts"]), NO_EXPERT, np.int16)
    for token in range(tokens):
        for layer, (size, k) in enumerate(zip(identity.layer_sizes, identity.top_k, strict=True)):
            experts[token, layer, :k] = chance.sample(range(size), k)
            named[token, layer, :k] = chance.sample(range(size), k)
    shares = np.array([chance.random() for _ in range(experts.size)]).reshape(experts.shape).astype(np.float16)
    return Trace(
        identity,
        experts,
        np.where(experts >= 0, shares, np.float16(0)) if weights else None,
        np.zeros(tokens, np.int32),
        np.arange(tokens, dtype=np.int32),
        np.arange(tokens) < 2,
        named if foreseen else None,
    )


def random_trace(seed: int) -> Trace:
    """A trace of a random model: layers of a smaller k, places that are empty, sequences mixed, positions with gaps."""
    chance = random.Random(seed)
    sizes = tuple(chance.choice([1, 2, 7, 64, 300]) for _ in range(chance.randint(1, 5)))
    identity = make_identity(sizes, tuple(chance.randint(1, min(size, 6)) for size in sizes), chance.choice(["", "c"]))
    whole = make_trace(
        identity,
        chance.choice([0, 1, 2, 17, 60]),
        seed=seed,
        weights=chance.random() < 0.7,
        foreseen=chance.random() < 0.5,
    )
    experts = whole.experts.copy()
    experts[np.array([chance.random() < 0.1 for _ in range(experts.size)], np.bool_).reshape(experts.shape)] = NO_EXPERT
    sequences = [chance.choice([0, 3, 2**31 - 1]) for _ in range(whole.num_tokens)]
    positions = sorted(chance.sample(range(chance.choice([100, 2**31 - 1])), whole.num_tokens))
    return Trace(
        identity,
        experts,
        None if whole.weights is None else np.where(experts >= 0, whole.weights, np.float16(0)),
        np.array(sequences, np.int32),
        np.array(positions, np.int32),
        np.array([chance.random() < 0.5 for _ in sequences], np.bool_),
        whole.foreseen,
    )


def assert_same(one: Trace, other: Trace) -> None:
    assert one.identity == other.identity
    for name in ARRAYS:
        mine, yours = getattr(one, name), getattr(other, name)
        assert (mine is None) == (yours is None), name
        if mine is not None:
            assert mine.dtype == yours.dtype
            assert np.array_equal(mine, yours), name
