"""`moeinf chat`: a conversation, line by line, and its slash commands."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from moeinf.chat import Conversation, Reply, has_chat_template, load_chat, save_chat
from moeinf.errors import MoeinfError, UsageError
from moeinf.settings import home_path

from .answers import Interrupts, describe_cut, describe_plan, describe_stats, open_engine
from .options import EngineFlags, Model, Quiet, SamplingFlags, Stats
from .output import INTERRUPTED, Mode, Output, unexpected
from .reading import LineReader, Reader, TerminalReader

__all__ = ["COMMANDS", "Repl", "chat"]

_BLOCK = '"""'
_SETTINGS: dict[str, Callable[[str], float]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "seed": int,
    "max_tokens": int,
}


def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system prompt.")] = None,
    sampling_flags: SamplingFlags = SamplingFlags(),
    stats: Stats = False,
    engine_flags: EngineFlags = EngineFlags(),
    quiet: Quiet = False,
) -> int:
    """\b
    moeinf chat mixtral-instruct
    moeinf chat mixtral-instruct --system "Answer in one sentence." --stats

    Talk to a model. /help lists what can be done besides talking. Ctrl-C stops an answer, twice leaves; Ctrl-D leaves.
    """
    output = Output(Mode.QUIET if quiet else Mode.HUMAN)
    with open_engine(model, engine_flags, sampling_flags, output) as (name, engine, sampling):
        conversation = Conversation(engine, sampling, system)
        reader: Reader = LineReader()
        if output.is_interactive:
            reader = TerminalReader(home_path() / "history" / "chat", [command.name for command in COMMANDS])
            output.note(f"{name}: {describe_plan(engine.plan)}. /help lists the commands, Ctrl-D leaves.")
        if not has_chat_template(engine.tokenizer):
            output.note(f"{name} has no chat template: it continues what is said as it stands")
        contexts = engine.plan.context, engine.manifest.max_context
        return Repl(name, conversation, reader, output, contexts=contexts, shows_stats=stats).talk()


class _Left(Exception):  # noqa: N818  # no error: somebody said /bye
    pass


