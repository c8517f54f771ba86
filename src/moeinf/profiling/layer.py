"""What a layer of a model costs beside reading weights: Python, attention, the router, the engine's bookkeeping.

Tiny models whose experts weigh nothing decode with the engine's own runtime. The disk is the one thing left out.
"""

from __future__ import annotations

import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import Qwen3MoeConfig

from moeinf import hooks
from moeinf.cache import ExpertCache
from moeinf.collection import ActivationCollection, RequestCounter
from moeinf.gate import GatePredictor
from moeinf.kernels import choose_maths, speed_up_dense
from moeinf.kvcache import make_cache
from moeinf.ledger import MemoryPlan
from moeinf.manifest import ExpertLayout, Manifest, MoeLayer, Source, TensorSpec
from moeinf.metamodel import CACHE, causal_lm_class, is_experts_module
from moeinf.native_reader import open_reader
from moeinf.policies import make_policy
from moeinf.predictors import Added, Predictor
from moeinf.runtime import ExpertRuntime
from moeinf.settings import DEFAULT_POLICY
from moeinf.steps import Arrival
from moeinf.timing import undisturbed
from moeinf.transfer import READERS, ExpertReader, SlotPool, Urgency

__all__ = ["LayerCosts", "NoDisk", "measure_layer"]

_EXPERTS, _TOP_K = 128, 8
_FEW, _MANY = 4, 12
"""Layers of the two models whose slope is a layer."""
_MISSING_SLOTS = 2 * _MANY * _TOP_K
"""Of the model that misses experts: what two tokens ask for."""
_PIECES = 3
"""In so many pieces an expert is read, as one of 3 MiB is."""
_LEAST_TOKENS = 2
_CONTEXT = 256


@dataclass(frozen=True)
class LayerCosts:
    """Seconds beside what takes weights or the disk: of a layer, by parts and in one call, of an expert that has to be
    fetched, and of asking a layer's router early.
    """

    layer_s: float
    whole_layer_s: float
    fetch_s: float
    foresee_s: float


def measure_layer(seconds: float) -> LayerCosts:
    """What layers take, found with tiny models that decode tokens in turn for so many `seconds`. A layer is the slope
    between few of them and many. With slots for few experts a token of many layers takes longer by what it has to
    fetch, from a file that the page cache holds. Of one more the routers are asked early, and two compute whole layers.
    """
    with ExitStack() as stack, torch.inference_mode():
        few, many = _Decoder(_FEW, stack), _Decoder(_MANY, stack)
        few_whole, many_whole = _Decoder(_FEW, stack, is_whole=True), _Decoder(_MANY, stack, is_whole=True)
        missing, foreseeing = _Decoder(_MANY, stack, slots=_MISSING_SLOTS), _Decoder(_MANY, stack, foresees=True)
        end = time.perf_counter() + seconds
        while len(few.times) < _LEAST_TOKENS or time.perf_counter() < end:
            for decoder in (few, many, few_whole, many_whole, missing, foreseeing):
                decoder.decode()
    asking = foreseeing.asking
    return LayerCosts(
        _slope(few, many),
        _slope(few_whole, many_whole),
        max(0.0, (missing.token_s - many.token_s) / max(1.0, missing.misses)),
        undisturbed(asking) if asking else 0.0,
    )


def _slope(few: _Decoder, many: _Decoder) -> float:
    return max(0.0, (many.token_s - few.token_s) / (_MANY - _FEW))


class _Asked:
    """A predictor that is asked, and names nothing: `times` are those of the answers that named something."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self.observe = predictor.observe
        self.times: list[float] = []

    def predict(self, layer: int, added: Added | None = None) -> list[int]:
        begin = time.perf_counter()
        if self._predictor.predict(layer, added):
            self.times.append(time.perf_counter() - begin)
        return []


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


class _Decoder:
    """A tiny model with the engine's runtime, all or so many `slots`, and how long its tokens took. Of one that
    `foresees` the routers are asked early; one that `is_whole` computes whole layers where it can.
    """

    def __init__(
        self, layers: int, stack: ExitStack, *, slots: int | None = None, foresees: bool = False, is_whole: bool = False
    ) -> None:
        self.times: list[float] = []
        self._model = _tiny_model(layers)
        self._runtime, self._asked = _attach_runtime(self._model, layers, slots, foresees, is_whole, stack)
        self._token = torch.tensor([[1]])

    def decode(self) -> None:
        """One token more."""
        if len(self.times) % _CONTEXT == 0:
            self._cache = make_cache(self._model.config, _CONTEXT)
        begin = time.perf_counter()
        logits = self._model(self._token, use_cache=True, **{CACHE: self._cache}).logits
        self.times.append(time.perf_counter() - begin)
        self._token = torch.multinomial(logits[0, -1].float().softmax(-1), 1)[None]

    @property
    def token_s(self) -> float:
        """Of a token that nothing disturbed; the first ones warmed up."""
        return undisturbed(self.times[len(self.times) // 4 :])

    @property
    def misses(self) -> float:
        """Experts of a token that had no slot."""
        return self._runtime.decode.misses / len(self.times)

    @property
    def asking(self) -> list[float]:
        """Seconds of each time that a router was asked early."""
        return self._asked.times if self._asked else []


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


def _attach_runtime(
    model: Any, layers: int, slots: int | None, foresees: bool, is_whole: bool, stack: ExitStack
) -> tuple[ExpertRuntime, _Asked | None]:
    """Let the engine's runtime compute the experts of `model`, with a slot for each of them or so many `slots`. Returns
    it, and what it asks if it `foresees`.
    """
    modules = {name: module for name, module in model.named_modules() if is_experts_module(module)}
    shapes = {
        name: tuple(each.shape[1:]) for name, each in next(iter(modules.values())).named_parameters(recurse=False)
    }
    layout, manifest = _describe(shapes, layers)
    sizes, experts = [_EXPERTS] * layers, layers * _EXPERTS
    slots = slots or experts
    pool = SlotPool(layout, slots)
    maths = choose_maths(modules.values(), layout, "auto", pool.tensors(0), stack)
    hooks.attend(model, speed_up_dense(model, maths))
    asked = _Asked(GatePredictor(model, modules)) if foresees else None
    runtime = ExpertRuntime(
        manifest,
        maths,
        cache=ExpertCache(experts, slots, make_policy(DEFAULT_POLICY, sizes)),
        pool=pool,
        fetcher=NoDisk() if slots == experts else _file_reader(pool, layout, experts, stack),
        counter=RequestCounter(sizes, ActivationCollection(sizes)),
        predictors={"gate": asked} if asked else None,
    )
    plan = MemoryPlan(
        budget=slots * pool.slot_bytes, dense=0, kv_cache=0, workspace=0, token_workspace=0, slots=slots,
        slot_bytes=pool.slot_bytes, all_experts=experts, token_experts=layers * _TOP_K, context=1,
    )  # fmt: skip
    hooks.attach(list(modules.values()), model, runtime, plan)
    if is_whole:
        hooks.decode(model, modules, maths, runtime, pool)
    return runtime, asked


def _file_reader(pool: SlotPool, layout: ExpertLayout, experts: int, stack: ExitStack) -> ExpertReader:
    """Brings each expert from the same small file, by as many threads and in as many pieces as larger ones have."""
    path = Path(stack.enter_context(TemporaryDirectory())) / "expert"
    path.write_bytes(bytes(layout.nbytes))
    reader = open_reader(threads=READERS, direct=False, piece_bytes=layout.nbytes // _PIECES)
    stack.callback(reader.close)
    return ExpertReader(reader, pool, [path] * experts, (0, layout.nbytes))


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
