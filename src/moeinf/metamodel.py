"""The transformers model of a configuration, with shapes and no memory, and what can be learnt from it.

Owns which configurations are acceptable: sizes that can be, quantisations that transformers can undo, models that have
experts. Reads config.json through transformers only. Knows nothing of tensors in files, and no model family by name.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.cache_utils import DynamicLayer
from transformers.core_model_loading import build_glob_alternation
from transformers.models.auto.auto_factory import _get_model_class
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.output_capturing import _active_collector

from .checkpoint import CONFIG_NAME
from .errors import IntegrityError, MoeinfError, UnsupportedError, UsageError
from .ledger import ModelShape
from .manifest import Manifest, are_whole_panels
from .settings import check_transformers

__all__ = [
    "CACHE",
    "MATHS_DTYPES",
    "LoadedConfig",
    "MetaModel",
    "Probe",
    "causal_lm_class",
    "choose_dtype",
    "is_experts_module",
    "load_config",
    "model_shape",
    "output_collector",
]

MATHS_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""What the model's maths can be done in, by the names that people give."""

CACHE = "cache" if "cache" in signature(GenerationMixin.prepare_inputs_for_generation).parameters else "past_key_values"
"""What models and what they return call the KV cache; since transformers 5.24 it is the first."""

output_collector: Any = _active_collector
"""Where a running model collects what its routers gave, and more, for who asked for that; None while nobody did."""

_EXPANDABLE = {"fp8": "float8 blocks", "mxfp8": "mxfp8", "mxfp4": "mxfp4"}
"""Quantisations that transformers can undo while it loads, by the names that config.json has for them."""

_EXPERTS_FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated", "_apply_gate")
"""What `use_experts_implementation` gives every experts module (transformers/integrations/moe.py)."""

_MAX_CONFIG_BYTES = 16_000_000
_SIZES = r"(hidden_size|intermediate_size|experts?|per_tok(en)?|heads|head_dim|rank|top_?k)$"
_LIMITS = (
    (re.compile(r"layers$|^n_layer$"), 10_000),
    (re.compile(r"vocab_size$"), 100_000_000),
    (re.compile(_SIZES), 1_000_000),
)
"""Numbers of config.json that lead to allocations, and the most that any honest model has of them."""
_ESSENTIAL = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_DROPPED_KEYS = ("quantization_config", "compression_config", "auto_map", "transformers_weights", "_name_or_path")
_TOP_K_NAMES = ("num_experts_per_tok", "num_experts_per_token", "top_k", "moe_topk", "moe_k", "top_k_experts")
_CONTEXT_NAMES = ("max_position_embeddings", "model_max_length", "max_sequence_length", "max_seq_len", "n_positions")

_LAYERS_IN_PLACE = {"DynamicLayer", "DynamicSlidingWindowLayer", "LinearAttentionLayer"}
"""Layers of transformers' KV cache that `kvcache` has in place, or that do not grow."""

