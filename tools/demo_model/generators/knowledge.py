"""Simple knowledge, written by us: countries most asked about, everyday facts, pairs (texts/knowledge.txt)."""

from tools.demo_model.texts import lines

COUNTRIES = lines("knowledge", "countries")
"""Country, capital, continent, languages, currency."""
FACTS = lines("knowledge", "facts")
"""Question and answer."""
SIMPLE_DEFINITIONS = lines("knowledge", "definitions")
"""Word and meaning."""
OPPOSITES, SOUNDS, YOUNG, COLOURS, ANIMAL_HOMES, ANIMAL_KINDS, LEGS = (
    [(line.rsplit(" ", 1)[0], line.rsplit(" ", 1)[1]) for line in lines("knowledge", title)]
    for title in ("opposites", "sounds", "young", "colours", "homes", "kinds", "legs")
)
TRANSLATIONS = lines("knowledge", "translations")
"""English, German, French, Spanish; an underscore stands for a space."""
DAYS = lines("knowledge", "days")
MONTHS = [(name, days) for name, days in (line.split() for line in lines("knowledge", "months"))]
