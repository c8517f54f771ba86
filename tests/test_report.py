"""The report: what it works out, and what it says where there is little to say."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest

from moeinf.errors import UsageError
from moeinf.policies import POLICIES
from moeinf.report import MOST_DOMAINS, PICTURES, Report, make_report, pictures, recommendation
from moeinf.simulate import BELADY
from moeinf.sizing import find_size
from moeinf.trace import Trace
from test_figures import check
from test_sizing import skewed_trace
from traces import make_identity, make_trace


def report_on(trace: Trace, domains: Sequence[str] = ()) -> Report:
    return make_report(trace, domains, 1 << 20, command="moeinf trace tiny", made="2026-01-02")


def test_a_report_has_all_its_pictures() -> None:
    found = pictures(report_on(skewed_trace([20] * 4), ["a", "a", "b", "b"]))
    assert tuple(found) == PICTURES
    for png in found.values():
        check(png)


@pytest.mark.parametrize(
    ("trace", "domains", "missing"),
    [
        (skewed_trace([20]), [], {"domains", "distances"}),
        (skewed_trace([20]), ["alone"], {"domains", "distances"}),
        (skewed_trace([2, 2]), ["a", "b"], {"hit-rates"}),
        (skewed_trace([1, 1]), [], {"hit-rates", "reuse", "domains", "distances"}),
        (make_trace(make_identity((5,), (1,)), 9), [], {"domains", "distances"}),
        (make_trace(make_identity((7, 1, 3), (2, 1, 3)), 9), [], {"domains", "distances"}),
    ],
    ids=["one request", "one domain", "only prompts", "only single tokens", "one layer", "uneven layers"],
)
def test_what_there_is_nothing_to_draw_of_is_left_out(trace: Trace, domains: list[str], missing: set[str]) -> None:
    found = pictures(report_on(trace, domains))
    assert set(found) == set(PICTURES) - missing
    for png in found.values():
        check(png)


def test_the_numbers_are_plain_objects() -> None:
    report = report_on(skewed_trace([20] * 3), ["a", "a", "b"])
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["routing"]["requests"] == 3
    assert data["domains"]["names"] == ["a", "b"]
    assert data["domains"]["distances"][1][1] is None
    assert {replay["policy"] for replay in data["replays"]} == {*POLICIES, BELADY}
    assert data["replayed"] == {"requests": 3, "all_requests": 3, "decoded_tokens": 54}
    advice = data["recommendation"]
    assert advice["bytes"] == advice["slots"] << 20
    assert advice["half"]["slots"] < advice["slots"]
    assert json.loads(json.dumps(report_on(skewed_trace([2])).to_json()))["recommendation"] is None


def test_many_domains_are_kept_and_some_are_drawn() -> None:
    names = [f"{number:02d}" for number in range(20)] + ["19"]
    report = report_on(skewed_trace([3] * 21), names)
    assert report.domains is not None
    assert len(report.domains.names) == 20
    assert "19" in report.domains.largest(MOST_DOMAINS).names
    drawn = pictures(report)
    for name in ("domains", "distances"):
        check(drawn[name])


def test_the_recommendation_in_words() -> None:
    trace = skewed_trace([200] * 2)
    found = find_size(trace, 1 << 20)
    assert found.advice is not None
    first, second = recommendation(found)
    at, half = found.advice.at, found.advice.at_half
    assert first.startswith(f"With {at.slots} experts ({at.fraction:.0%} of all, {at.slots}.0 MiB) in memory, ")
    assert f" {at.hit_rate:.1%} of what decoding asks for is found there" in first
    assert second.startswith(f"With half, {half.slots} experts ({half.slots}.0 MiB), {half.hit_rate:.1%} is found")
    assert "No size finds 90%" in recommendation(find_size(skewed_trace([12]), 1))[-1]
    assert "Nothing was decoded" in recommendation(find_size(skewed_trace([2]), 1))[0]
    busy = Trace(
        make_identity((8,), (2,)),
        np.tile(np.array([0, 1], np.int16), (50, 1, 1)),
        None,
        np.zeros(50, np.int32),
        np.arange(50, dtype=np.int32),
        np.zeros(50, np.bool_),
    )
    assert len(recommendation(find_size(busy, 1))) == 1


def test_a_trace_without_tokens_is_refused() -> None:
    with pytest.raises(UsageError, match="no token went through the model"):
        report_on(make_trace(tokens=0))
