"""What a layer of a model costs beside reading weights: Python, attention, the router, the engine's bookkeeping.

A tiny model whose experts weigh nothing decodes with the engine's own runtime. The disk is the one thing left out.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from typing import Any

import torch
from transformers import Qwen3MoeConfig

from moeinf import hooks
from moeinf.cache import ExpertCache
from moeinf.collection import ActivationCollection, RequestCounter
from moeinf.kernels import choose_maths, speed_up_dense
from moeinf.kvcache import make_cache
from moeinf.ledger import MemoryPlan
from moeinf.manifest import ExpertLayout, Manifest, MoeLayer, Source, TensorSpec
from moeinf.metamodel import causal_lm_class, is_experts_module
from moeinf.policies import make_policy
from moeinf.runtime import ExpertRuntime
from moeinf.settings import DEFAULT_POLICY
from moeinf.steps import Arrival
from moeinf.timing import undisturbed
from moeinf.transfer import SlotPool, Urgency

__all__ = ["NoDisk", "measure_layer"]

_EXPERTS, _TOP_K = 128, 8
_LAYERS = (4, 12)
_LEAST_TOKENS = 2
_CONTEXT = 256


def measure_layer(seconds: float) -> float:
    """Seconds that a layer takes beside reading weights: the slope between a tiny model of few layers and one of more,
    both with all experts resident, which decode tokens in turn for so many `seconds`.
    """
    times: dict[int, list[float]] = {layers: [] for layers in _LAYERS}
    with ExitStack() as stack, torch.inference_mode():
        decoders = {layers: _decode(layers, stack) for layers in _LAYERS}
        end = time.perf_counter() + seconds
        while len(times[_LAYERS[0]]) < _LEAST_TOKENS or time.perf_counter() < end:
            for layers, tokens in decoders.items():
                times[layers].append(next(tokens))
    few, many = (undisturbed(of_one[len(of_one) // 4 :]) for of_one in times.values())  # the first ones warm up
    return max(0.0, (many - few) / (_LAYERS[1] - _LAYERS[0]))


class NoDisk:
    """A disk that takes no time and brings nothing."""

    def __init__(self) -> None:
        self._done: deque[Arrival] = deque()

    def fetch(self, key: int, slot: int, urgency: Urgency) -> None:
        self._done.append(Arrival(key, 0))

    def promote(self, key: int) -> None:
        pass

    def cancel(self, key: int) -> None:
        pass

    def wait(self) -> Arrival:
        return self._done.popleft()

    def poll(self) -> Arrival | None:
        return self._done.popleft() if self._done else None

    def close(self) -> None:
        pass


def _decode(layers: int, stack: ExitStack) -> Iterator[float]:
    """A tiny model with the engine's runtime, and the seconds of each token that it decodes."""
    model = _tiny_model(layers)
    token = torch.tensor([[1]])
    _attach_runtime(model, layers, stack)
    for position in count():
        if position % _CONTEXT == 0:
            cache = make_cache(model.config, _CONTEXT)
        begin = time.perf_counter()
        logits = model(token, past_key_values=cache, use_cache=True).logits
        taken = time.perf_counter() - begin
        token = torch.multinomial(logits[0, -1].float().softmax(-1), 1)[None]
        yield taken


def _tiny_model(layers: int) -> Any:
    config = Qwen3MoeConfig(  # type: ignore[call-arg]  # head_dim comes from a base class without types
        vocab_size=256,
        hidden_size=128,  # matrices of 4096 numbers and fewer would be torch's
        intermediate_size=128,
        moe_intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=_EXPERTS,
        num_experts_per_tok=_TOP_K,
        dtype="bfloat16",
    )
    with torch.random.fork_rng(devices=[]), hooks.quiet():
        torch.manual_seed(0)
        model: Any = causal_lm_class(config)(config)
    return model.to(torch.bfloat16).eval()


def _attach_runtime(model: Any, layers: int, stack: ExitStack) -> None:
    """Let the engine's runtime compute the experts of `model`, with a slot for each of them."""
    modules = [module for module in model.modules() if is_experts_module(module)]
    shapes = {name: tuple(each.shape[1:]) for name, each in modules[0].named_parameters(recurse=False)}
    layout, manifest = _describe(shapes, layers)
    sizes = [_EXPERTS] * layers
    slots = layers * _EXPERTS
    pool = SlotPool(layout, slots)
    maths = choose_maths(modules, layout, "auto", pool.tensors(0), stack)
    hooks.attend(model, speed_up_dense(model, maths))
    runtime = ExpertRuntime(
        manifest,
        maths,
        cache=ExpertCache(slots, slots, make_policy(DEFAULT_POLICY, sizes)),
        pool=pool,
        fetcher=NoDisk(),
        counter=RequestCounter(sizes, ActivationCollection(sizes)),
    )
    plan = MemoryPlan(
        budget=0, dense=0, kv_cache=0, workspace=0, token_workspace=0, slots=slots, slot_bytes=pool.slot_bytes,
        all_experts=slots, token_experts=layers * _TOP_K, context=1,
    )  # fmt: skip
    hooks.attach(modules, model, runtime, plan)


def _describe(shapes: dict[str, tuple[int, ...]], layers: int) -> tuple[ExpertLayout, Manifest]:
    specs: list[TensorSpec] = []
    for name in ("gate_up_proj", "down_proj"):
        specs.append(TensorSpec(name, "BF16", shapes[name], sum(spec.nbytes for spec in specs)))
    layout = ExpertLayout(4096, tuple(specs))
    manifest = Manifest(
        source=Source("profile"),
        architecture="Qwen3MoeForCausalLM",
        model_type="qwen3_moe",
        dtype="bfloat16",
        precision="bfloat16",
        layers=tuple(MoeLayer(f"model.layers.{layer}.mlp.experts", _EXPERTS, _TOP_K) for layer in range(layers)),
        layout=layout,
        dense_files=(),
        dense_bytes=0,
        kv_token_bytes=0,
        kv_fixed_bytes=0,
        max_context=1,
        files={},
    )
    return layout, manifest
