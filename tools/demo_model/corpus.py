"""Documents, conversations and the files that hold them; knows nothing about where text comes from."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

END_OF_TEXT, USER, ASSISTANT, END = "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL_TOKENS = (END_OF_TEXT, USER, ASSISTANT, END)
SPLITS = ("train", "val", "calib")

Turn = tuple[str, str]
"""A question and its answer."""


@dataclass(slots=True)
class Splits:
    """The documents of one domain: what is trained on, and two held-out parts that share no work with it."""

    train: list[str] = field(default_factory=list)
    val: list[str] = field(default_factory=list)
    calib: list[str] = field(default_factory=list)

    def add(self, split: str, documents: Iterable[str]) -> None:
        """Append documents to the split of that name."""
        part: list[str] = getattr(self, split)
        part.extend(documents)


def conversation(turns: Iterable[Turn]) -> str:
    """Write turns in the chat template of the model."""
    return "".join(f"{USER}{question.strip()}{END}{ASSISTANT}{answer.strip()}{END}" for question, answer in turns)


def chunks(text: str, shortest: int = 1500, longest: int = 4000) -> Iterator[str]:
    """Cut text at paragraph borders into documents of about `shortest` to `longest` characters."""
    current = ""
    for raw in re.split(r"\n\s*\n", text):
        paragraph = raw.rstrip()
        if not paragraph.strip():
            continue
        current += ("\n\n" if current else "") + paragraph
        if len(current) < shortest:
            continue
        while len(current) > longest:
            cut = current.rfind("\n", 1, longest)
            cut = cut if cut > longest // 2 else longest
            yield current[:cut]
            current = current[cut:].lstrip("\n")
        if current.strip():
            yield current
        current = ""
    if len(current) > 200:
        yield current


def corpus_file(work: Path, domain: str, split: str) -> Path:
    """Path of one domain's split."""
    return work / "corpus" / f"{domain}.{split}.jsonl"


def write_documents(path: Path, documents: Sequence[str]) -> int:
    """Write documents as JSON lines, atomically; returns the bytes of text in them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
    partial.replace(path)
    return sum(len(document.encode()) for document in documents)


def read_documents(path: Path) -> Iterator[str]:
    """Read the documents of a JSON lines file."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            text: str = json.loads(line)["text"]
            yield text
