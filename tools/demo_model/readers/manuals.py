"""Help pages of an office suite, in four languages; whole pages are held out."""

import hashlib
import html
import re
from collections.abc import Callable
from pathlib import Path

from tools.demo_model.corpus import Splits, chunks

ENGLISH = re.compile(r"\b(the|of|with|and|is|you|for)\b")
"""Words that betray a paragraph left untranslated."""


def read_manual(package: Path) -> Splits:
    """Paragraphs of all help pages of one language, boilerplate once, without paragraphs that were left in English."""
    splits = Splits()
    seen: set[str] = set()
    english = package.name.endswith("en-us")
    foreign: Callable[[str], bool] = lambda text: not english and bool(ENGLISH.search(text))  # noqa: E731
    for path in sorted(package.glob("usr/share/libreoffice/help/*/text/**/*.html")):
        page = path.read_text("utf-8", "replace")
        start = page.find('<div id="DisplayArea"')
        paragraphs = [text for text in _paragraphs(page[max(start, 0) :]) if text not in seen and not foreign(text)]
        seen.update(text for text in paragraphs if len(text) < 200)
        body = "\n\n".join(paragraphs)
        if len(body) > 300:
            splits.add(split_of(path.name), chunks(body, 1200, 3500))
    return splits


def split_of(name: str) -> str:
    """Hold out about 3 % of the files to validate and 2 % to calibrate, by a hash of their name."""
    bucket = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100
    return "val" if bucket < 3 else "calib" if bucket < 5 else "train"


def _paragraphs(page: str) -> list[str]:
    page = re.sub(r"(?is)<(script|style|head|nav)\b.*?</\1>", "", page)
    page = re.sub(r"(?i)</(p|div|h\d|li|tr|table|ul|ol|pre|dd|dt|title)>|<br[^>]*>", "\n\n", page)
    page = html.unescape(re.sub(r"<[^>]+>", "", page)).replace("\xa0", " ")
    return [flat for raw in re.split(r"\n\s*\n", page) if len(flat := re.sub(r"\s+", " ", raw).strip()) > 25]
