"""What a person may ask experts to be stored as, and what that is called.

Knows nothing of tensors (`quantized` makes the numbers), and imports torch only when they are to be made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import UsageError
from .manifest import GROUPS, LOSSLESS, PANEL_ROWS, ExpertLayout, Manifest, Quantization

if TYPE_CHECKING:
    from .quantized import Encoder

__all__ = [
    "ExpertForm",
    "is_expanded_on_request",
    "is_not_packable",
    "name_calibration",
    "name_plain",
    "name_precision",
    "pull_options",
    "quantize_again",
    "released_dtype",
]

_DEFAULT_GROUPS = {LOSSLESS: PANEL_ROWS} | {kind: groups[0] for kind, groups in GROUPS.items()}
_CALIBRATED = ", calibrated on "
_CONVERTED = " converted to "
_ON_REQUEST = " on request"
_NOT_PACKABLE = ", not packable without loss"
"""How a manifest's precision says what a pull was asked for, and did or could not do."""


@dataclass(frozen=True, slots=True)
class ExpertForm:
    """Experts that are packed here: `kind` is one of NUMBER_BITS, `group` one of its GROUPS; or LOSSLESS, whose group
    is what it is.
    """

    kind: str
    group: int

    @classmethod
    def read(cls, experts: str, group: int | None) -> ExpertForm:
        """What a person asks for, with the usual `group` if None. Raises UsageError."""
        if experts not in _DEFAULT_GROUPS:
            raise UsageError(f"--experts {experts} is not known", hint=f"choose one of: {', '.join(_DEFAULT_GROUPS)}")
        if experts == LOSSLESS and group is not None:
            raise UsageError("--group says how int8 experts are grouped", hint="leave it out")
        if group is not None and group not in GROUPS[experts]:
            known = ", ".join(map(str, sorted(GROUPS[experts])))
            raise UsageError(f"--group {group} is none that {experts} experts have", hint=f"choose one of: {known}")
        return cls(experts, group or _DEFAULT_GROUPS[experts])

    @classmethod
    def of(cls, quantization: Quantization | None) -> ExpertForm | None:
        """What experts were packed as here; None for plain ones, and for those that are as they were released."""
        if quantization is None or quantization.is_released:
            return None
        return cls(quantization.kind, quantization.group)

    @property
    def bits(self) -> int:
        """Of a weight, without what its group has in common."""
        return Quantization(self.kind, self.group, "BF16", {}).bits

    @property
    def options(self) -> list[str]:
        """How a command line asks for it."""
        group = ["--group", str(self.group)] if self.kind == "int8" else []
        return ["--experts", self.kind, *group]

    def encoder(self, layout: ExpertLayout, *, is_transposed: bool) -> Encoder:
        """What brings experts of that layout into this form. Raises UnsupportedError for those that have none."""
        from .lossless import LosslessPacker
        from .quantized import Quantizer

        if self.kind == LOSSLESS:
            return LosslessPacker(layout, is_transposed)
        return Quantizer(layout, is_transposed, self.kind, self.group)


def name_precision(before: str, layout: ExpertLayout, calibration: str = "") -> str:
    """What a manifest calls the precision of weights that had `before` as theirs and are stored in this layout, their
    numbers chosen with this `calibration`.
    """
    if layout.quantization is None:
        return before
    before = before.removesuffix(_NOT_PACKABLE).removesuffix(_ON_REQUEST)
    if layout.quantization.is_lossless:
        return f"{before}, packed without loss"
    if layout.is_exact:
        return layout.quantization.text
    return f"{layout.quantization.text}, from {before}" + (f"{_CALIBRATED}{calibration}" if calibration else "")


def name_plain(precision: str, *, on_request: bool, not_packable: bool) -> str:
    """The precision of plain weights, which would be packed as they were released if nobody had asked for that, or
    packed without loss if they could be.
    """
    return precision + (_ON_REQUEST if on_request else "") + (_NOT_PACKABLE if not_packable else "")


def is_expanded_on_request(manifest: Manifest) -> bool:
    return manifest.precision.endswith(_ON_REQUEST)


def is_not_packable(manifest: Manifest) -> bool:
    """Whether its experts were to be packed without loss, and could not be."""
    return manifest.precision.endswith(_NOT_PACKABLE)


def released_dtype(manifest: Manifest) -> str:
    """How `--dtype` asks for the dtype that it has."""
    return manifest.dtype if _CONVERTED in manifest.precision else "auto"


def pull_options(manifest: Manifest) -> list[str]:
    """How a command line asks `pull` for the same once more."""
    form = ExpertForm.of(manifest.layout.quantization)
    options = form.options if form else ["--experts", LOSSLESS] if is_not_packable(manifest) else []
    if is_expanded_on_request(manifest):
        options = ["--experts", "bf16"]
    dtype = released_dtype(manifest)
    return options if dtype == "auto" else [*options, "--dtype", dtype]


def name_calibration(precision: str) -> str:
    """The calibration of weights whose precision has this name, or ""."""
    return precision.partition(_CALIBRATED)[2]


def quantize_again(name: str, manifest: Manifest) -> list[str]:
    """The command that makes a calibrated model of this name once more, of the one that it was made of."""
    form = ExpertForm.of(manifest.layout.quantization)
    options = form.options if form else []
    return ["moeinf", "quantize", manifest.source.repo, *options, "--name", name, "--calibrate", "DATASET", "--force"]
