"""The layers of the code: imports go downwards only, and heavy libraries stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import moeinf

SOURCE = Path(moeinf.__file__).parent

LAYERS = [
    {"errors", "interrupts", "units", "progress", "settings"},
    {
        "catalog",
        "demo",
        "forecast",
        "gpu_forecast",
        "machine",
        "manifest",
        "ledger",
        "outlook",
        "panels",
        "prompts",
        "typedjson",
    },
    {
        "checkpoint",
        "codebook",
        "collection",
        "collectionfile",
        "conversion",
        "datasets",
        "densefile",
        "dtypes",
        "embedding",
        "evidence",
        "files",
        "forms",
        "fused",
        "gptq",
        "hub",
        "incoming",
        "locks",
        "lossless",
        "metamodel",
        "origins",
        "pull",
        "qualityfile",
        "quantized",
        "quantizing",
        "reference",
        "sharding",
        "shared_library",
        "store",
        "testing",
        "tensorfile",
        "trace",
        "tracefile",
        "wanted",
    },
    {
        "cache",
        "cgroups",
        "dense_reader",
        "device",
        "gate",
        "hardware",
        "kernels",
        "memory",
        "misses",
        "native_reader",
        "native_routing",
        "policies",
        "predictors",
        "routing_memory",
        "steps",
        "tiers",
        "timing",
        "transfer",
        "trials",
    },
    {
        "draw",
        "engine",
        "generation",
        "hooks",
        "kvcache",
        "compiling",
        "latents",
        "placement",
        "prefetch",
        "recorder",
        "replay",
        "runlog",
        "runtime",
        "simulate",
        "stats",
        "token_forward",
    },
    {
        "analysis",
        "bench",
        "calibrated",
        "calibration",
        "chat",
        "figures",
        "findings",
        "page",
        "planning",
        "profiling",
        "quality",
        "rates",
        "report",
        "scores",
        "sizing",
        "systems",
        "worker",
    },
    {"cli"},
]
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}

HEAVY = {
    "torch": {
        "calibrated",
        "codebook",
        "conversion",
        "dense_reader",
        "densefile",
        "embedding",
        "dtypes",
        "fused",
        "gptq",
        "lossless",
        "metamodel",
        "quality",
        "quantized",
        "quantizing",
        "sharding",
        "device",
        "misses",
        "placement",
        "gate",
        "predictors",
        "prefetch",
        "tiers",
        "transfer",
        "kernels",
        "recorder",
        "runtime",
        "hooks",
        "draw",
        "engine",
        "generation",
        "kvcache",
        "compiling",
        "latents",
        "profiling",
        "rates",
        "replay",
        "testing",
        "timing",
        "token_forward",
        "worker",
    },
    "transformers": {
        "conversion",
        "metamodel",
        "gate",
        "hooks",
        "draw",
        "engine",
        "generation",
        "kvcache",
        "compiling",
        "latents",
        "profiling",
        "testing",
        "worker",
    },
    "safetensors": set(),
    "huggingface_hub": {"hub"},
    "matplotlib": {"figures"},
    "psutil": {"hardware", "memory"},
    "pyarrow": {"datasets"},
    "typer": {"cli"},
    "rich": {"cli"},
    "prompt_toolkit": {"cli"},
    "click": set(),
}


def modules() -> list[tuple[str, Path]]:
    """(unit, file): the unit is the name under moeinf, a package's modules counting as the package."""
    return [(path.relative_to(SOURCE).parts[0].removesuffix(".py"), path) for path in sorted(SOURCE.rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Names that a file imports at any place in it: `moeinf.x` for our own, the top-level package for others."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            depth = len(path.relative_to(SOURCE).parts) - 1
            if node.level == 0:
                names.add(node.module or "")
            elif node.level > depth:  # out of the package's sub-folder, or from the top
                found = [node.module] if node.module else [alias.name for alias in node.names]
                names |= {f"moeinf.{name}" for name in found}
    return names


def test_every_module_has_a_layer() -> None:
    assert {unit for unit, _ in modules()} == set(LEVELS) | {"__init__", "__main__"}


@pytest.mark.parametrize(
    ("unit", "path"), modules(), ids=lambda value: str(value) if isinstance(value, str) else value.stem
)
def test_imports_go_downwards(unit: str, path: Path) -> None:
    if unit in ("__init__", "__main__"):
        return
    ours = {name.split(".")[1] for name in imported(path) if name.startswith("moeinf.")}
    upwards = {name for name in ours if name in LEVELS and LEVELS[name] > LEVELS[unit]}
    assert not upwards, f"{path.name} imports from a layer above its own"
    for library, allowed in HEAVY.items():
        uses = any(name.split(".")[0] == library for name in imported(path))
        assert not uses or unit in allowed, f"{path.name} imports {library}"


@pytest.mark.parametrize("unit", sorted(LAYERS[0]))
def test_the_lowest_layer_needs_nothing_installed(unit: str) -> None:
    names = {name.split(".")[0] for name in imported(SOURCE / f"{unit}.py")}
    assert names - {"moeinf"} <= sys.stdlib_module_names


def test_importing_moeinf_imports_nothing_heavy() -> None:
    code = f"import moeinf, sys; print(sorted(set(sys.modules) & {set(HEAVY)!r}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


@pytest.mark.parametrize(
    ("unit", "path"), modules(), ids=lambda value: str(value) if isinstance(value, str) else value.stem
)
def test_exports_are_sorted_and_there(unit: str, path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            names = ast.literal_eval(node.value)
            assert names == sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
            return
    assert unit in ("__main__",), f"{path} has no __all__"


def test_all_of_moeinf_can_be_imported_by_name() -> None:
    for name in moeinf.__all__:
        assert getattr(moeinf, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = moeinf.nothing