_PROBE_TOKENS = 256
_LONGEST_PROBED_WINDOW = 4096
"""A sliding window longer than this is taken for full attention: more KV cache is planned for than will be used."""


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A configuration that was found acceptable. `quantizer` expands weights that are packed as `packing` says.

    `dtype` is what config.json names, None where it names none.
    """

    folder: Path
    config: PreTrainedConfig
    dtype: str | None
    quantizer: HfQuantizer | None
    packing: str | None


@dataclass(frozen=True, slots=True)
class Probe:
    """What a run of the model tells: its experts modules in the order of their turn, and experts per token of each.

    One token of context takes `token_bytes` in the KV cache, a conversation of any length `fixed_bytes`. If the model
    cannot run without weights, they are "computed" from the configuration: rather too many than too few.
    """

    order: tuple[str, ...]
    top_k: Mapping[str, int]
    token_bytes: int
    fixed_bytes: int
    origin: Literal["measured", "computed"]


def load_config(folder: Path) -> LoadedConfig:
    """Read `folder`/config.json. Code that comes with a model is never run.

    Raises UnsupportedError for a model that is known not to run, IntegrityError for a configuration that cannot be.
    """
    check_transformers()
    path = folder / CONFIG_NAME
    with _blaming(path, "cannot be read"):
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise IntegrityError(f"{path} is too large to be a configuration")
        raw = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise IntegrityError(f"{path} names no model_type")
    if raw["model_type"] not in CONFIG_MAPPING:
        raise UnsupportedError(
            f"transformers {transformers.__version__} does not know the model type {raw['model_type']!r} of {folder}, "
            "and moeinf never runs code that comes with a model",
            hint="update transformers if the model is new",
        )
    _check_numbers(path, raw)
    with _blaming(path, f"is no configuration of {raw['model_type']}"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if config.is_encoder_decoder:
        raise UnsupportedError(
            f"{config.model_type} in {folder} is an encoder-decoder model; moeinf runs decoders only"
        )
    quantizer, packing = _take_quantizer(path, config)
    config = _causal_config(folder, config)
    for name in ("auto_map", "transformers_weights"):
        if hasattr(config, name):
            delattr(config, name)
    config._attn_implementation = "eager"  # a configuration can name one that is code to be downloaded
    config._experts_implementation = "eager"
    dtype = None if config.dtype is None else str(config.dtype).removeprefix("torch.")
    return LoadedConfig(folder, config, dtype, quantizer, packing)


def choose_dtype(asked: str, released: str | None) -> torch.dtype:
    """The dtype of the model's maths: `asked`, or with "auto" the one that it was `released` in."""
    if asked != "auto" and asked not in MATHS_DTYPES:
        raise UsageError(f"--dtype {asked} is not known", hint=f"choose one of: auto, {', '.join(MATHS_DTYPES)}")
    name = released if asked == "auto" else asked
    if name not in MATHS_DTYPES:
        raise UsageError(
            f"the model names {'no dtype' if name is None else f'the dtype {name}'} to compute in",
            hint=f"choose one with --dtype: {', '.join(MATHS_DTYPES)}",
        )
    return MATHS_DTYPES[name]


def causal_lm_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that AutoModelForCausalLM makes of `config`; its module is imported."""
    mapping = AutoModelForCausalLM._model_mapping
    known: type[PreTrainedModel] = _get_model_class(config, mapping)  # type: ignore[no-untyped-call]  # transformers' own
    return known


def model_shape(config: PreTrainedConfig, manifest: Manifest) -> ModelShape:
    """What the memory ledger and forecasts want to know of a model beside its manifest."""
    text = config.get_text_config(decoder=True)
    expanded_bytes, plain_layers = _expanded_bytes(text, manifest), _plain_layers(text)
    holds_scores = (
        not causal_lm_class(config)._supports_sdpa or expanded_bytes > 0
    )  # their values are smaller than keys
    widest = max(max(tensor.shape) for tensor in manifest.layout.unpacked.tensors)
    table_bytes = text.vocab_size * text.hidden_size * MATHS_DTYPES[manifest.dtype].itemsize
    is_tied = getattr(config, "tie_word_embeddings", False)
    return ModelShape(
        hidden=text.hidden_size,
        widest=max(widest, getattr(text, "intermediate_size", None) or 0),
        vocabulary=text.vocab_size,
        score_heads=max(layer.num_attention_heads for layer in text.per_layer_config) if holds_scores else 0,
        sharing=max(map(_sharing, text.per_layer_config)),
        layers=text.num_hidden_layers,
        head_bytes=table_bytes,
        lookup_bytes=0 if is_tied else table_bytes,
        expanded_bytes=expanded_bytes,
        kept_layers=plain_layers if expanded_bytes else 0,
        has_plain_attention=plain_layers == text.num_hidden_layers and not (holds_scores or manifest.kv_fixed_bytes),
        grows_in_place=_grows_in_place(config, text),
        table="" if is_tied else _table_name(config),
    )


def _table_name(config: PreTrainedConfig) -> str:
    """The parameter that is the table of input embeddings: its class says which one an output layer could share with
    it, and then it is of the same shape. "" where that is not said.
    """
    untyped: Any = causal_lm_class(config)
    shared = set((untyped._tied_weights_keys or {}).values())
    return shared.pop() if len(shared) == 1 else ""


def _sharing(layer: Any) -> int:
    """How many heads of a layer share keys and values."""
    heads = getattr(layer, "num_attention_heads", None) or 1
    return -(-heads // (getattr(layer, "num_key_value_heads", None) or heads))


def _expanded_bytes(text: Any, manifest: Manifest) -> int:
    """Bytes of the keys and values that a layer makes of a token's latents; 0 where it keeps these themselves."""

    def most(name: str) -> int:
        return max(getattr(layer, name, None) or 0 for layer in text.per_layer_config)

    if not most("kv_lora_rank"):
        return 0
    head = most("qk_nope_head_dim") + most("qk_rope_head_dim") + most("v_head_dim")
    return most("num_attention_heads") * head * MATHS_DTYPES[manifest.dtype].itemsize


