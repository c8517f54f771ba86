"""Measures the exported checkpoint and prints the tables of docs/demo-model.md: `python -m tools.demo_model evaluate`.

Needs the repository alone: the shipped weights and the shipped prompt sets. Where the work folder has validation
tokens, losses on them are added. Everything is at temperature 0 by the checkpoint's own generation config.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moeinf import demo
from moeinf.prompts import Prompt, demo_prompts
from moeinf.simulate import BELADY, replay
from tools.demo_model import domains, prompts, questions, report, routing
from tools.demo_model.answers import (
    Checkpoint,
    Tokens,
    Traced,
    complete,
    load,
    question_tokens,
    random_control,
    token_bytes,
    trace,
)
from tools.demo_model.batches import load_tokens, validation_rows
from tools.demo_model.questions import Question

__all__ = ["add_arguments", "is_looping", "run"]

CONTROL_SEED = 0
WINDOW = 256  # tokens of a text that are routed
FIRST_TOKENS = (32, 128, 256)
CACHE_SHARES = (0.25, 0.5)
CACHE_TEXTS = 3  # of each domain, by turns, so that the topic changes every 256 tokens
ROWS, ROW_LENGTH = 24, 512  # of each domain's validation tokens
ANSWER_TOKENS, SAMPLE_TOKENS = 40, 200
LOOP_WINDOW, LONGEST_PERIOD, REPEATS, SHORTEST_LOOP = 60, 20, 3, 6

Results = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "--checkpoint", type=Path, default=demo.CHECKPOINT, help="folder of the checkpoint; default: as shipped"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and answers there")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="put the tables into this document")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="only these parts")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, and write what was asked for."""
    checkpoint = load(arguments.checkpoint)
    results: Results = {name: SECTIONS[name](checkpoint, arguments.work) for name in arguments.only}
    text = report.to_markdown(results)
    sys.stdout.write(text)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if arguments.docs:
        report.paste(text, arguments.docs)
    return 0


def measure_losses(checkpoint: Checkpoint, work: Path) -> Results:
    """Loss and bits per byte of each domain: on validation tokens where there are any, and on the shipped texts."""
    shipped = [(prompt.domain, _window(checkpoint, prompt)) for prompt in demo_prompts("evaluation")]
    results: Results = {"shipped": {}, "validation": {}}
    for name in domains.NAMES:
        texts = [tokens for domain, tokens in shipped if domain == name]
        results["shipped"][name] = _loss(checkpoint, texts)
    for name, tokens in load_tokens(work, "val", domains.NAMES).items():
        results["validation"][name] = _loss(checkpoint, validation_rows(tokens, ROW_LENGTH, ROWS).tolist())
    return results


def _loss(checkpoint: Checkpoint, texts: Sequence[Tokens]) -> Results:
    losses = np.concatenate([traced.losses for traced in trace(checkpoint, texts)])
    sizes = token_bytes(checkpoint)
    size = sum(int(sizes[text[1:]].sum()) for text in texts)
    return {
        "tokens": len(losses),
        "nats_per_token": float(losses.mean()),
        "bits_per_byte": float(losses.sum()) / math.log(2) / size,
    }


def measure_questions(checkpoint: Checkpoint, _work: Path) -> Results:
    """Right answers among capitals and one-digit sums, for each wording, with the wrong answers."""
    results: Results = {"capitals": {}, "sums": {}}
    for wording in questions.CAPITAL_WORDINGS:
        results["capitals"][wording] = _ask(checkpoint, questions.capital_questions(wording))
    for sign in "+-*":
        results["sums"][sign] = {wording: _ask(checkpoint, asked) for wording, asked in questions.sum_questions(sign)}
    return results


def measure_small_talk(checkpoint: Checkpoint, _work: Path) -> Results:
    """Answers to openers that fit what was said."""
    return _ask(checkpoint, questions.SMALL_TALK, SAMPLE_TOKENS)


def _ask(checkpoint: Checkpoint, asked: Sequence[Question], new_tokens: int = ANSWER_TOKENS) -> Results:
    answers = _answers(checkpoint, [question.text for question in asked], new_tokens)
    wrong = {
        question.text: answer
        for question, answer in zip(asked, answers, strict=True)
        if not question.is_answered_by(answer)
    }
    return {"asked": len(asked), "right": len(asked) - len(wrong), "wrong": wrong}


def _answers(checkpoint: Checkpoint, texts: Sequence[str], new_tokens: int) -> list[str]:
    completions = complete(checkpoint, [question_tokens(checkpoint, text) for text in texts], new_tokens)
    return [checkpoint.tokenizer.decode(tokens).strip() for tokens in completions]


