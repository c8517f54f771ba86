"""Questions and answers about countries (our list and The World Factbook), days, animals, colours, words."""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.demo_model.corpus import Splits, Turn, conversation
from tools.demo_model.generators import knowledge
from tools.demo_model.generators.style import article, as_typed, listed, upper_first
from tools.demo_model.texts import lines

CAPITAL_ASKS = lines("asks", "capital asks")
CAPITAL_ANSWERS = lines("asks", "capital answers")
REVERSE_ASKS = lines("asks", "reverse asks")
CONTINENT_ASKS = lines("asks", "continent asks")
LANGUAGE_ASKS = lines("asks", "language asks")
CURRENCY_ASKS = lines("asks", "currency asks")
ABOUT_ASKS = lines("asks", "about asks")
EVERYDAY_PASSES = 55
ORDINALS = (
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
    "eleventh",
    "twelfth",
)
LANGUAGES = ("German", "French", "Spanish")


@dataclass(frozen=True, slots=True)
class Country:
    """What is asked about a country; empty where it is not known."""

    name: str
    capital: str
    continent: str = ""
    languages: str = ""
    currency: str = ""
    neighbours: tuple[str, ...] = ()


def generate(factbook: Path, seed: int) -> Splits:
    """Conversations of one to four questions; validation asks the same facts in conversations of its own."""
    rng = random.Random(seed)
    known = list(our_countries())
    neighbours = dict(_neighbours(factbook))
    known = [
        Country(c.name, c.capital, c.continent, c.languages, c.currency, neighbours.get(_bare(c.name), ()))
        for c in known
    ]
    names = {_bare(country.name) for country in known}
    others = [country for country in _other_countries(factbook) if _bare(country.name) not in names]
    turns = [turn for country in known for _ in range(10) for turn in capital_turns(country, rng)]
    turns += [turn for country in known for turn in _about(country, rng, 25)]
    turns += [turn for country in others for turn in capital_turns(country, rng) + capital_turns(country, rng)]
    turns += [turn for country in others for turn in _about(country, rng, 4)]
    for _ in range(EVERYDAY_PASSES):
        turns += list(_everyday(rng))
    documents = list(_conversations(turns, rng))
    rng.shuffle(documents)
    return Splits(train=documents[1200:], val=documents[:700], calib=documents[700:1200])


def our_countries() -> Iterator[Country]:
    """The countries most asked about."""
    for line in knowledge.COUNTRIES:
        name, capital, continent, languages, currency = line.split("|")
        yield Country(name, capital, continent, languages, currency)


def capital_questions() -> list[Turn]:
    """The plain question of each of our countries and its capital, for the evaluation."""
    return [(f"What is the capital of {country.name}?", country.capital) for country in our_countries()]


def everyday_turns(rng: random.Random) -> list[Turn]:
    """One pass over the everyday facts, for mixed conversations of other generators."""
    return list(_everyday(rng))


def _conversations(turns: list[Turn], rng: random.Random) -> Iterator[str]:
    rng.shuffle(turns)
    position = 0
    while position < len(turns):
        size = rng.choice((1, 1, 2, 3, 4))
        yield conversation((as_typed(ask, rng), answer) for ask, answer in turns[position : position + size])
        position += size


def capital_turns(country: Country, rng: random.Random) -> list[Turn]:
    """One turn for each wording of the question for a capital, in random order."""
    turns = [
        (
            upper_first(ask.format(c=country.name)) if ask[0].isupper() else ask.format(c=country.name),
            _say_capital(country, rng),
        )
        for ask in CAPITAL_ASKS
    ]
    rng.shuffle(turns)
    return turns


def _say_capital(country: Country, rng: random.Random) -> str:
    return _full_stop(upper_first(rng.choice(CAPITAL_ANSWERS).format(c=country.name, x=country.capital)))


