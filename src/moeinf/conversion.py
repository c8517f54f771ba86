"""What becomes of a checkpoint: which tensors and experts the store will hold, and of which tensors each is made.

The one module that uses transformers' internals for names (core_model_loading.py, conversion_mapping.py): it plays
transformers' loader through on names alone, and runs transformers' conversions on the few tensors that it is handed.
Knows nothing of stores and progress, and no model family by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import Mxfp4Dequantize
from transformers.quantizers.base import HfQuantizer

from .checkpoint import Checkpoint
from .dtypes import SAFETENSORS_NAMES, TORCH_DTYPES
from .errors import IntegrityError, UnsupportedError
from .manifest import DTYPE_BYTES, RELEASED_GROUPS, ExpertLayout, MoeLayer, TensorSpec
from .metamodel import MetaModel, choose_dtype, load_config
from .tensorfile import TensorFile, encode_expert_header

__all__ = [
    "DenseTensor",
    "ExpertPart",
    "Plan",
    "Recipe",
    "Source",
    "plan_conversion",
]

_Method = Literal["copy", "rows", "whole"]

_NO_WEIGHTS = ("_scale_inv", "activation_scale")
"""How the names of what lies beside weights in float8 end."""


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of the checkpoint, and the pattern under which transformers' conversion takes it in."""

    name: str
    pattern: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to make the parameters `outputs` of the tensors `sources`.

    "copy": the sources, one after another, are the output but for their dtype. "rows": bands of the output's rows can
    be converted one by one, each from the same band of every source; `band_rows` is what config.json says a band has.
    "whole": nothing less than all sources will do.
    """

    outputs: tuple[str, ...]
    sources: tuple[Source, ...]
    method: _Method
    converter: WeightConverter | None = field(default=None, repr=False)
    band_rows: int | None = None

    def needs_floats(self, source: Source) -> bool:
        """Whether a source is taken for weights as it is: nothing that transformers does with it scales it."""
        match self.converter and self.converter.operations:
            case [Fp8Dequantize(), *_]:
                is_weight = not source.pattern.endswith(_NO_WEIGHTS)
                return is_weight and all(other.pattern != _scale_of(source.pattern) for other in self.sources)
            case [Mxfp4Dequantize(), *_]:
                return False
        return True


@dataclass(frozen=True, slots=True)
class DenseTensor:
    """A tensor of the dense part, under its name in the transformers model."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class ExpertPart:
    """One tensor of one expert and its recipe. Fused sources hold all experts; the expert's row of each is meant.

    `packing` is what the tensor is released in, of the kinds that a store can keep (manifest.RELEASED_BITS); None for
    another.
    """

    spec: TensorSpec
    recipe: Recipe
    is_fused: bool
    packing: str | None

    @property
    def pieces(self) -> tuple[tuple[Source, Source], ...]:
        """The numbers and scales of a packed tensor, in the order in which they come one below the other."""
        sources = self.recipe.sources
        if self.packing != "fp8":
            return ((sources[0], sources[1]),)
        assert self.recipe.converter is not None, "without one nothing is packed"
        of = {source.pattern: source for source in sources}
        patterns = (pattern for pattern in self.recipe.converter.source_patterns if pattern in of)
        return tuple((of[name], of[_scale_of(name)]) for name in patterns if _scale_of(name) in of)


