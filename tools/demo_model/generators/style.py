"""How people type: case, punctuation, politeness and slips of the finger."""

import random
import re
from collections.abc import Sequence

NEIGHBOUR_KEYS = dict(zip("qwertyuiopasdfghjklzxcvbnm", "wertyuiopqsdfghjklaxcvbnmz", strict=True))
OPENINGS = (
    "Please tell me: ",
    "Hey, ",
    "Hi, ",
    "Hello, ",
    "OK, ",
    "Quick question: ",
    "Now tell me, ",
    "So, ",
    "And ",
    "Sorry, ",
    "Well, ",
    "Can you tell me: ",
)
CLOSINGS = (" Please.", " please", ", please?", " Thanks.", " Thank you!")


def as_typed(text: str, rng: random.Random, plain: float = 0.6) -> str:
    """A question as someone might type it; unchanged with probability `plain`."""
    if rng.random() < plain:
        return text
    kind = rng.random()
    if kind < 0.3:
        return text[:1].lower() + text[1:].rstrip(".?!")
    if kind < 0.45:
        return text.lower()
    if kind < 0.6:
        return text.rstrip(".?!")
    if kind < 0.72:
        opening = rng.choice(OPENINGS)
        return opening + (text if opening.endswith(": ") else lower_first(text))
    if kind < 0.8:
        return (
            text.rstrip(".") + rng.choice(CLOSINGS)
            if text.endswith("?")
            else text.rstrip("!.") + rng.choice((", please.", " please"))
        )
    if kind < 0.84:
        return text.upper()
    if kind < 0.88:
        return text + rng.choice(("!", "??", "!!", " :)"))
    return with_typo(text, rng)


def lower_first(text: str) -> str:
    """Lower the first letter unless it belongs to "I" or a name in capitals."""
    return text if re.match(r"I\b|[A-Z]{2}", text) else text[:1].lower() + text[1:]


def upper_first(text: str) -> str:
    """Raise the first letter."""
    return text[:1].upper() + text[1:]


def with_typo(text: str, rng: random.Random) -> str:
    """Swap, drop, double or mistype one letter."""
    places = [i for i in range(1, len(text) - 1) if text[i].isalpha() and text[i + 1].isalpha()]
    if not places:
        return text
    i = rng.choice(places)
    wrong = (
        text[i + 1] + text[i],
        text[i + 1],
        text[i] + text[i] + text[i + 1],
        NEIGHBOUR_KEYS.get(text[i], text[i]) + text[i + 1],
    )
    return text[:i] + rng.choice(wrong) + text[i + 2 :]


def article(noun: str) -> str:
    """The noun with "a" or "an"."""
    return f"an {noun}" if noun[0] in "aeiou" and not noun.startswith(("uni", "use", "one")) else f"a {noun}"


def listed(items: Sequence[str]) -> str:
    """Items as "a, b and c"."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
