"""The model that ships with the package: a checkpoint of 13 million parameters, to try the engine with.

Owns the files beside it. They are a checkpoint like any other, and become a model in the store like any other, when
somebody first asks for `demo`; see docs/demo-model.md for what it was trained on and what it can do.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["CHECKPOINT", "NAME", "NOTE", "VERSION"]

NAME = "demo"
NOTE = "demo: 13 M parameters, to try the engine with, not for answers"
VERSION = "1"
"""Changes with the weights: a store that holds another version gets this one."""
CHECKPOINT = Path(__file__).parent / "model"
