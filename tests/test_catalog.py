"""The catalog: every entry is complete, its family is one that moeinf can run, and near misses are understood."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moeinf import catalog, demo
from moeinf.catalog import CatalogEntry

ALIASES = [entry.alias for entry in catalog.entries()]


def test_exports_are_sorted_and_exist() -> None:
    assert catalog.__all__ == sorted(catalog.__all__)
    assert all(hasattr(catalog, name) for name in catalog.__all__)


def test_looks_up_an_alias() -> None:
    assert catalog.lookup("mixtral") == CatalogEntry(
        alias="mixtral",
        repo="mistralai/Mixtral-8x7B-v0.1",
        description="Mixtral 8x7B, base model",
        model_type="mixtral",
        total="46.7B",
        active="12.9B",
        precision="bfloat16",
        gated=True,
    )


@pytest.mark.parametrize("name", ["", "no-such-model", "mistralai/Mixtral-8x7B-v0.1", "Mixtral"])
def test_knows_only_aliases(name: str) -> None:
    assert catalog.lookup(name) is None


@pytest.mark.parametrize(
    ("written", "meant"),
    [("mixtrl", "mixtral"), ("Mixtral", "mixtral"), ("deepseek-v2lite", "deepseek-v2-lite"), ("gptoss", "gpt-oss-20b")],
)
def test_suggests_what_was_meant(written: str, meant: str) -> None:
    assert meant in catalog.suggest(written)


def test_suggests_nothing_for_something_else() -> None:
    assert catalog.suggest("zzzzzzzz") == []


def test_every_repo_has_one_alias() -> None:
    assert len({entry.repo for entry in catalog.entries()}) == len(ALIASES)


@pytest.mark.parametrize("entry", catalog.entries(), ids=ALIASES)
def test_entry_is_complete(entry: CatalogEntry) -> None:
    assert re.fullmatch(r"[a-z0-9][a-z0-9.-]*", entry.alias)
    assert entry.repo == demo.NAME or re.fullmatch(r"[\w.-]+/[\w.-]+", entry.repo)
    assert entry.description
    assert entry.precision in ("bfloat16", "fp8", "mxfp4")
    assert isinstance(entry.gated, bool)
    total, active = (float(count.rstrip("BM")) for count in (entry.total, entry.active))
    assert 0 < active < total


@pytest.mark.parametrize("family", sorted({entry.model_type for entry in catalog.entries()}))
def test_family_routes_its_experts_where_moeinf_can_take_over(family: str) -> None:
    package = importlib.util.find_spec("transformers")
    assert package is not None
    assert package.origin is not None
    source = Path(package.origin).parent / "models" / family / f"modeling_{family}.py"
    assert "@use_experts_implementation" in source.read_text(encoding="utf-8")


def test_reads_its_file_late_and_imports_nothing_slow() -> None:
    program = (
        "import sys, moeinf.catalog as c; assert c._catalog.cache_info().currsize == 0; c.lookup('mixtral');"
        "print(*sorted({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