@dataclass(frozen=True, slots=True)
class _LayerPart:
    """One tensor of all experts of a layer. `names`: its sources by pattern, one per expert or one that is fused."""

    parameter: str
    spec: TensorSpec
    names: tuple[tuple[str, tuple[str, ...]], ...]
    is_fused: bool
    converter: WeightConverter | None
    packing: str | None

    def of_expert(self, expert: int) -> ExpertPart:
        at = 0 if self.is_fused else expert
        sources = tuple(Source(names[at], pattern) for pattern, names in self.names)
        return ExpertPart(
            self.spec, Recipe((self.parameter,), sources, "whole", self.converter), self.is_fused, self.packing
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """All that the store of one checkpoint will hold, and what it is made of. The manifest has the same names for it.

    `dense` is in the order of the dense file; `recipes` make its tensors, each one or several. `tensor_files` says
    where sources lie, `ignored` which tensors of the checkpoint the model has no use for. `config` is the text of the
    store's config.json.
    """

    architecture: str
    model_type: str
    dtype: str
    precision: str
    layers: tuple[MoeLayer, ...]
    layout: ExpertLayout
    dense: tuple[DenseTensor, ...]
    recipes: tuple[Recipe, ...]
    kv_token_bytes: int
    kv_fixed_bytes: int
    max_context: int
    config: str
    tensor_files: Mapping[str, str]
    ignored: tuple[str, ...]
    _parts: tuple[tuple[_LayerPart, ...], ...] = field(repr=False)
    _meta: MetaModel = field(repr=False)
    _quantizer: HfQuantizer | None = field(repr=False)

    @property
    def dense_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.dense)

    @property
    def packable(self) -> dict[str, tuple[int, int]]:
        """The dense weights that can be packed without loss if their numbers let them, and their sides."""
        there = {tensor.name for tensor in self.dense}
        return {name: sides for name, sides in self._meta.packable.items() if name in there}

    @property
    def is_transposed(self) -> bool:
        """Whether the weights of experts are [in, out]."""
        return self._meta.is_transposed(self.layers[0].module)

    @property
    def packing(self) -> str | None:
        """What all matrices of all experts are released in, of the kinds that a store can keep; None for another."""
        kinds = {part.packing for layer in self._parts for part in layer if len(part.spec.shape) == 2}
        return kinds.pop() if len(kinds) == 1 else None

    @property
    def pieces(self) -> dict[str, int]:
        """Of how many packed matrices of the checkpoint each of an expert's is made, if they are `packing`."""
        return {part.spec.name: len(part.pieces) for part in self.expert_parts(0, 0) if part.packing is not None}

    def expert_parts(self, layer: int, expert: int) -> tuple[ExpertPart, ...]:
        """The tensors of an expert, in the order of `layout`. `layer` counts MoE layers."""
        return tuple(part.of_expert(expert) for part in self._parts[layer])

    def convert(self, recipe: Recipe, tensors: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run `recipe` on its sources, given in their order, and return its outputs by name, in the dtype of the store.

        For an expert's recipe every tensor is what belongs to this expert (one row, where sources are fused), and the
        output is what the model's parameter has at [expert : expert + 1]. Raises IntegrityError if they do not fit.
        """
        target, dtypes = recipe.outputs[0], self._meta.dtypes
        if recipe.converter is None:
            (tensor,) = tensors
            return {target: tensor.to(dtypes[target])}
        converter = recipe.converter.copy(
            list(recipe.converter._original_source_patterns),
            list(recipe.converter._original_target_patterns),
            operations=list(recipe.converter.operations),
        )
        for source, tensor in zip(recipe.sources, tensors, strict=True):
            dtype: torch.dtype | None = dtypes[target]
            if self._quantizer is not None:
                dtype = self._quantizer.get_new_dtype(converter, tensor, dtype)
            ready = tensor if dtype is None else tensor.to(dtype)
            converter.add_tensor(target, source.name, source.pattern, ready)  # type: ignore[arg-type]  # or a Future
        try:
            made = converter.convert(target, model=self._meta.model, config=self._meta.model.config)
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
            names = ", ".join(source.name for source in recipe.sources[:3])
            raise IntegrityError(f"{target} cannot be made of {names}: {error}") from error
        outputs = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        return {name: outputs[name].detach().to(dtypes[name]) for name in recipe.outputs}


def plan_conversion(checkpoint: Checkpoint, dtype: str = "auto") -> Plan:
    """Work out what the store of `checkpoint` will hold, for maths in `dtype` ("auto": what it was released in).

    Needs config.json and the names of the tensors, no weights. Raises UnsupportedError for a model that moeinf cannot
    run, IntegrityError for a configuration or a set of tensors that cannot be, UsageError for a dtype that is none.
    """
    loaded = load_config(checkpoint.folder)
    released = loaded.dtype or _first_dtype(checkpoint)
    meta = MetaModel(loaded, choose_dtype(dtype, released))
    maths = str(meta.dtype).removeprefix("torch.")
    naming = _Naming(meta, loaded.quantizer, checkpoint.tensor_files)
    probe = meta.probe()
    layout, parts = _lay_out_experts(meta, probe.order, naming.recipes, loaded.quantizer)
    dense, recipes = _lay_out_dense(meta, naming.recipes)
    plan = Plan(
        architecture=meta.architecture,
        model_type=meta.model_type,
        dtype=maths,
        precision=_precision(loaded.packing, released, maths),
        layers=tuple(MoeLayer(name, _num_experts(meta, name), probe.top_k[name]) for name in probe.order),
        layout=layout,
        dense=dense,
        recipes=recipes,
        kv_token_bytes=probe.token_bytes,
        kv_fixed_bytes=probe.fixed_bytes,
        max_context=meta.max_context,
        config=meta.config_text,
        tensor_files=checkpoint.tensor_files,
        ignored=tuple(naming.ignored),
        _parts=parts,
        _meta=meta,
        _quantizer=loaded.quantizer,
    )
    meta.keep_one_expert()
    return plan


def _first_dtype(checkpoint: Checkpoint) -> str | None:
    """What transformers falls back on: the dtype of the first floating-point tensor. None without a file to look in."""
    first = checkpoint.folder / next(iter(checkpoint.weight_files), "")
    if not first.is_file():
        return None
    with TensorFile.open(first) as file:
        names = (entry.dtype for entry in file.entries.values() if entry.dtype in ("F32", "F16", "BF16"))
        found = next(names, None)
    return None if found is None else str(TORCH_DTYPES[found]).removeprefix("torch.")


def _precision(packing: str | None, released: str | None, dtype: str) -> str:
    if packing is not None:
        return f"{packing} expanded to {dtype}"
    return dtype if released in (dtype, None) else f"{released} converted to {dtype}"


# Names


class _Naming:
    """Which tensors of the checkpoint transformers loads into which parameters, and through which conversion.

    Follows `convert_and_load_state_dict_in_model` (transformers/core_model_loading.py) step by step, without tensors.
    `recipes` has every parameter that has a source.
    """

    def __init__(self, meta: MetaModel, quantizer: HfQuantizer | None, tensors: Iterable[str]) -> None:
        self.recipes: dict[str, Recipe] = {}
        self.ignored: list[str] = []
        mapping = get_model_conversion_mapping(meta.model, hf_quantizer=quantizer)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._converter_of = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        self._prefix = meta.model.base_model_prefix
        self._known = meta.model.state_dict()
        block = getattr(quantizer.quantization_config, "weight_block_size", None) if quantizer else None
        self._band_rows: int | None = block[0] if block else None
        for target, found in self._collect(tensors).items():
            recipe = self._recipe(target, found)
            for output in recipe.outputs:
                if output not in self._known or self.recipes.setdefault(output, recipe) is not recipe:
                    raise IntegrityError(
                        f"{found[0][0]!r} makes {output!r}, which the model has not, or from elsewhere"
                    )
        _check_complete(meta, self.recipes)

    def _collect(self, tensors: Iterable[str]) -> dict[str, list[tuple[str, str | None]]]:
        """Per parameter, the tensors that lead to it, each with the pattern of its conversion (None: only renamed)."""
        collected: dict[str, list[tuple[str, str | None]]] = {}
        for name in sorted(tensors, key=dot_natural_key):
            target, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self._known)
            if target not in self._known and name in self._known:
                target, pattern = rename_source_key(name, [], [], self._prefix, self._known)
            if target in self._known:
                collected.setdefault(target, []).append((name, pattern))
            else:
                self.ignored.append(name)
        return collected

    def _recipe(self, target: str, found: list[tuple[str, str | None]]) -> Recipe:
        first, pattern = found[0]
        if pattern is None:
            self.ignored.extend(name for name, _ in found[1:])
            return Recipe((target,), (Source(first, first),), "copy")
        converter = self._converter_of[pattern]
        sources = tuple(Source(name, pattern) for name, pattern in found if pattern is not None)
        if len(sources) < len(found):
            raise IntegrityError(
                f"the checkpoint has {target} twice, in different forms: {[name for name, _ in found]}"
            )
        outputs = tuple(target.replace(converter.target_patterns[0], name) for name in converter.target_patterns)
        return Recipe(outputs, sources, _method(converter, sources), converter, self._band_rows)


def _method(converter: WeightConverter, sources: tuple[Source, ...]) -> _Method:
    match converter.operations:
        case [Fp8Dequantize()]:
            return "copy" if len(sources) == 1 else "rows"
        case [Concatenate(dim=0)]:
            in_order = sorted(sources, key=lambda source: converter.source_patterns.index(source.pattern))
            return "copy" if tuple(in_order) == sources else "whole"
    return "whole"


def _check_complete(meta: MetaModel, recipes: Mapping[str, Recipe]) -> None:
    """Every parameter has a source, is tied to one that has, or is one that transformers itself lets be absent."""
    tied = meta.model.all_tied_weights_keys
    loaded = {tied.get(name, name) for name in recipes}
    optional = [re.compile(pattern) for pattern in meta.model._keys_to_ignore_on_load_missing or ()]
    missing = [
        name
        for name in meta.shapes
        if name not in recipes and tied.get(name, name) not in loaded and not any(p.search(name) for p in optional)
    ]
    if missing:
        rest = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise IntegrityError(
            f"the checkpoint has no tensor for {', '.join(missing[:3])}{rest} of {meta.architecture}",
            hint="it is incomplete, or config.json is not its own",
        )


# Layouts


def _lay_out_dense(
    meta: MetaModel, recipes: Mapping[str, Recipe]
) -> tuple[tuple[DenseTensor, ...], tuple[Recipe, ...]]:
    """Tensors of the widest dtype first, so that each starts at a multiple of its element's size."""
    experts = {f"{module}.{name}" for module in meta.experts for name in _parameters(meta, module)}
    dense = tuple(
        DenseTensor(name, SAFETENSORS_NAMES[meta.dtypes[name]], shape)
        for name, shape in sorted(meta.shapes.items(), key=lambda item: -meta.dtypes[item[0]].itemsize)
        if name not in experts and name in recipes
    )
    unique = {id(recipes[tensor.name]): recipes[tensor.name] for tensor in dense}
    return dense, tuple(unique.values())


def _lay_out_experts(
    meta: MetaModel, modules: Iterable[str], recipes: Mapping[str, Recipe], quantizer: HfQuantizer | None = None
) -> tuple[ExpertLayout, tuple[tuple[_LayerPart, ...], ...]]:
    layouts = {module: _layout(meta, module) for module in modules}
    first, layout = next(iter(layouts.items()))
    for module, other in layouts.items():
        if other != layout:
            raise UnsupportedError(f"the experts of {module} differ in shape or dtype from those of {first}")
    parts = (
        tuple(_layer_part(meta, module, spec, recipes, quantizer) for spec in layout.tensors) for module in layouts
    )
    return layout, tuple(parts)


def _layout(meta: MetaModel, module: str) -> ExpertLayout:
    """Tensors of the widest dtype first, so that each starts at a multiple of its element's size."""
    count = _num_experts(meta, module)
    specs, offset = [], 0
    names = sorted(_parameters(meta, module), key=lambda name: -meta.dtypes[f"{module}.{name}"].itemsize)
    for name in names:
        shape = meta.shapes[f"{module}.{name}"]
        if shape[0] != count:
            raise UnsupportedError(f"{module}.{name} of shape {list(shape)} has not one row for each expert")
        specs.append(TensorSpec(name, SAFETENSORS_NAMES[meta.dtypes[f"{module}.{name}"]], shape[1:], offset))
        offset += specs[-1].nbytes
    return ExpertLayout(len(encode_expert_header(specs)), tuple(specs))


def _parameters(meta: MetaModel, module: str) -> list[str]:
    return [name for name, _ in meta.experts[module].named_parameters(recurse=False)]


def _num_experts(meta: MetaModel, module: str) -> int:
    count: int = meta.shapes[f"{module}.{_parameters(meta, module)[0]}"][0]
    return count


def _layer_part(
    meta: MetaModel, module: str, spec: TensorSpec, recipes: Mapping[str, Recipe], quantizer: HfQuantizer | None
) -> _LayerPart:
    parameter, count = f"{module}.{spec.name}", _num_experts(meta, module)
    recipe = recipes[parameter]
    operations = recipe.converter.operations if recipe.converter else []
    if len(recipe.outputs) > 1 or not all(_keeps_experts_apart(operation) for operation in operations):
        raise UnsupportedError(
            f"transformers makes {parameter} with {operations}, which cannot be done expert by expert"
        )
    is_fused = not any(isinstance(operation, MergeModulelist) for operation in operations)
    names: dict[str, list[str]] = {}
    for source in recipe.sources:
        names.setdefault(source.pattern, []).append(source.name)
    for found in names.values():
        if len(found) != (1 if is_fused else count):
            raise IntegrityError(
                f"{parameter} has {count} experts, and the checkpoint {len(found)} tensors like {found[0]} for them"
            )
    named = tuple((pattern, tuple(found)) for pattern, found in names.items())
    packing = _packing(recipe, quantizer)
    if packing == "fp8" and meta.is_transposed(module):
        packing = None
    return _LayerPart(parameter, spec, named, is_fused, recipe.converter, packing)


def _packing(recipe: Recipe, quantizer: HfQuantizer | None) -> str | None:
    """What an expert's tensor is released in, as far as names and config.json tell: `ExpertPart.packing`."""
    match recipe.converter and recipe.converter.operations:
        case [Mxfp4Dequantize()]:
            return "mxfp4"
        case [Fp8Dequantize(), *others] if all(_joins_rows(operation) for operation in others):
            patterns = {source.pattern for source in recipe.sources}
            weights = {name for name in patterns if not name.endswith(_NO_WEIGHTS)}
            if _has_float8_blocks(quantizer) and weights and all(_scale_of(name) in patterns for name in weights):
                return "fp8"
    return None


def _joins_rows(operation: ConversionOps) -> bool:
    """Whether the operation puts matrices of an expert one below the other, or does nothing to one expert."""
    match operation:
        case MergeModulelist(dim=0) | Concatenate(dim=1):
            return True
    return False


def _has_float8_blocks(quantizer: HfQuantizer | None) -> bool:
    """Whether experts are in float8 with a scale for each block as the store has them."""
    about: Any = quantizer and quantizer.quantization_config
    size = RELEASED_GROUPS["fp8"]
    return list(getattr(about, "weight_block_size", None) or ()) == [size, size] and getattr(
        about, "expert_dtype", None
    ) in ("fp8", None)


def _scale_of(pattern: str) -> str:
    """The pattern of a weight's scales, as transformers pairs them (Fp8Dequantize)."""
    return f"{pattern}_scale_inv"


def _keeps_experts_apart(operation: ConversionOps) -> bool:
    """Whether the operation, on a tensor of many experts, does to each what it would do to that one alone."""
    match operation:
        case Fp8Dequantize() | Mxfp4Dequantize() | MergeModulelist(dim=0):
            return True
        case Concatenate() | Interleave():
            return operation.dim not in (0, -3)
        case Transpose():
            return not {operation.dim0, operation.dim1} & {0, -3}
    return False
