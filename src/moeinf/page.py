"""The report on a trace as files: one HTML page that needs nothing but itself, and its pictures.

Owns what the page says and how it looks. Knows nothing of how its numbers are worked out.
"""

from __future__ import annotations

import base64
import html
import math
import struct
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .analysis import Domains, Floats, Likeness, Predictability, Routing, activation_matrix, shares
from .figures import DOTS_PER_INCH
from .files import FileSystem, publish
from .report import MOST_DOMAINS, PICTURES, Report, naming_rows, pictures, recommendation, replayed_part, reuse_rows
from .sizing import Sizing, ranked

__all__ = ["Saved", "page", "save"]

_CSS_PIXEL = 96 / DOTS_PER_INCH


@dataclass(frozen=True, slots=True)
class Saved:
    """Where a report lies."""

    page: Path
    pictures: tuple[Path, ...]


def page(report: Report, images: dict[str, bytes]) -> str:
    """The page, as HTML with the `images` of `pictures` in it."""
    title = f"How {report.trace.identity.model} uses its experts"
    sections = "\n".join([_advice(report), *_sections(report, images)])
    return _PAGE.format(title=_text(title), style=_STYLE, facts=_facts(report), sections=sections)


def save(report: Report, trace_path: Path, *, disk: FileSystem | None = None) -> Saved:
    """Write `<stem>.html` and `<stem>-<picture>.png` beside the trace, each whole or not at all, the page last.

    What an earlier report had and this one has not is removed. Raises CapacityError when the disk is full.
    """
    disk = disk or FileSystem()
    images = pictures(report)
    places = {name: trace_path.with_name(f"{trace_path.stem}-{name}.png") for name in PICTURES}
    for name, place in places.items():
        if name in images:
            publish(place, [images[name]], disk=disk)
        else:
            disk.remove(place)
    whole = trace_path.with_suffix(".html")
    publish(whole, [page(report, images).encode()], disk=disk)
    return Saved(whole, tuple(places[name] for name in images))


def _facts(report: Report) -> str:
    identity, routing = report.trace.identity, report.routing
    commit = f", commit {identity.source.commit}" if identity.source.commit else ""
    prompts = int(report.trace.is_prefill.sum())
    facts = {
        "model": ", ".join(filter(None, (identity.model, identity.architecture))),
        "source": f"{identity.source.repo}{commit}",
        "experts": f"{sum(identity.layer_sizes):,} in {len(identity.layer_sizes)} layers, {_range(identity.top_k)} of a"
        " layer per token",
        "trace": f"{routing.requests:,} requests of {routing.tokens:,} tokens together, {prompts:,} of them in prompts",
        "made": report.made,
        "command": report.command,
    }
    return "".join(f"<dt>{name}</dt><dd>{_text(value)}</dd>" for name, value in facts.items() if value)


def _advice(report: Report) -> str:
    text = "".join(f"<p>{_text(line)}</p>" for line in recommendation(report.sizing))
    advice = report.sizing.advice
    command = f"moeinf chat {report.trace.identity.model} --experts {advice.at.slots}" if advice else ""
    shown = f"<pre>{_text(command)}</pre>" if command else ""
    return f'<section class="advice">\n<h2>What to keep in memory</h2>\n{text}\n{shown}\n</section>'


def _sections(report: Report, images: dict[str, bytes]) -> Iterator[str]:
    if report.sizing.advice is not None:
        yield _hit_rates(report.sizing, images["hit-rates"])
    yield _activation(report, images["activation"])
    if report.domains is not None:
        shown = report.domains.largest(MOST_DOMAINS)
        yield _domain_maps(shown, len(report.domains.names), images["domains"])
        yield _distances(shown, report.routing.likeness, images["distances"])
    if report.routing.predictability is not None:
        yield _reuse(report.routing, report.routing.predictability, images["reuse"])


def _hit_rates(sizing: Sizing, png: bytes) -> str:
    sizes = sorted({(one.slots, one.fraction) for one in sizing.replays})
    rates = {(one.policy, one.slots): one.hit_rate for one in sizing.replays}
    text = """An expert that is not in memory has to be read from disk, and the answer waits. Each line is a policy, a
        way to choose which expert makes room for another; higher is better. The thick line is the policy that moeinf
        uses unless told otherwise, and the ring on it is the size recommended above. Belady, the dashed line, knows
        the future: nothing can beat it. The cache is empty at first, and nothing is fetched ahead."""
    return _section(
        "How much is found in memory",
        f"{text} {replayed_part(sizing)}",
        _image(png, "Lines, one per policy: hit rate over the share of experts that are in memory."),
        _table(
            ["policy", *(f"{slots:,} ({share:.0%})" for slots, share in sizes)],
            [[name, *(f"{rates[name, slots]:.1%}" for slots, _ in sizes)] for name in ranked(sizing.replays)],
        ),
    )


def _activation(report: Report, png: bytes) -> str:
    sizes = report.trace.layer_sizes
    rows = zip(shares(activation_matrix(report.trace)), sizes, strict=True)
    grey = "" if len(set(sizes)) == 1 else " Grey is where a layer has fewer experts than others."
    return _section(
        "Which experts are used",
        f"""A row is a layer and a cell one of its experts: the brighter, the more often the layer chose that expert.
        The experts of each layer are sorted by their use. If all were used alike, everything would have one colour. On
        average, one request uses {report.routing.used_share:.0%} of all experts.{grey}""",
        _image(png, "Heatmap of layers and their experts: brighter where an expert is chosen more often."),
        _table(
            ["layer", "experts", "share of the most used", "experts with half of the use", "experts never used"],
            [
                [f"{layer}", f"{size}", f"{row.max():.1%}", f"{_half(row)}", f"{size - np.count_nonzero(row)}"]
                for layer, (row, size) in enumerate(rows)
            ],
        ),
    )


