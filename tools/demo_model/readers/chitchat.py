"""Real conversations between people (chitchat-dataset), the better ones: clean, on topic, without contact data."""

import hashlib
import json
import re
from pathlib import Path

from tools.demo_model.corpus import ASSISTANT, END, USER, Splits

PROFANE = re.compile(
    r"(?i)\b(f+u+c+k\w*|sh[i1]t\w*|bitch\w*|asshole\w*|ass|damn\w*|crap\w*|dick\w*|porn\w*|sex\w*|nude\w*|penis|vagina|"
    r"boob\w*|whore|slut|n[i1]gg\w*|f[a]g\w*|retard\w*|rape\w*|suicid\w*|kill (my|your)self|"
    r"drunk|weed|cocaine|hitler|nazi\w*|wtf|stfu|"
    r"hell|bastard\w*|piss\w*|horny|tits)\b"
)
CONTACT = re.compile(
    r"(?i)@\w|https?:|www\.|\.com\b|\d{3}[-. ]?\d{3,4}|instagram|snapchat|facebook|my (number|email)|phone number"
)
PLATFORM = re.compile(
    r"(?i)\b(byu|turing|chat ?bot|bot|chit-?chat|leaderboard|this (app|website|site|challenge)|points?|"
    r"research|survey)\b"
)
PREAMBLE = "A chat between two people.\n"
"""System message of these conversations, so that the model does not take the people's lives for its own."""
FIXES = (
    (r"\bi\b", "I"),
    (r"\bi'(m|ve|ll|d)\b", r"I'\1"),
    (r"\b[Ii]m\b", "I'm"),
    (r"\bdont\b", "don't"),
    (r"\bDont\b", "Don't"),
    (r"\bcant\b", "can't"),
    (r"\bthats\b", "that's"),
    (r"\bThats\b", "That's"),
    (r"\bwhats\b", "what's"),
    (r"\bWhats\b", "What's"),
    (r"\bu\b", "you"),
    (r"\bur\b", "your"),
    (r"\bU\b", "You"),
    (r"\br\b", "are"),
    (r"\bdidnt\b", "didn't"),
    (r"\bdoesnt\b", "doesn't"),
    (r"\b[Ii]ve\b", "I've"),
    (r"\bisnt\b", "isn't"),
    (r"\bwouldnt\b", "wouldn't"),
    (r"\byoure\b", "you're"),
    (r"\bhavent\b", "haven't"),
    (r"\b[Ii]dk\b", "I don't know"),
    (r"\bnvm\b", "never mind"),
    (r"\s+", " "),
    (r"([!?.])\1{2,}", r"\1"),
    (r"(.)\1{3,}", r"\1\1"),
    (r" ([,.?!])", r"\1"),
    (r"\b[Ll][Oo][Ll]\b", "lol"),
)


def read_chitchat(package: Path, budget_bytes: int = 9_000_000) -> Splits:
    """Conversations in order of quality up to a budget; whole conversations are held out."""
    data = json.loads((package / "chitchat_dataset/dataset.json").read_text())
    rated = []
    for key, conversation in data.items():
        for number, turns in enumerate(_clean_runs([[m["text"] for m in group] for group in conversation["messages"]])):
            rated.append((_quality(turns), f"{key}/{number}", turns))
    rated.sort(reverse=True)
    splits = Splits()
    used = 0
    for _, key, turns in rated:
        text = (
            USER
            + PREAMBLE
            + "".join((USER if i % 2 == 0 else ASSISTANT) + turn + END for i, turn in enumerate(turns)).removeprefix(
                USER
            )
        )
        used += len(text.encode())
        if used > budget_bytes:
            break
        bucket = int(hashlib.sha256(key.split("/")[0].encode()).hexdigest(), 16) % 100
        splits.add("val" if bucket < 2 else "calib" if bucket < 3 else "train", [text])
    return splits


def _clean_runs(groups: list[list[str]]) -> list[list[str]]:
    """Cut a conversation at turns that cannot stay; runs of at least two exchanges survive."""
    runs: list[list[str]] = [[]]
    for group in groups:
        turn = _fix(" ".join(text if re.search(r"[.?!,:)]\s*$", text) else text + "." for text in group))
        if turn:
            runs[-1].append(turn)
        else:
            runs.append([])
    return [run[: len(run) // 2 * 2] for run in runs if len(run) >= 4]


def _fix(text: str) -> str:
    """The turn in good shape, or nothing when it cannot be used."""
    if PROFANE.search(text) or CONTACT.search(text) or PLATFORM.search(text) or not text.isascii():
        return ""
    for pattern, replacement in FIXES:
        text = re.sub(pattern, replacement, text)
    text = re.sub(r"(^|[.?!] )([a-z])", lambda match: match[1] + match[2].upper(), text.strip())
    if len(text) < 2 or len(text) > 400 or not re.search(r"[A-Za-z]{2}", text):
        return ""
    return (
        text
        if text[-1] in ".?!)"
        else text + ("?" if re.match(r"(?i)(what|how|who|where|why|do|did|are|is) ", text) else ".")
    )


def _quality(turns: list[str]) -> float:
    """Prefer middle-sized turns and full sentences; dislike shouting and one-word turns."""
    words = [len(turn.split()) for turn in turns]
    short = sum(count < 3 for count in words) / len(words)
    middle = sum(5 <= count <= 35 for count in words) / len(words)
    shouting = sum(turn.isupper() for turn in turns) / len(turns)
    lol = sum("lol" in turn or "haha" in turn.lower() for turn in turns) / len(turns)
    return middle - 1.5 * short - shouting - 0.3 * lol
