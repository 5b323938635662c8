"""Many tokenized documents as flat arrays. A Python list of a hundred thousand small arrays would spend more memory on objects than on tokens;
here a document costs 12 bytes per token and 12 more, and a selection of documents (a split, a mixture with repeats) shares the tokens.
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

    def weight_between(self, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        """float64 [documents]: the sum of each document's weights from its token `begin[i]` up to `end[i]` (exclusive)."""
        before = np.concatenate([[0.0], np.cumsum(self.flat.weights, dtype=np.float64)])
        return before[self.starts + np.minimum(end, self.lengths)] - before[self.starts + np.minimum(begin, self.lengths)]


class DocumentsBuilder:
    """Grows by pieces; each piece becomes one array per field, so small arrays do not outlive it."""

    def __init__(self):
        self._pieces: list[Encoded] = []
        self._lengths: list[np.ndarray] = []
        self.num_tokens = 0

    def add(self, documents: Iterable[Encoded]) -> None:
        documents = list(documents)
        if not documents:
            return
        self._pieces.append(Encoded(*map(np.concatenate, zip(*documents))))
        self._lengths.append(np.array([len(document.ids) for document in documents], np.int32))
        self.num_tokens += len(self._pieces[-1].ids)

    def build(self) -> Documents:
        """Everything that was added; the builder is empty afterwards."""
        flat = []
        for dtype in (np.int32, np.int32, np.float32):  # one field after another, so that only one exists twice
            pieces = [piece[len(flat)] for piece in self._pieces]
            flat.append(np.concatenate(pieces) if pieces else np.zeros(0, dtype))
        lengths = np.concatenate(self._lengths) if self._lengths else np.zeros(0, np.int32)
        self.__init__()
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        return Documents(Encoded(*flat), starts, lengths)


class Span(NamedTuple):
    """Documents of each conversation: `first[r]` and how many."""

    first: np.ndarray  # int64 [conversations]
    count: np.ndarray  # int64 [conversations]

    def documents_of(self, conversations: np.ndarray) -> np.ndarray:
        """int64: the documents of these conversations, in their order."""
        count = self.count[conversations]
        offset = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        return np.repeat(self.first[conversations], count) + offset