def _domain_maps(domains: Domains, of: int, png: bytes) -> str:
    text = """The same for each kind of text, called a domain, with the experts in the order of the picture above.
        Bright cells on the right are experts that this kind of text likes and the others do not."""
    if len(domains.names) < of:
        text += f" These are the {len(domains.names)} domains of {of} that have the most requests."
    columns = zip(domains.names, domains.requests, np.diag(domains.distances), domains.others, strict=True)
    return _section(
        "What each domain uses",
        text,
        _image(png, "A small heatmap of layers and their experts for each domain."),
        _table(
            ["domain", "requests", "distance within", "distance to others"],
            [[name, f"{requests:,}", _number(within), _number(others)] for name, requests, within, others in columns],
        ),
    )


def _distances(domains: Domains, likeness: Likeness | None, png: bytes) -> str:
    text = """How differently two requests use the experts, averaged over pairs of requests: 0 is alike, 1 is nothing in
        common (it is 1 - the cosine between their uses, averaged over layers). On the diagonal both requests are of one
        domain. Where that is less than elsewhere, what one request taught helps with the next of its kind."""
    if likeness is not None:
        text += (
            f" Over all pairs it is {likeness.within:.2f} within a domain and {likeness.between:.2f} between domains."
        )
    return _section(
        "How alike the domains are",
        text,
        _image(png, "Table of domains against domains: darker where their requests are less alike."),
        _table(
            ["", *domains.names],
            [[n, *map(_number, row)] for n, row in zip(domains.names, domains.distances, strict=True)],
        ),
    )


def _reuse(routing: Routing, named: Predictability, png: bytes) -> str:
    windows = [
        ["the next" if tokens == 1 else f"one of the next {tokens}", f"{chance:.1%}", f"{even:.1%}"]
        for tokens, chance, even in reuse_rows(routing)
    ]
    return _section(
        "How soon experts come back, and whether that can be foreseen",
        f"""Left: the chance that an expert that a token used is used again by one of the next tokens of its request,
        beside what it would be if all experts were used alike. A cache lives on the difference. Right: if one had to
        name as many experts as the next token asks for, the share that would be right, for three ways of naming them
        ({named.tokens:,} tokens were judged).""",
        _image(png, "Bars: the chance of reuse beside even use, and the share of experts named rightly."),
        _table(["used again by", "measured", "even use"], windows)
        + _table(["named by", "right"], [[name, f"{share:.1%}"] for name, share in naming_rows(routing)]),
    )


def _half(row: Floats) -> int:
    """How many experts, the most used first, have half of the choices."""
    return int(np.searchsorted(np.cumsum(np.sort(row)[::-1]), 0.5) + 1) if row.any() else 0


def _range(numbers: Sequence[int]) -> str:
    smallest, largest = min(numbers), max(numbers)
    return f"{smallest}" if smallest == largest else f"{smallest} to {largest}"


# Pieces of HTML.


def _section(title: str, text: str, image: str, tables: str) -> str:
    """`text` may have line ends anywhere."""
    said = _text(" ".join(text.split()))
    numbers = f"<details><summary>The numbers</summary>{tables}</details>"
    return f"<section>\n<h2>{_text(title)}</h2>\n<p>{said}</p>\n{image}\n{numbers}\n</section>"


def _image(png: bytes, alternative: str) -> str:
    """A picture in its natural size, which a PNG says in the first fields of its header."""
    data = base64.b64encode(png).decode("ascii")
    width, height = (round(size * _CSS_PIXEL) for size in struct.unpack(">II", png[16:24]))
    return (
        f'<figure><img src="data:image/png;base64,{data}" width="{width}" height="{height}"'
        f' alt="{_text(alternative)} A table follows."></figure>'
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column names the rows."""
    heads = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{_text(row[0])}</th>{"".join(f"<td>{_text(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _number(value: float) -> str:
    return "none" if math.isnan(value) else f"{value:.2f}"


def _text(text: str) -> str:
    """Text that a page may hold: models and data sets choose their names themselves."""
    unsafe = ("Cc", "Cs")
    return html.escape("".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in unsafe else c for c in text))


_STYLE = """\
:root { color-scheme: light dark; --ink: #24292f; --paper: #fff; --quiet: #57606a; --line: #d0d7de; --tint: #f3f6f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --paper: #14181d; --quiet: #9aa5b1; --line: #343c46; --tint: #1c222a; }
}
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 56rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.6 system-ui, sans-serif; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 1.25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 0 0 .5rem; }
section { margin-top: 3rem; }
p { margin: 0 0 .75rem; max-width: 44rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.25rem; margin: 0; }
dt { color: var(--quiet); }
dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font: .9em/1.5 ui-monospace, monospace; }
pre { margin: .75rem 0 0; white-space: pre-wrap; }
.advice { margin-top: 2rem; padding: 1.1rem 1.25rem; background: var(--tint); border-left: 4px solid #0072b2; }
figure { margin: 1rem 0 .75rem; padding: .75rem; background: #fff; border: 1px solid var(--line); border-radius: 6px; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
summary { cursor: pointer; color: var(--quiet); }
.wide { overflow-x: auto; margin: .5rem 0 1rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .75rem .2rem 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 600; }
th[scope="row"], th:first-child { text-align: left; }
@media print { details > * { display: block; } }"""

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
<main>
<header>
<h1>{title}</h1>
<dl>{facts}</dl>
</header>
{sections}
</main>
</body>
</html>
"""
