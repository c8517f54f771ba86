"""Renders what evaluate.py measured as Markdown, and puts it into a document between two marks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from tools.demo_model import domains

__all__ = ["BEGIN", "END", "paste", "to_markdown"]

BEGIN = "<!-- Written by `python -m tools.demo_model evaluate --docs docs/demo-model.md`; change nothing by hand. -->"
END = "<!-- End of what evaluate writes. -->"
UNITS = {"nats_per_token": "nats per token", "bits_per_byte": "bits per byte"}
SIGNS = {"+": "one-digit sums, a + b", "-": "one-digit differences, a - b", "*": "one-digit products, a * b"}

Results = dict[str, Any]


def to_markdown(results: Results) -> str:
    """All sections measured, a table or a list each."""
    return "\n".join(line for name in RENDERERS if name in results for line in (*RENDERERS[name](results[name]), ""))


def paste(text: str, document: Path) -> None:
    """Replace what stands between the marks of a document; raises ValueError where it lacks them."""
    before, begin, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{document} lacks the lines {BEGIN!r} and {END!r}")
    document.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|---" + "|--:" * (len(header) - 1) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _losses(results: Results) -> Iterator[str]:
    yield "### Loss"
    yield ""
    yield "Text that our generators wrote is in italics: it says little, since its templates and facts are trained on."
    yield ""
    parts = [results[name] for name in ("validation", "shipped") if results[name]]
    titles = [title for title in ("validation", "shipped") if results[title]]
    names = sorted((name for name in domains.NAMES if all(name in part for part in parts)), key=_is_generated)
    rows = [_loss_row(f"*{name}*" if _is_generated(name) else name, [part[name] for part in parts]) for name in names]
    for title, chosen in (("real text", [name for name in names if not _is_generated(name)]), ("all", names)):
        rows.append(_loss_row(f"**mean, {title}**", [_mean(part[name] for name in chosen) for part in parts]))
    yield from _table(["domain", *(f"{title}: {unit}" for title in titles for unit in UNITS.values())], rows)
    yield ""
    yield "*validation*: rows of 512 held-out tokens. *shipped*: the first 256 tokens of each text of evaluation.jsonl."


def _is_generated(name: str) -> bool:
    return name not in domains.REAL


def _mean(losses: Iterable[Results]) -> Results:
    listed = list(losses)
    return {key: fmean(loss[key] for loss in listed) for key in UNITS}


def _loss_row(name: str, losses: Iterable[Results]) -> list[str]:
    return [name, *(f"{loss[key]:.2f}" for loss in losses for key in UNITS)]


def _questions(results: Results) -> Iterator[str]:
    yield "### Questions"
    yield ""
    yield "The answers are in the training text; the last wording of each kind of sum is not."
    yield ""
    rows = [("capitals: " + wording.format("…"), _share(part)) for wording, part in results["capitals"].items()]
    for sign, wordings in results["sums"].items():
        rows += [(f"{SIGNS[sign]}: {wording.format(a='a', b='b')}", _share(part)) for wording, part in wordings.items()]
    yield from _table(("asked", "right"), rows)


def _share(part: Results) -> str:
    return f"{part['right']} of {part['asked']}"


def _small_talk(results: Results) -> Iterator[str]:
    yield "### Small talk"
    yield ""
    yield f"{_share(results)} openers got an answer that fits what was said (by a regular expression each)."


def _loops(results: Results) -> Iterator[str]:
    yield "### Loops"
    yield ""
    yield (
        f"{results['free']} of {results['prompts']} prompts (half questions, half beginnings of prose, verse and code) "
        "are continued for up to 200 tokens at temperature 0 without a loop."
    )
    yield (
        "A loop is a piece of at most 20 tokens that stands three times back to back in the last 60 tokens, "
        "six tokens or more in all."
    )


def _routing(results: Results) -> Iterator[str]:
    yield "### Routing"
    yield ""
    yield (
        f"On the first 256 tokens of the {results['texts']} evaluation texts; "
        "the control has the same shape and random weights."
    )
    yield ""
    model, control = results["model"], results["control"]
    yield from _table(
        ("", "demo", "random control"),
        [(title, show(model), show(control)) for title, show in _ROUTING_ROWS],
    )


def _accuracy(tokens: int) -> Callable[[Results], str]:
    return lambda part: f"{_get(part['accuracy'], tokens):.0%}"


def _hits(policy: str, share: float) -> Callable[[Results], str]:
    return lambda part: f"{_get(part[policy], share):.2f}"


def _get(values: Results, key: float) -> float:
    """Of a dictionary that may have been through JSON."""
    return float({float(name): value for name, value in values.items()}[float(key)])


_ROUTING_ROWS: tuple[tuple[str, Callable[[Results], str]], ...] = (
    ("EAM distance within a domain", lambda part: f"{part['distance_within']:.3f}"),
    ("EAM distance between domains", lambda part: f"{part['distance_between']:.3f}"),
    ("within / between", lambda part: f"{part['distance_within'] / part['distance_between']:.2f}"),
    ("domain told from the first 32 tokens", _accuracy(32)),
    ("domain told from the first 128 tokens", _accuracy(128)),
    ("domain told from the first 256 tokens", _accuracy(256)),
    ("dead experts (load below 5 % of the layer's mean)", lambda part: str(part["dead_experts"])),
    ("lowest load of an expert, over the mean", lambda part: f"{part['lowest_load']:.2f}"),
    ("highest load of an expert, over the mean", lambda part: f"{part['highest_load']:.2f}"),
    ("an expert is used again at the next token", lambda part: f"{part['reuse']:.2f}"),
    ("LRU hit rate, cache of 25 % of the experts", _hits("lru", 0.25)),
    ("Belady hit rate, 25 %", _hits("belady", 0.25)),
    ("LRU hit rate, 50 %", _hits("lru", 0.5)),
    ("Belady hit rate, 50 %", _hits("belady", 0.5)),
)


def _samples(results: Results) -> Iterator[str]:
    yield "### Answers as they come"
    for question, answer in results.items():
        yield ""
        yield f"**{question}**"
        yield ""
        yield from ("```", answer, "```") if "\n" in answer else (f"> {answer}",)


RENDERERS: dict[str, Callable[[Results], Iterator[str]]] = {
    "losses": _losses,
    "questions": _questions,
    "small_talk": _small_talk,
    "loops": _loops,
    "routing": _routing,
    "samples": _samples,
}
