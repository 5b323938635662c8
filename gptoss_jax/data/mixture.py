"""Which conversations an epoch consists of: the split into training and held-out ones, and the mixture of several sources by weight.

Both depend on nothing but the number of rows, their order and the seed, so they are the same on every machine and for any number of processes.

    split     the rows of all sources in a line, a permutation by the seed, the first ceil(fraction * rows) held out. This is what
              `datasets.Dataset.train_test_split(test_size=fraction, seed=seed)` holds out: with 0.1 and 42 the evaluation rows of NVIDIA's recipe.
    mixture   a source of n rows and weight w gives round(w * n) conversations: each floor(w) times, and of the rest as many as are missing, drawn
              without replacement by the seed and the place of the source in the list. All epochs have the same conversations; their order differs.
              The sources are interleaved evenly: a packed row has documents of all of them.

Held-out rows are taken away before the mixture, so a repeated row cannot be on both sides.
"""

import math
from collections.abc import Sequence

import numpy as np


def split_rows(num_rows: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows to train on, held-out rows), int64, both ascending."""
    permutation = np.random.default_rng(seed).permutation(num_rows)
    held_out = math.ceil(fraction * num_rows)
    return np.sort(permutation[held_out:]), np.sort(permutation[:held_out])


def mix(rows_of: Sequence[np.ndarray], weights: Sequence[float], seed: int) -> np.ndarray:
    """int64: the conversations of an epoch in order. `rows_of[s]` are those of source s. One source of weight 1 stays as it is."""
    order, place = [], []
    for s, (rows, weight) in enumerate(zip(rows_of, weights)):
        whole = int(weight)
        missing = round(weight * len(rows)) - whole * len(rows)
        drawn = np.sort(np.random.default_rng((seed, s)).permutation(len(rows))[:missing])
        chosen = np.concatenate([np.tile(rows, whole), rows[drawn]]).astype(np.int64)
        order.append(chosen)
        place.append((np.arange(len(chosen)) + 0.5) / max(1, len(chosen)))
    return np.concatenate(order)[np.argsort(np.concatenate(place), kind="stable")]
