"""The models that have a short name: what `moeinf pull ALIAS` fetches, and what to say about it beforehand.

Owns catalog.toml and nothing else. Knows nothing of the network or of what is pulled here. A model needs no alias to be
pulled.
"""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources

__all__ = ["CatalogEntry", "entries", "lookup", "suggest"]


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One alias. `total` and `active` are parameter counts as text ("46.7B"), of the whole model and per token.

    `precision` is what the weights were released in, `model_type` the family's name in transformers; `gated` means that
    the hub asks to accept terms first.
    """

    alias: str
    repo: str
    description: str
    model_type: str
    total: str
    active: str
    precision: str
    gated: bool = False


def entries() -> tuple[CatalogEntry, ...]:
    """Every entry, in the order of catalog.toml: families together."""
    return tuple(_catalog().values())


def lookup(alias: str) -> CatalogEntry | None:
    """The entry of this alias, or None. Aliases are lower case."""
    return _catalog().get(alias)


def suggest(name: str) -> list[str]:
    """At most three aliases that somebody who wrote `name` may have meant, the nearest first."""
    return difflib.get_close_matches(name.lower(), _catalog(), n=3)


@cache
def _catalog() -> dict[str, CatalogEntry]:
    text = resources.files(__package__).joinpath("catalog.toml").read_text(encoding="utf-8")
    return {alias: CatalogEntry(alias=alias, **fields) for alias, fields in tomllib.loads(text).items()}
