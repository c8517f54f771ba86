"""Verse and prose: the King James Bible, Shakespeare's plays and poems, Jane Austen's novels.

Whole works are held out: some books of the Bible, two plays, one novel (a half to validate, a half to calibrate).
"""

import random
import re
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from tools.demo_model.corpus import Splits, chunks, conversation

HELD_OUT_BOOKS = {
    **dict.fromkeys(("ruth", "est", "dan", "hos", "jas"), "val"),
    **dict.fromkeys(("jonah", "eccl", "amos", "gal", "1jn"), "calib"),
}
HELD_OUT_PLAYS = {"winters_tale": "val", "cymbeline": "calib"}
HELD_OUT_NOVEL = "NORTHANGER ABBEY"


def read_bible(program: Path, text: Path, seed: int) -> Splits:
    """Chapters of the King James Bible, as the package's own reader prints them."""
    chapters = _bible_chapters(program / "usr/bin/bible", text / "usr/lib")
    splits = Splits()
    for split, documents in _by_split(chapters, HELD_OUT_BOOKS).items():
        splits.add(split, documents)
    asks = (
        "Quote the Bible.",
        "Read me something from the Bible.",
        "quote the bible",
        "Give me a verse from the Bible.",
    )
    splits.train = _some_as_answers(splits.train, asks, 0.12, random.Random(seed))
    return splits


def _bible_chapters(program: Path, folder: Path) -> Iterator[tuple[str, str]]:
    listing = subprocess.run(
        [str(program.resolve()), "-f", "-p", ".", "gen1:1-rev22:21"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    verses: list[str] = []
    current = ""
    for match in re.finditer(r"(?m)^(\w+?)(\d+):(\d+) (.*)$", listing):
        book, chapter, _, verse = match.groups()
        if f"{book} {chapter}" != current and verses:
            yield current.split()[0].lower(), "\n".join(verses)
            verses = []
        current = f"{book} {chapter}"
        verses.append(verse)
    yield current.split()[0].lower(), "\n".join(verses)


def read_shakespeare(package: Path, seed: int) -> Splits:
    """Plays and poems in modern spelling."""
    splits = Splits()
    works: list[tuple[str, str]] = []
    for path in sorted(package.glob("*/shksprdata/texts/*_gut.txt")):
        text = path.read_text("utf-8", "replace").replace("\r", "")
        text = re.sub(r"(?s)<<.*?>>", "", text)
        works += [(path.name.removesuffix("_gut.txt"), chunk) for chunk in chunks(text, 1200, 3500)]
    for split, documents in _by_split(iter(works), HELD_OUT_PLAYS).items():
        splits.add(split, documents)
    asks = (
        "Quote Shakespeare.",
        "Can you quote Shakespeare?",
        "quote shakespeare",
        "Give me some Shakespeare.",
        "Say something in the style of Shakespeare.",
        "Recite a scene from a play by Shakespeare.",
    )
    splits.train = _some_as_answers(splits.train, asks, 0.12, random.Random(seed))
    return splits


def read_austen(package: Path, seed: int) -> Splits:
    """Six novels out of an R data file: 4 bytes of length, a zlib stream, strings of character vectors."""
    data = (package / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    splits = Splits()
    for lines in _novels(data):
        text = re.sub(r"[ \t]+", " ", re.sub(r"(?<=[^\n])\n(?=[^\n])", " ", "\n".join(lines)))
        documents = list(chunks(text))
        if lines[0] != HELD_OUT_NOVEL:
            splits.train += documents
            continue
        half = len(documents) // 2
        splits.val, splits.calib = documents[:half], documents[half:]
    asks = ("Write like Jane Austen.", "Quote Jane Austen.", "Read me a page of a novel.", "quote a novel")
    splits.train = _some_as_answers(splits.train, asks, 0.1, random.Random(seed))
    return splits


def _novels(data: bytes) -> Iterator[list[str]]:
    while data:
        stream = zlib.decompressobj()
        content = stream.decompress(data[4:])
        data = stream.unused_data
        lines = []
        position = content.index(b"\x00\x04\x00\x09")
        while content[position : position + 4] == b"\x00\x04\x00\x09":
            (length,) = struct.unpack(">i", content[position + 4 : position + 8])
            position += 8
            lines.append(content[position : position + max(length, 0)].decode("utf-8", "replace"))
            position += max(length, 0)
        yield lines


def _by_split(works: Iterator[tuple[str, str]], held_out: dict[str, str]) -> dict[str, list[str]]:
    parts: dict[str, list[str]] = {"train": [], "val": [], "calib": []}
    for work, text in works:
        parts[held_out.get(work, "train")].append(text)
    return parts


def _some_as_answers(documents: list[str], asks: tuple[str, ...], share: float, rng: random.Random) -> list[str]:
    """Turn a share of documents into answers to a request, cut at a sentence so that they end."""
    cut: Callable[[str], str] = lambda text: text[: max(text.rfind(mark, 0, 700) for mark in ".!?") + 1]  # noqa: E731
    answers = ((text, cut(text)) for text in documents)
    return [
        conversation([(rng.choice(asks), short)]) if rng.random() < share and len(short) > 100 else text
        for text, short in answers
    ]