def _grows_in_place(config: PreTrainedConfig, text: PreTrainedConfig) -> bool:
    """Whether what tokens add to the KV cache is kept by layers that `kvcache` has in place."""
    kinds = {type(layer).__name__ for layer in DynamicCache(config=text).layers}
    untyped: Any = causal_lm_class(config)
    return untyped._supports_default_dynamic_cache() and kinds <= _LAYERS_IN_PLACE


def _plain_layers(text: PreTrainedConfig) -> int:
    """Layers whose part of the KV cache is all tokens' and nothing else's, which `kvcache` keeps in place."""
    return sum(type(layer) is DynamicLayer for layer in DynamicCache(config=text).layers)


class MetaModel:
    """The model on torch's "meta" device, as `from_pretrained` makes it before it loads weights.

    `experts` are its experts modules by name, `dtypes` and `shapes` those of every parameter and persistent buffer.
    """

    def __init__(self, loaded: LoadedConfig, dtype: torch.dtype) -> None:
        self.model = _build(loaded, dtype)
        self.dtype = dtype
        self.experts = {name: module for name, module in self.model.named_modules() if is_experts_module(module)}
        if not self.experts:
            raise UnsupportedError(
                f"{self.model_type} in {loaded.folder} has no experts that moeinf can store one by one: it is a dense "
                "model, or a mixture of experts of a kind that is not supported"
            )
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        self.dtypes = self._loaded_dtypes()

    @property
    def architecture(self) -> str:
        return type(self.model).__name__

    @property
    def model_type(self) -> str:
        return str(self.model.config.model_type)

    @property
    def max_context(self) -> int:
        """Tokens that the model was made for. Raises UnsupportedError if the configuration does not say."""
        text = self.model.config.get_text_config(decoder=True)
        for name in _CONTEXT_NAMES:
            if isinstance(tokens := getattr(text, name, None), int) and tokens > 0:
                return tokens
        raise UnsupportedError(f"the configuration of this {self.model_type} does not say how long its context may be")

    @property
    def config_text(self) -> str:
        """The config.json of a store: it reads back to this model, and names no code and no packing."""
        raw = _without(json.loads(self.model.config.to_json_string()), _DROPPED_KEYS)
        raw |= {"architectures": [self.architecture], "dtype": str(self.dtype).removeprefix("torch.")}
        return json.dumps(raw, indent=2, sort_keys=True) + "\n"

    def probe(self) -> Probe:
        """Run the model on tokens without memory, at two lengths; where it looks at values, ask its configuration."""
        return self._run_probe() or self._guess_probe()

    @property
    def packable(self) -> dict[str, tuple[int, int]]:
        """The parameters that can be packed without loss if their numbers let them, and their sides (rows, width): in
        bfloat16, of whole panels, the weight of a linear layer and of nothing else.
        """
        tied = self.model.all_tied_weights_keys
        uses = Counter(map(id, self.model.state_dict(keep_vars=True).values()))
        found = {}
        for layer, module in self.model.named_modules():
            if type(module) is not nn.Linear or uses[id(module.weight)] > 1:
                continue
            name, (rows, width) = f"{layer}.weight", module.weight.shape
            is_shared = name in tied or name in tied.values()
            if not is_shared and self.dtypes[name] == torch.bfloat16 and are_whole_panels(rows, width):
                found[name] = (rows, width)
        return found

    def is_transposed(self, experts: str) -> bool:
        """Whether the weights of this experts module are [in, out]."""
        flags: Any = self.experts[experts]
        return bool(flags.is_transposed)

    def keep_one_expert(self) -> None:
        """Give experts modules the shapes of one expert: conversions may look at the shape of what they are to make."""
        for module in self.experts.values():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter[:1], requires_grad=False))

    def _loaded_dtypes(self) -> dict[str, torch.dtype]:
        """What transformers loads each tensor in: the dtype it was made with, or float32 if the family asks for it."""
        dtypes = {name: tensor.dtype for name, tensor in self.model.state_dict().items()}
        plan = self.model._get_dtype_plan(self.dtype)
        if plan:
            pattern, patterns_of_groups, _ = build_glob_alternation(list(plan))
            for name in dtypes:
                match = pattern.search(name)
                if match and match.lastgroup:
                    dtypes[name] = plan[patterns_of_groups[match.lastgroup]]
        return dtypes

    def _run_probe(self) -> Probe | None:
        top_k: dict[str, int] = {}
        for name, module in self.experts.items():
            module.forward = _stand_in(name, top_k)
        try:
            layers = getattr(self._cache_after(1), "layers", ())
            window = max((getattr(layer, "sliding_window", None) or 0 for layer in layers), default=0)
            begin = min(window, _LONGEST_PROBED_WINDOW) + _PROBE_TOKENS
            end = begin + _PROBE_TOKENS
            sizes = {tokens: _bytes_in(self._cache_after(tokens)) for tokens in (begin, end)}
        except Exception:  # a family's forward may do anything to tensors that have no values
            return None
        finally:
            for module in self.experts.values():
                del module.forward
        if set(top_k) != set(self.experts):
            return None
        token_bytes = math.ceil((sizes[end] - sizes[begin]) / _PROBE_TOKENS)
        fixed_bytes = max(0, *(size - tokens * token_bytes for tokens, size in sizes.items()))
        return Probe(tuple(top_k), top_k, token_bytes, fixed_bytes, "measured")

    def _cache_after(self, tokens: int) -> Any:
        with torch.no_grad(), torch.device("meta"):
            made = self.model(input_ids=torch.zeros((1, tokens), dtype=torch.long), use_cache=True)
            return getattr(made, CACHE)

    def _guess_probe(self) -> Probe:
        token_bytes = 0
        for layer in self.model.config.get_text_config(decoder=True).per_layer_config:
            heads = getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads
            head_dim = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
            token_bytes += 2 * heads * head_dim * self.dtype.itemsize
        top_k = {name: self._find_top_k(name) for name in self.experts}
        return Probe(tuple(self.experts), top_k, token_bytes, 0, "computed")

    def _find_top_k(self, module: str) -> int:
        """Experts per token: what the router beside the experts says, else the configuration, maybe a list by layer."""
        block = self.model.get_submodule(module.rpartition(".")[0])
        layer = next((int(part) for part in module.split(".") if part.isdigit()), 0)
        for owner in (*block.children(), block, self.model.config.get_text_config(decoder=True)):
            for name in _TOP_K_NAMES:
                count = getattr(owner, name, None)
                count = count[layer] if isinstance(count, list) and layer < len(count) else count
                if isinstance(count, int) and count > 0:
                    return count
        raise UnsupportedError(
            f"the configuration of this {self.model_type} does not say how many experts a token uses"
        )


