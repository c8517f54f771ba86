"""How lossless experts lie in their files (docs/store-format.md), worked out from how plain ones do. Pure data."""

from __future__ import annotations

from .errors import UnsupportedError
from .manifest import (
    DTYPE_BYTES,
    EXPERT_ALIGNMENT,
    LOSSLESS,
    MOST_INPUTS,
    PANEL_INPUTS,
    PANEL_ROWS,
    ExpertLayout,
    Quantization,
    TensorSpec,
    are_whole_panels,
    lossless_shapes,
    uppers_name,
)

__all__ = ["lossless_layout"]


def lossless_layout(plain: ExpertLayout) -> ExpertLayout:
    """How experts that lie so lie when they are packed. Raises UnsupportedError for those that cannot be."""
    hint = "store them as bf16"
    matrices = {spec.name: spec for spec in plain.tensors if len(spec.shape) == 2}
    dtypes = {spec.dtype for spec in matrices.values()}
    if plain.quantization is not None or dtypes != {"BF16"}:
        raise UnsupportedError(f"experts in {' and '.join(sorted(dtypes)) or 'no matrices'} are not packed", hint=hint)
    for name, spec in matrices.items():
        rows, width = spec.shape
        if not are_whole_panels(rows, width):
            raise UnsupportedError(
                f"{name} is {rows} x {width}: packing without loss takes multiples of {PANEL_ROWS} x {PANEL_INPUTS}, up"
                f" to {MOST_INPUTS:,} wide",
                hint=hint,
            )
    shapes = {name: lossless_shapes(*spec.shape) for name, spec in matrices.items()}
    others = [(uppers_name(name), *uppers) for name, (_, uppers) in shapes.items()]
    others += [(spec.name, spec.dtype, spec.shape) for spec in plain.tensors if spec.name not in matrices]
    others.sort(key=lambda tensor: -DTYPE_BYTES[tensor[1]])
    specs, offset = [], 0
    for name, dtype, shape in [*((name, *panels) for name, (panels, _) in shapes.items()), *others]:
        specs.append(TensorSpec(name, dtype, shape, offset))  # panels first: they are read by cache lines
        offset += specs[-1].nbytes
    widths = {name: spec.shape[1] for name, spec in matrices.items()}
    return ExpertLayout(EXPERT_ALIGNMENT, tuple(specs), Quantization(LOSSLESS, PANEL_ROWS, "BF16", widths))
