"""The recorder: what was recorded comes back in order, and what is incomplete does not."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from moeinf.manifest import Source
from moeinf.recorder import Recorder
from moeinf.trace import ModelIdentity

IDENTITY = ModelIdentity("tiny", "", Source(""), (8, 4), (2, 2))


def choice(tokens: int, layer: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    chance = random.Random(f"{seed} {layer}")
    ids = [chance.sample(range(IDENTITY.layer_sizes[layer]), 2) for _ in range(tokens)]
    return torch.tensor(ids), torch.rand(tokens, 2, generator=torch.Generator().manual_seed(seed))


def step(recorder: Recorder, tokens: int, seed: int = 0, *, layers: int = 2, is_prefill: bool = False) -> None:
    for layer in range(layers):
        recorder.record(layer, *choice(tokens, layer, seed), is_prefill=is_prefill)


def test_steps_become_tokens() -> None:
    recorder = Recorder(IDENTITY)
    recorder.begin(7)
    step(recorder, 3, 1, is_prefill=True)
    for seed in range(2, 100):  # more than is kept unpacked
        step(recorder, 1, seed)
    trace = recorder.trace()
    assert trace.num_tokens == recorder.num_tokens == 101
    assert trace.position.tolist() == list(range(101))
    assert trace.is_prefill.tolist() == [True] * 3 + [False] * 98
    assert set(trace.sequence_id.tolist()) == {7}
    for layer in range(2):
        ids, weights = zip(*(choice(3 if seed == 1 else 1, layer, seed) for seed in range(1, 100)), strict=True)
        assert np.array_equal(trace.experts[:, layer], torch.cat(ids).numpy())
        assert trace.weights is not None
        assert np.array_equal(trace.weights[:, layer], torch.cat(weights).to(torch.float16).numpy())


def test_positions_go_on_in_each_sequence() -> None:
    recorder = Recorder(IDENTITY)
    recorder.begin(0)
    step(recorder, 2, is_prefill=True)
    step(recorder, 2, is_prefill=True)
    recorder.begin(1, position=5)
    step(recorder, 1)
    recorder.begin(0)
    step(recorder, 1)
    trace = recorder.trace()
    assert trace.sequence_id.tolist() == [0, 0, 0, 0, 1, 0]
    assert trace.position.tolist() == [0, 1, 2, 3, 5, 4]


def test_steps_that_end_early_are_dropped() -> None:
    recorder = Recorder(IDENTITY)
    recorder.begin(0)
    step(recorder, 4, layers=1, is_prefill=True)
    step(recorder, 1, 3)
    recorder.record(1, *choice(1, 1, 5), is_prefill=False)  # its layer 0 never came
    step(recorder, 1, 4, layers=1)
    recorder.begin(1)
    step(recorder, 1, 6)
    trace = recorder.trace()
    assert trace.sequence_id.tolist() == [0, 1]
    assert np.array_equal(trace.experts[0, 0], choice(1, 0, 3)[0][0].numpy())


def test_only_so_many_tokens_are_kept() -> None:
    recorder = Recorder(IDENTITY, max_tokens=5)
    recorder.begin(0)
    step(recorder, 4, 1, is_prefill=True)
    step(recorder, 3, 2, is_prefill=True)
    step(recorder, 1, 3)
    assert (recorder.num_tokens, recorder.dropped_tokens) == (5, 3)
    assert recorder.trace().position.tolist() == [0, 1, 2, 3, 4]


def test_no_expert_and_an_expert_named_twice() -> None:
    recorder = Recorder(IDENTITY)
    recorder.begin(0)
    recorder.record(0, torch.tensor([[8, 3]]), torch.tensor([[0.25, 0.75]]), is_prefill=False)
    recorder.record(1, torch.tensor([[2, 2]]), torch.tensor([[0.25, 0.5]]), is_prefill=False)
    trace = recorder.trace()
    assert trace.weights is not None
    for layer, expert, weight in ((0, 3, 0.75), (1, 2, 0.75)):
        place = trace.experts[0, layer].tolist().index(expert)
        assert sorted(trace.experts[0, layer].tolist()) == [-1, expert]
        assert trace.weights[0, layer, place] == weight
        assert trace.weights[0, layer, 1 - place] == 0


def test_a_recorder_that_was_not_used_has_an_empty_trace() -> None:
    assert Recorder(IDENTITY).trace().num_tokens == 0


def test_what_is_no_sequence_is_a_bug() -> None:
    recorder = Recorder(IDENTITY)
    with pytest.raises(AssertionError, match="begin comes first"):
        step(recorder, 1)
    recorder.begin(0, position=3)
    step(recorder, 1)
    with pytest.raises(AssertionError, match="has come to 4"):
        recorder.begin(0, position=2)
