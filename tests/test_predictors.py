"""What the gate predictor says is what the next layer's router says about this layer's state."""

from __future__ import annotations

import pytest
import torch

import moeinf
from moeinf.predictors import GatePredictor, NoPredictor


def test_it_asks_the_next_layer_s_router(tiny: str) -> None:
    with moeinf.load(tiny, experts="50%", prefetch="gate") as engine, torch.inference_mode():
        model, runtime = engine.model, engine.runtime
        predictor = runtime._prefetcher._predictor
        assert isinstance(predictor, GatePredictor)
        blocks = [model.get_submodule(layer.module.rpartition(".")[0]) for layer in engine.manifest.layers]
        inputs: list[torch.Tensor] = []
        for block in blocks:
            block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        answers: dict[int, list[int]] = {}
        predict = predictor.predict

        def spy(layer: int) -> list[int]:
            answers[layer] = predict(layer)
            return answers[layer]

        predictor.predict = spy  # type: ignore[method-assign]
        model(torch.tensor([[7]]))
        assert len(inputs) == len(blocks) == len(answers) >= 2
        for layer, block in enumerate(blocks[1:]):
            router: torch.nn.Module = block.get_submodule("gate")
            chosen = router(inputs[layer].reshape(1, -1))[-1]
            assert sorted(answers[layer]) == sorted(chosen[0].tolist())
        assert answers[len(blocks) - 1] == []  # there is no next layer
        assert all(module.moeinf[0] is runtime for module in predictor._experts)


@pytest.mark.parametrize("experts", ["50%", "100%"])
@pytest.mark.parametrize("prefetch", ["auto", "gate", "off"])
def test_who_predicts(tiny: str, prefetch: str, experts: str) -> None:
    with moeinf.load(tiny, experts=experts, prefetch=prefetch) as engine:
        predictor = engine.runtime._prefetcher._predictor
        predicts = prefetch == "gate" or (prefetch == "auto" and experts == "50%")
        assert isinstance(predictor, GatePredictor if predicts else NoPredictor)
    assert NoPredictor().predict(0) == []
