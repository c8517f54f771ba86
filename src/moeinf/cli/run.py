"""`moeinf run`: one answer."""

from __future__ import annotations

from typing import Annotated

import typer

from moeinf.chat import Conversation, Reply, complete, has_chat_template
from moeinf.errors import UsageError

from .answers import Interrupts, describe_cut, describe_stats, open_engine
from .options import EngineFlags, Model, OutputFlags, SamplingFlags, Stats
from .output import INTERRUPTED, Mode
from .reading import read_piped_text

__all__ = ["run"]


def run(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="What to say to the model.")] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system prompt.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it stands, no chat template.")] = False,
    sampling_flags: SamplingFlags = SamplingFlags(),
    stats: Stats = False,
    engine_flags: EngineFlags = EngineFlags(),
    output_flags: OutputFlags = OutputFlags(),
) -> int:
    """\b
    moeinf run mixtral-instruct "Why is the sky blue?"
    moeinf run mixtral-instruct "Summarise this:" < notes.txt

    Print one answer. Text on standard input is put after the prompt. Ctrl-C ends the answer and keeps what was said.
    """
    output = output_flags.output()
    if raw and system is not None:
        raise UsageError("--raw goes without a system prompt", hint="leave out --raw or --system")
    text = _read_prompt(prompt, model)
    with open_engine(model, engine_flags, sampling_flags, output) as (name, engine, sampling):
        if not (raw or has_chat_template(engine.tokenizer)):
            output.note(f"{name} has no chat template: it continues the prompt as it stands")
        on_text = None if output.mode is Mode.JSON else output.write
        with Interrupts().watch() as should_stop:
            try:
                if raw:
                    reply = complete(engine, text, sampling, on_text=on_text, should_stop=should_stop)
                else:
                    reply = Conversation(engine, sampling, system).send(text, on_text, should_stop)
            finally:
                output.end_line()
        if output.mode is Mode.JSON:
            output.result(_to_dict(name, reply), lines=())
        contexts = engine.plan.context, engine.manifest.max_context
    if cut := describe_cut(reply.completion, sampling, *contexts):
        output.note(cut)
    for line in describe_stats(reply.completion.stats) if stats else []:
        output.tell(line)
    return INTERRUPTED if reply.completion.finish_reason == "interrupted" else 0


def _read_prompt(prompt: str | None, model: str) -> str:
    parts = [part for part in (prompt, read_piped_text()) if part]
    if not parts:
        raise UsageError(
            "there is no prompt", hint=f'moeinf run {model} "Why is the sky blue?", or moeinf chat {model} to talk'
        )
    return "\n".join(parts)


def _to_dict(name: str, reply: Reply) -> dict[str, object]:
    completion = reply.completion
    return {
        "model": name,
        "prompt_tokens": completion.prompt_tokens,
        "tokens": list(completion.tokens),
        "text": reply.text,
        "finish_reason": completion.finish_reason,
        "stats": completion.stats.to_dict(),
    }
