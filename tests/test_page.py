"""The page of a report: sound HTML that needs nothing but itself, and files that are whole or not there."""

from __future__ import annotations

import base64
import errno
import itertools
from html.parser import HTMLParser
from pathlib import Path

import pytest

from faults import FailingDisk
from moeinf.errors import CapacityError, MoeinfError
from moeinf.manifest import Source
from moeinf.page import page, save
from moeinf.report import PICTURES, Report, make_report, pictures
from moeinf.sizing import Sizing
from moeinf.trace import ModelIdentity, Trace
from test_figures import colours
from test_sizing import skewed_trace
from traces import make_identity, make_trace

EMPTY = {"meta", "img"}


class Reader(HTMLParser):
    """Reads a page, and holds it to its form: what is opened is closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in EMPTY:
            self.open.append(tag)
            self.text.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text[self.open[-1]][-1] += data

    def values(self, tag: str, name: str) -> list[str]:
        return [value for where, what, value in self.attributes if (where, what) == (tag, name)]


def report_on(trace: Trace, domains: list[str], command: str = "moeinf trace tiny") -> Report:
    return make_report(trace, domains, 1 << 20, command=command, made="2026-01-02")


@pytest.fixture(scope="module")
def report() -> Report:
    return report_on(skewed_trace([20] * 4), ["a", "a", "b", "b"])


@pytest.fixture(scope="module")
def images(report: Report) -> dict[str, bytes]:
    return pictures(report)


def test_the_page_needs_nothing_but_itself(report: Report, images: dict[str, bytes]) -> None:
    text = page(report, images)
    found = Reader(text)
    assert text.startswith("<!DOCTYPE html>\n")
    assert found.values("html", "lang") == ["en"]
    assert {tag for tag, _, _ in found.attributes} | found.text.keys() >= {"meta", "style", "main", "h1", "table"}
    assert not {"script", "link", "iframe", "object"} & found.text.keys()
    references = [value for _, name, value in found.attributes if name in ("src", "href", "srcset", "action", "data")]
    assert all(value.startswith("data:image/png;base64,") for value in references)
    assert "url(" not in text
    assert "@import" not in text
    assert "://" not in text


def test_the_pictures_are_in_it_with_words_for_those_who_do_not_see_them(
    report: Report, images: dict[str, bytes]
) -> None:
    found = Reader(page(report, images))
    shown = [base64.b64decode(value.partition(",")[2]) for value in found.values("img", "src")]
    assert shown == list(images.values())
    assert len(set(found.values("img", "alt"))) == len(images)
    for png, width in zip(shown, found.values("img", "width"), strict=True):
        assert int(width) == round(colours(png)[0][0] * 96 / 150)


def test_the_numbers_are_in_tables(report: Report, images: dict[str, bytes]) -> None:
    found = Reader(page(report, images))
    assert len(found.text["table"]) == len(images) + 1
    cells = found.text["td"]
    for replay in report.sizing.replays:
        assert f"{replay.hit_rate:.1%}" in cells
        assert replay.policy in found.text["th"]
    assert {"row", "col"} == set(found.values("th", "scope"))


def test_what_the_trace_is_of_stands_at_the_top(report: Report, images: dict[str, bytes]) -> None:
    found = Reader(page(report, images))
    assert found.text["h1"] == found.text["title"] == ["How tiny uses its experts"]
    facts = dict(zip(found.text["dt"], found.text["dd"], strict=True))
    assert facts == {
        "model": "tiny, TinyForCausalLM",
        "source": "org/tiny, commit c",
        "experts": "48 in 2 layers, 2 of a layer per token",
        "trace": "4 requests of 80 tokens together, 8 of them in prompts",
        "made": "2026-01-02",
        "command": "moeinf trace tiny",
    }
    assert report.sizing.advice is not None
    assert found.text["pre"] == [f"moeinf chat tiny --experts {report.sizing.advice.at.slots}"]


def test_names_cannot_become_markup() -> None:
    bad = "<script>alert('x')</script>\x00\ud800{0}&amp;"
    trace = skewed_trace([4] * 4)
    identity = ModelIdentity(bad, bad, Source(bad, bad), trace.layer_sizes, trace.identity.top_k)
    own = Trace(identity, trace.experts, None, trace.sequence_id, trace.position, trace.is_prefill)
    report = report_on(own, [bad, bad, "b", '" onload="x'], command=bad)
    text = page(report, pictures(report))
    found = Reader(text)
    assert "script" not in found.text
    assert not found.values("img", "onload")
    shown = bad.replace("\x00", "\ufffd").replace("\ud800", "\ufffd")
    assert f"How {shown} uses its experts" in found.text["h1"]
    assert shown in found.text["th"]
    assert text.encode()


@pytest.mark.parametrize(
    ("lengths", "domains"), [([20], []), ([2], []), ([1], []), ([4] * 20, [*"abcdefghijklmnopqrst"])]
)
def test_a_page_on_very_little_and_on_many_domains(lengths: list[int], domains: list[str]) -> None:
    report = report_on(skewed_trace(lengths), domains)
    images = pictures(report)
    text = page(report, images)
    assert len(Reader(text).values("img", "src")) == len(images)
    assert ("the 16 domains of 20" in text) == bool(domains)


def test_the_page_says_why_some_cells_are_grey(report: Report, images: dict[str, bytes]) -> None:
    assert "Grey" not in page(report, images)
    uneven = report_on(make_trace(make_identity((7, 3), (2, 1)), 9), [])
    assert "Grey is where a layer has fewer experts than others." in page(uneven, pictures(uneven))


def test_the_page_says_what_was_not_replayed(report: Report, images: dict[str, bytes]) -> None:
    assert "were replayed" not in page(report, images)
    sizing = Sizing(1, 4, 1, report.sizing.replays, report.sizing.advice)
    part = Report(report.trace, report.command, report.made, report.routing, report.domains, sizing)
    assert "To save time, 1 of the 4 requests were replayed." in page(part, images)


def test_files_lie_beside_the_trace_and_old_ones_go(report: Report, images: dict[str, bytes], tmp_path: Path) -> None:
    trace = tmp_path / "set.v2-4x8.safetensors"
    saved = save(report, trace)
    assert saved.page == tmp_path / "set.v2-4x8.html"
    assert [path.name for path in saved.pictures] == [f"set.v2-4x8-{name}.png" for name in PICTURES]
    assert [path.read_bytes() for path in saved.pictures] == list(images.values())
    assert saved.page.read_text(encoding="utf-8") == page(report, images)
    fewer = save(report_on(skewed_trace([20]), []), trace)
    assert sorted(tmp_path.iterdir()) == sorted([fewer.page, *fewer.pictures])
    assert len(fewer.pictures) == 3


def test_whatever_operation_fails_no_half_file_is_left(
    report: Report, images: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moeinf.page.pictures", lambda _: images)
    whole = {*images.values(), page(report, images).encode()}
    for number in itertools.count(1):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        try:
            save(report, folder / "t.safetensors", disk=FailingDisk(number))
        except MoeinfError:
            assert {path.read_bytes() for path in folder.iterdir()} <= whole
        else:
            break
    assert number > 20


def test_a_full_disk_is_told(report: Report, tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match="no room left to write"):
        save(report, tmp_path / "t.safetensors", disk=FailingDisk(3, errno.ENOSPC, for_ever=True))
