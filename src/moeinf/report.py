"""The report on a trace: what routing, domains and replays say together, in numbers, pictures and sentences.

Knows nothing of pages, terminals, or models that run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from . import figures
from .analysis import Domains, Routing, activation_matrix, compare_domains, describe, shares
from .errors import UsageError
from .progress import NO_PROGRESS, Progress
from .sizing import GOOD_HIT_RATE, Advice, Sizing, find_size, ranked
from .trace import Trace
from .units import format_bytes

__all__ = [
    "MOST_DOMAINS",
    "PICTURES",
    "Report",
    "make_report",
    "naming_rows",
    "pictures",
    "recommendation",
    "replayed_part",
    "reuse_rows",
]

PICTURES = ("hit-rates", "activation", "domains", "distances", "reuse")
"""Their names, in the order of the page; a report has not always all of them."""
MOST_DOMAINS = 16
"""As many are drawn."""


@dataclass(frozen=True, slots=True, eq=False)
class Report:
    """What is reported. `command` made the trace on the day `made`; `domains` is None where there are not two of
    them.
    """

    trace: Trace
    command: str
    made: str
    routing: Routing
    domains: Domains | None
    sizing: Sizing

    def to_json(self) -> dict[str, Any]:
        """The numbers, as plain objects."""
        sizing = self.sizing
        return {
            "routing": asdict(self.routing),
            "domains": None if self.domains is None else _domains_to_json(self.domains),
            "replayed": {
                "requests": sizing.requests,
                "all_requests": sizing.all_requests,
                "decoded_tokens": sizing.decoded_tokens,
            },
            "replays": [{**asdict(one), "hit_rate": one.hit_rate} for one in sizing.replays],
            "recommendation": None if sizing.advice is None else _advice_to_json(sizing.advice),
        }


def make_report(
    trace: Trace,
    domains: Sequence[str],
    expert_bytes: int,
    *,
    command: str,
    made: str,
    processes: int = 1,
    progress: Progress = NO_PROGRESS,
) -> Report:
    """Work everything out. `domains` names the kind of each request, in order, or is empty.

    Raises UsageError for a trace without tokens.
    """
    if not trace.num_tokens:
        raise UsageError("no token went through the model", hint="give it prompts with text in them")
    return Report(
        trace=trace,
        command=command,
        made=made,
        routing=describe(trace, domains),
        domains=compare_domains(list(trace.sequences()), domains) if len(set(domains)) > 1 else None,
        sizing=find_size(trace, expert_bytes, processes=processes, progress=progress),
    )


def pictures(report: Report) -> dict[str, bytes]:
    """PNGs by name, those of PICTURES that there is something to draw in."""
    sizes, sizing = report.trace.layer_sizes, report.sizing
    overall = shares(activation_matrix(report.trace))
    order = np.argsort(-overall, axis=1, kind="stable")
    drawn = {"activation": figures.activation(overall, sizes, order)}
    if sizing.advice is not None:
        title = f"{report.trace.identity.model}: experts found in memory while decoding"
        drawn["hit-rates"] = figures.hit_rates([(title, sizing.replays)], ranked(sizing.replays), sizing.advice.at)
    if report.domains is not None:
        domains = report.domains.largest(MOST_DOMAINS)
        drawn["domains"] = figures.activation_by_domain(domains.activation, domains.names, sizes, order)
        drawn["distances"] = figures.distances(domains.distances, domains.names)
    if report.routing.predictability is not None:
        drawn["reuse"] = figures.reuse(reuse_rows(report.routing), naming_rows(report.routing))
    return {name: drawn[name] for name in PICTURES if name in drawn}


def recommendation(sizing: Sizing) -> list[str]:
    """The recommended size and what it buys, in sentences."""
    advice = sizing.advice
    if advice is None:
        return ["Nothing was decoded, so there is no size to recommend: more new tokens per prompt would show one."]
    at, half = advice.at, advice.at_half
    size = f"{at.slots:,} experts ({at.fraction:.0%} of all, {format_bytes(advice.size_bytes)})"
    read = f"{format_bytes(round(advice.read_bytes_per_token))} are read from disk per token"
    lines = [f"With {size} in memory, {at.hit_rate:.1%} of what decoding asks for is found there, and {read}."]
    if half.slots < at.slots:
        lines.append(
            f"With half, {half.slots:,} experts ({format_bytes(advice.half_bytes)}), {half.hit_rate:.1%} is found,"
            f" and {format_bytes(round(advice.half_read_bytes_per_token))} are read per token."
        )
    if not advice.is_good:
        lines.append(
            f"No size finds {GOOD_HIT_RATE:.0%}: the trace is so short that reading each expert once counts. This one"
            " finds as much as all experts would."
        )
    return lines


def replayed_part(sizing: Sizing) -> str:
    """Which part was replayed, as a sentence; empty if it was the whole trace."""
    if sizing.requests == sizing.all_requests:
        return ""
    return f"To save time, {sizing.requests:,} of the {sizing.all_requests:,} requests were replayed."


def reuse_rows(routing: Routing) -> list[tuple[int, float, float]]:
    """(tokens, chance of reuse within them, what even use would give)."""
    pairs = zip(routing.reuse, routing.even_reuse, strict=True)
    return [(tokens, chance, even) for (tokens, chance), (_, even) in pairs]


def naming_rows(routing: Routing) -> list[tuple[str, float]]:
    """(who names the next token's experts, the share that is right)."""
    named = routing.predictability
    if named is None:
        return []
    rows = [("this request's uses so far", named.own), ("the token before", named.previous), ("chance", named.chance)]
    return rows if named.router is None else [("the router, asked a layer early", named.router), *rows]


def _domains_to_json(domains: Domains) -> dict[str, Any]:
    return {
        "names": list(domains.names),
        "requests": list(domains.requests),
        "distances": [[None if math.isnan(value) else value for value in row] for row in domains.distances.tolist()],
    }


def _advice_to_json(advice: Advice) -> dict[str, Any]:
    at, half = advice.at, advice.at_half
    return {
        "policy": at.policy,
        "slots": at.slots,
        "fraction": at.fraction,
        "bytes": advice.size_bytes,
        "hit_rate": at.hit_rate,
        "target": GOOD_HIT_RATE,
        "read_bytes_per_token": advice.read_bytes_per_token,
        "half": {
            "slots": half.slots,
            "fraction": half.fraction,
            "bytes": advice.half_bytes,
            "hit_rate": half.hit_rate,
            "read_bytes_per_token": advice.half_read_bytes_per_token,
        },
    }
