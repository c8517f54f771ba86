"""Code: Python sources of the standard library and of packages, C++ headers, and requests answered by functions."""

import importlib.util
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tools.demo_model.corpus import Splits, chunks, conversation
from tools.demo_model.readers.manuals import split_of

FUNCTION = re.compile(
    r"(?m)^(?P<indent>(?: {4})?)def (?P<name>[a-z]\w+)\([^)]*\)[^:\n]*:\n"
    r'\s+"""(?P<says>[A-Z][^"\n]{15,90}?)\.?(?:"""|\n)'
)
ASKS = (
    "Write a Python function: {says}.",
    "Write a Python function {name} that does this: {says}.",
    "Write a Python function called {name}.",
    "Python code: {says}.",
    "write a python function {name}",
)
CHUNKS_BYTES = 9_000_000
SKIPPED = re.compile(r"/(test|tests|idle_test|lib2to3|site-packages|ensurepip|_vendor)/|/test_|pydoc_data|/encodings/")


def read_python(seed: int) -> Splits:
    """The running Python's library, networkx, sympy and torch.nn; a file is held out as a whole, with its functions."""
    rng = random.Random(seed)
    splits = Splits()
    pairs: list[str] = []
    for path in python_files():
        text = re.sub(r"\A(#.*\n)+", "", path.read_text("utf-8", "replace"))
        if len(text) > 200_000:
            continue
        split = split_of(f"{path.parent.name}/{path.name}")
        splits.add(split, chunks(text, 1800, 4500))
        if split == "train":
            pairs += _function_requests(text, rng)
    rng.shuffle(splits.train)
    room = CHUNKS_BYTES
    splits.train = [chunk for chunk in splits.train if (room := room - len(chunk)) > 0] + pairs
    return splits


def python_files() -> Iterator[Path]:
    """Files of the standard library first, then of the packages."""
    library = Path(sysconfig.get_path("stdlib"))
    roots = [(library, "**/*.py"), *((_package(name), "**/*.py") for name in ("networkx", "sympy"))]
    roots.append((_package("torch") / "nn", "**/*.py"))
    for root, pattern in roots:
        for path in sorted(root.glob(pattern)):
            if not SKIPPED.search("/" + str(path.relative_to(root.parent))):
                yield path


def read_cpp() -> Splits:
    """Headers of PyTorch's own libraries, without licence headers."""
    splits = Splits()
    include = _package("torch") / "include"
    for part in ("c10", "ATen", "torch", "caffe2"):
        for path in sorted((include / part).rglob("*.h")):
            text = path.read_text("utf-8", "replace")
            if "/ops/" in str(path) or "Functions" in path.name or len(text) > 150_000:
                continue
            text = re.sub(r"\A\s*(/\*.*?\*/|(//.*\n)+)", "", text, flags=re.DOTALL)
            splits.add(split_of(f"{path.parent.name}/{path.name}"), chunks(text, 1800, 4500))
    return splits


def _package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"package {name} is missing: pip install -r tools/demo_model/requirements.txt")
    return Path(found.origin).parent


def _function_requests(text: str, rng: random.Random) -> Iterator[str]:
    for match in FUNCTION.finditer(text):
        end = re.search(r"\n(?=\S|    def |    @|    class )", text[match.end() :])
        body = text[match.start() : match.end() + (end.start() if end else 600)].rstrip()
        if len(body) > 900:
            continue
        body = "\n".join(line.removeprefix(match["indent"]) for line in body.split("\n"))
        yield conversation([(rng.choice(ASKS).format(says=match["says"], name=match["name"]), body)])
