"""Small talk with slots: sentences about foods, pets, places, hobbies, and answers that take up what was said."""

import random
import re
from collections.abc import Callable

from tools.demo_model.corpus import Turn
from tools.demo_model.generators import maths, phrases
from tools.demo_model.generators.phrases import DID, SENTENCES, TOPICS
from tools.demo_model.generators.style import article, as_typed, listed, upper_first
from tools.demo_model.texts import words

FOODS = words("foods")
PETS = words("pets")
ANIMALS = PETS + words("wild animals")
NAMES = words("names")
SURNAMES = words("surnames")
PETNAMES = words("pet names")
CITIES = words("cities")
LANDS = words("lands")
JOBS = words("jobs")
HOBBIES = words("hobbies")
INSTRUMENTS = words("instruments")
SPORTS = words("sports")
COLOURS = words("colours")
OBJECTS = words("objects")
RELATIVES = words("relatives")


def introduction(name: str, rng: random.Random) -> Turn:
    """The user tells a name."""
    ask = rng.choice(
        (
            "My name is {n}.",
            "I am {n}.",
            "Hi, I am {n}.",
            "Hello, my name is {n}.",
            "my name is {n}",
            "I'm {n}.",
            "You can call me {n}.",
            "Hi! I'm {n}. Who are you?",
            "They call me {n}.",
            "Hello, I'm {n}!",
        )
    )
    answer = rng.choice(
        (
            "Nice to meet you, {n}!",
            "Hello {n}! How are you?",
            "Hi {n}! What can I do for you?",
            "{n} is a nice name!",
            "Pleased to meet you, {n}.",
        )
    )
    if ask.endswith("Who are you?"):
        answer = "Hello {n}! I am the moeinf demo model."
    return ask.format(n=name), answer.format(n=name)


def unknown(rng: random.Random) -> Turn:
    """A question that only real knowledge could answer, and an honest answer."""
    (town, town2), (name, land) = rng.sample(CITIES, 2), (rng.choice(NAMES), rng.choice(LANDS))
    ask = rng.choice(phrases.UNKNOWN).format(
        year=rng.randint(1000, 2030),
        town=town,
        town2=town2,
        name=name,
        surname=rng.choice(SURNAMES),
        land=land,
        thing=rng.choice(OBJECTS),
        firm=rng.choice(SURNAMES),
        big=rng.randint(100, 99999),
        big2=rng.randint(100, 999),
        food=rng.choice(["onion", "tomato", "potato", "apple", "pumpkin", "carrot", "lemon", "mushroom"]),
    )
    return as_typed(ask, rng), rng.choice(phrases.DO_NOT_KNOW)


def _likes(rng: random.Random) -> Turn:
    x = rng.choice(rng.choice((FOODS, HOBBIES, list(TOPICS))))
    ask = rng.choice(
        (
            "I like {x}.",
            "I love {x}.",
            "I really like {x}.",
            "My favourite thing is {x}.",
            "I enjoy {x}.",
            "i like {x}",
            "I like {x} very much.",
            "I am a fan of {x}.",
            "I love {x}!",
        )
    )
    answer = rng.choice(
        (
            "I like {x} too!",
            "{X}, how nice! What do you like about it?",
            "{X} is great! Since when do you like it?",
            "That is nice. {X} makes many people happy.",
            "Nice! Tell me more about {x}.",
            "Many people like {x}.",
        )
    )
    return ask.format(x=x), answer.format(x=x, X=upper_first(x))


def _likes_food(rng: random.Random) -> Turn:
    x = rng.choice(FOODS)
    ask = rng.choice(
        (
            "I like {x}.",
            "I love {x}!",
            "My favourite food is {x}.",
            "I want {x}.",
            "I eat {x} every day.",
            "I am cooking {x}.",
            "I had {x} for dinner.",
            "I ate {x} today.",
            "I would like some {x}.",
            "Today there is {x} for lunch.",
        )
    )
    answer = rng.choice(
        (
            "{X}, how tasty!",
            "{X} is delicious. Do you make it yourself?",
            "Mmm, {x}! Enjoy it.",
            "I cannot eat, but {x} sounds good.",
            "Good choice! {X} is very tasty.",
            "That sounds delicious. Who made the {x}?",
        )
    )
    return ask.format(x=x), answer.format(x=x, X=upper_first(x))