def measure_loops(checkpoint: Checkpoint, _work: Path) -> Results:
    """Prompts, half of them questions and half beginnings of text, from which 200 tokens do not fall into a loop."""
    asked = [question_tokens(checkpoint, text) for text in questions.CHAT_PROMPTS]
    begun = [checkpoint.tokenizer.encode(text, add_special_tokens=False) for text in questions.PROSE_PROMPTS]
    texts = (*questions.CHAT_PROMPTS, *questions.PROSE_PROMPTS)
    completions = complete(checkpoint, asked + begun, SAMPLE_TOKENS)
    looping = {
        text: checkpoint.tokenizer.decode(tokens)
        for text, tokens in zip(texts, completions, strict=True)
        if is_looping(tokens)
    }
    return {"prompts": len(texts), "free": len(texts) - len(looping), "looping": looping}


def is_looping(tokens: Tokens) -> bool:
    """Whether the last 60 tokens hold at most 20 tokens three times back to back, six tokens or more in all."""
    tail = tokens[-LOOP_WINDOW:]
    for period in range(1, LONGEST_PERIOD + 1):
        length = period * max(REPEATS, math.ceil(SHORTEST_LOOP / period))
        for start in range(len(tail) - length + 1):
            piece = tail[start : start + length]
            if piece[period:] == piece[:-period]:
                return True
    return False


def measure_routing(checkpoint: Checkpoint, _work: Path) -> Results:
    """Statistics of routing on the shipped texts, of the model and of a control with random weights."""
    return {
        "model": _routing(checkpoint),
        "control": _routing(random_control(checkpoint, CONTROL_SEED)),
        "texts": len(demo_prompts("evaluation")),
    }


def _routing(checkpoint: Checkpoint) -> Results:
    calibration = _choices(checkpoint, demo_prompts("calibration"))
    evaluation = _choices(checkpoint, demo_prompts("evaluation"))
    experts = checkpoint.experts
    centroids = _eams(calibration, experts)
    eams = _eams(evaluation, experts)
    within, between = routing.distances(eams)
    loads = routing.relative_loads(eams)
    mixed = [text for texts in zip(*evaluation.values(), strict=True) for text in texts]
    events = routing.events(mixed[: CACHE_TEXTS * len(evaluation)], experts)
    slots = {share: int(share * loads.size) for share in CACHE_SHARES}
    sizes = (experts,) * len(loads)
    return {
        "distance_within": within,
        "distance_between": between,
        "accuracy": {n: routing.domain_accuracy(centroids, _eams(evaluation, experts, n)) for n in FIRST_TOKENS},
        "dead_experts": routing.dead_experts(loads),
        "lowest_load": float(loads.min()),
        "highest_load": float(loads.max()),
        "reuse": routing.reuse(mixed),
        "lru": {share: replay(events, sizes, "lru", count).hit_rate for share, count in slots.items()},
        "belady": {share: replay(events, sizes, BELADY, count).hit_rate for share, count in slots.items()},
    }


def _choices(checkpoint: Checkpoint, shipped: Sequence[Prompt]) -> dict[str, list[routing.Trace]]:
    traces: list[Traced] = trace(checkpoint, [_window(checkpoint, prompt) for prompt in shipped])
    by_domain: dict[str, list[routing.Trace]] = {prompt.domain: [] for prompt in shipped}
    for prompt, traced in zip(shipped, traces, strict=True):
        by_domain[prompt.domain].append(traced.choices)
    return by_domain


def _eams(
    traces: dict[str, list[routing.Trace]], experts: int, first_tokens: int = WINDOW
) -> dict[str, list[routing.Eam]]:
    return {name: [routing.eam(text[:first_tokens], experts) for text in texts] for name, texts in traces.items()}


def _window(checkpoint: Checkpoint, prompt: Prompt) -> Tokens:
    """The first tokens of a shipped text, talks in the chat template."""
    text = prompt.text
    if prompt.domain in prompts.CHATS:
        text = checkpoint.tokenizer.apply_chat_template(prompts.messages(prompt), tokenize=False)
    return list(checkpoint.tokenizer.encode(text, add_special_tokens=False))[:WINDOW]


def measure_samples(checkpoint: Checkpoint, _work: Path) -> Results:
    """Questions with their answers, as they come."""
    return dict(zip(questions.SAMPLES, _answers(checkpoint, questions.SAMPLES, SAMPLE_TOKENS), strict=True))


SECTIONS: dict[str, Callable[[Checkpoint, Path], Results]] = {
    "losses": measure_losses,
    "questions": measure_questions,
    "small_talk": measure_small_talk,
    "loops": measure_loops,
    "routing": measure_routing,
    "samples": measure_samples,
}