@contextmanager
def _blaming(path: Path, what: str) -> Iterator[None]:
    """Turn whatever a family's own code raises on an odd configuration into an error that names the file."""
    try:
        yield
    except MoeinfError:
        raise
    except ImportError as error:
        raise UnsupportedError(f"{path}: the model needs a package that is not installed: {error}") from error
    except Exception as error:  # families check their configurations with exceptions of every kind
        raise IntegrityError(f"{path} {what}: {error}") from error


def _check_numbers(path: Path, raw: Mapping[str, Any]) -> None:
    """Refuse sizes that no model has, before anything is built of them."""
    for name, value in raw.items():
        if isinstance(value, dict):
            _check_numbers(path, value)
        limit = next((limit for pattern, limit in _LIMITS if pattern.search(name)), None)
        least = 1 if name in _ESSENTIAL else 0
        for number in value if isinstance(value, list) else [value]:
            is_number = isinstance(number, int | float) and not isinstance(number, bool)
            is_too_small = number is value and is_number and number < least
            if limit is not None and is_number and (is_too_small or number > limit):
                raise IntegrityError(f"{path} says {name} = {number}, which no model has")


def _take_quantizer(path: Path, config: PreTrainedConfig) -> tuple[HfQuantizer | None, str | None]:
    """The object that knows how to expand packed weights, and what to call them. The configuration forgets about it."""
    parts = (config, config.get_text_config(decoder=True))
    found = [part.quantization_config for part in parts if getattr(part, "quantization_config", None) is not None]
    for part in parts:
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    if not found:
        return None, None
    raw = found[0] if isinstance(found[0], dict) else {}
    method = str(raw.get("quant_method") or "a method without a name")
    if method not in _EXPANDABLE:
        raise UnsupportedError(
            f"{path} says that the weights are quantised with {method}; moeinf expands {', '.join(_EXPANDABLE)} only",
            hint="use the model's original weights",
        )
    with _blaming(path, "has an odd quantization_config"):
        quantizer: HfQuantizer = AutoHfQuantizer.from_config({**raw, "dequantize": True}, pre_quantized=True)
    return quantizer, _EXPANDABLE[method]


