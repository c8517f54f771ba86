"""Generators: modules whose `generate(seed)` writes conversations of our own, from templates and word lists."""
