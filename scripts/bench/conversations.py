"""Invented conversations for timing the data pipeline: seeded, unlike each other, some 200 to 400 tokens of the release's tokenizer each."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

DEVELOPER = "reasoning language: French\n\nAnswer briefly and name your sources."


def words(tokenizer: Any, number: int, seed: int) -> np.ndarray:
    """Texts of `number` tokens that are a space and letters: real words, or pieces of some."""
    rng = np.random.default_rng(seed)
    names = np.array([token[1:] for token in tokenizer.get_vocab() if token.startswith("Ġ") and token[1:].isalpha() and token[1:].isascii()])
    return rng.permutation(np.sort(names))[:number]


def rows(number: int, tokenizer: Any, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Word frequencies fall off as 1 / rank, as in a language; lengths are uniform in their ranges."""
    rng = np.random.default_rng(seed)
    lexicon = words(tokenizer, 20_000, seed)
    cumulative = np.cumsum(1 / np.arange(1, len(lexicon) + 1))
    cumulative /= cumulative[-1]

    def text(low: int, high: int) -> str:
        chosen = lexicon[np.searchsorted(cumulative, rng.random(rng.integers(low, high)))]
        return ". ".join(" ".join(chosen[i : i + 12]) for i in range(0, len(chosen), 12)) + "."

    for _ in range(number):
        yield {
            "messages": [
                {"role": "system", "content": DEVELOPER},
                {"role": "user", "content": text(20, 80)},
                {"role": "assistant", "thinking": text(50, 150), "content": text(50, 150)},
            ]
        }


def write(path: Path, number: int, tokenizer: Any, seed: int = 0) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows(number, tokenizer, seed):
            file.write(json.dumps(row) + "\n")
