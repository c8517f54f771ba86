"""Sizes and times between people and programs. Sizes are integers of bytes until they are shown."""

from __future__ import annotations

import math
import re

from .errors import UsageError

__all__ = ["GIB", "KIB", "MIB", "align_up", "format_bytes", "format_seconds", "parse_size"]

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_FACTORS = {
    "": 1,
    "B": 1,
    **{f"{prefix}IB": 1 << (10 * power) for power, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)},
    **{prefix: 1 << (10 * power) for power, prefix in enumerate("KMGT", 1)},
}
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[a-z]*|%)", re.IGNORECASE)


def parse_size(text: str, *, whole_bytes: int | None = None) -> int:
    """Bytes that `text` names: `900MiB`, `12GB`, `1.5g` (binary, like GiB), `123` or, of `whole_bytes`, `50%`.

    Raises UsageError for anything else, for a negative size, and for a share where nothing is there to take it of.
    """
    match = _SIZE.fullmatch(text.strip())
    if match and not math.isfinite(float(match["number"]) * max(_FACTORS.values())):
        raise UsageError(f"{text[:20]}… is more than there is", hint="write it like 900MiB or 12GB")
    unit = match["unit"].upper() if match else ""
    if match and unit == "%" and whole_bytes is not None:
        if float(match["number"]) > 100:
            raise UsageError(f"{text} is more than there is", hint="a share is 100% at most")
        return int(whole_bytes * float(match["number"]) / 100)
    if not match or unit not in _FACTORS:
        share = ", or a share like 50%" if whole_bytes is not None else ""
        raise UsageError(f"{text!r} is not a size", hint=f"write it like 900MiB or 12GB{share}")
    return int(float(match["number"]) * _FACTORS[unit])


def format_bytes(size_bytes: int) -> str:
    """Three significant digits in binary units: `512 B`, `3.10 GiB`, `97.5 MiB`."""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1000 or unit == "TiB":
            break
        value /= 1024
    if unit == "B":
        return f"{size_bytes} B"
    return f"{value:.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f} {unit}"


def format_seconds(seconds: float) -> str:
    """`850 ms`, `2.4 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def align_up(size_bytes: int, alignment_bytes: int) -> int:
    """The smallest multiple of `alignment_bytes` that is not below `size_bytes`."""
    return -(-size_bytes // alignment_bytes) * alignment_bytes
