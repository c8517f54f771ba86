"""The places where moeinf enters transformers: it loads models without their experts, and computes experts itself.

Loading: a "quantizer" that empties every experts module, and linear layers whose weights stay packed, before the
weights are loaded, so that `from_pretrained` builds the dense part, for any family, and experts never occupy memory
outside the slots. Compute: an experts implementation that transformers calls in place of its own. Attention: of a
single token, where that is native, in front of transformers' `sdpa`. All are public extension points
(transformers/quantizers/auto.py, transformers/integrations/moe.py, AttentionInterface), registered when this module is
imported. The rotary embedding, and attention that a family computes step by step, have no such point: in a loaded model
the names by which attention calls them mean other functions. Nor have decoder layers: one that is computed whole has
another forward. A family is supported when its experts module is made by `use_experts_implementation`; no family is
named here.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .errors import IntegrityError
from .gate import first_decoder_layer
from .interrupts import KeptInterrupt
from .kernels import (
    DecoderLayers,
    ExpertMaths,
    LosslessLinear,
    NativeAttention,
    NativeDeltaRule,
    NativeMaths,
    NativeSinks,
    SelfAttentions,
    Slots,
    Watching,
    one_thread,
)
from .kvcache import grows_in_place
from .ledger import MemoryPlan
from .metamodel import CACHE, causal_lm_class, is_experts_module
from .runtime import ExpertRuntime
from .token_forward import TokenForward
from .transfer import SlotPool

__all__ = ["announce_tokens", "attach", "attend", "decode", "load_dense_model", "move", "quiet"]

_NAME = "moeinf"
_ROTATION = "apply_rotary_pos_emb"
"""What most families call the function that turns queries and keys."""
_EAGER = "eager_attention_forward"
"""What they call the one that attends step by step."""
_DELTA_RULE = "torch_recurrent_gated_delta_rule"
"""What Qwen's call a step of a recurrent state."""
_interrupt = KeptInterrupt()
"""Within a forward pass, Ctrl-C waits for the next MoE layer that is not part of a larger call, or the end."""


@register_quantization_config(_NAME)
class _StoreConfig(QuantizationConfigMixin):
    def __init__(self, packed: Iterable[str] = (), **_: Any) -> None:
        self.quant_method = _NAME  # type: ignore[assignment]  # typed as transformers' own enum
        self.packed = list(packed)


@register_quantizer(_NAME)
class _StoreQuantizer(HfQuantizer):
    """Takes the experts and packed weights out of a model before it is loaded. What it loads carries its final names:
    no conversions.
    """

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        for module in model.modules():
            if is_experts_module(module):
                for name, _parameter in list(module.named_parameters(recurse=False)):
                    setattr(module, name, None)
                module._is_hf_initialized = True  # type: ignore[assignment]  # a plain attribute
        about: Any = self.quantization_config
        for name in about.packed:
            layer = _find_linear(model, name)
            layer.weight = None  # type: ignore[assignment]  # a module may lack a parameter
            layer._is_hf_initialized = True  # type: ignore[assignment]  # a plain attribute

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        """Take off every mark of a quantized model: some families compute differently when they see one (jamba)."""
        self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                vars(module.config).pop("_is_quantized", None)
        return model

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> list[Any]:
        return []

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def _find_linear(model: nn.Module, name: str) -> nn.Linear:
    with contextlib.suppress(AttributeError):
        layer = model.get_submodule(name)
        if type(layer) is nn.Linear:
            return layer
    raise IntegrityError(f"the model has no linear layer {name}, whose weight is stored", hint="pull it again")


