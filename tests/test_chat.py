"""Conversations: what the model is given, what is shown while it answers, and what is kept."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli_fakes import CHAT_TEMPLATE, FakeEngine, make_byte_tokenizer, make_piece_tokenizer
from moeinf.chat import Conversation, Message, TextStream, complete, load_chat, save_chat
from moeinf.errors import IntegrityError, UsageError
from moeinf.generation import Sampling

SAMPLING = Sampling()
REFUSES_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT_TEMPLATE
)


def stream(tokenizer: Any, ids: list[int]) -> list[str]:
    text = TextStream(tokenizer)
    return [*(text.push(token) for token in ids), text.finish()]


def pieces_of(tokenizer: Any, *pieces: str) -> list[int]:
    ids = [tokenizer.convert_tokens_to_ids(piece) for piece in pieces]
    assert tokenizer.unk_token_id not in ids
    return ids


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "plain",
        " leading and  double  spaces ",
        "naïve café",
        "你好世界",
        "👩‍👩‍👧 family",
        "e\u0301 combined",
        "a\n\n\tb",
        "\ufffd inside",
    ],
)
def test_streamed_text_is_the_decoded_text(text: str) -> None:
    tokenizer = make_byte_tokenizer()
    ids = tokenizer.encode(text)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == text


def test_no_piece_holds_half_a_character() -> None:
    tokenizer = make_byte_tokenizer()
    assert stream(tokenizer, tokenizer.encode("é€😀!")) == ["", "é", "", "", "€", "", "", "", "😀", "!", ""]


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_character_that_is_never_completed_is_dropped(cut: int) -> None:
    tokenizer = make_byte_tokenizer()
    ids = tokenizer.encode("ok 😀")
    assert "".join(stream(tokenizer, ids[:-cut])) == "ok "


def test_stray_bytes_between_characters_show_as_replacements() -> None:
    tokenizer = make_byte_tokenizer()
    e_acute = tokenizer.encode("é")
    ids = [*tokenizer.encode("a"), e_acute[0], *tokenizer.encode("b")]
    assert "".join(stream(tokenizer, ids)) == "a\ufffdb"


def test_special_tokens_are_not_shown_and_take_no_spaces_with_them() -> None:
    tokenizer = make_piece_tokenizer(["▁Hello", "▁world", "s"])
    ids = pieces_of(tokenizer, "▁Hello", "<user>", "<user>", "▁world", "s", "<end>")
    assert stream(tokenizer, ids) == ["Hello", "", "", " world", "s", "", ""]


@pytest.mark.parametrize(
    "pieces",
    [
        ("▁The", "▁cat", "s", "▁", "▁", "▁cat"),
        ("▁", "▁The", "▁", "s"),
        ("▁", "<end>", "▁The", "<end>", "▁", "▁cat"),
        ("<0xE4>", "<0xBD>", "<0xA0>", "<0xE5>", "<0xA5>", "<0xBD>", "▁cat"),
        ("▁cat", "<0x0A>", "▁cat", "<0xC3>", "<0xA9>", "s"),
    ],
)
def test_spaces_in_front_of_words_are_exact(pieces: tuple[str, ...]) -> None:
    tokenizer = make_piece_tokenizer(["▁The", "▁cat", "s"])
    ids = pieces_of(tokenizer, *pieces)
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_text_that_was_shown_is_not_taken_back_when_stray_bytes_follow() -> None:
    tokenizer = make_piece_tokenizer(["▁cat"])
    ids = pieces_of(tokenizer, "<0xE4>", "<0xBD>", "<0xA0>", "<0xE5>", "▁cat")
    assert "".join(tokenizer.decode(ids)).startswith("\ufffd" * 4)  # what the tokenizer makes of it in the end
    assert stream(tokenizer, ids) == ["", "", "你", "", "\ufffd cat", ""]


def test_a_conversation_is_rendered_with_the_template() -> None:
    engine = FakeEngine(["Fine.", "Really."])
    conversation = Conversation(engine, SAMPLING, system="Be brief.")
    assert conversation.send("How are you?").text == "Fine."
    assert conversation.send("Really?").text == "Really."
    assert engine.prompts == [
        "<system>Be brief.<end><user>How are you?<end><assistant>",
        "<system>Be brief.<end><user>How are you?<end><assistant>Fine.<end><user>Really?<end><assistant>",
    ]
    assert conversation.messages == (
        Message("user", "How are you?"),
        Message("assistant", "Fine."),
        Message("user", "Really?"),
        Message("assistant", "Really."),
    )
    assert engine.sessions == 1  # one KV cache, so that what was said is not computed again


def test_without_a_template_texts_follow_each_other() -> None:
    engine = FakeEngine([" a time", " there was"], tokenizer=make_byte_tokenizer(None))
    conversation = Conversation(engine, SAMPLING, system="A tale.")
    conversation.send("Once upon")
    conversation.send("And then")
    assert engine.prompts == ["A tale.\nOnce upon", "A tale.\nOnce upon a time\nAnd then"]


def test_complete_takes_the_prompt_as_it_is() -> None:
    engine = FakeEngine([" Paris"])
    reply = complete(engine, "The capital of France is", SAMPLING)
    assert (reply.text, engine.prompts) == (" Paris", ["The capital of France is"])


def test_the_stop_token_is_not_shown_even_if_it_is_no_special_one() -> None:
    tokenizer = make_byte_tokenizer()
    tokenizer.eos_token = "!"
    engine = FakeEngine(["Stop"], tokenizer=tokenizer)
    shown: list[str] = []
    reply = Conversation(engine, SAMPLING).send("Go", shown.append)
    assert reply.text == "".join(shown) == "Stop"
    assert reply.completion.tokens[-1] == tokenizer.eos_token_id


def test_an_answer_that_was_stopped_is_kept_as_far_as_it_went() -> None:
    engine = FakeEngine(["0123456789"])
    conversation = Conversation(engine, SAMPLING)
    shown: list[str] = []
    reply = conversation.send("Count", shown.append, lambda: len(shown) == 4)
    assert (reply.text, reply.completion.finish_reason) == ("0123", "interrupted")
    assert conversation.messages[-1] == Message("assistant", "0123")


def test_an_answer_that_never_began_leaves_turns_that_alternate() -> None:
    engine = FakeEngine(["no", "yes"])
    conversation = Conversation(engine, SAMPLING)
    conversation.send("Well?", should_stop=lambda: True)
    conversation.send("Well?")
    assert engine.prompts[-1] == "<user>Well?<end><assistant><end><user>Well?<end><assistant>"


def test_a_failing_answer_leaves_the_conversation_as_it_was() -> None:
    engine = FakeEngine(["one", "two"])
    conversation = Conversation(engine, SAMPLING)
    conversation.send("1")
    before = conversation.messages
    engine.on_step = lambda step: signal.raise_signal(signal.SIGINT) if step == 1 else None
    actions: list[Callable[[], object]] = [lambda: conversation.send("2"), conversation.retry]
    for action in actions:
        with pytest.raises(KeyboardInterrupt):
            action()
        assert conversation.messages == before


def test_retry_replaces_the_last_answer() -> None:
    engine = FakeEngine(["first", "second"])
    conversation = Conversation(engine, SAMPLING)
    with pytest.raises(UsageError, match="no answer to try again"):
        conversation.retry()
    conversation.send("Say")
    conversation.retry()
    assert conversation.messages == (Message("user", "Say"), Message("assistant", "second"))
    assert engine.prompts[0] == engine.prompts[1]


def test_changes_between_messages_take_effect() -> None:
    engine = FakeEngine()
    conversation = Conversation(engine, SAMPLING)
    conversation.send("1")
    conversation.system = "New."
    conversation.sampling = Sampling(temperature=0.5)
    conversation.clear()
    conversation.send("2")
    assert engine.prompts[-1] == "<system>New.<end><user>2<end><assistant>"
    assert engine.samplings == [SAMPLING, Sampling(temperature=0.5)]


def test_a_conversation_longer_than_the_context_is_refused() -> None:
    conversation = Conversation(FakeEngine(context=30), SAMPLING)
    conversation.send("short")
    before = conversation.messages
    with pytest.raises(UsageError, match="context holds 30"):
        conversation.send("a rather long message that does not fit")
    assert conversation.messages == before


def test_a_template_that_refuses_the_system_prompt_is_explained() -> None:
    conversation = Conversation(FakeEngine(tokenizer=make_byte_tokenizer(REFUSES_SYSTEM)), SAMPLING, system="Be nice.")
    with pytest.raises(UsageError, match="no system role") as caught:
        conversation.send("Hi")
    assert caught.value.hint == "leave out the system prompt"
    conversation.system = None
    assert conversation.send("Hi").text == "Hello."


@pytest.mark.parametrize(("prompt", "message"), [("", "prompt is empty"), ("\udcff", "not valid UTF-8")])
def test_prompts_that_cannot_be_encoded_are_refused(prompt: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        complete(FakeEngine(), prompt, SAMPLING)


def test_a_saved_chat_goes_on_where_it_was(tmp_path: Path) -> None:
    conversation = Conversation(FakeEngine(["Grüße."]), SAMPLING, system="German.")
    conversation.send("Hello")
    path = save_chat("berlin", conversation, tmp_path)
    assert path == tmp_path / "chats" / "berlin.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["berlin.json"]
    other = Conversation(FakeEngine(), SAMPLING)
    load_chat("berlin", other, tmp_path)
    assert (other.system, other.messages) == (conversation.system, conversation.messages)


def test_saving_again_replaces_the_file(tmp_path: Path) -> None:
    conversation = Conversation(FakeEngine(), SAMPLING)
    save_chat("x", conversation, tmp_path)
    conversation.send("more")
    path = save_chat("x", conversation, tmp_path)
    assert len(json.loads(path.read_text())["messages"]) == 2


def test_what_cannot_be_saved_or_read_is_explained(tmp_path: Path) -> None:
    (tmp_path / "chats").write_text("a file in the way")
    actions: list[Callable[..., object]] = [save_chat, load_chat]
    for action in actions:
        with pytest.raises(UsageError, match="no access to"):
            action("x", Conversation(FakeEngine(), SAMPLING), tmp_path)


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "x\0", "x" * 300])
def test_names_that_could_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    actions: list[Callable[..., object]] = [save_chat, load_chat]
    for action in actions:
        with pytest.raises(UsageError, match="cannot name a chat"):
            action(name, Conversation(FakeEngine(), SAMPLING), tmp_path)


def test_a_missing_chat_is_told_with_those_that_are_there(tmp_path: Path) -> None:
    conversation = Conversation(FakeEngine(), SAMPLING)
    save_chat("one", conversation, tmp_path)
    save_chat("two", conversation, tmp_path)
    with pytest.raises(UsageError, match="'three'") as caught:
        load_chat("three", conversation, tmp_path)
    assert caught.value.hint == "saved chats: one, two"


@pytest.mark.parametrize(
    "content",
    [
        b"not json",
        b"[" * 100_000,
        b"\xff",
        b"[]",
        b"null",
        b'{"schema": 2, "system": null, "messages": []}',
        b'{"schema": 1, "messages": []}',
        b'{"schema": 1, "system": 3, "messages": []}',
        b'{"schema": 1, "system": null, "messages": 3}',
        b'{"schema": 1, "system": null, "messages": [{"role": "tool", "content": ""}]}',
        b'{"schema": 1, "system": null, "messages": [{"role": "user", "content": 3}]}',
        b'{"schema": 1, "system": null, "messages": [{"role": "user"}]}',
        b'{"schema": 1, "system": null, "messages": ["x"]}',
    ],
    ids=lambda content: content[:60].decode(errors="replace"),
)
def test_a_damaged_chat_changes_nothing(tmp_path: Path, content: bytes) -> None:
    conversation = Conversation(FakeEngine(), SAMPLING, system="kept")
    conversation.send("kept too")
    before = conversation.to_dict()
    save_chat("bad", conversation, tmp_path).write_bytes(content)
    with pytest.raises(IntegrityError, match="no saved chat"):
        load_chat("bad", conversation, tmp_path)
    assert conversation.to_dict() == before
