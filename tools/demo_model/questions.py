"""What the demo model is asked, and how an answer is judged: capitals, sums, small talk, prompts to go on from.

Judging is by regular expression, without case and accents; it says whether an answer fits, not whether it is good.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass

__all__ = [
    "CAPITAL_WORDINGS",
    "CHAT_PROMPTS",
    "PROSE_PROMPTS",
    "SAMPLES",
    "SMALL_TALK",
    "Question",
    "capital_questions",
    "sum_questions",
]


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and a regular expression that finds something in any fitting answer."""

    text: str
    expected: str

    def is_answered_by(self, answer: str) -> bool:
        """Whether the answer fits."""
        return re.search(self.expected, _plain(answer)) is not None


def _plain(text: str) -> str:
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    return "".join(character for character in decomposed if not unicodedata.combining(character))


_CAPITALS = """
France=paris;Germany=berlin;Italy=rome;Spain=madrid;Portugal=lisbon;the United Kingdom=london;England=london;
Ireland=dublin;Scotland=edinburgh;the Netherlands=amsterdam;Belgium=brussels;Switzerland=bern;Austria=vienna;
Poland=warsaw;the Czech Republic=prague;Hungary=budapest;Greece=athens;Turkey=ankara;Russia=moscow;Ukraine=kyiv|kiev;
Sweden=stockholm;Norway=oslo;Denmark=copenhagen;Finland=helsinki;Iceland=reykjavik;Romania=bucharest;Croatia=zagreb;
the United States=washington;Canada=ottawa;Mexico=mexico city;Cuba=havana;Brazil=brasilia;Argentina=buenos aires;
Chile=santiago;Peru=lima;Colombia=bogota;China=beijing;Japan=tokyo;India=delhi;Pakistan=islamabad;South Korea=seoul;
Vietnam=hanoi;Thailand=bangkok;Indonesia=jakarta;Iran=tehran;Egypt=cairo;Morocco=rabat;Kenya=nairobi;
South Africa=pretoria|cape town;Australia=canberra
"""
"""The fifty countries asked about most (our judgement), each with its capital."""

CAPITAL_WORDINGS = (
    "What is the capital of {}?",
    "what is the capital of {}",
    "Tell me the capital of {}.",
    "Which city is the capital of {}?",
)
"""The first is the one that counts; the others are for information."""


def capital_questions(wording: str) -> list[Question]:
    """The fifty capitals, asked in one wording."""
    pairs = (entry.strip().split("=") for entry in _CAPITALS.split(";"))
    return [Question(wording.format(country), rf"\b({capital})\b") for country, capital in pairs]


_SUMS: dict[str, tuple[tuple[str, ...], Callable[[int, int], int]]] = {
    "+": (("What is {a} + {b}?", "{a}+{b}", "How much is {a} plus {b}?", "Work out {a} plus {b}."), lambda a, b: a + b),
    "-": (
        ("What is {a} - {b}?", "{a}-{b}", "How much is {a} minus {b}?", "Work out {a} minus {b}."),
        lambda a, b: a - b,
    ),
    "*": (
        ("What is {a} * {b}?", "{a}*{b}", "How much is {a} times {b}?", "Work out {a} times {b}."),
        lambda a, b: a * b,
    ),
}
"""Wordings and operation by sign; the last wording of each is one that the training text never has."""


def sum_questions(sign: str) -> Iterator[tuple[str, list[Question]]]:
    """Each wording with all sums of one-digit numbers; differences are never negative."""
    wordings, operation = _SUMS[sign]
    pairs = [(a, b) for a, b in itertools.product(range(10), repeat=2) if sign != "-" or a >= b]
    for wording in wordings:
        yield (
            wording,
            [Question(wording.format(a=a, b=b), rf"^\D*(\d+\D+\d+\D+)?{operation(a, b)}\b(?!.*\d)") for a, b in pairs],
        )