def _about(country: Country, rng: random.Random, times: int) -> Iterator[Turn]:
    name = upper_first(country.name)
    for _ in range(times):
        yield (
            rng.choice(REVERSE_ASKS).format(x=country.capital),
            f"{country.capital} is the capital of {_full_stop(country.name)}",
        )
        if country.continent:
            ask = rng.choice(CONTINENT_ASKS).format(c=country.name, k=country.continent)
            yield upper_first(ask), ("Yes, " if ask.startswith("Is ") else "") + f"{name} is in {country.continent}."
            sentences = [
                f"{name} is a country in {country.continent}.",
                f"Its capital is {_full_stop(country.capital)}",
            ]
            if country.languages:
                sentences.append(f"People there speak {country.languages}.")
            yield rng.choice(ABOUT_ASKS).format(c=country.name), " ".join(sentences)
        if country.languages:
            yield (
                rng.choice(LANGUAGE_ASKS).format(c=country.name),
                f"In {country.name} people speak {country.languages}.",
            )
        if country.currency:
            yield (
                rng.choice(CURRENCY_ASKS).format(c=country.name),
                f"The currency of {country.name} is {country.currency}.",
            )
        if country.neighbours and rng.random() < 0.6:
            ask = rng.choice(
                ("Which countries border {c}?", "What are the neighbours of {c}?", "Who are the neighbors of {c}?")
            )
            yield ask.format(c=country.name), f"{name} borders {listed(country.neighbours)}."


def _full_stop(text: str) -> str:
    return text if text.endswith(".") else text + "."


def _bare(name: str) -> str:
    return name.removeprefix("the ").removeprefix("The ")


