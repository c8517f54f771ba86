"""The prompts that ship with the package: texts of 27 kinds, in two disjoint sets, to record and to measure with.

Owns the files beside it, which NOTICE.md lists with their sources and licences. 15 of the kinds are what the demo model
was trained on and held out from it; the other 12 were written for this project. Knows nothing of other people's sets.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Literal

__all__ = ["SHIPPED", "Part", "Prompt", "demo_prompts", "shipped_prompts", "text_digest"]

Part = Literal["calibration", "evaluation"]

SHIPPED: dict[str, Part] = {"default": "calibration", "default-held-out": "evaluation"}
"""The names of the two sets: what to record a trace with, and what to measure with afterwards."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text to put through a model, and what kind of text it is, where that is known.

    Those that ship also say where they come from, and under which licence.
    """

    domain: str
    text: str
    source: str = ""
    licence: str = ""


def text_digest(text: str) -> str:
    """By which a text is known again: 16 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def shipped_prompts(name: str) -> list[Prompt]:
    """The set of this name, of `SHIPPED`: the first text of every domain, then the second of every domain, and so on.

    However few are taken from the front, no domain is ahead of another by more than one.
    """
    part = SHIPPED[name]
    by_domain: dict[str, list[Prompt]] = {}
    for prompt in [*demo_prompts(part), *_read(f"written-{part}.jsonl")]:
        by_domain.setdefault(prompt.domain, []).append(prompt)
    return [prompt for row in zip_longest(*by_domain.values()) for prompt in row if prompt is not None]


def demo_prompts(part: Part) -> list[Prompt]:
    """The prompts of the 15 domains of the demo model, which it was not trained on, domains together."""
    return _read(f"{part}.jsonl")


def _read(name: str) -> list[Prompt]:
    lines = (Path(__file__).parent / name).read_text(encoding="utf-8").split("\n")
    return [Prompt(**json.loads(line)) for line in lines if line]
