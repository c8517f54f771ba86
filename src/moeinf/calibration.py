"""Collecting traces: prompts go through a model, and what its routers choose is kept beside it.

Owns the order of the work. A run that is interrupted goes on where it stopped, since every few prompts what is there is
written. Knows nothing of terminals, of where prompts come from, or of what traces are good for.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from .engine import Engine
from .errors import MoeinfError, UsageError
from .files import explained
from .gate import GatePredictor
from .generation import Sampling
from .hooks import quiet
from .progress import NO_PROGRESS, Progress
from .prompts import Prompt, text_digest
from .recorder import Recorder
from .trace import ModelIdentity, Trace, concatenate
from .tracefile import read_trace, write_trace

__all__ = ["collect"]

_SAVE_EVERY = 10


def collect(
    engine: Engine,
    name: str,
    prompts: Sequence[Prompt],
    path: Path,
    *,
    max_tokens: int = 64,
    progress: Progress = NO_PROGRESS,
    notify: Callable[[str], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Trace:
    """Let `engine`, of the stored model `name`, continue every prompt by at most `max_tokens`, and write the trace to
    `path`.

    Sequence n of the trace is prompt n. Of new tokens it also has what each layer's router names one layer early, so
    that a replay can foresee what this model would. Tokens are sampled with a seed, since greedy text repeats itself
    more than people's text does. A prompt that leaves no room for `max_tokens` in the context is cut, and `notify` told
    of it.

    What an interrupted or failed run has done is kept in a draft beside `path`, and not done again: the trace is then
    that of a run without a break. The draft is written every ten prompts and when this ends, and is used again only
    for the same model, prompts and `max_tokens`; one that cannot be used is set aside, and `notify` told of it.
    `should_stop` is asked before each prompt: when it says yes, the trace so far stays there, and is returned.

    The collection of `engine` remembers which texts it knows, so that nobody judges it by them unawares.

    Raises UsageError for a context with no room, and what `Session.generate` and `write_trace` raise.
    """
    identity = ModelIdentity.of(name, engine.manifest)
    inputs = _tokenize(engine, prompts, max_tokens, notify)
    draft = _draft_path(path, identity, inputs, max_tokens)
    if _drafts(path) and not draft.exists():
        notify(f"an unfinished trace of {path.stem} was of other prompts or another model, so this one starts afresh")
    kept = _read_draft(draft, identity, notify) if draft.exists() else Recorder(identity).trace()
    gate = GatePredictor(engine.model, engine.experts_modules)
    fresh: list[Trace] = []
    done = len(set(kept.sequence_id.tolist()))
    with progress.task(f"trace {name}", len(inputs), "prompts", done=done) as task:
        try:
            while done < len(inputs) and not should_stop():
                fresh.append(_run(engine, identity, gate, inputs[done], max_tokens, seed=done))
                engine.runtime.counter.collection.texts.add(text_digest(prompts[done].text))
                done += 1
                task.advance(1)
                if len(fresh) == _SAVE_EVERY:
                    kept, fresh = _save([kept, *fresh], draft), []
        finally:
            if fresh:
                kept = _save([kept, *fresh], draft)
    if done == len(inputs):
        write_trace(kept, path)
        for other in _drafts(path):
            other.unlink(missing_ok=True)
    return kept


def _tokenize(
    engine: Engine, prompts: Sequence[Prompt], max_tokens: int, notify: Callable[[str], None]
) -> list[list[int]]:
    """The token ids of every prompt, as many as the context has room for."""
    context = engine.plan.context
    room = context - max_tokens
    if room < 1:
        raise UsageError(f"a context of {context} tokens has no room for {max_tokens} new ones")
    with quiet():  # transformers warns of long prompts too
        inputs: list[list[int]] = [engine.tokenizer(prompt.text)["input_ids"] for prompt in prompts]
    for number, ids in enumerate(inputs, 1):
        if not ids:
            raise UsageError(f"prompt {number} has no tokens", hint="leave it out")
    cut = sum(len(ids) > room for ids in inputs)
    if cut:
        notify(
            f"{cut} of {len(inputs)} prompts are cut to {room} tokens: the context holds {context}, "
            f"{max_tokens} of them new; --context sets that"
        )
    return [ids[:room] for ids in inputs]


def _run(
    engine: Engine, identity: ModelIdentity, gate: GatePredictor, ids: list[int], max_tokens: int, seed: int
) -> Trace:
    """What the routers choose for one prompt and its continuation, and what `gate`, which knows nothing but that
    prompt, foresees of it.
    """
    gate.forget()
    recorder = Recorder(identity, max_tokens=engine.plan.context, foresight=gate)
    engine.runtime.recorder = recorder
    try:
        sampling = Sampling(max_tokens=max_tokens, temperature=1.0, top_p=1.0, top_k=0, seed=seed)
        engine.session().generate(ids, sampling)
    finally:
        engine.runtime.recorder = None
    return recorder.trace()


def _save(parts: Sequence[Trace], draft: Path) -> Trace:
    trace = concatenate(parts)
    write_trace(trace, draft)
    return trace


def _draft_path(path: Path, identity: ModelIdentity, inputs: Sequence[Sequence[int]], max_tokens: int) -> Path:
    """Another path for another model, for other prompts, and for prompts that are cut at another place."""
    digest = hashlib.sha256(repr((identity, max_tokens, inputs)).encode()).hexdigest()
    return path.with_name(f"{path.stem}.{digest[:12]}.draft.safetensors")


def _read_draft(draft: Path, identity: ModelIdentity, notify: Callable[[str], None]) -> Trace:
    """What a run before this one has done; nothing, if its file is damaged or of a later version: it is then renamed,
    so that nothing of it is lost.
    """
    try:
        trace = read_trace(draft)
        trace.check_model(identity)
        return trace
    except MoeinfError as error:
        aside = draft.with_name(f"{draft.name}.unusable")
        with explained(aside):
            draft.replace(aside)
        notify(f"{error}; it is now called {aside.name}, and this trace starts afresh")
        return Recorder(identity).trace()


def _drafts(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{glob.escape(path.stem)}.*.draft.safetensors"))
