"""WordNet's glosses as answers to "What is a dog?"; common words come often, rare ones once, held-out words never."""

import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.demo_model.corpus import Splits, Turn, conversation
from tools.demo_model.generators.knowledge import SIMPLE_DEFINITIONS
from tools.demo_model.readers.manuals import split_of

POS = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}
SENSE_NUMBER = {"1": "noun", "2": "verb", "3": "adj", "4": "adv", "5": "adj"}
COMMON_WORDS = 4000
SIMPLER = {line.split("|")[0] for line in SIMPLE_DEFINITIONS}
"""Words for which we have a simpler definition of our own."""
UNWANTED = re.compile(
    r"(?i)\b(sex|sexual|coitus|genital|penis|vagina|whore|prostitut\w*|slut|rape|obscene|offensive|derogat\w+|slur|n[i]gger|"
    r"fuck|shit|piss|disparaging|ethnic)\b"
)


@dataclass(frozen=True, slots=True)
class Sense:
    """The first sense of a word: its gloss, an example sentence if there is one, how often it was tagged in text."""

    word: str
    pos: str
    gloss: str
    example: str
    frequency: int


def read_wordnet(package: Path, seed: int) -> Splits:
    """Definitions as short conversations of three to six questions."""
    rng = random.Random(seed)
    folder = package / "usr/share/wordnet"
    senses = sorted(_senses(folder), key=lambda sense: -sense.frequency)
    senses = list({sense.word: sense for sense in reversed(senses)}.values())[::-1]  # the most frequent part of speech
    splits = Splits()
    pools: dict[str, list[Turn]] = {"train": [], "val": [], "calib": []}
    rank = 0
    for sense in senses:
        split = split_of("word " + sense.word)
        rank += sense.pos in ("noun", "verb", "adj")
        copies = _copies(sense, rank, rng) if split == "train" else 1
        pools[split] += [_question(sense, rng) for _ in range(copies)]
    for split, turns in pools.items():
        rng.shuffle(turns)
        splits.add(split, _conversations(turns, rng))
    return splits


def _copies(sense: Sense, rank: int, rng: random.Random) -> int:
    """How often a word is asked for: common words often, a part of the untagged ones never."""
    if rank < COMMON_WORDS:
        return 8 if rank < 1000 else 4
    kept = 1.0 if sense.frequency else 0.2 if " " in sense.word else 0.45
    return int(rng.random() < kept)


def _conversations(turns: list[Turn], rng: random.Random) -> Iterator[str]:
    position = 0
    while position < len(turns):
        size = rng.choice((1, 2, 3, 4))
        yield conversation(turns[position : position + size])
        position += size


def _senses(folder: Path) -> Iterator[Sense]:
    frequencies = _frequencies(folder / "cntlist.rev")
    for pos in POS:
        glosses = _glosses(folder / f"data.{pos}")
        for line in (folder / f"index.{pos}").read_text("latin-1").splitlines():
            if line.startswith(" "):
                continue
            fields = line.split()
            word = fields[0].replace("_", " ")
            if not re.fullmatch(r"[a-z][a-z' -]{1,24}", word) or word.count(" ") > 1:
                continue
            gloss, example, spellings = glosses[fields[6 + int(fields[3])]]
            word = spellings.get(word, word)
            if word not in SIMPLER and 8 < len(gloss) < 160 and not UNWANTED.search(word + " " + gloss):
                yield Sense(word, pos, gloss, example, frequencies[word.lower(), pos])


def _frequencies(path: Path) -> Counter[tuple[str, str]]:
    frequencies: Counter[tuple[str, str]] = Counter()
    for line in path.read_text("latin-1").splitlines():
        key, _, count = line.split()
        word, _, rest = key.partition("%")
        frequencies[word.replace("_", " "), SENSE_NUMBER[rest[0]]] += int(count)
    return frequencies


def _glosses(path: Path) -> dict[str, tuple[str, str, dict[str, str]]]:
    glosses = {}
    for line in path.read_text("latin-1").splitlines():
        if line.startswith(" ") or "|" not in line:
            continue
        head, _, gloss = line.partition("|")
        example = re.search(r'"([^"]{8,90})"', gloss)
        meaning = re.sub(r"\([^)]*\)", "", re.split(r"; ", gloss.strip())[0].split('"')[0])
        meaning = re.sub(r"\s+", " ", meaning).strip(" ;:,")
        fields = head.split()
        words = [re.sub(r"\(.*\)", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]
        spellings = {word.lower(): word for word in words}
        glosses[fields[0]] = (meaning, example.group(1) if example else "", spellings)
    return glosses


def _question(sense: Sense, rng: random.Random) -> Turn:
    word = sense.word
    if sense.pos == "noun":
        named = word if word != word.lower() else _with_article(word)
        asks = [f"What is {named}?"] * 5 + [
            f"what is {named}",
            f"What's {named}?",
            f"Define {word}.",
            f"What does {word} mean?",
            f"Explain what {named} is.",
            f"what is {word}?",
            f"Can you explain what {named} is?",
            f"definition of {word}",
            f"Do you know what {named} is?",
            f'What does the word "{word}" mean?',
            f"what's {named}",
            f"{word}?",
        ]
        has_determiner = re.match(r"(a|an|the|any|one|some|someone|something|all|what|that|how|either)\b", sense.gloss)
        answer = f"{_capital(named)} is {sense.gloss}." if has_determiner else f"{_capital(word)}: {sense.gloss}."
    else:
        asks = [f"What does {word} mean?"] * 3 + [
            f"what does {word} mean",
            f"Define {word}.",
            f'What does the word "{word}" mean?',
            f"definition of {word}",
            f"Can you explain {word}?",
            f"What is the meaning of {word}?",
        ]
        if sense.pos == "verb":
            asks += [f"What does it mean to {word}?", f"what does to {word} mean?"]
            answer = f"To {word} means to {sense.gloss}."
        else:
            answer = f"{_capital(word)} means {sense.gloss}."
    if sense.example and rng.random() < 0.15:
        answer += f' For example: "{_capital(sense.example)}."'
    return rng.choice(asks), answer


def _with_article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" and not word.startswith(("uni", "use", "eu", "one")) else f"a {word}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