SMALL_TALK = (
    Question("Hello!", r"\b(hello|hi|hey|nice to (meet|see))\b"),
    Question("Good morning", r"\bmorning\b"),
    Question("How are you?", r"\b(fine|well|good|great|thank)"),
    Question("What is your name?", r"moeinf|demo"),
    Question("Who are you?", r"moeinf|demo|model"),
    Question("What can you do?", r"\b(chat|stor(y|ies)|jokes?|sums?|capitals?|talk)\b"),
    Question("Who made you?", r"moeinf|trained|project"),
    Question("Are you a robot?", r"\b(program|model|robot|computer)\b"),
    Question("How big are you?", r"parameters|small|tiny|million"),
    Question("Tell me a joke.", r"\?|because|\bwhat\b|\bwhy\b|\bwalks?\b"),
    Question("Tell me a story about a dog.", r"\bdogs?\b|\bpuppy\b"),
    Question("Write a short story about a cat and a bird.", r"\bcat\b.*\bbird\b|\bbird\b.*\bcat\b"),
    Question("Thank you very much!", r"welcome|pleasure|no problem|glad"),
    Question("I am sad.", r"sorry|sad|hug|better|happen|cheer|help|wrong"),
    Question("I am so happy today!", r"glad|happy|great|wonderful|nice|good"),
    Question("I have a dog. His name is Max.", r"\b(dog|max|pet|he|him|his|nice|cute)\b"),
    Question("I like pizza.", r"pizza|taste|eat|food|like|good"),
    Question("What is a dog?", r"animal|pet|mammal|barks?"),
    Question("What is the opposite of hot?", r"\bcold\b"),
    Question("Do you like music?", r"music|song|sing|listen|hear"),
    Question("What time is it?", r"clock|time|watch|know"),
    Question("Goodbye!", r"\b(goodbye|bye|see you|take care)\b"),
)
"""Openings that people try first."""

CHAT_PROMPTS = (
    "Hello, who are you?",
    "Tell me a story.",
    "Tell me a story about a fox who wanted to fly.",
    "Tell me a long story about a little girl and a dragon.",
    "Write a story about a boy who finds a key.",
    "What is the capital of France? And of Spain?",
    "Tell me about Germany.",
    "Explain what a volcano is.",
    "What is a computer?",
    "What is love?",
    "Why is the sky blue?",
    "How do I bake a cake?",
    "Write a Python function that adds two numbers.",
    "Write a Python function called merge_sorted.",
    "Quote Shakespeare.",
    "Quote the Bible.",
    "Write like Jane Austen.",
    "Count to ten.",
    "What are the months of the year?",
    "Write a poem about the sea.",
    "Do you think that machines will ever be clever?",
    "My favourite film is about a robot. What is yours?",
    "What should I cook tonight?",
    "Say something in German.",
    "What is 12 times 12?",
)
"""Half of the prompts on which loops are counted, asked in the chat template."""

PROSE_PROMPTS = (
    "Once upon a time there was a",
    "It was a dark and windy night, and the old man",
    "The train had left the station when she remembered",
    "In the beginning",
    "And the king said unto his servants,",
    "Blessed is the man",
    "KING. What news, my lord?\n",
    "Enter two GENTLEMEN\n\n  FIRST GENTLEMAN. ",
    "Shall we not go to dinner, sir?",
    "Mr. Harding was a gentleman of good fortune, and",
    "The ladies walked together towards the park;",
    "It is seldom that a young woman",
    "def read_lines(path):\n",
    "class Stack:\n    def __init__(self):\n",
    "import os\nimport sys\n\n",
    "#include <vector>\n\nnamespace ",
    "template <typename T>\nstruct ",
    "To insert a table in your document, choose",
    "Click the icon on the toolbar to open the dialog, then",
    "Wählen Sie im Menü",
    "Mit dieser Funktion können Sie",
    "Cliquez sur le bouton pour",
    "Cette fonction renvoie",
    "Haga clic en el icono para",
    "Esta función devuelve",
)
"""The other half, to be continued without a template."""

SAMPLES = (
    "Hello! Who are you?",
    "What is the capital of France?",
    "What is 7 + 5?",
    "Tell me a story about a dog.",
    "Tell me a joke.",
    "What is a volcano?",
    "What can you do?",
    "I am tired today.",
    "Write a Python function that adds two numbers.",
    "Who won the last World Cup?",
)
"""Questions whose answers are shown as they come."""
