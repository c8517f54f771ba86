"""The recorder: what was recorded comes back in order, and what is incomplete does not."""

from __future__ import annotations

import contextlib
import itertools
import random
import sys
from types import FrameType

import numpy as np
import pytest
import torch

from moeinf import recorder as recorder_module
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
        if seed == 40:
            recorder.pack()
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
    assert recorder.num_tokens == 5
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


def test_an_interrupt_at_any_place_leaves_whole_tokens() -> None:
    """The N-th line of the recorder is interrupted, N = 1, 2, 3 …; recording goes on with the next step."""
    for number in itertools.count(1):
        recorder = Recorder(IDENTITY, packed_tokens=3)
        recorder.begin(0)
        interrupter, tracer = Interrupter(number), sys.gettrace()
        sys.settrace(interrupter)
        for seed in range(8):
            with contextlib.suppress(KeyboardInterrupt):
                step(recorder, 1, seed)
        sys.settrace(tracer)
        trace = recorder.trace()
        assert 7 <= trace.num_tokens <= 8
        known = [choice(1, 0, seed)[0][0].tolist() for seed in range(8)]
        found = [known.index(row) for row in trace.experts[:, 0].tolist()]
        assert found == sorted(set(found))
        if not interrupter.has_fired:
            break
    assert trace.num_tokens == 8
    assert number > 50


class Interrupter:
    """A trace function of Python's that interrupts at the N-th line of the recorder."""

    def __init__(self, fire_at: int) -> None:
        self.left = fire_at

    @property
    def has_fired(self) -> bool:
        return self.left <= 0

    def __call__(self, frame: FrameType, event: str, _argument: object) -> Interrupter | None:
        if frame.f_code.co_filename != recorder_module.__file__:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_are_kept_in_float16_whatever_they_were(dtype: torch.dtype) -> None:
    recorder = Recorder(IDENTITY)
    recorder.begin(0)
    for tokens in (1, 2):
        weights = torch.tensor([[0.5, 0.25]] * tokens, dtype=dtype, requires_grad=True)
        for layer in range(2):
            recorder.record(layer, torch.tensor([[1, 0]] * tokens), weights, is_prefill=tokens > 1)
    trace = recorder.trace()
    assert trace.weights is not None
    assert trace.weights.tolist() == [[[0.5, 0.25]] * 2] * 3


def test_weights_that_are_no_numbers_spoil_no_trace() -> None:
    recorder = Recorder(IDENTITY)
    recorder.begin(0)
    recorder.record(0, torch.tensor([[1, 0]]), torch.tensor([[1e30, float("nan")]]), is_prefill=False)
    recorder.record(1, torch.tensor([[1, 1]]), torch.tensor([[6e4, 6e4]]), is_prefill=False)
    weights = recorder.trace().weights
    assert weights is not None
    assert weights.tolist() == [[[65504, 0], [65504, 0]]]


def test_layers_may_have_another_k() -> None:
    recorder = Recorder(ModelIdentity("tiny", "", Source(""), (8, 4), (3, 1)))
    recorder.begin(0)
    recorder.record(0, torch.tensor([[7, 0, 2]]), torch.ones(1, 3), is_prefill=False)
    recorder.record(1, torch.tensor([[3]]), torch.ones(1, 1), is_prefill=False)
    assert recorder.trace().experts.tolist() == [[[7, 0, 2], [3, -1, -1]]]


def test_recording_goes_on_after_a_trace_was_made() -> None:
    recorder = Recorder(IDENTITY)
    recorder.begin(0)
    for seed in range(5):
        step(recorder, 1, seed)
        assert recorder.trace().num_tokens == seed + 1
    assert recorder.trace().position.tolist() == [0, 1, 2, 3, 4]


def test_a_prompt_is_copied_and_holds_no_larger_tensor() -> None:
    recorder = Recorder(IDENTITY)
    recorder.begin(0)
    scores = torch.rand(4, 100)
    for layer in range(2):
        ids = torch.tensor([[0, 1]] * 4)
        recorder.record(layer, ids, scores[:, :2], is_prefill=True)
        ids.zero_()
    assert recorder.trace().experts[:, 0].tolist() == [[0, 1]] * 4
