"""Check the documents: every relative link leads somewhere, every code fence is closed, every heading is unique in its
file.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```", re.MULTILINE)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def anchors(text: str) -> set[str]:
    """The anchors that a Markdown viewer gives the headings of `text`."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(prose)}


def problems(path: Path) -> Iterator[str]:
    text = path.read_text(encoding="utf-8")
    if len(FENCE.findall(text)) % 2:
        yield "a code fence is not closed"
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        page = path.parent / name if name else path
        if not page.exists():
            yield f"link to {target}: no such file"
        elif anchor and anchor not in anchors(page.read_text(encoding="utf-8")):
            yield f"link to {target}: no such heading"


def main() -> int:
    pages = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
    found = [f"{page.relative_to(ROOT)}: {problem}" for page in pages for problem in problems(page)]
    print("\n".join(found) or f"{len(pages)} pages are in order")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
