"""Collecting traces: prompts go through a model, and what its routers choose is kept beside it.

Owns the prompt sets, and the order of the work. A run that is interrupted goes on where it stopped, since every few
prompts what is there is written. Knows nothing of terminals, or of what traces are good for.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import demo
from .engine import Engine
from .errors import IntegrityError, UsageError
from .generation import Sampling
from .progress import NO_PROGRESS, Progress
from .recorder import Recorder
from .trace import ModelIdentity, Trace, concatenate
from .tracefile import read_trace, write_trace

__all__ = ["DEFAULT_DATASET", "CalibrationPrompt", "collect", "read_prompts"]

DEFAULT_DATASET = "default"
"""The prompts that ship with the package, 15 kinds of text (docs/demo-model.md)."""
_SAVE_EVERY = 10
_TEXT_FIELDS = ("text", "prompt", "question", "instruction")


@dataclass(frozen=True, slots=True)
class CalibrationPrompt:
    """A text to put through a model, and what kind of text it is, where that is known."""

    text: str
    domain: str = ""


def read_prompts(dataset: str) -> list[CalibrationPrompt]:
    """The prompts of `default`, or of a file: .txt (one per paragraph), .jsonl or .csv (a field called text, prompt,
    question or instruction; one called domain is kept).

    Raises UsageError for what is neither, and IntegrityError for a file that holds no prompts.
    """
    if dataset == DEFAULT_DATASET:
        return [CalibrationPrompt(prompt.text, prompt.domain) for prompt in demo.prompts("calibration")]
    path = Path(dataset)
    readers = {".txt": _read_paragraphs, ".jsonl": _read_json_lines, ".csv": _read_csv}
    if path.suffix not in readers:
        raise UsageError(
            f"{dataset!r} is no prompt set", hint=f"give `{DEFAULT_DATASET}`, or a file: {', '.join(readers)}"
        )
    try:
        prompts = [prompt for prompt in readers[path.suffix](path.read_text(encoding="utf-8")) if prompt.text.strip()]
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, csv.Error) as error:
        raise IntegrityError(f"{path} is not a valid {path.suffix[1:]} file: {error}") from error
    if not prompts:
        raise IntegrityError(f"{path} holds no prompts", hint=f"name a field one of: {', '.join(_TEXT_FIELDS)}")
    return prompts


def collect(
    engine: Engine,
    name: str,
    prompts: Sequence[CalibrationPrompt],
    path: Path,
    *,
    max_tokens: int = 64,
    progress: Progress = NO_PROGRESS,
    should_stop: Callable[[], bool] = lambda: False,
) -> Trace:
    """Let `engine`, of the stored model `name`, continue every prompt by at most `max_tokens`, and write the trace to
    `path`.

    Sequence n of the trace is prompt n. Tokens are sampled with a seed, since greedy text repeats itself more than
    people's text does. What an interrupted run has done is kept in a draft beside `path`, and not done again; it is
    written every ten prompts. `should_stop` is asked after each prompt: when it says yes, the trace so far stays there,
    and is returned.
    """
    identity = ModelIdentity.of(name, engine.manifest)
    draft = path.with_suffix(".draft.safetensors")
    parts = _read_draft(draft, identity)
    done = sum(len(set(part.sequence_id.tolist())) for part in parts)
    with progress.task(f"trace {name}", len(prompts), "prompts", done=done) as task:
        while done < len(prompts) and not should_stop():
            recorder = Recorder(identity)
            engine.runtime.recorder = recorder
            try:
                for prompt in prompts[done : done + _SAVE_EVERY]:
                    _run(engine, prompt.text, max_tokens, seed=done)
                    task.advance(1)
                    done += 1
                    if should_stop():
                        break
            finally:
                engine.runtime.recorder = None
            parts = [concatenate([*parts, recorder.trace()])]
            write_trace(parts[0], draft)
    trace = parts[0] if parts else Recorder(identity).trace()
    if done >= len(prompts):
        write_trace(trace, path)
        draft.unlink(missing_ok=True)
    return trace


def _run(engine: Engine, text: str, max_tokens: int, seed: int) -> None:
    ids: list[int] = engine.tokenizer(text)["input_ids"]
    room = engine.plan.context - max_tokens
    if room < 1:
        raise UsageError(f"a context of {engine.plan.context} tokens has no room for {max_tokens} new ones")
    sampling = Sampling(max_tokens=max_tokens, temperature=1.0, top_p=1.0, top_k=0, seed=seed)
    engine.session().generate(ids[:room], sampling)


def _read_draft(draft: Path, identity: ModelIdentity) -> list[Trace]:
    if not draft.exists():
        return []
    trace = read_trace(draft)
    trace.check_model(identity)
    return [trace]


def _read_paragraphs(text: str) -> list[CalibrationPrompt]:
    return [CalibrationPrompt(part.strip()) for part in text.replace("\r\n", "\n").split("\n\n")]


def _read_json_lines(text: str) -> list[CalibrationPrompt]:
    return [_prompt_of(json.loads(line)) for line in text.splitlines() if line.strip()]


def _read_csv(text: str) -> list[CalibrationPrompt]:
    return [_prompt_of(row) for row in csv.DictReader(text.splitlines(keepends=True), strict=True)]


def _prompt_of(row: object) -> CalibrationPrompt:
    if not isinstance(row, dict):
        raise ValueError("a line is no object")
    text = next((row[name] for name in _TEXT_FIELDS if isinstance(row.get(name), str)), "")
    return CalibrationPrompt(text, str(row.get("domain") or ""))
