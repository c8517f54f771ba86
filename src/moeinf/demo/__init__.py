"""The model that ships with the package: a checkpoint of 13 million parameters, to try the engine with.

Owns the files beside it. They are a checkpoint like any other, and become a model in the store like any other, when
somebody first asks for `demo`; see docs/demo-model.md for what it was trained on and what it can do.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["CHECKPOINT", "NAME", "NOTE", "VERSION", "Prompt", "prompts"]

NAME = "demo"
NOTE = "demo: 13 M parameters, to try the engine with, not for answers"
VERSION = "1"
"""Changes with the weights: a store that holds another version gets this one."""
CHECKPOINT = Path(__file__).parent / "model"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text that the demo model was not trained on, of one domain, with where it comes from."""

    domain: str
    text: str
    source: str
    licence: str


def prompts(part: Literal["calibration", "evaluation"]) -> list[Prompt]:
    """The prompts of one of two disjoint sets, domains together."""
    lines = (Path(__file__).parent / "prompts" / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
    return [Prompt(**json.loads(line)) for line in lines]