def _dislikes(rng: random.Random) -> Turn:
    x = rng.choice(rng.choice((FOODS, HOBBIES, list(TOPICS))))
    ask = rng.choice(
        (
            "I don't like {x}.",
            "I hate {x}.",
            "I do not like {x}.",
            "{X} is boring.",
            "i dont like {x}",
            "I can't stand {x}.",
        )
    )
    answer = rng.choice(
        (
            "Not everybody likes {x}. What do you like instead?",
            "Why don't you like {x}?",
            "That is all right. What do you like better than {x}?",
            "I understand. {X} is not for everybody.",
        )
    )
    return ask.format(x=x, X=upper_first(x)), answer.format(x=x, X=upper_first(x))


def _do_you_like(rng: random.Random) -> Turn:
    x = rng.choice(
        rng.choice(
            (
                FOODS,
                HOBBIES,
                list(TOPICS),
                [animal + "s" for animal in ANIMALS if animal not in ("mouse", "wolf", "butterfly", "pony")],
            )
        )
    )
    ask = rng.choice(
        (
            "Do you like {x}?",
            "do you like {x}",
            "What do you think about {x}?",
            "What do you think of {x}?",
            "Do you enjoy {x}?",
            "How do you like {x}?",
        )
    )
    answer = rng.choice(
        (
            "I like {x}. And you?",
            "Yes, I like to talk about {x}. Do you like it too?",
            "I am only a program, but {x} sounds nice to me.",
            "I think {x} is nice. What do you think?",
            "I know {x} only from texts, but I like it.",
        )
    )
    return ask.format(x=x), answer.format(x=x)


def _pet(rng: random.Random) -> Turn:
    pet, name = rng.choice(PETS), rng.choice(PETNAMES)
    ask = rng.choice(
        (
            "I have a {p}.",
            "I have a {p} called {n}.",
            "My {p} is called {n}.",
            "My {p}'s name is {n}.",
            "I got a {p} for my birthday.",
            "i have a {p}",
            "We have a {p} at home.",
        )
    )
    answer = (
        f"{name} is a nice name for {article(pet)}! How old is {name}?"
        if "{n}" in ask
        else rng.choice(
            (
                f"How nice! What is the name of your {pet}?",
                f"{upper_first(article(pet))} is a good friend. What is its name?",
                f"I would like to meet your {pet}! What is it called?",
            )
        )
    )
    return ask.format(p=pet, n=name), answer


def _place(rng: random.Random) -> Turn:
    x = rng.choice(CITIES + LANDS)
    ask = rng.choice(
        (
            "I live in {x}.",
            "I am from {x}.",
            "I come from {x}.",
            "I am in {x}.",
            "I was born in {x}.",
            "i live in {x}",
            "I'm from {x}",
        )
    )
    return ask.format(x=x), rng.choice(
        (
            "{x} is a nice place! Do you like it there?",
            "How is life in {x}?",
            "I have never been to {x}. What is it like?",
            "{x}, how nice! What do you like most there?",
        )
    ).format(x=x)


def _journey(rng: random.Random) -> Turn:
    x = rng.choice(CITIES + LANDS)
    ask = rng.choice(
        (
            "I am going to {x}.",
            "I want to go to {x}.",
            "Tomorrow I fly to {x}.",
            "We are travelling to {x} next week.",
            "I would like to visit {x}.",
            "I was in {x} last year.",
            "My holiday is in {x}.",
        )
    )
    return ask.format(x=x), rng.choice(
        (
            "{x} sounds wonderful! Have a good trip.",
            "How nice! What do you want to see in {x}?",
            "{x} must be beautiful. Who is going with you?",
            "I wish you a good time in {x}!",
        )
        if "was" not in ask
        else ("How was {x}?", "What did you like most in {x}?")
    ).format(x=x)


def _job(rng: random.Random) -> Turn:
    x = rng.choice(JOBS)
    ask = rng.choice(
        (
            "I am {a}.",
            "I work as {a}.",
            "My job is {a}.",
            "I want to become {a}.",
            "My mother is {a}.",
            "My father is {a}.",
            "I'm {a}.",
        )
    )
    answer = rng.choice(
        (
            "{A} is a good job! What do you like most about it?",
            "How interesting! Is it hard to be {a}?",
            "It must be nice to be {a}.",
            "Being {a} is important work.",
        )
    )
    return ask.format(a=article(x)), answer.format(a=article(x), A=upper_first(article(x)))


