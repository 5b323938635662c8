"""Numbers in words in five languages, and which numbers are held out.

The words are Unicode CLDR's spell-out rules (package `unicode-rbnf`), so they are exact and nobody has to check them. All 10,000 words
of a language differ. Held out are 20 % of the numbers from 100 on that are no round hundred; the words below 100 and the round hundreds
are the atoms of a number system and cannot be guessed (French "soixante-et-onze", Spanish "quinientos"), so every split may use them in training.
"""

import functools
import random

from unicode_rbnf import RbnfEngine

LANGUAGES = {"English": "en", "German": "de", "French": "fr", "Spanish": "es", "Italian": "it"}
SPLITS = ("train", "dev", "final")


@functools.cache
def _engine(code: str) -> RbnfEngine:
    return RbnfEngine.for_language(code)


@functools.cache
def spell(number: int, language: str) -> str:
    """`spell(21, "German") == "einundzwanzig"`. About 0.1-0.4 ms the first time, then cached."""
    return _engine(LANGUAGES[language]).format_number(number).text


def split_of_number(number: int) -> str:
    """The split that owns a number. A multiplicative hash spreads the held-out ones over all sizes and last digits."""
    if number < 100 or number % 100 == 0:
        return "train"
    bucket = (number * 2654435761 % 2**32) % 10
    return {0: "final", 1: "dev"}.get(bucket, "train")


@functools.cache
def numbers_of(split: str, max_number: int) -> tuple[int, ...]:
    """All numbers 0..max_number of a split, ascending."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: one of {', '.join(SPLITS)}")
    return tuple(n for n in range(max_number + 1) if split_of_number(n) == split)


@functools.cache
def _numbers_by_length(split: str, max_number: int) -> tuple[tuple[int, ...], ...]:
    pools = [tuple(n for n in numbers_of(split, max_number) if len(str(n)) == length) for length in range(1, len(str(max_number)) + 1)]
    return tuple(pool for pool in pools if pool)


def draw_number(rng: random.Random, split: str, max_number: int) -> int:
    """Half of the draws are uniform over the numbers, half uniform over their lengths: 90 % of 0..9999 have four digits."""
    if rng.random() < 0.5:
        return rng.choice(numbers_of(split, max_number))
    return rng.choice(rng.choice(_numbers_by_length(split, max_number)))
