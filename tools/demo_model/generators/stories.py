"""Short stories by a grammar: a hero, an obstacle, an outcome, talk, and one name for each thing throughout."""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tools.demo_model.corpus import Splits, Turn, conversation
from tools.demo_model.generators.plots import OPENING, PLOTS, Beats
from tools.demo_model.generators.style import article, as_typed, upper_first
from tools.demo_model.texts import words

DOCUMENTS = 13_500
ANIMALS = words("story animals")
PEOPLE: dict[str, str] = dict(item.split("|") for item in words("story people"))
"""Each with its pronoun."""
NAMES = {"he": words("boys"), "she": words("girls"), "it": words("neutral")}
TRAITS = words("traits")
PLACES: dict[str, str] = dict(item.split("|") for item in words("places"))
"""Each with the words for being there."""
THINGS = words("story things")
FOODS = words("story foods")
HIDING = words("hiding")
WEATHER = words("when")
FEARS = words("fears")
PROJECTS = words("projects")
CONTESTS = words("contests")


@dataclass(frozen=True, slots=True)
class Cast:
    """Who and what a story is about."""

    hero: str
    name: str
    he: str
    friend: str
    friend_name: str
    friend_he: str
    place: str
    thing: str
    trait: str

    def slots(self) -> dict[str, str]:
        """Words for the sentences: `he`, `him`, `his` for the hero, `fhe` and so on for the friend."""
        own = {"he": ("him", "his"), "she": ("her", "her"), "it": ("it", "its")}
        him, his = own[self.he]
        fhim, fhis = own[self.friend_he]
        return {
            "hero": self.hero,
            "a_hero": article(f"{self.trait} {self.hero}"),
            "name": self.name,
            "he": self.he,
            "him": him,
            "his": his,
            "He": upper_first(self.he),
            "friend": self.friend,
            "a_friend": article(self.friend),
            "fname": self.friend_name,
            "fhe": self.friend_he,
            "fhim": fhim,
            "fhis": fhis,
            "Fhe": upper_first(self.friend_he),
            "place": self.place,
            "at": PLACES[self.place],
            "thing": self.thing,
            "a_thing": article(self.thing),
            "trait": self.trait,
        }


def generate(seed: int) -> Splits:
    """Requests answered by stories, sometimes with questions about them."""
    rng = random.Random(seed)
    documents = [_document(rng) for _ in range(DOCUMENTS)]
    return Splits(train=documents[500:], val=documents[:300], calib=documents[300:500])


def _document(rng: random.Random) -> str:
    turns: list[Turn] = []
    for _ in range(rng.choice((1, 1, 1, 2))):
        cast = _cast(rng)
        plot = rng.choice(PLOTS)
        request, story = _request(cast, rng, bool(turns)), tell(cast, plot, rng)
        if cast.thing in request and cast.thing not in story:
            carried = rng.choice((" {} always carried {}.", " {} had {}.", " {} never went out without {}."))
            story = story.replace(".", "." + carried.format(cast.name, article(cast.thing)), 1)
        turns.append((as_typed(request, rng, 0.75), story))
        turns += list(_questions(cast, rng))
    if rng.random() < 0.2:
        turns.append(
            (
                rng.choice(("Thank you!", "Nice story!", "I like that.", "That was nice.", "Great!")),
                rng.choice(
                    (
                        "I am glad that you like it!",
                        "Thank you! I like stories too.",
                        "You are welcome! Ask me for another one at any time.",
                    )
                ),
            )
        )
    return conversation(turns)


def _cast(rng: random.Random) -> Cast:
    hero, friend = rng.sample([*ANIMALS, *PEOPLE], 2) if rng.random() < 0.5 else rng.sample(ANIMALS, 2)
    name, he = _named(hero, rng, "")
    friend_name, friend_he = _named(friend, rng, name)
    return Cast(
        hero, name, he, friend, friend_name, friend_he, rng.choice(list(PLACES)), rng.choice(THINGS), rng.choice(TRAITS)
    )