def load_dense_model(
    config: PreTrainedConfig,
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    packed: Mapping[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> PreTrainedModel:
    """The model of `config` with the dense weights in `tensors`, which it uses in place, and no experts. `packed` has
    the weights that stay packed, which are those of linear layers, by the names of these: panels and uppers. Raises
    IntegrityError if the model has no such layers.
    """
    packed = packed or {}
    with quiet():
        model: PreTrainedModel = causal_lm_class(config).from_pretrained(
            None, config=config, state_dict=dict(tensors), dtype=dtype, quantization_config=_StoreConfig(packed)
        )
    for name, parts in packed.items():
        LosslessLinear.pack_into(_find_linear(model, name), *parts)
    model.train(False)
    return model


def move(model: PreTrainedModel, place: torch.device) -> None:
    """Move the dense weights to a device; what they took in host memory is free again."""
    untyped: Any = model
    untyped.to(place)
    untyped.tie_weights()  # a device's tensors may be of a kind that leaves tied weights apart


def give_back(model: PreTrainedModel) -> None:
    """Free the memory of all weights, whoever still holds the model."""
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)


def attach(modules: list[nn.Module], model: PreTrainedModel, runtime: ExpertRuntime, plan: MemoryPlan) -> None:
    """Let `runtime` compute the experts of `modules`, one per MoE layer in order, whenever `model` runs.

    What steps of several tokens take, and the tokens of a conversation, is borrowed from slots for as long as it is
    needed, where the plan has no other room for it.
    """
    loans = _Loans(runtime, plan)
    model.register_forward_pre_hook(loans.begin, with_kwargs=True)
    model.register_forward_hook(loans.end, always_call=True)
    for layer, module in enumerate(modules):
        module.moeinf = (runtime, layer)  # type: ignore[assignment]  # a plain attribute, not a submodule
    model.set_experts_implementation(_NAME)


@contextlib.contextmanager
def without_experts(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While this is open, the experts of `modules` add nothing, and none is asked for."""
    attached: list[tuple[Any, Any]] = [(module, module.moeinf) for module in modules]
    for module, (_, layer) in attached:
        module.moeinf = (_NoExperts(), layer)
    try:
        yield
    finally:
        for module, own in attached:
            module.moeinf = own


class _NoExperts:
    def forward(self, _layer: int, hidden: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.zeros_like(hidden)


class _Loans:
    """The slots that lend their memory to what a plan has no other room for."""

    def __init__(self, runtime: ExpertRuntime, plan: MemoryPlan) -> None:
        self._runtime = runtime
        self._plan = plan
        self._held: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        """Tokens that each KV cache has memory of: as many as it ever held."""
        self._is_as_between_steps = False
        """Whether as much is lent for the step that runs as behind it: it is of one token, and counted."""

    def begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A step begins."""
        _interrupt.hold()
        self._runtime.require_open()
        given = kwargs.get("input_ids", args[0] if args else None)
        if given is None and (embedded := kwargs.get("inputs_embeds")) is not None:
            given = embedded[..., 0]
        self._is_as_between_steps = False
        if given is not None:
            tokens, cache = given.numel(), kwargs.get(CACHE, kwargs.get("past_key_values"))
            self._lend(tokens, self._count(cache, tokens))
            self._is_as_between_steps = tokens == 1 and cache in self._held

    def end(self, *_: Any) -> None:
        """It has ended; after a KeyboardInterrupt torch does not say so."""
        if not self._is_as_between_steps:
            self._lend(1, sum(self._held.values()))
        _interrupt.release()

    def _count(self, cache: Any, tokens: int) -> int:
        """Tokens that are held, in all conversations, behind a step of so many; of another's KV cache nobody knows."""
        if cache not in self._held and not grows_in_place(cache):
            return self._plan.context
        self._held[cache] = max(self._held.get(cache, 0), cache.get_seq_length() + tokens)
        return sum(self._held.values())

    def _lend(self, tokens: int, held: int) -> None:
        self._runtime.lend(min(self._plan.lent_slots(tokens, held), self._plan.most_slots - 2))


def announce_tokens(first: nn.Module, runtime: ExpertRuntime) -> None:
    """Tell `runtime` of each token that enters `first`, the model's first decoder layer, alone."""

    def enter(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = args[0] if args else kwargs["hidden_states"]
        if state.numel() == state.shape[-1]:
            runtime.token_enters()

    first.register_forward_pre_hook(Watching(enter), with_kwargs=True)


def _experts_forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    _interrupt.check()
    runtime, layer = module.moeinf
    output: torch.Tensor = runtime.forward(layer, hidden_states, top_k_index, top_k_weights)
    return output


ALL_EXPERTS_FUNCTIONS.register(_NAME, _experts_forward)


def attend(model: nn.Module, attention: NativeAttention | None) -> None:
    """Let `attention` do what it can of the attention of `model`; None leaves all of it to transformers."""
    if attention is None:
        return
    forwards: dict[Any, FunctionType] = {}
    wholes = SelfAttentions(attention)
    for module in model.modules():
        module.moeinf_attention = attention  # type: ignore[assignment]  # a plain attribute, not a submodule
        forward = _forward_of(module)
        if _called(forward):
            if forward not in forwards:
                forwards[forward] = _with_native(forward, attention)
            module.forward = MethodType(forwards[forward], module)
            if (whole := wholes.find(module)) is not None:
                module.forward = whole


def decode(
    model: nn.Module,
    experts: Mapping[str, nn.Module],
    maths: Sequence[ExpertMaths],
    runtime: ExpertRuntime,
    pool: SlotPool,
) -> None:
    """Let the library compute whole decoder layers of one token, where it can, and one after the other. `experts` are
    the modules by their names in the model, one per MoE layer in order, which `maths` computes from the slots of
    `pool`. To be called after `announce_tokens`.
    """
    slots = Slots(runtime.cache.resident, pool.bytes.data_ptr(), pool.slot_bytes)
    layers = DecoderLayers(runtime, slots, _interrupt.check)
    has_experts: dict[nn.Module, tuple[nn.Module, ExpertMaths, range]] = {}
    for (name, module), each, span in zip(experts.items(), maths, runtime.spans, strict=True):
        has_experts[model.get_submodule(".".join(name.split(".")[:-2]))] = module, each, span
    name = next(iter(experts))
    base: Any = model.get_submodule(".".join(name.split(".")[:-4]))
    for layer in {**has_experts, **dict.fromkeys(getattr(base, "layers", ()))}:
        if (whole := layers.find(layer, *has_experts.get(layer, ()))) is not None:
            layer.forward = whole  # of this one alone
    first = first_decoder_layer(model, name)
    if first is not None and any(isinstance(each, NativeMaths) for each in maths):
        token_forward = TokenForward.find(model, base, runtime, _interrupt.check, first)
        if token_forward is not None:
            model.forward = token_forward


def _forward_of(module: nn.Module) -> Any:
    """That of its class; where that has a recurrent state, without what accelerate has wrapped around it."""
    forward: Any = type(module).forward
    bare = inspect.unwrap(forward)
    return bare if _DELTA_RULE in _called(bare) else forward


def _called(forward: Any) -> set[str]:
    """Which of the functions that the library may have it calls, by their names in its module."""
    if not isinstance(forward, FunctionType):
        return set()
    return {_ROTATION, _EAGER, _DELTA_RULE}.intersection(forward.__code__.co_names, forward.__globals__)


def _with_native(forward: FunctionType, attention: NativeAttention) -> FunctionType:
    """The same code, to which these names mean what the library has."""
    names = dict(forward.__globals__)
    makers: dict[str, Any] = {
        _ROTATION: attention.rotation,
        _EAGER: partial(NativeSinks, pool=attention.pool),
        _DELTA_RULE: partial(NativeDeltaRule, pool=attention.pool),
    }
    names |= {name: makers[name](names[name]) for name in _called(forward)}
    made = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


_sdpa_forward: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]


def _attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' `sdpa`, and what it comes to for one token of a model that `attend` was told of."""
    native: NativeAttention | None = getattr(module, "moeinf_attention", None)
    is_plain = attention_mask is None and not any(more.get(name) for name in ("dropout", "softcap"))
    is_plain = is_plain and more.get("position_bias") is None and more.get("cache") is None
    if native is not None and is_plain and native.takes(query, key, value):
        return native.compute(query, key, value, scaling or query.shape[3] ** -0.5), None
    with one_thread(native is not None and native.is_small(query, key.shape[2])):
        output: tuple[torch.Tensor, None] = _sdpa_forward(
            module, query, key, value, attention_mask, scaling=scaling, **more
        )
    return output


ALL_ATTENTION_FUNCTIONS.register("sdpa", _attention_forward)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and advice off the user's terminal; its errors still come as exceptions."""
    level = transformers.logging.get_verbosity()
    shows_bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(logging.ERROR)
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if shows_bars:
            transformers.logging.enable_progress_bar()  # type: ignore[no-untyped-call]
