"""Our own lines and word lists, as text files of titled sections."""

from functools import cache
from pathlib import Path


@cache
def sections(file: str) -> dict[str, tuple[str, ...]]:
    """The lines of a file by the title above them."""
    found: dict[str, list[str]] = {}
    title = ""
    for line in (Path(__file__).parent / f"{file}.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            title = line[2:]
            found[title] = []
        elif line:
            found[title].append(line)
    return {title: tuple(lines) for title, lines in found.items()}


def lines(file: str, title: str) -> tuple[str, ...]:
    """The lines of one section."""
    return sections(file)[title]


def words(title: str) -> list[str]:
    """The words of one list in words.txt."""
    return " ".join(lines("words", title)).split(", ")


def pairs(file: str, title: str) -> dict[str, str]:
    """Lines of the form `left|right` as a dictionary."""
    return dict(line.split("|") for line in lines(file, title))