def _factbook(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted(folder.glob("package/*/*.json")):
        data = json.loads(path.read_text())
        names = data.get("Government", {}).get("Country name", {})
        short = names.get("conventional short form", {})
        name = re.split(r"[;(]", short.get("text", "") if isinstance(short, dict) else "")[0].strip()
        if name and name.lower() != "none" and "," not in name:
            yield name.replace("The ", "the "), data


def _other_countries(folder: Path) -> Iterator[Country]:
    for name, data in _factbook(folder):
        capital = re.split(r"[;(,]", data["Government"].get("Capital", {}).get("name", {}).get("text", ""))[0].strip()
        if not re.fullmatch(r"[A-Z][A-Za-z' .-]{2,24}", capital):
            continue
        location = data.get("Geography", {}).get("Location", {}).get("text", "")
        continent = next(
            (k for k in ("Africa", "Asia", "Europe", "South America", "North America", "Oceania") if k in location), ""
        )
        languages = data.get("People and Society", {}).get("Languages", {}).get("text", "")
        spoken = re.findall(r"([A-Z][a-z]+) \(official", languages)[:3]
        yield Country(name, capital, continent, listed(spoken) if spoken else "")


def _neighbours(folder: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    for name, data in _factbook(folder):
        text = next(
            (
                v["text"]
                for k, v in data.get("Geography", {}).get("Land boundaries", {}).items()
                if k.startswith("border")
            ),
            "",
        )
        found = re.findall(r"([A-Z][A-Za-z' ]+?) \(?[\d.,]+ km", text)
        if found:
            yield _bare(name), tuple(found[:8])


def _everyday(rng: random.Random) -> Iterator[Turn]:
    for line in knowledge.FACTS:
        ask, _, answer = line.partition("|")
        yield ask, answer
    yield from _definitions(rng)
    yield from _animals(rng)
    yield from _words(rng)
    yield from _calendar(rng)


def _definitions(rng: random.Random) -> Iterator[Turn]:
    for line in knowledge.SIMPLE_DEFINITIONS:
        word, _, meaning = line.partition("|")
        named = article(word) if meaning.startswith(("A ", "An ")) else word
        for _ in range(2):
            ask = rng.choice(
                (
                    f"What is {named}?",
                    f"What is {named}?",
                    f"what is {named}",
                    f"Tell me about {word}s.",
                    f"Explain {word}.",
                    f"Define {word}.",
                    f"What's {named}?",
                    f"Do you know what {named} is?",
                    f"What does {word} mean?",
                )
            )
            if ask.startswith("Tell me") and named == word:
                ask = f"What is {word}?"
            yield ask, meaning


def _animals(rng: random.Random) -> Iterator[Turn]:
    for rest, sound in knowledge.SOUNDS:
        animal, verb = rest.rsplit(" ", 1)
        ask = rng.choice(
            (
                "What does a {} say?",
                "What sound does a {} make?",
                "What noise does a {} make?",
                "How does a {} sound?",
                "what does the {} say",
            )
        )
        yield ask.format(animal), f"{upper_first(article(animal))} {verb}: {sound}!"
    for animal, young in knowledge.YOUNG:
        ask = rng.choice(
            (
                "What is a young {} called?",
                "What do you call a baby {}?",
                "What is a baby {}?",
                "what is a baby {} called",
            )
        )
        yield ask.format(animal), f"A young {animal} is called {article(young)}."
    for animal, home in knowledge.ANIMAL_HOMES:
        place = (
            f"in {article(home)}"
            if home[0].islower() and home not in ("water",)
            else "in " + ("the " if home.startswith(("Arc", "Ant")) else "") + home
        )
        if home in ("savanna", "desert", "jungle"):
            place = f"in the {home}"
        yield (
            rng.choice(("Where does {} live?", "Where do you find {}?", "where does {} live")).format(article(animal)),
            f"{upper_first(article(animal))} lives {place}.",
        )
    for animal, kind in knowledge.ANIMAL_KINDS:
        wrong = rng.choice([k for k in ("mammal", "bird", "fish", "reptile", "insect") if k != kind])
        yes = rng.random() < 0.5
        ask = rng.choice(
            (f"Is {article(animal)} {article(kind if yes else wrong)}?", f"What kind of animal is {article(animal)}?")
        )
        answer = f"{upper_first(article(animal))} is {article(kind)}."
        yield (
            ask,
            ("" if ask.startswith("What") else "Yes, " if yes else "No, ")
            + (answer if ask.startswith("What") else answer[0].lower() + answer[1:]),
        )
    for animal, legs in knowledge.LEGS:
        ask = rng.choice(("How many legs does {} have?", "how many legs does {} have", "How many legs has {}?"))
        yield ask.format(article(animal)), f"{upper_first(article(animal))} has {legs} legs."


def _words(rng: random.Random) -> Iterator[Turn]:
    for one, other in knowledge.OPPOSITES:
        a, b = (one, other) if rng.random() < 0.5 else (other, one)
        ask = rng.choice(
            (
                "What is the opposite of {}?",
                "what is the opposite of {}",
                "Opposite of {}?",
                "What's the opposite of {}?",
                'What is the opposite of "{}"?',
            )
        )
        yield ask.format(a), f"The opposite of {a} is {b}."
    for thing, colour in knowledge.COLOURS:
        named = (
            f"the {thing}"
            if thing in ("sky", "sun", "sea", "night")
            else thing
            if thing in ("grass", "snow", "blood", "milk", "coal", "cocoa", "chocolate")
            else article(thing)
        )
        ask = rng.choice(
            (
                "What color is {}?",
                "What colour is {}?",
                "what color is {}",
                "Which colour does {} have?",
                "What is the color of {}?",
            )
        )
        yield ask.format(named), f"{upper_first(named)} is {colour}."
    yield from translations(rng)


def translations(rng: random.Random) -> Iterator[Turn]:
    """Every word of our list in one language each."""
    for item in knowledge.TRANSLATIONS:
        english, *others = (word.replace("_", " ") for word in item.split(" "))
        number = rng.randrange(3)
        language, foreign = LANGUAGES[number], others[number]
        if rng.random() < 0.2:
            yield f'What does "{foreign}" mean in English?', f'"{foreign}" is {language} and means "{english}".'
            continue
        ask = rng.choice(
            (
                'Translate "{}" to {}.',
                "Translate {} to {}.",
                "How do you say {} in {}?",
                'How do you say "{}" in {}?',
                "What is {} in {}?",
                "what is {} in {}",
                'What is the {1} word for "{0}"?',
                "translate '{}' to {}",
                "Translate '{}' into {}.",
                "{} in {}?",
            )
        )
        yield ask.format(english, language), f'"{upper_first(english)}" in {language} is "{foreign}".'


def _calendar(rng: random.Random) -> Iterator[Turn]:
    for names, what in ((knowledge.DAYS, "day"), ([month for month, _ in knowledge.MONTHS], "month")):
        for i, name in enumerate(names):
            after, before = names[(i + 1) % len(names)], names[i - 1]
            ask = rng.choice(("What comes after {}?", "Which {w} comes after {}?", "What {w} is after {}?"))
            yield ask.format(name, w=what), f"After {name} comes {after}."
            ask = rng.choice(("What comes before {}?", "Which {w} comes before {}?", "What {w} is before {}?"))
            yield ask.format(name, w=what), f"Before {name} comes {before}."
            if what == "day" and rng.random() < 0.5:
                yield f"If today is {name}, what day is tomorrow?", f"If today is {name}, tomorrow is {after}."
    for name, days in knowledge.MONTHS:
        yield (
            f"How many days does {name} have?",
            f"{name} has {days} days" + (", or 29 in a leap year." if days == "28" else "."),
        )
    for ordinal, (name, _) in zip(ORDINALS, knowledge.MONTHS, strict=True):
        yield f"What is the {ordinal} month?", f"The {ordinal} month is {name}."
