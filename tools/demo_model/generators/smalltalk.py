"""Small talk and persona: conversations of intents, sentences with slots, facts, sums and requests."""

import random
import re
from collections.abc import Iterator

from tools.demo_model.corpus import Splits, Turn, conversation
from tools.demo_model.generators import facts, maths, phrases, snippets
from tools.demo_model.generators.replies import reply_to
from tools.demo_model.generators.slotted import NAMES, SLOTTED, introduction, unknown
from tools.demo_model.generators.style import as_typed, upper_first

DOCUMENTS = 40_000


def generate(seed: int) -> Splits:
    """Conversations of one to nine turns; validation is conversations not trained on."""
    rng = random.Random(seed)
    intents = list(_intents())
    pool = facts.everyday_turns(rng) + [
        turn for country in facts.our_countries() for turn in facts.capital_turns(country, rng)[:12]
    ]
    documents = list(dict.fromkeys(conversation(_talk(intents, pool, rng)) for _ in range(DOCUMENTS)))
    return Splits(train=documents[1200:], val=documents[:700], calib=documents[700:1200])


def _intents() -> Iterator[tuple[list[str], list[str]]]:
    for line in phrases.INTENTS:
        asks, _, answers = line.partition(" => ")
        yield asks.split("|"), answers.replace("\\n", "\n").split("|")


def _talk(intents: list[tuple[list[str], list[str]]], pool: list[Turn], rng: random.Random) -> Iterator[Turn]:
    greeting, farewell = intents[0], intents[5]
    length = rng.choice((1, 1, 1, 2, 2, 3, 4, 5, 6))
    if length > 1 and rng.random() < 0.4:
        hello = _intent_turn(greeting, rng)
        yield hello
        reply = reply_to(hello[1], rng) if rng.random() < 0.6 else None
        if reply is not None:
            yield reply
    name = rng.choice(NAMES)
    introduced = rng.random() < 0.15
    if introduced:
        yield introduction(name, rng)
    for _ in range(length):
        turn = _one_turn(intents, pool, rng)
        yield turn
        for _ in range(2):
            reply = reply_to(turn[1], rng) if rng.random() < 0.6 else None
            if reply is None:
                break
            turn = (as_typed(reply[0], rng, 0.75), reply[1])
            yield turn
    if introduced:
        yield (
            as_typed(
                rng.choice(
                    (
                        "What is my name?",
                        "Do you know my name?",
                        "what's my name?",
                        "Who am I?",
                        "Do you remember my name?",
                    )
                ),
                rng,
            ),
            rng.choice((f"Your name is {name}.", f"You are {name}.")),
        )
    if length > 2 and rng.random() < 0.3:
        yield _intent_turn(farewell, rng)


def _one_turn(intents: list[tuple[list[str], list[str]]], pool: list[Turn], rng: random.Random) -> Turn:
    kind = rng.random()
    if kind < 0.4:
        return _intent_turn(_likely(intents, rng), rng)
    if kind < 0.62:
        ask, answer = rng.choice(SLOTTED)(rng)
        return as_typed(ask, rng), answer
    if kind < 0.73:
        return as_typed(rng.choice(phrases.NAME_ASKS), rng), rng.choice(phrases.PERSONA)
    if kind < 0.77:
        return as_typed(rng.choice(phrases.JOKE_ASKS), rng), rng.choice(phrases.JOKES)
    if kind < 0.78:
        return as_typed(rng.choice(phrases.RIDDLE_ASKS), rng), rng.choice(phrases.RIDDLES)
    if kind < 0.81:
        return unknown(rng)
    if kind < 0.84:
        return _function(rng)
    if kind < 0.85:
        return as_typed(rng.choice(phrases.QUOTE_ASKS), rng), rng.choice(phrases.QUOTES)
    if kind < 0.89:
        return maths.turn(rng)
    ask, answer = rng.choice(pool)
    return as_typed(ask, rng), answer


def _likely(intents: list[tuple[list[str], list[str]]], rng: random.Random) -> tuple[list[str], list[str]]:
    """The first intents are what nearly everybody tries."""
    return rng.choice(intents[:22]) if rng.random() < 0.3 else rng.choice(intents)


def _intent_turn(intent: tuple[list[str], list[str]], rng: random.Random) -> Turn:
    asks, answers = intent
    ask = rng.choice(asks)
    if rng.random() < 0.65:
        ask = upper_first(ask)
        ask += "" if ask[-1] in ".!?)" or rng.random() < 0.35 else rng.choice(".!") if rng.random() < 0.9 else "..."
    return as_typed(ask, rng, 0.8), rng.choice(answers)


def _function(rng: random.Random) -> Turn:
    does, name, code = rng.choice(_FUNCTIONS)
    return as_typed(rng.choice(snippets.FUNCTION_ASKS).format(does=does, name=name), rng, 0.85), code


_FUNCTIONS = [
    (match[1], match[2], match[3].strip())
    for match in re.finditer(r"(?ms)^([a-zA-Z ]+)\|(\w+)\|(.*?)(?=^[a-zA-Z ]+\|\w+\||\Z)", snippets.FUNCTIONS)
]