def _named(kind: str, rng: random.Random, taken: str) -> tuple[str, str]:
    he = PEOPLE.get(kind) or rng.choice(("he", "she"))
    return rng.choice([name for name in NAMES[he] if name != taken]), he


def _request(cast: Cast, rng: random.Random, again: bool) -> str:
    hero, friend = article(cast.hero), article(cast.friend)
    about = rng.choice(
        (
            f" about {hero}",
            f" about {hero}",
            f" about {hero} and {friend}",
            f" about {hero} and {friend}",
            f" about {hero} and a {cast.place}"
            if cast.place[0] not in "aeiou"
            else f" about {hero} and an {cast.place}",
            f" about {hero} and {article(cast.thing)}",
            f" with {hero} in it",
            f" about {hero} called {cast.name}",
            f" about a {cast.trait} {cast.hero}"
            if cast.trait[0] not in "aeiou"
            else f" about an {cast.trait} {cast.hero}",
            "",
            "",
            "",
            f" about {hero}, {friend} and {article(cast.thing)}",
        )
    )
    if again:
        return (
            rng.choice(("Another one", "Tell me another story", "One more", "Now a story"))
            + about
            + rng.choice((".", ", please.", "!"))
        )
    start = rng.choice(
        (
            "Tell me a story",
            "Tell me a story",
            "Tell me a story",
            "Can you tell me a story",
            "Tell a story",
            "Write a story",
            "Write a short story",
            "Please tell me a story",
            "I want a story",
            "I would like to hear a story",
            "Do you know a story",
            "Make up a story",
            "Tell me a short story",
            "story",
            "Could you write a story",
            "Give me a story",
        )
    )
    return start + about + ("?" if start.startswith(("Can", "Do", "Could")) else ".")


def _questions(cast: Cast, rng: random.Random) -> Iterator[Turn]:
    if rng.random() < 0.25:
        ask = rng.choice(
            ("What was the {}'s name?", "What was the name of the {}?", "What is the {} called?", "Who was the {}?")
        )
        yield as_typed(ask.format(cast.hero), rng), f"The {cast.hero} was called {cast.name}."
    if rng.random() < 0.12:
        yield (
            as_typed(rng.choice(("Where does {} live?", "Where did {} live?")).format(cast.name), rng),
            f"{cast.name} lived {PLACES[cast.place]}.",
        )
    if rng.random() < 0.12:
        yield (
            as_typed(
                rng.choice(
                    (f"Who helped {cast.name}?", f"Who is {cast.friend_name}?", f"Who was the friend of {cast.name}?")
                ),
                rng,
            ),
            f"{cast.friend_name} was {article(cast.friend)} and the friend of {cast.name}.",
        )


def tell(cast: Cast, plot: Callable[[random.Random], Beats], rng: random.Random) -> str:
    """Write the story: each beat of the plot is a choice of sentences."""
    slots = cast.slots() | {
        "when": rng.choice(WEATHER),
        "hiding": rng.choice(HIDING),
        "fear": rng.choice(FEARS),
        "project": rng.choice(PROJECTS),
        "contest": rng.choice(CONTESTS),
        "food": rng.choice(FOODS),
        "animal": rng.choice([a for a in ANIMALS if a not in (cast.hero, cast.friend)]),
        "days": rng.choice(("two", "three", "four", "five", "seven")),
        "colour": rng.choice(["red", "blue", "green", "yellow", "white", "golden", "silver", "brown"]),
    }
    slots["a_food"], slots["an_animal"], slots["a_contest"], slots["a_project"] = (
        article(slots[key]) for key in ("food", "animal", "contest", "project")
    )
    beats = [OPENING, *plot(rng)]
    text = " ".join(rng.choice(beat).format(**slots) for beat in beats)
    text = text.replace("a old", "an old")
    return re.sub(r"(^|[.!?] |\.\" )(\"?[a-z])", lambda match: match[1] + match[2].upper(), text)
