"""What moeinf uses of transformers beyond its public interface.

When one of these fails, a new version has moved something: look at the file that the message names, and bring
src/moeinf/conversion.py, metamodel.py, hooks.py, kvcache.py, engine.py, gate.py or compiling.py after it.
"""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.integrations.moe import use_experts_implementation

# Where it is, what it is called, and the parameters that moeinf gives it.
USED = [
    ("transformers.conversion_mapping", "get_model_conversion_mapping", {"model", "hf_quantizer"}),
    ("transformers.core_model_loading", "build_glob_alternation", {"globs"}),
    ("transformers.core_model_loading", "dot_natural_key", {"s"}),
    ("transformers.cache_utils", "DynamicLayer.update", {"key_states", "value_states"}),
    ("transformers.modeling_layers", "GradientCheckpointingLayer", None),
    (
        "transformers.core_model_loading",
        "rename_source_key",
        {"source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict"},
    ),
    ("transformers.core_model_loading", "WeightRenaming", {"source_patterns", "target_patterns"}),
    ("transformers.core_model_loading", "WeightConverter", {"source_patterns", "target_patterns", "operations"}),
    ("transformers.core_model_loading", "WeightConverter.add_tensor", {"target_key", "source_key", "source_pattern"}),
    ("transformers.core_model_loading", "WeightConverter.convert", {"layer_name", "model", "config"}),
    ("transformers.core_model_loading", "WeightConverter.copy", {"source_patterns", "target_patterns"}),
    ("transformers.core_model_loading", "Concatenate", {"dim"}),
    ("transformers.core_model_loading", "Interleave", {"dim"}),
    ("transformers.core_model_loading", "MergeModulelist", {"dim"}),
    ("transformers.core_model_loading", "Transpose", {"dim0", "dim1"}),
    ("transformers.initialization", "meta_device_safe_creation_ops", set()),
    ("transformers.initialization", "no_tie_weights", set()),
    ("transformers.integrations.finegrained_fp8", "Fp8Dequantize", {"hf_quantizer"}),
    ("transformers.integrations.mxfp4", "Mxfp4Dequantize", {"hf_quantizer"}),
    (
        "transformers.integrations.sdpa_attention",
        "sdpa_attention_forward",
        {"module", "query", "key", "value", "attention_mask", "dropout", "scaling", "position_bias"},
    ),
    ("transformers.modeling_utils", "PreTrainedModel._get_dtype_plan", {"dtype"}),
    ("transformers.models.auto.auto_factory", "_get_model_class", {"config", "model_mapping"}),
    ("transformers.models.auto.configuration_auto", "CONFIG_MAPPING", None),
    ("transformers.models.auto.modeling_auto", "AutoModelForCausalLM._model_mapping", None),
    ("transformers.quantizers.auto", "AutoHfQuantizer.from_config", {"quantization_config"}),
    ("transformers.quantizers.base", "HfQuantizer.get_new_dtype", {"converter", "param", "dtype"}),
    ("transformers.quantizers.base", "HfQuantizer.update_weight_conversions", {"weight_conversions", "model"}),
    ("transformers.utils.output_capturing", "_active_collector.set", None),
    (
        "transformers.utils.quantization_config",
        "FineGrainedFP8Config",
        {"weight_block_size", "expert_dtype"},
    ),
]


@pytest.mark.parametrize(
    ("module", "name", "parameters"), USED, ids=lambda value: value.rpartition(".")[2] if isinstance(value, str) else ""
)
def test_what_is_used_is_there(module: str, name: str, parameters: set[str] | None) -> None:
    moved = f"transformers has moved {name} of {module}: src/moeinf/conversion.py, metamodel.py or hooks.py must follow"
    found: object = importlib.import_module(module)
    for part in name.split("."):
        assert hasattr(found, part), moved
        found = getattr(found, part)
    if parameters is not None:
        assert callable(found), moved
        assert parameters <= set(inspect.signature(found).parameters), moved


def test_layers_of_a_kv_cache_count_as_before() -> None:
    layer = DynamicSlidingWindowLayer(8)
    assert (layer.sliding_window, layer.cumulative_length, layer.is_initialized) == (8, 0, False)
    assert not getattr(layer, "record_past", False)
    layer.update(*torch.zeros(2, 1, 1, 3, 4))
    assert (layer.cumulative_length, layer.get_seq_length()) == (3, 3)


def test_an_experts_module_is_known_by_its_flags() -> None:
    from moeinf.metamodel import _EXPERTS_FLAGS, is_experts_module

    class Experts(nn.Module):
        def __init__(self, config: PreTrainedConfig) -> None:
            super().__init__()

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states

    decorated: type[nn.Module] = use_experts_implementation(Experts)
    module = decorated(PreTrainedConfig())
    missing = [flag for flag in _EXPERTS_FLAGS if not hasattr(module, flag)]
    assert not missing, f"use_experts_implementation (transformers/integrations/moe.py) no longer sets {missing}"
    assert is_experts_module(module)
    assert not is_experts_module(nn.Linear(1, 1))


def test_a_converter_remembers_its_patterns_and_takes_tensors() -> None:
    """The rule that sharding one expert at a time stands on."""
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    converter = WeightConverter(
        ["experts.*.a", "experts.*.b"], "experts.ab", [MergeModulelist(dim=0), Concatenate(dim=1)]
    )
    copied = converter.copy(
        list(converter._original_source_patterns),
        list(converter._original_target_patterns),
        operations=list(converter.operations),
    )
    for name in "ab":
        tensor = torch.full((1, 2), ord(name), dtype=torch.uint8)
        copied.add_tensor("x.experts.ab", f"x.experts.7.{name}", f"experts.*.{name}", tensor)  # type: ignore[arg-type]
    made = copied.convert("x.experts.ab", model=None, config=None)
    assert {name: tensor.tolist() for name, tensor in made.items()} == {"x.experts.ab": [[[97, 97], [98, 98]]]}
