"""What people say in small talk and what the model answers: the lines of texts/phrases.txt and texts/intents.txt."""

from tools.demo_model.texts import lines, pairs

PERSONA = lines("phrases", "persona")
DO_NOT_KNOW = lines("phrases", "do not know")
NAME_ASKS = lines("phrases", "name asks")
JOKE_ASKS = lines("phrases", "joke asks")
JOKES = lines("phrases", "jokes")
RIDDLE_ASKS = lines("phrases", "riddle asks")
RIDDLES = lines("phrases", "riddles")
UNKNOWN = lines("phrases", "unknown")
QUOTE_ASKS = lines("phrases", "quote asks")
QUOTES = lines("phrases", "quotes")
TOPICS = pairs("phrases", "topics")
DID = lines("phrases", "did")
SENTENCES = lines("phrases", "sentences")
INTENTS = lines("intents", "intents")
"""One intent a line: wordings, an arrow, answers."""
