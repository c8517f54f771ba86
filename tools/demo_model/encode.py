"""Turn the corpus into token files: uint16, every document followed by the end-of-text id."""

import argparse
import os
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from tools.demo_model.corpus import SPLITS, corpus_file, read_documents
from tools.demo_model.domains import NAMES

END_OF_TEXT_ID = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `encode`."""
    parser.add_argument("--domains", nargs="*", default=list(NAMES), help="only these domains")


def run(arguments: argparse.Namespace) -> None:
    """Encode every split of every domain that the corpus has, and print sizes."""
    tokenizer = Tokenizer.from_file(str(arguments.work / "tokenizer/tokenizer.json"))
    print(f"{'domain':12} {'split':6} {'documents':>10} {'bytes':>11} {'tokens':>11} {'bytes/token':>12}")
    for domain in arguments.domains:
        for split in SPLITS:
            source = corpus_file(arguments.work, domain, split)
            if source.exists():
                target = arguments.work / "tokens" / f"{domain}.{split}.npy"
                documents, size, tokens = encode_file(tokenizer, source, target)
                print(
                    f"{domain:12} {split:6} {documents:10,} {size:11,} {tokens:11,} {size / tokens:12.2f}", flush=True
                )


def encode_file(tokenizer: Tokenizer, source: Path, target: Path) -> tuple[int, int, int]:
    """Encode one file; returns its documents, bytes and tokens."""
    documents = list(read_documents(source))
    parts: list[np.ndarray[tuple[int], np.dtype[np.uint16]]] = []
    for start in range(0, len(documents), 1000):
        for encoding in tokenizer.encode_batch_fast(documents[start : start + 1000]):
            parts.append(np.array([*encoding.ids, END_OF_TEXT_ID], dtype=np.uint16))
    tokens = np.concatenate(parts)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    with partial.open("wb") as file:
        np.save(file, tokens)
    os.replace(partial, target)
    return len(documents), sum(len(document.encode()) for document in documents), len(tokens)