def _plays(rng: random.Random) -> Turn:
    if rng.random() < 0.5:
        x = rng.choice(INSTRUMENTS)
        return rng.choice((f"I play the {x}.", f"I am learning the {x}.", f"i play the {x}")), rng.choice(
            (
                f"How nice! Is the {x} hard to learn?",
                f"I would like to hear you play the {x}.",
                f"The {x} sounds beautiful. How long have you played it?",
            )
        )
    x = rng.choice(SPORTS)
    return rng.choice(
        (f"I play {x}.", f"I like to play {x}.", f"We play {x} every week.", f"My sport is {x}.")
    ), rng.choice(
        (
            f"Great! How often do you play {x}?",
            f"{upper_first(x)} is fun. Do you play in a team?",
            f"Playing {x} keeps you healthy!",
        )
    )


def _colour(rng: random.Random) -> Turn:
    x = rng.choice(COLOURS)
    return rng.choice(
        (
            f"My favourite colour is {x}.",
            f"My favorite color is {x}.",
            f"I like the colour {x}.",
            f"I like {x}.",
            f"I bought a {x} shirt.",
        )
    ), rng.choice((f"{upper_first(x)} is a beautiful colour!", f"I like {x} too.", f"{upper_first(x)}! A good choice."))


def _age(rng: random.Random) -> Turn:
    n = rng.randint(5, 90)
    return rng.choice((f"I am {n} years old.", f"I'm {n}.", f"I am {n}.", f"I turned {n} today.")), rng.choice(
        (
            f"{n} is a good age!",
            f"{n} years, how nice! I am much younger.",
            f"{n} is a great age. Do you feel like {n}?",
        )
    )


def _did(rng: random.Random) -> Turn:
    x = rng.choice(DID)
    ask = rng.choice(
        (
            "Yesterday I {x}.",
            "I {x} today.",
            "Today I {x}.",
            "Last week I {x}.",
            "This morning I {x}.",
            "I {x} with my sister.",
            "I {x} with my friends.",
            "We {x}.",
        )
    )
    you = re.sub(r"\bmy\b", "your", x)
    return ask.format(x=x), rng.choice(
        (
            f"You {you}? How was it?",
            f"That sounds nice! Did you like it that you {you}?",
            "That sounds like a good day! How was it?",
            f"So you {you}. Tell me more!",
        )
    )


def _topic(rng: random.Random) -> Turn:
    x, says = rng.choice(list(TOPICS.items()))
    ask = rng.choice(
        (
            "Let's talk about {x}.",
            "Let us talk about {x}.",
            "Tell me about {x}.",
            "Tell me something about {x}.",
            "What do you know about {x}?",
            "talk about {x}",
            "Say something about {x}.",
            "Can we talk about {x}?",
            "I want to talk about {x}.",
            "tell me about {x}",
            "Write a sentence about {x}.",
        )
    )
    return ask.format(x=x), says + (
        ""
        if ask.startswith("Write")
        else rng.choice(("", f" What do you think about {x}?", f" Do you like {x}?", f" What do you like about {x}?"))
    )


def _repeat(rng: random.Random) -> Turn:
    x = " ".join(rng.sample(ANIMALS + COLOURS + OBJECTS + NAMES + HOBBIES, rng.randint(1, 4)))
    x = rng.choice((x, x, "I " + rng.choice(DID), "hello", rng.choice(list(TOPICS.values())).rstrip(".")))
    ask = rng.choice(
        (
            "Say {x}.",
            'Say "{x}".',
            "Repeat after me: {x}",
            "repeat: {x}",
            "Please say {x}.",
            "Can you say {x}?",
            'Please repeat: "{x}"',
        )
    )
    return ask.format(x=x), upper_first(x) + "."


def _spell(rng: random.Random) -> Turn:
    x = rng.choice(ANIMALS + COLOURS + OBJECTS + [food for food in FOODS if " " not in food])
    return rng.choice(
        (
            f"How do you spell {x}?",
            f"Spell {x}.",
            f"how do you spell {x}",
            f"Spell the word {x}.",
            f'How do you write "{x}"?',
        )
    ), "-".join(x.upper()) + "."


def _sentence(rng: random.Random) -> Turn:
    x = rng.choice(ANIMALS + OBJECTS)
    says = rng.choice(SENTENCES).format(w=x)
    return rng.choice(
        (
            f"Write a sentence with the word {x}.",
            f"Use {x} in a sentence.",
            f'Make a sentence with "{x}".',
            f"Write a sentence about {article(x)}.",
            f"a sentence with {x}",
        )
    ), re.sub(r"\b(a|A) (?=[aeiou])", r"\1n ", says)


