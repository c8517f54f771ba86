"""Small sums in the words people use; some wordings are held out, so that validation asks in ways not trained on."""

import itertools
import random
from collections.abc import Callable, Mapping

from tools.demo_model.corpus import Splits, Turn, conversation
from tools.demo_model.texts import lines, words

DOCUMENTS = 42_000
ASKS = {sign: lines("asks", f"sum asks {sign}") for sign in "+-*/"}
HELD_OUT_ASKS = {sign: lines("asks", f"held-out sum asks {sign}") for sign in "+-*/"}
WORDS = words("number words")
NAMES = words("maths names")
THINGS = words("maths things")
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a // b,
}


def generate(seed: int) -> Splits:
    """Conversations of one to five questions."""
    rng = random.Random(seed)
    splits = Splits(train=[_conversation(rng, ASKS) for _ in range(DOCUMENTS)])
    splits.train += [conversation([turn]) for turn in every_small_sum(rng)]
    splits.val = [_conversation(rng, HELD_OUT_ASKS) for _ in range(900)]
    splits.calib = [_conversation(rng, HELD_OUT_ASKS) for _ in range(500)]
    return splits


def every_small_sum(rng: random.Random) -> list[Turn]:
    """Every sum, difference and product of one-digit numbers, in twelve wordings each."""
    pairs = list(itertools.product(range(10), repeat=2))
    return [
        sum_turn(sign, max(a, b) if sign == "-" else a, min(a, b) if sign == "-" else b, wording)
        for sign in "+-*"
        for a, b in pairs
        for wording in rng.choices(ASKS[sign], k=12)
    ]


def sum_turn(sign: str, a: int, b: int, wording: str) -> Turn:
    """One question and its answer, e.g. "3 + 4 = 7."."""
    a_word, b_word = (WORDS[n] if n < len(WORDS) else str(n) for n in (a, b))
    question = wording.format(a=a, b=b, a_word=a_word, b_word=b_word, A=a_word.capitalize())
    return question, f"{a} {sign} {b} = {OPERATIONS[sign](a, b)}."


def turn(rng: random.Random, asks: Mapping[str, tuple[str, ...]] = ASKS) -> Turn:
    """A random question: most of them one-digit sums, the rest larger sums, tasks in words, comparisons, sequences."""
    kind = rng.random()
    if kind < 0.85:
        return _sum(rng, asks, one_digit=kind < 0.65)
    return rng.choice((_story, _compare, _sequence, _parity, _half))(rng)


def _conversation(rng: random.Random, asks: Mapping[str, tuple[str, ...]]) -> str:
    return conversation(turn(rng, asks) for _ in range(rng.choice((1, 2, 2, 3, 4, 5))))


def _sum(rng: random.Random, asks: Mapping[str, tuple[str, ...]], one_digit: bool) -> Turn:
    sign = rng.choice("+++--***/" if one_digit else "++--*/")
    if sign == "/":
        b = rng.randint(1, 10)
        a = b * rng.randint(1, 10)
    elif one_digit:
        a, b = rng.randint(0, 9), rng.randint(0, 9)
    elif sign == "*":
        a, b = rng.randint(2, 12), rng.randint(2, 12)
    else:
        a, b = rng.choice(((rng.randint(1, 20), rng.randint(1, 20)), (rng.randint(1, 99), rng.randint(1, 99))))
    if sign == "-" and (not one_digit or rng.random() < 0.8):
        a, b = max(a, b), min(a, b)
    return sum_turn(sign, a, b, rng.choice(asks[sign]))


def _story(rng: random.Random) -> Turn:
    (who, other), what = rng.sample(NAMES, 2), rng.choice(THINGS)
    a, b = rng.randint(2, 12), rng.randint(1, 9)
    if rng.random() < 0.5:
        start = rng.choice(
            (
                f"{who} has {a} {what} and gets {b} more from {other}.",
                f"{who} has {a} {what}. {other} gives {who} {b} more.",
            )
        )
        return f"{start} How many {what} does {who} have now?", f"{a} + {b} = {a + b}. {who} has {a + b} {what}."
    a, b = a + b, b
    start = rng.choice((f"{who} has {a} {what} and gives {b} to {other}.", f"{who} has {a} {what} and loses {b}."))
    return f"{start} How many {what} are left?", f"{a} - {b} = {a - b}. {who} has {a - b} {what} left."


def _compare(rng: random.Random) -> Turn:
    a, b = rng.sample(range(1, 100), 2)
    if rng.random() < 0.5:
        ask = rng.choice(
            (
                "Which is bigger, {} or {}?",
                "What is more, {} or {}?",
                "Which number is larger: {} or {}?",
                "which is greater, {} or {}",
            )
        )
        return ask.format(a, b), f"{max(a, b)} is bigger than {min(a, b)}."
    ask = rng.choice(("Which is smaller, {} or {}?", "What is less, {} or {}?", "which number is smaller: {} or {}?"))
    return ask.format(a, b), f"{min(a, b)} is smaller than {max(a, b)}."


def _sequence(rng: random.Random) -> Turn:
    start, step = rng.randint(1, 20), rng.choice((1, 1, 1, 2, 2, 5, 10))
    if step == 1 and rng.random() < 0.6:
        start = rng.randint(0, 98)
        if rng.random() < 0.6:
            ask = rng.choice(("What comes after {}?", "What number comes after {}?", "which number follows {}?"))
            return ask.format(start), f"After {start} comes {start + 1}."
        ask = rng.choice(("What comes before {}?", "What number comes before {}?"))
        return ask.format(start + 1), f"Before {start + 1} comes {start}."
    row = [start + step * i for i in range(4)]
    shown = ", ".join(map(str, row))
    ask = rng.choice(("What comes next: {}?", "Continue: {}", "Which number comes next? {}"))
    return ask.format(shown), f"The next number is {row[-1] + step}."


def _parity(rng: random.Random) -> Turn:
    n = rng.randint(0, 99)
    kind = "even" if n % 2 == 0 else "odd"
    return rng.choice((f"Is {n} even or odd?", f"Is {n} an even number?", f"is {n} odd or even?")), f"{n} is {kind}."


def _half(rng: random.Random) -> Turn:
    n = rng.randint(1, 50)
    if rng.random() < 0.5:
        return rng.choice((f"What is half of {2 * n}?", f"half of {2 * n}?")), f"Half of {2 * n} is {n}."
    return rng.choice((f"What is double {n}?", f"What is twice {n}?", f"double {n}")), f"Twice {n} is {2 * n}."
