"""The domains of the corpus: which are real text, and how the training mixture weighs them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Domain:
    """One kind of text. `is_real` is false where our own generators wrote it."""

    name: str
    weight: float
    is_real: bool


DOMAINS = (
    Domain("smalltalk", 11, False),
    Domain("facts", 10, False),
    Domain("maths", 8, False),
    Domain("stories", 4, False),
    Domain("chat", 8, True),
    Domain("definitions", 7, True),
    Domain("bible", 5.5, True),
    Domain("shakespeare", 6.5, True),
    Domain("austen", 7, True),
    Domain("python", 8, True),
    Domain("cpp", 5, True),
    Domain("tech_en", 5, True),
    Domain("german", 5, True),
    Domain("french", 5, True),
    Domain("spanish", 4.5, True),
)

NAMES = tuple(domain.name for domain in DOMAINS)
REAL = tuple(domain.name for domain in DOMAINS if domain.is_real)
WEIGHTS = {domain.name: domain.weight / sum(d.weight for d in DOMAINS) for domain in DOMAINS}