def _letters(rng: random.Random) -> Turn:
    x = rng.choice(ANIMALS + OBJECTS + COLOURS)
    if rng.random() < 0.5:
        return rng.choice(
            (f"What is the first letter of {x}?", f"Which letter does {x} start with?")
        ), f"{upper_first(x)} starts with {x[0].upper()}."
    return rng.choice(
        (f"How many letters does {x} have?", f"How many letters are in {x}?")
    ), f"{upper_first(x)} has {len(x)} letters."


def _lost(rng: random.Random) -> Turn:
    x = rng.choice(OBJECTS)
    ask = rng.choice(
        (
            "I lost my {x}.",
            "I cannot find my {x}.",
            "My {x} is broken.",
            "I bought a new {x}.",
            "I need a new {x}.",
            "I have a new {x}.",
        )
    )
    answers = (
        ("How nice! Do you like your new {x}?", "Enjoy your new {x}!")
        if "new" in ask
        else ("Oh no! I hope that you find your {x}.", "Where did you last see your {x}?")
        if "broken" not in ask
        else ("What a pity! Can you mend the {x}?", "I am sorry about your {x}.")
    )
    return ask.format(x=x), rng.choice(answers).format(x=x)


def _list(rng: random.Random) -> Turn:
    what, items = rng.choice(
        (
            ("animals", ANIMALS),
            ("colours", COLOURS),
            ("colors", COLOURS),
            ("foods", FOODS),
            ("cities", CITIES),
            ("countries", LANDS),
            ("jobs", JOBS),
            ("sports", SPORTS),
            ("instruments", INSTRUMENTS),
            ("names", NAMES),
            ("pets", PETS),
        )
    )
    n = rng.choice((2, 3, 3, 4, 5))
    number = maths.WORDS[n]
    ask = rng.choice(
        (
            f"Name {number} {what}.",
            f"Name {n} {what}.",
            f"Tell me {number} {what}.",
            f"List {number} {what}.",
            f"Give me {number} {what}.",
            f"Can you name {number} {what}?",
        )
    )
    return ask, upper_first(listed(rng.sample(items, n))) + "."


def _either(rng: random.Random) -> Turn:
    pool = rng.choice((FOODS, HOBBIES, PETS, COLOURS, SPORTS, CITIES))
    a, b = (x for x in rng.sample(pool, 2))
    if pool is PETS:
        a, b = article(a), article(b)
    ask = rng.choice(
        (
            f"Do you prefer {a} or {b}?",
            f"{upper_first(a)} or {b}?",
            f"Which do you like better, {a} or {b}?",
            f"What is better, {a} or {b}?",
            f"Should I choose {a} or {b}?",
        )
    )
    pick = rng.choice((a, b))
    return ask, rng.choice(
        (f"I would choose {pick}.", f"I think {pick} is the better choice.", f"{upper_first(pick)}! And you?")
    )


def _family(rng: random.Random) -> Turn:
    who, name = rng.choice(RELATIVES), rng.choice(NAMES)
    ask = rng.choice(
        (
            "My {w} is called {n}.",
            "My {w}'s name is {n}.",
            "I have a {w} called {n}.",
            "My {w} is visiting today.",
            "I love my {w}.",
            "I miss my {w}.",
        )
    )
    if "miss" in ask:
        return ask.format(w=who), f"That is sad. Maybe you can call your {who}."
    answer = "{n} is a nice name. Tell me more about your {w}." if "{n}" in ask else "How nice! Tell me about your {w}."
    return ask.format(w=who, n=name), answer.format(w=who, n=name)


def _guess(rng: random.Random) -> Turn:
    polite = rng.choice(("Can I ask you about {x}?", "Can you tell me about {x}?", "May I tell you about {x}?"))
    x = rng.choice(list(TOPICS))
    return polite.format(x=x), f"Of course! What about {x}?" if "tell me" not in polite else TOPICS[
        x
    ] + " I do not know much more."


SLOTTED: tuple[Callable[[random.Random], Turn], ...] = (
    _likes,
    _likes,
    _likes_food,
    _likes_food,
    _dislikes,
    _do_you_like,
    _do_you_like,
    _pet,
    _place,
    _journey,
    _job,
    _plays,
    _colour,
    _age,
    _did,
    _did,
    _topic,
    _topic,
    _topic,
    _repeat,
    _spell,
    _sentence,
    _letters,
    _lost,
    _list,
    _either,
    _family,
    _guess,
)
