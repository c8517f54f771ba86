"""Conversations with a model: messages in, text out while it is made.

Owns the messages of a conversation, their file form, and the way from token ids to text that can be shown at once.
Knows the engine by `TextEngine` only, and nothing of terminals.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from .errors import IntegrityError, UsageError
from .files import explained, publish
from .settings import home_path

if TYPE_CHECKING:
    from .generation import Completion, Sampling

__all__ = [
    "Conversation",
    "Message",
    "Reply",
    "TextEngine",
    "TextSession",
    "TextStream",
    "complete",
    "has_chat_template",
    "load_chat",
    "save_chat",
]

SCHEMA = 1
_LONGEST_NAME = 200
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

Role = Literal["user", "assistant"]


class TextSession(Protocol):
    """What a conversation needs of `moeinf.generation.Session`."""

    def generate(
        self,
        input_ids: Sequence[int],
        sampling: Sampling,
        *,
        on_token: Callable[[int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Completion:
        """Continue `input_ids`, which are the whole conversation. Raises UsageError when they exceed the context."""


class TextEngine(Protocol):
    """What a conversation needs of `moeinf.Engine`."""

    @property
    def tokenizer(self) -> Any:
        """A transformers tokenizer."""

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Tokens that end an answer and are no part of its text."""

    def session(self) -> TextSession:
        """A KV cache of its own."""


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: `text` is all that `on_text` was given."""

    text: str
    completion: Completion


class TextStream:
    """Text of token ids that come one by one.

    What it returns is never taken back: a character whose bytes are not all there is held until they are, and dropped
    if they never come. All pieces together are the text that the tokenizer makes of all ids, special tokens left out.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # a window of ids from here on is decoded; its first ids give the rest their context
        self._end = 0  # ids before this one have been returned
        self._shown = ""  # the text of ids[start:end]

    def push(self, token: int) -> str:
        """The text that is certain now and was not before; often a word, sometimes nothing."""
        self._ids.append(token)
        text = self._decode(self._start)
        if text.endswith(REPLACEMENT):
            return ""
        piece = self._after_shown(text)
        newest = self._decode(self._end)
        if newest:  # visible by itself, so that a leading space that decoding strips is stripped here too
            self._start = self._end
        self._shown = newest or text
        self._end = len(self._ids)
        return piece

    def finish(self) -> str:
        """What is left, without a character that was never completed."""
        return self._after_shown(self._decode(self._start)).rstrip(REPLACEMENT)

    def _after_shown(self, text: str) -> str:
        if text.startswith(self._shown):
            return text[len(self._shown) :]
        return self._decode(self._end)  # stray bytes changed how what stood before them decodes

    def _decode(self, begin: int) -> str:
        ids = self._ids[begin:]
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class Conversation:
    """A conversation with one engine, over one session: what was said before is not computed again.

    `sampling` and `system` may be changed between two messages.
    """

    def __init__(self, engine: TextEngine, sampling: Sampling, system: str | None = None) -> None:
        self.sampling = sampling
        self.system = system
        self._engine = engine
        self._session = engine.session()
        self._messages: list[Message] = []

    @property
    def messages(self) -> tuple[Message, ...]:
        return tuple(self._messages)

    def send(
        self,
        text: str,
        on_text: Callable[[str], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Reply:
        """Say `text` and return the answer, which `on_text` is given piece by piece.

        An answer that `should_stop` cut off is kept as far as it went. When this raises, the conversation is as it was.
        """
        return self._extend([*self._messages, Message("user", text)], on_text, should_stop)

    def retry(
        self, on_text: Callable[[str], None] | None = None, should_stop: Callable[[], bool] | None = None
    ) -> Reply:
        """Answer the last message once more, in place of the last answer. Raises UsageError if there is none."""
        if not self._messages:
            raise UsageError("there is no answer to try again")
        return self._extend(self._messages[:-1], on_text, should_stop)

    def count_tokens(self) -> int:
        """The tokens that the next message will stand behind."""
        return len(_encode_messages(self._engine.tokenizer, self._messages, self.system)) if self._messages else 0

    def clear(self) -> None:
        """Forget all messages; `system` and `sampling` stay."""
        self._messages.clear()

    def to_dict(self) -> dict[str, object]:
        return {"schema": SCHEMA, "system": self.system, "messages": [asdict(message) for message in self._messages]}

    def restore(self, data: object) -> None:
        """Go on where `to_dict` was called. Raises IntegrityError, and changes nothing, if `data` is not from there."""
        try:
            self.system, self._messages = _checked(data)
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"this is no saved chat: {error}") from error

    def _extend(
        self,
        messages: list[Message],
        on_text: Callable[[str], None] | None,
        should_stop: Callable[[], bool] | None,
    ) -> Reply:
        ids = _encode_messages(self._engine.tokenizer, messages, self.system)
        reply = _generate(self._engine, self._session, ids, self.sampling, on_text, should_stop)
        self._messages = [*messages, Message("assistant", reply.text)]
        return reply


def complete(
    engine: TextEngine,
    prompt: str,
    sampling: Sampling,
    *,
    on_text: Callable[[str], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Reply:
    """Go on with `prompt` as it stands, without a chat template. Raises UsageError for an empty prompt."""
    ids = _encode(engine.tokenizer, prompt)
    return _generate(engine, engine.session(), ids, sampling, on_text, should_stop)


def has_chat_template(tokenizer: Any) -> bool:
    """Whether the model says how messages are written; without, a conversation is the texts one after the other."""
    return bool(getattr(tokenizer, "chat_template", None))


def save_chat(name: str, conversation: Conversation, home: Path | None = None) -> Path:
    """Write `conversation` to the private file `chats/NAME.json`, whether or not it is there; returns its path. Raises
    what `publish` raises.
    """
    path = _chat_path(name, home)
    text = json.dumps(conversation.to_dict(), indent=1, ensure_ascii=False)
    with explained(path.parent):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    publish(path, [text.encode()], mode=0o600)
    return path


def load_chat(name: str, conversation: Conversation, home: Path | None = None) -> None:
    """Go on with the chat saved as `name`. Raises UsageError if there is none or it may not be read, IntegrityError if
    it is damaged.
    """
    path = _chat_path(name, home)
    with explained(path):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            saved = ", ".join(sorted(other.stem for other in path.parent.glob("*.json"))) or "none"
            raise UsageError(f"no chat is saved as {name!r}", hint=f"saved chats: {saved}") from None
        except (ValueError, RecursionError) as error:
            raise IntegrityError(f"{path} is no saved chat: {error}") from error
    conversation.restore(data)


def _chat_path(name: str, home: Path | None) -> Path:
    if not re.fullmatch(r"[\w-][\w.-]*", name) or len(name.encode()) > _LONGEST_NAME:
        hint = f"use letters, digits, '-', '_' and '.', {_LONGEST_NAME} bytes of them at most"
        raise UsageError(f"{name!r} cannot name a chat", hint=hint)
    return (home or home_path()) / "chats" / f"{name}.json"


def _checked(data: Any) -> tuple[str | None, list[Message]]:
    if data["schema"] != SCHEMA:
        raise ValueError(f"schema {data['schema']!r} is not known")
    messages = [Message(**raw) for raw in data["messages"]]
    if not all(message.role in get_args(Role) and isinstance(message.content, str) for message in messages):
        raise ValueError("a message has no role or no text")
    if not isinstance(data["system"], str | None):
        raise ValueError("the system prompt is no text")
    return data["system"], messages


def _generate(
    engine: TextEngine,
    session: TextSession,
    ids: Sequence[int],
    sampling: Sampling,
    on_text: Callable[[str], None] | None,
    should_stop: Callable[[], bool] | None,
) -> Reply:
    stream = TextStream(engine.tokenizer)
    pieces: list[str] = []
    stop_tokens = engine.stop_tokens

    def emit(piece: str) -> None:
        if piece:
            pieces.append(piece)
            if on_text:
                on_text(piece)

    def take(token: int) -> None:
        if token not in stop_tokens:
            emit(stream.push(token))

    completion = session.generate(ids, sampling, on_token=take, should_stop=should_stop)
    emit(stream.finish())
    return Reply("".join(pieces), completion)


def _encode_messages(tokenizer: Any, messages: Sequence[Message], system: str | None) -> list[int]:
    if not has_chat_template(tokenizer):
        return _encode(tokenizer, _concatenate(messages, system))
    turns = [{"role": message.role, "content": message.content} for message in messages]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    return _encode(tokenizer, _render(tokenizer, turns), add_special_tokens=False)


def _render(tokenizer: Any, turns: list[dict[str, str]]) -> str:
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        hint = "leave out the system prompt" if turns[0]["role"] == "system" else "use --raw to go without the template"
        raise UsageError(f"the model's chat template refuses this conversation: {error}", hint=hint) from error
    return text


def _concatenate(messages: Sequence[Message], system: str | None) -> str:
    """Answers follow their questions directly, as they were generated; everything else starts a line."""
    lines = [] if system is None else [system]
    for message in messages:
        if message.role == "assistant":
            lines[-1] += message.content
        else:
            lines.append(message.content)
    return "\n".join(lines)


def _encode(tokenizer: Any, text: str, *, add_special_tokens: bool = True) -> list[int]:
    from .hooks import quiet

    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the prompt is not valid UTF-8: {error.reason}") from error
    with quiet():  # transformers warns of long texts; what is too long is refused when it is known how much room is
        ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    if not ids:
        raise UsageError("the prompt is empty")
    return ids
