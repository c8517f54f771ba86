"""What someone replies to the model's own questions, and what it says then."""

import random
import re

from tools.demo_model.corpus import Turn
from tools.demo_model.generators import phrases
from tools.demo_model.generators.slotted import ANIMALS, CITIES, COLOURS, FOODS, PETNAMES
from tools.demo_model.generators.style import article, upper_first


def reply_to(said: str, rng: random.Random) -> Turn | None:
    """What someone may reply to the model's own question, and what it says then; nothing where nothing fits."""
    for ends, replies in REPLIES.items():
        if re.search(ends, said):
            asks, answers = rng.choice(replies)
            food, city, colour, name, animal = (
                rng.choice(FOODS),
                rng.choice(CITIES),
                rng.choice(COLOURS),
                rng.choice(PETNAMES),
                rng.choice(ANIMALS),
            )
            slots = {
                "food": food,
                "city": city,
                "colour": colour,
                "name": name,
                "animal": animal,
                "joke": rng.choice(phrases.JOKES),
            }
            slots |= {
                "Food": upper_first(food),
                "Colour": upper_first(colour),
                "an_animal": article(animal),
                "An_animal": upper_first(article(animal)),
            }
            return rng.choice(asks).format(**slots), rng.choice(answers).format(**slots)
    return None


FINE = (
    (
        "I am fine.",
        "Fine, thanks.",
        "I am fine, thank you.",
        "Good, thanks!",
        "Very well.",
        "I'm good.",
        "fine",
        "good",
        "I am doing well.",
        "great",
        "Not bad.",
    ),
    (
        "I am glad to hear that!",
        "That is good to hear.",
        "Nice! What would you like to talk about?",
        "Great! What can I do for you?",
    ),
)
NOT_FINE = (
    ("Not so good.", "I am tired.", "I feel bad today.", "not good", "I am a bit sad.", "Bad."),
    (
        "I am sorry to hear that. What happened?",
        "Oh, I am sorry. I hope that you feel better soon.",
        "I am sorry. Do you want to talk about it?",
    ),
)
REPLIES = {
    r"(How are you( today)?\?|[Hh]ow are you\?|How is it going\?|What about you\?)$": (FINE, FINE, NOT_FINE),
    r"thanks! And you\?$": (FINE, NOT_FINE),
    r"(How was your day|How was yours|How is your day)\?$": (
        (
            ("It was good.", "Good, thanks.", "It was fine.", "Very nice!"),
            ("I am glad to hear that!", "How nice! What did you do?"),
        ),
        (
            ("It was bad.", "Not so good.", "It was long."),
            ("I am sorry to hear that. I hope that tomorrow is better.",),
        ),
    ),
    r"favourite food\?$|What do you like\?$|Which one do you like\?$": (
        (
            (
                ("{Food}.", "I like {food}.", "{food}", "My favourite food is {food}."),
                ("{Food}, how tasty!", "I hear that {food} is delicious.", "Good choice! Many people like {food}."),
            )
        ),
    ),
    r"What did you eat today\?$": (
        (
            ("{Food}.", "I ate {food}.", "{food}", "Just {food}."),
            ("{Food}, that sounds tasty!", "I hope that the {food} was good."),
        ),
    ),
    r"What is yours\?$|And yours\?$": (
        (
            ("{Colour}.", "{colour}", "I like {colour}.", "My favourite is {colour}."),
            ("{Colour} is a beautiful colour!", "{Colour}! A good choice."),
        ),
    ),
    r"Do you have a pet\?$": (
        (
            ("Yes, I have {an_animal}.", "Yes, {an_animal}.", "I have {an_animal}."),
            ("How nice! What is the name of your {animal}?", "{An_animal} is a good friend. What is its name?"),
        ),
        (("No.", "No, I don't.", "no"), ("That is fine. Would you like to have one?", "Maybe one day!")),
    ),
    r"(What is its name\?|What is it called\?|What is the name of your \w+\?)$": (
        (
            ("{name}.", "{name}", "Its name is {name}.", "It is called {name}."),
            ("{name} is a beautiful name!", "{name}, what a nice name!"),
        ),
    ),
    r"Which one do you like best\?$": (
        (
            ("I like {animal}s.", "The {animal}.", "{an_animal}", "My favourite animal is the {animal}."),
            ("The {animal} is a nice animal. Why do you like it?", "Good choice! I like the {animal} too."),
        ),
    ),
    r"Where would you like to (go|travel)\?$": (
        (
            ("{city}.", "To {city}.", "I would like to go to {city}.", "{city}"),
            ("{city} must be beautiful!", "How nice! What would you do in {city}?"),
        ),
    ),
    r"(another joke|hear one|ask for one)": (
        (("Yes.", "Yes, please!", "yes", "Sure.", "ok", "Yes, tell me one."), ("{joke}",)),
    ),
    r"a story or a joke\?$": ((("A joke.", "a joke", "A joke, please.", "Joke!"), ("{joke}",)),),
    r"capital of Spain\?$": (
        (("Madrid", "Madrid.", "It is Madrid."), ("Right! Well done.", "Yes, that is right!")),
        (("Barcelona", "Paris", "I don't know", "London"), ("Not quite. It is Madrid.",)),
    ),
    r"animal that barks": (
        (("A dog.", "dog", "a dog", "It is a dog!"), ("Right, it is a dog!", "Yes! Well done.")),
        (("A cat.", "a cow", "I don't know"), ("No, it is a dog. Only dogs bark.",)),
    ),
    r"What is your name\?$": (
        (
            ("Anna", "I am {name}.", "My name is {name}.", "{name}"),
            ("Nice to meet you!", "That is a nice name. Nice to meet you!"),
        ),
    ),
    r"Is there cake\?$": (
        (("Yes!", "Yes, a big one.", "yes"), ("How tasty! Enjoy it.",)),
        (("No.", "no"), ("What a pity! I hope that you have a nice day all the same.",)),
    ),
    r"Did you sleep well\?$": (
        (("Yes, very well.", "Yes.", "yes, thanks"), ("That is good. Have a nice day!",)),
        (("No, not really.", "No.", "no"), ("I am sorry. Maybe you can rest a little later.",)),
    ),
    r"What makes you happy\?$": (
        (
            ("My friends.", "Music.", "{Food}.", "Good books.", "My family.", "The sun."),
            ("That is a good thing to be happy about.", "How nice!"),
        ),
    ),
}
