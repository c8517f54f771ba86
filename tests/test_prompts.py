"""The prompts that ship: enough of them, of many kinds, each said once, with what may be done with them."""

from __future__ import annotations

import re
from collections import Counter
from importlib import resources

import pytest

from moeinf.prompts import SHIPPED, Part, Prompt, demo_prompts, shipped_prompts

SIZES = [("default", 216, {8}), ("default-held-out", 168, {4, 8})]
ALL = [prompt for name in SHIPPED for prompt in shipped_prompts(name)]
WRITTEN = [prompt for prompt in ALL if prompt.source == "written for moeinf"]


@pytest.mark.parametrize(("name", "size", "per_domain"), SIZES)
def test_sizes(name: str, size: int, per_domain: set[int]) -> None:
    domains = Counter(prompt.domain for prompt in shipped_prompts(name))
    assert (domains.total(), len(domains), set(domains.values())) == (size, 27, per_domain)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_domain_comes_before_one_comes_again(name: str) -> None:
    domains = [prompt.domain for prompt in shipped_prompts(name)]
    assert len(set(domains[:27])) == len(set(domains[27:54])) == 27


@pytest.mark.parametrize("part", ["calibration", "evaluation"])
def test_those_of_the_demo_model_are_15_of_the_domains(part: Part) -> None:
    name = next(name for name, meant in SHIPPED.items() if meant == part)
    written = {prompt.domain for prompt in WRITTEN}
    assert Counter(demo_prompts(part)) == Counter(p for p in shipped_prompts(name) if p.domain not in written)
    assert len({prompt.domain for prompt in demo_prompts(part)}) == 15


def test_no_sentence_of_the_written_texts_stands_twice() -> None:
    owners: dict[str, Prompt] = {}
    for prompt in WRITTEN:
        for sentence in set(re.split(r"(?<=[.!?])\s|[\n\u3002\uff01\uff1f]", prompt.text)):
            if len(sentence.strip()) > 30:
                assert owners.setdefault(sentence.strip(), prompt) is prompt, sentence


def test_no_text_is_in_both_sets() -> None:
    assert len({prompt.text for prompt in ALL}) == len(ALL) == 384


def test_lengths_sources_and_licences() -> None:
    assert len(WRITTEN) == 12 * (8 + 4)
    for prompt in ALL:
        length = len(prompt.text) * (3 if prompt.domain == "chinese" else 1)
        assert 600 <= length <= 1350, prompt.text
        assert prompt.source
        assert prompt.licence
    assert all(prompt.text == prompt.text.strip() for prompt in WRITTEN)
    assert {prompt.licence for prompt in WRITTEN} == {"the same as moeinf"}


def test_the_notice_tells_of_every_domain() -> None:
    notice = resources.files("moeinf.prompts").joinpath("NOTICE.md").read_text(encoding="utf-8")
    cells = " ".join(line.split("|")[1] for line in notice.splitlines() if line.startswith("|"))
    assert {prompt.domain for prompt in ALL} <= set(re.findall(r"\w+", cells))