def _causal_config(folder: Path, config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of what AutoModelForCausalLM builds: of a larger model it may take the text part only."""
    mapping = AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        raise UnsupportedError(
            f"transformers has no text model for {config.model_type} in {folder}, only one with more parts or for "
            "another use; moeinf runs what AutoModelForCausalLM builds"
        )
    model_class = causal_lm_class(config)
    text_class = config.sub_configs.get("text_config")
    return config.get_text_config() if text_class is not None and model_class.config_class == text_class else config


def _without(table: Any, keys: tuple[str, ...]) -> Any:
    if isinstance(table, dict):
        return {key: _without(value, keys) for key, value in table.items() if key not in keys}
    return table


def _build(loaded: LoadedConfig, dtype: torch.dtype) -> PreTrainedModel:
    with (
        _blaming(loaded.folder / CONFIG_NAME, "describes no model that transformers can build"),
        torch.device("meta"),
        initialization.no_tie_weights(),
        initialization.meta_device_safe_creation_ops(),
    ):
        auto: Any = AutoModelForCausalLM  # untyped
        model: PreTrainedModel = auto.from_config(loaded.config, dtype=dtype, trust_remote_code=False)
    model.train(False)
    return model


def is_experts_module(module: nn.Module) -> bool:
    """Whether `module` holds routed experts in the form that transformers' `use_experts_implementation` gives them."""
    return all(hasattr(module, flag) for flag in _EXPERTS_FLAGS)


def _stand_in(name: str, top_k: dict[str, int]) -> Callable[..., torch.Tensor]:
    """A forward for an experts module that notes how it is called and computes nothing."""

    def forward(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        top_k[name] = top_k_index.shape[-1]
        return torch.empty_like(hidden_states)

    return forward


def _bytes_in(cache: Any) -> int:
    """Bytes of all tensors that can be reached from `cache`."""
    seen: set[int] = set()
    total, waiting = 0, [cache]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, nn.Module | PreTrainedConfig | type):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            total += thing.nbytes
        elif isinstance(thing, dict):
            waiting.extend(thing.values())
        elif isinstance(thing, list | tuple):
            waiting.extend(thing)
        else:
            waiting.extend(vars(thing).values() if hasattr(thing, "__dict__") else ())
    return total
