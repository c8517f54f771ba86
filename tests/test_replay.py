"""Replayed routing: that the recorded experts are computed, and what cannot be replayed."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import moeinf
from moeinf.errors import UsageError
from moeinf.gate import GatePredictor
from moeinf.generation import Sampling
from moeinf.manifest import Source
from moeinf.recorder import Recorder
from moeinf.replay import Replay, check_replay, recorded_layer
from moeinf.store import Store
from moeinf.trace import NO_EXPERT, ModelIdentity, Trace


def make_trace(experts: Any, *, size: int = 8, top_k: int = 2, weights: Any = None) -> Trace:
    array = np.array(experts, np.int16)
    tokens, layers, _ = array.shape
    identity = ModelIdentity("other", "", Source(""), (size,) * layers, (top_k,) * layers)
    shares = None if weights is None else np.array(weights, np.float16)
    rows = (np.zeros(tokens, np.int32), np.arange(tokens, dtype=np.int32), np.zeros(tokens, np.bool_))
    return Trace(identity, array, shares, *rows)


class Seen(nn.Module):
    """An experts module that notes what it is to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[list[Any], list[Any]]] = []
        self.then: Seen | None = None
        """It has a predictor ask this one while it computes."""

    def forward(self, hidden: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        assert experts.dtype == torch.int64
        self.calls.append((experts.tolist(), weights.tolist()))
        if self.then is not None:
            self.then.moeinf = (GatePredictor.__new__(GatePredictor), 1)  # type: ignore[assignment]
            self.then(hidden, torch.full_like(experts, 7), weights)
            del self.then.moeinf
        return hidden


def run(modules: list[Seen], tokens: int) -> None:
    for module in modules:
        module(torch.zeros(tokens, 4), torch.full((tokens, 2), 7), torch.full((tokens, 2), 0.5))


def test_tokens_follow_the_trace_and_then_the_routers() -> None:
    trace = make_trace(
        [[[0, 1], [2, 3]], [[4, 5], [6, 0]], [[1, 2], [3, 4]]],
        weights=[[[0.75, 0.25], [1, 0.5]], [[0.5, 0.5], [0.5, 0.25]], [[1, 0.5], [1, 0.5]]],
    )
    modules = [Seen(), Seen()]
    replay = Replay([trace], modules)
    run(modules, 1)
    replay.begin(0)
    run(modules, 2)
    run(modules, 1)
    run(modules, 1)
    replay.begin(0, 2)
    run(modules, 1)
    routers = ([[7, 7]], [[0.5, 0.5]])
    last = ([[1, 2]], [[1.0, 0.5]])
    assert modules[0].calls == [routers, ([[0, 1], [4, 5]], [[0.75, 0.25], [0.5, 0.5]]), last, routers, last]
    assert modules[1].calls[1] == ([[2, 3], [6, 0]], [[1.0, 0.5], [0.5, 0.25]])


def test_empty_places_and_no_weights() -> None:
    trace = make_trace([[[NO_EXPERT, 3]], [[1, 2]]])
    module = Seen()
    replay = Replay([trace], [module])
    replay.begin(0)
    run([module], 1)
    replay.begin(0)
    run([module], 2)
    assert module.calls == [([[3]], [[1.0]]), ([[3, 3], [1, 2]], [[0.0, 1.0], [0.5, 0.5]])]


@pytest.mark.parametrize(
    ("recorded", "followed"),
    [
        (6, [0, 1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2]),
        (3, [0, 1, 2, 1, 2, 1]),
        (2, [0, 1, 1, 1]),
        (1, [0, 0, 0]),
        (4, [0, 1]),
    ],
)
def test_layers_repeat_from_the_second_on(recorded: int, followed: list[int]) -> None:
    assert [recorded_layer(layer, recorded) for layer in range(len(followed))] == followed


def test_a_deeper_model_repeats_the_layers_of_the_trace() -> None:
    """Their empty places too; and a token ends with the model's last layer."""
    trace = make_trace(
        [[[0, 1], [NO_EXPERT, 3], [4, 5]], [[6, 7], [1, 2], [3, 4]]],
        weights=[[[0.75, 0.25], [0, 1], [0.5, 0.25]], [[1, 0.5], [0.5, 0.5], [0.25, 0.5]]],
    )
    modules = [Seen() for _ in range(6)]
    replay = Replay([trace], modules)
    replay.begin(0)
    run(modules, 1)
    run(modules, 1)
    first = [([[0, 1]], [[0.75, 0.25]]), ([[3]], [[1.0]]), ([[4, 5]], [[0.5, 0.25]])]
    second = [([[6, 7]], [[1.0, 0.5]]), ([[1, 2]], [[0.5, 0.5]]), ([[3, 4]], [[0.25, 0.5]])]
    assert [module.calls for module in modules] == [[first[n], second[n]] for n in (0, 1, 2, 1, 2, 1)]


def test_a_real_model_repeats_a_trace_of_one_layer(tiny: str) -> None:
    sampling = Sampling(max_tokens=8, temperature=0.0)
    trace = make_trace([[[token % 8, (token + 3) % 8]] for token in range(10)])
    with moeinf.load(tiny, experts="50%", prefetch="off", context=64) as engine:
        engine.learns = False
        replay = Replay([trace], engine.experts_modules.values())
        recorder = Recorder(ModelIdentity.of(tiny, engine.manifest))
        engine.runtime.recorder = recorder
        replay.begin(0)
        engine.session().generate([5, 6, 7], sampling)
    found = recorder.trace().experts
    assert found.shape == (10, 2, 2)
    assert all(np.array_equal(found[:, layer], trace.experts[:, 0]) for layer in range(2))


def test_a_model_that_replays_itself_says_the_same(tiny: str) -> None:
    sampling = Sampling(max_tokens=8, temperature=0.0)
    with moeinf.load(tiny, experts="50%", prefetch="off", context=64) as engine:
        engine.learns = False
        recorder = Recorder(ModelIdentity.of(tiny, engine.manifest))
        engine.runtime.recorder = recorder
        said = engine.session().generate([5, 6, 7], sampling)
        engine.runtime.recorder = None
        trace = recorder.trace()
        modules = [engine.model.get_submodule(layer.module) for layer in engine.manifest.layers]
        replay = Replay([trace], modules)
        again = Recorder(ModelIdentity.of(tiny, engine.manifest))
        engine.runtime.recorder = again
        replay.begin(0)
        engine.session().generate([9, 10, 11], sampling)  # other tokens, and yet the same experts
        assert np.array_equal(again.trace().experts, trace.experts)
        replay.begin(0)
        assert engine.session().generate([5, 6, 7], sampling).tokens == said.tokens


def test_a_router_that_is_asked_early_names_what_the_recorded_one_did(tiny: str) -> None:
    """Also of a model whose own routers would name something else."""
    sampling = Sampling(max_tokens=8, temperature=0.0)
    with moeinf.load(tiny, experts="50%", prefetch="gate", context=64) as engine:
        engine.learns = False
        modules = engine.experts_modules
        recorder = Recorder(ModelIdentity.of(tiny, engine.manifest), foresight=GatePredictor(engine.model, modules))
        engine.runtime.recorder = recorder
        engine.session().generate([5, 6, 7], sampling)
        trace = recorder.trace()
        replay = Replay([trace], modules.values())
        assert replay.foresees
        again = Recorder(ModelIdentity.of(tiny, engine.manifest), foresight=GatePredictor(engine.model, modules))
        engine.runtime.recorder = again
        replay.begin(0)
        engine.session().generate([9, 10, 11], sampling)
        assert np.array_equal(again.trace().experts, trace.experts)
        assert np.array_equal(again.trace().foreseen, trace.foreseen)  # type: ignore[arg-type]
        assert engine.runtime.prefetch.named > 0
        blind = Replay([dataclasses.replace(trace, foreseen=None)], modules.values())
        assert not blind.foresees


def test_where_nothing_was_foreseen_nothing_is_named() -> None:
    """A layer that a predictor calls is asked, and does not end the token."""
    trace = make_trace([[[0, 1], [2, 3]], [[4, 5], [6, 0]]])
    foreseen = np.full_like(trace.experts, NO_EXPERT)
    foreseen[1, 1, 0] = 6
    modules = [Seen(), Seen()]
    modules[0].then = modules[1]
    replay = Replay([dataclasses.replace(trace, foreseen=foreseen)], modules)
    replay.begin(0)
    run(modules, 1)
    run(modules, 1)
    assert [experts for experts, _ in modules[1].calls] == [[[]], [[2, 3]], [[6]], [[6, 0]]]
    assert [experts for experts, _ in modules[0].calls] == [[[0, 1]], [[4, 5]]]


def test_a_repeated_layer_foresees_what_the_recorded_one_did() -> None:
    trace = make_trace([[[0, 1], [2, 3], [4, 5]]] * 2)
    foreseen = np.full_like(trace.experts, NO_EXPERT)
    foreseen[:, 1, 0], foreseen[:, 2, 0] = [3, 2], [5, NO_EXPERT]
    modules = [Seen() for _ in range(5)]
    modules[1].then, modules[2].then = modules[3], modules[4]
    replay = Replay([dataclasses.replace(trace, foreseen=foreseen)], modules)
    replay.begin(0)
    run(modules, 1)
    run(modules, 1)
    assert [experts for experts, _ in modules[3].calls] == [[[3]], [[2, 3]], [[2]], [[2, 3]]]
    assert [experts for experts, _ in modules[4].calls] == [[[5]], [[4, 5]], [[]], [[4, 5]]]


@pytest.mark.parametrize(
    ("trace", "why"),
    [
        (make_trace([[[0, 1]] * 2], size=9), "its layer 0 has 9 experts, layer 0 of the model 8"),
        (make_trace([[[0, 1, 2]] * 2], top_k=3), "its layer 0 asks for 3 experts, layer 0 of the model for 2"),
        (make_trace([[[0, 1]] * 2, [[0, 1], [-1, -1]]]), "token 1 asks for no expert of layer 1"),
    ],
)
def test_what_does_not_fit(tiny: str, trace: Trace, why: str) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        check_replay(trace, Store().open(tiny).manifest)
    assert "moeinf.testing" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("last", "why"),
    [
        ({"num_experts": 7}, "its layer 1 has 8 experts, layer 3 of the model 7"),
        ({"top_k": 1}, "its layer 1 asks for 2 experts, layer 3 of the model for 1"),
    ],
)
def test_a_repeated_layer_must_fit_too(tiny: str, last: dict[str, Any], why: str) -> None:
    manifest = Store().open(tiny).manifest
    first, second = manifest.layers
    trace = make_trace([[[0, 1], [2, 3]]])
    check_replay(trace, dataclasses.replace(manifest, layers=(first, second, second, second)))
    deeper = dataclasses.replace(manifest, layers=(first, second, second, dataclasses.replace(second, **last)))
    with pytest.raises(UsageError, match=why):
        check_replay(trace, deeper)


def test_fewer_experts_and_more_layers_fit(tiny: str) -> None:
    check_replay(make_trace([[[0], [1], [2]]], size=3, top_k=1), Store().open(tiny).manifest)
