"""What a person may ask experts to be stored as, and what that is called.

Knows nothing of tensors (`quantized` makes the numbers), and imports torch only when they are to be made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import UsageError
from .manifest import GROUPS, NUMBER_BITS, ExpertLayout, Quantization

if TYPE_CHECKING:
    from .quantized import Quantizer

__all__ = ["ExpertForm", "name_precision"]

_DEFAULT_GROUPS = {"int8": 64, "int4": 32}
"""Smaller groups are worth their factors for 4 bits (docs/quantization.md)."""


@dataclass(frozen=True, slots=True)
class ExpertForm:
    """Quantised experts: `kind` is one of NUMBER_BITS, `group` one of GROUPS."""

    kind: str
    group: int

    @classmethod
    def read(cls, experts: str, group: int | None) -> ExpertForm:
        """What a person asks for; without a `group` it is 64 for int8, and 32 for int4. Raises UsageError."""
        if experts not in NUMBER_BITS:
            raise UsageError(f"--experts {experts} is not known", hint=f"choose one of: {', '.join(NUMBER_BITS)}")
        if group not in (None, *GROUPS):
            raise UsageError(f"--group {group} is not known", hint=f"choose one of: {', '.join(map(str, GROUPS))}")
        return cls(experts, group or _DEFAULT_GROUPS[experts])

    @classmethod
    def of(cls, quantization: Quantization | None) -> ExpertForm | None:
        """What experts were made to be stored as; None for plain ones, and for those that are as they were released."""
        if quantization is None or quantization.is_released:
            return None
        return cls(quantization.kind, quantization.group)

    def quantizer(self, layout: ExpertLayout, *, is_transposed: bool) -> Quantizer:
        """What brings experts of that layout into this form."""
        from .quantized import Quantizer

        return Quantizer(layout, is_transposed, self.kind, self.group)


def name_precision(before: str, layout: ExpertLayout) -> str:
    """What a manifest calls the precision of weights that had `before` as theirs and are stored in this layout."""
    if layout.quantization is None:
        return before
    return layout.quantization.text if layout.is_released else f"{layout.quantization.text}, from {before}"
