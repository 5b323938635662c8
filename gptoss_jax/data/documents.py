"""Many tokenized documents as flat arrays. A Python list of a hundred thousand small arrays would spend more memory on objects than on tokens;
here a document costs 12 bytes per token (8 where no label differs from its token) and 12 more, and a selection of documents (a split, a mixture with
repeats) shares the tokens.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from gptoss_jax.data.harmony import Encoded


class Documents(Sequence):
    """A sequence of `Encoded`: document i is `flat[starts[i] : starts[i] + lengths[i]]` of each flat array, a view."""

    def __init__(self, flat: Encoded, starts: np.ndarray, lengths: np.ndarray):
        self.flat, self.starts, self.lengths = flat, starts, lengths  # int32/int32/float32 [tokens], int64 [documents], int32 [documents]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> Encoded:
        start = self.starts[i]
        stop = start + self.lengths[i]
        return Encoded(*(array[start:stop] for array in self.flat))

    def select(self, order: np.ndarray) -> "Documents":
        """These documents in this order; one may stand there several times."""
        return Documents(self.flat, self.starts[order], self.lengths[order])


class DocumentsBuilder:
    """Grows by pieces; each piece becomes one array per field, so small arrays do not outlive it."""

    def __init__(self):
        self._pieces: list[tuple[np.ndarray, np.ndarray | None, np.ndarray]] = []  # ids, labels if they differ, weights
        self._lengths: list[np.ndarray] = []
        self.num_tokens = 0

    def add(self, documents: Iterable[Encoded]) -> None:
        documents = list(documents)
        if not documents:
            return
        ids, labels, weights = map(np.concatenate, zip(*documents))
        self._pieces.append((ids, None if np.array_equal(ids, labels) else labels, weights))
        self._lengths.append(np.array([len(document.ids) for document in documents], np.int32))
        self.num_tokens += len(ids)

    def build(self) -> Documents:
        """Everything that was added; the builder is empty afterwards."""
        pieces, lengths = self._pieces, _joined(self._lengths, np.int32)
        self.__init__()
        weights = _joined([weights for _, _, weights in pieces], np.float32)
        pieces = [(ids, labels) for ids, labels, _ in pieces]  # drops the weights: one field at a time exists twice
        ids = _joined([ids for ids, _ in pieces], np.int32)
        same = all(labels is None for _, labels in pieces)
        labels = ids if same else _joined([ids if labels is None else labels for ids, labels in pieces], np.int32)
        return Documents(Encoded(ids, labels, weights), np.cumsum(lengths, dtype=np.int64) - lengths, lengths)


def _joined(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype)


class Span(NamedTuple):
    """Documents of each conversation: `first[r]` and how many."""

    first: np.ndarray  # int64 [conversations]
    count: np.ndarray  # int64 [conversations]

    def documents_of(self, conversations: np.ndarray) -> np.ndarray:
        """int64: the documents of these conversations, in their order."""
        count = self.count[conversations]
        offset = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        return np.repeat(self.first[conversations], count) + offset