class Repl:
    """Reads lines, and answers or obeys. Answers go to stdout, everything else to stderr."""

    def __init__(
        self,
        model: str,
        conversation: Conversation,
        reader: Reader,
        output: Output,
        *,
        contexts: tuple[int, int],
        shows_stats: bool = False,
        interrupts: Interrupts | None = None,
    ) -> None:
        self._model = model
        self._conversation = conversation
        self._reader = reader
        self._output = output
        self._contexts = contexts
        """Tokens that fit now, and those that the model was made for."""
        self._shows_stats = shows_stats
        self._interrupts = interrupts or Interrupts()
        self._last: Reply | None = None

    def talk(self) -> int:
        """Until the input ends or somebody leaves; returns the exit code.

        Where nobody can try again, the first mistake ends it: it raises MoeinfError.
        """
        while True:
            try:
                self._turn()
            except (EOFError, _Left):
                return 0
            except KeyboardInterrupt:
                if self._interrupts.press():
                    return INTERRUPTED
                self._output.note("Ctrl-C again or Ctrl-D to leave")
            except Exception as error:  # whatever it is, what was said is worth more
                if not self._reader.is_interactive:
                    raise
                self._output.error(error if isinstance(error, MoeinfError) else unexpected(error))

    def _turn(self) -> None:
        line = self._reader.read(">>> ").strip()
        if line.startswith(_BLOCK):
            self._say(self._read_block(line.removeprefix(_BLOCK)))
        elif line.startswith("/"):
            self._obey(line)
        else:
            self._say(line)

    def _read_block(self, text: str) -> str:
        while not text.rstrip().endswith(_BLOCK):
            try:
                text += "\n" + self._reader.read("... ")
            except EOFError:
                self._output.warn(f"the last message was not closed with {_BLOCK} and was not sent")
                raise
        return text.rstrip().removesuffix(_BLOCK).removeprefix("\n").removesuffix("\n")

    def _say(self, text: str) -> None:
        if text.strip():
            self._answer(lambda on_text, should_stop: self._conversation.send(text, on_text, should_stop))

    def _obey(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        for command in COMMANDS:
            if command.name == name:
                return command.action(self, argument.strip())
        raise UsageError(
            f"{name} is no command", hint=f"/help lists them; a message that starts with / goes in {_BLOCK}"
        )

    def _answer(self, ask: Callable[[Callable[[str], None], Callable[[], bool]], Reply]) -> None:
        with self._interrupts.watch() as should_stop:
            try:
                self._last = ask(self._output.write, should_stop)
            finally:
                self._output.end_line()
        completion = self._last.completion
        if completion.finish_reason == "interrupted":
            self._output.note("stopped; what was said is kept, /retry asks again")
        if cut := describe_cut(completion, self._conversation.sampling, *self._contexts, setter="/set max_tokens"):
            self._output.note(cut)
        if self._shows_stats:
            self.stats("")

    def help(self, _: str) -> None:
        width = max(len(command.usage) for command in COMMANDS)
        for command in COMMANDS:
            self._output.tell(f"{command.usage:<{width}}  {command.help}")
        self._output.tell(f"{_BLOCK:<{width}}  begins and ends a message of several lines")

    def clear(self, _: str) -> None:
        self._conversation.clear()
        self._last = None
        self._output.note("forgot what was said")

    def system(self, text: str) -> None:
        self._conversation.system = text or None
        self._output.note("system prompt set" if text else "no system prompt")

    def set(self, argument: str) -> None:
        name, _, value = argument.partition(" ")
        if name == "stats":
            self._set_stats(value.strip())
        elif name in _SETTINGS:
            self._set_sampling(name, value.strip())
        else:
            names = ", ".join([*_SETTINGS, "stats"])
            raise UsageError(f"{name!r} cannot be set" if name else "what is to be set?", hint=f"/set knows {names}")

    def _set_stats(self, value: str) -> None:
        if value not in ("", "on", "off"):
            raise UsageError(f"stats are on or off, not {value!r}")
        self._shows_stats = value != "off"
        self._output.note(f"stats {'on' if self._shows_stats else 'off'}")

    def _set_sampling(self, name: str, value: str) -> None:
        try:
            number = None if value == "default" else _SETTINGS[name](value)
        except ValueError:
            kind = "a whole number" if _SETTINGS[name] is int else "a number"
            raise UsageError(f"{name} must be {kind} or default, not {value!r}") from None
        changed: dict[str, Any] = {name: number}
        self._conversation.sampling = dataclasses.replace(self._conversation.sampling, **changed)
        self._output.note(f"{name} {value}")

    def show(self, _: str) -> None:
        sampling = dataclasses.asdict(self._conversation.sampling)
        last = self._last.completion if self._last else None
        used = last.prompt_tokens + len(last.tokens) if last else self._conversation.count_tokens()
        self._output.tell(f"model     {self._model}")
        self._output.tell(f"system    {self._conversation.system or 'none'}")
        self._output.tell("settings  " + ", ".join(f"{name} {_shown(value)}" for name, value in sampling.items()))
        self._output.tell(f"messages  {len(self._conversation.messages)}, {used} of {self._contexts[0]} tokens")

    def stats(self, _: str) -> None:
        if self._last is None:
            raise UsageError("there is no answer yet")
        for line in describe_stats(self._last.completion.stats):
            self._output.tell(line)

    def save(self, name: str) -> None:
        self._output.note(f"saved {save_chat(name, self._conversation)}")

    def load(self, name: str) -> None:
        load_chat(name, self._conversation)
        self._last = None
        self._output.note(f"loaded {name}: {len(self._conversation.messages)} messages")

    def retry(self, _: str) -> None:
        self._answer(self._conversation.retry)

    def bye(self, _: str) -> None:
        raise _Left


@dataclass(frozen=True, slots=True)
class _Command:
    usage: str
    help: str
    action: Callable[[Repl, str], None]

    @property
    def name(self) -> str:
        return self.usage.partition(" ")[0]


COMMANDS = (
    _Command("/help", "this list", Repl.help),
    _Command("/clear", "forget what was said", Repl.clear),
    _Command("/system [TEXT]", "set the system prompt, or have none", Repl.system),
    _Command(
        "/set NAME VALUE", "temperature, top_p, top_k, seed, max_tokens (or default); stats on, stats off", Repl.set
    ),
    _Command("/show", "the model, the settings, and how full the context is", Repl.show),
    _Command("/stats", "what the last answer cost", Repl.stats),
    _Command("/save NAME", "keep this chat under a name", Repl.save),
    _Command("/load NAME", "go on with a kept chat", Repl.load),
    _Command("/retry", "answer the last message again", Repl.retry),
    _Command("/bye", "leave", Repl.bye),
)


def _shown(value: object) -> str:
    return "default" if value is None else str(value)
