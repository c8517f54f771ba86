"""What the demo model's evaluation is made of, without weights: loops, judging, routing statistics, prompt sets."""

from __future__ import annotations

import numpy as np
import pytest

from moeinf.prompts import demo_prompts
from tools.demo_model import prompts, questions, report, routing
from tools.demo_model.domains import NAMES
from tools.demo_model.evaluate import is_looping


def test_a_loop_is_a_piece_three_times_back_to_back() -> None:
    assert is_looping([1, 2, 3] * 3)
    assert is_looping([*range(100, 150), *[7, 8] * 3, 9])
    assert is_looping([5] * 6)
    assert is_looping(list(range(20)) * 3)
    assert not is_looping([1, 2, 3] * 2)
    assert not is_looping([5] * 5)
    assert not is_looping([*[1, 2, 3] * 3, *range(10, 70)])
    assert not is_looping(list(range(21)) * 3)
    assert not is_looping([])


def test_a_sum_is_right_when_its_result_is_the_last_number() -> None:
    wording, asked = next(iter(questions.sum_questions("+")))
    question = asked[34]
    assert (wording, len(asked), question.text) == ("What is {a} + {b}?", 100, "What is 3 + 4?")
    for answer in ("3 + 4 = 7.", "7", "It is 7."):
        assert question.is_answered_by(answer)
    for answer in ("3 + 4 = 8.", "3 + 4 = 17.", "7 + 4 = 3.", "3 + 4 = 77.", ""):
        assert not question.is_answered_by(answer)


def test_differences_are_never_negative() -> None:
    assert {len(asked) for _, asked in questions.sum_questions("-")} == {55}


def test_capitals_are_judged_without_accents_and_case() -> None:
    asked = {question.text: question for question in questions.capital_questions(questions.CAPITAL_WORDINGS[0])}
    assert len(asked) == 50
    brazil = asked["What is the capital of Brazil?"]
    assert brazil.is_answered_by("It is Brasília.")
    assert not brazil.is_answered_by("The capital of Brazil is Lima.")


def test_prompts_for_loops_are_fifty() -> None:
    assert len({*questions.CHAT_PROMPTS, *questions.PROSE_PROMPTS}) == 50


def trace(*tokens: list[int]) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """A trace of one layer."""
    return np.array(tokens)[:, None, :]


def test_eams_are_near_within_a_domain_and_far_between() -> None:
    eams = {
        "left": [routing.eam(trace([0, 1], [0, 1]), 4), routing.eam(trace([0, 1]), 4)],
        "right": [routing.eam(trace([2, 3]), 4), routing.eam(trace([2, 3], [3, 2]), 4)],
    }
    within, between = routing.distances(eams)
    assert within == pytest.approx(0)
    assert between == pytest.approx(1)
    assert routing.domain_accuracy(eams, eams) == 1
    assert routing.domain_accuracy(eams, {"left": eams["right"], "right": eams["right"]}) == 0.5


def test_loads_give_every_domain_the_same_weight() -> None:
    loads = routing.relative_loads(
        {"long": [routing.eam(trace(*[[0, 1]] * 9), 4)], "short": [routing.eam(trace([0, 2]), 4)]}
    )
    assert loads.tolist() == [[2, 1, 1, 0]]
    assert routing.dead_experts(loads) == 1


def test_reuse_counts_experts_chosen_again() -> None:
    assert routing.reuse([trace([0, 1], [1, 2], [3, 4])]) == 0.25


def test_events_number_experts_over_all_layers() -> None:
    two_layers = np.array([[[0, 1], [2, 3]], [[1, 2], [0, 3]]])
    found = routing.events([two_layers], experts=4)
    assert [event.choices for event in found] == [((0, 1),), ((6, 7),), ((1, 2),), ((4, 7),)]
    assert [event.layer for event in found] == [0, 1, 0, 1]
    assert [event.begins for event in found] == [True, False, False, False]


def test_prompt_sets_are_whole_and_disjoint() -> None:
    calibration, evaluation = demo_prompts("calibration"), demo_prompts("evaluation")
    for part in (calibration, evaluation):
        assert [prompt.domain for prompt in part] == [name for name in NAMES for _ in range(8)]
        for prompt in part:
            assert 600 <= len(prompt.text) <= 1500
            assert prompt.source
            assert prompt.licence
    texts = [prompt.text for prompt in (*calibration, *evaluation)]
    assert len(set(texts)) == len(texts)
    assert sum(len(text.encode()) for text in texts) < prompts.MOST_BYTES


def test_talks_alternate_and_end_with_an_answer() -> None:
    for prompt in demo_prompts("evaluation"):
        if prompt.domain in prompts.CHATS:
            turns = prompts.messages(prompt)
            assert turns[0]["role"] == "user"
            assert turns[-1]["role"] == "assistant"
            assert all(turn["content"].strip() for turn in turns)


def test_tables_are_pasted_between_the_marks(tmp_path_factory: pytest.TempPathFactory) -> None:
    document = tmp_path_factory.mktemp("docs") / "page.md"
    document.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", encoding="utf-8")
    report.paste("new\n", document)
    assert document.read_text(encoding="utf-8") == f"before\n{report.BEGIN}\n\nnew\n\n{report.END}\nafter\n"
    document.write_text("no marks", encoding="utf-8")
    with pytest.raises(ValueError, match="lacks the lines"):
        report.paste("new", document)
