"""Sources -> checked, rendered and tokenized in chunks -> training and held-out sets of documents, with a report of what they hold.

Texts of a chunk are dropped once they are tokens, so memory is that of the token arrays and one chunk. Everything is decided here before anything is
compiled: what cannot be trained on is an error, what looks like a mistake a warning.

Of many processes each checks, renders and tokenizes its share of the rows, and they exchange the tokens (data/together.py).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import xxhash

from gptoss_jax.data.documents import Documents, DocumentsBuilder, Span
from gptoss_jax.data.harmony import Encoded, HarmonyEncoder, Piece, System, TrainOn, training_examples
from gptoss_jax.data.mixture import mix, split_rows
from gptoss_jax.data.packing import Packed, TooLong, pack
from gptoss_jax.data.sources import Conversation, Source, conversations, refuse_bad
from gptoss_jax.data.together import Share, gathered_rows
from gptoss_jax.errors import UsageError
from gptoss_jax.sharding.distributed import on_each

CHUNK_ROWS, CHUNK_CHARACTERS = 1000, 8_000_000
# called with (conversations read, tokens so far) after every chunk
Tick = Callable[[int, int], None]
# the rendered documents of each conversation of a chunk
Examples = list[list[list[Piece]]]


@dataclass
class SourceCount:
    """What a source holds. `layouts` counts its good rows by the layout of their columns, `problems` are its bad ones, by number."""

    source: Source
    layouts: Counter[str] = field(default_factory=Counter)
    by_number: dict[int, str] = field(default_factory=dict)
    num_without_thinking: int = 0

    @property
    def num_rows(self) -> int:
        return self.layouts.total()

    @property
    def problems(self) -> list[str]:
        return list(self.by_number.values())

    def add(self, chunk: Sequence[Conversation]) -> list[dict[str, Any]]:
        """Counts a chunk; returns its good rows."""
        good = [c for c in chunk if c.problem is None]
        self.layouts.update(c.layout for c in good)
        self.by_number.update((c.number, c.problem) for c in chunk if c.problem is not None)
        self.num_without_thinking += sum(not c.row["messages"][-1].get("thinking") for c in good)
        return [c.row for c in good]

    def plain(self) -> list[Any]:
        return [dict(self.layouts), list(self.by_number.items()), self.num_without_thinking]

    @classmethod
    def merged(cls, source: Source, shares: Sequence[list[Any]]) -> "SourceCount":
        """From what `plain` gave for every share of the rows."""
        layouts, problems, num_without_thinking = zip(*shares)
        by_number = dict(sorted((number, text) for share in problems for number, text in share))
        return cls(source, sum(map(Counter, layouts), Counter()), by_number, sum(num_without_thinking))


class Corpus(NamedTuple):
    """All conversations of some sources, tokenized; conversation r has the documents `span.documents_of([r])`."""

    documents: Documents
    span: Span
    source_of: np.ndarray  # int32 [conversations]
    hash_of: np.ndarray  # uint64 [conversations]: of its token ids
    counts: list[SourceCount]


class _CorpusBuilder:
    def __init__(self):
        self.documents, self.counts = DocumentsBuilder(), []
        self._per_conversation, self._source_of, self._hashes, self._numbers = [], [], [], []

    def add(self, encoded: list[list[Encoded]], numbers: list[int]) -> None:
        """Conversations of the source that comes next, which are these of its rows."""
        self._per_conversation += map(len, encoded)
        self._numbers += numbers
        self._source_of += [len(self.counts)] * len(encoded)
        self._hashes += [xxhash.xxh3_64_intdigest(b"".join(document.ids.tobytes() for document in documents)) for documents in encoded]
        self.documents.add(document for documents in encoded for document in documents)

    def __len__(self) -> int:
        return len(self._source_of)

    def build(self, together: bool) -> Corpus:
        count, numbers = np.array(self._per_conversation, np.int64), np.array(self._numbers, np.int64)
        documents, source_of, hash_of = self.documents.build(), np.array(self._source_of, np.int32), np.array(self._hashes, np.uint64)
        if together:
            documents, count, source_of, hash_of = gathered_rows(documents, count, numbers, source_of, hash_of)
        return Corpus(documents, Span(np.cumsum(count) - count, count), source_of, hash_of, self.counts)


@dataclass(frozen=True)
class Pipeline:
    """How conversations become documents and rows, as the `data` section of a config says."""

    tokenizer: Any
    row_length: int
    packing: bool = True
    train_on: TrainOn = "assistant"
    too_long: TooLong = "error"
    system: System | None = None
    skip_bad_rows: bool = False

    def tokenize(
        self, sources: Sequence[Source], tick: Tick = lambda rows, tokens: None, *, keep_bad: bool = False, together: bool = False
    ) -> Corpus:
        """Reads and encodes every row. With `keep_bad`, bad rows and empty sources are only counted.

        Args:
          together: all processes of the run call this, and each does its share; the result is the same on all, and that of a single process.

        Raises:
          CorruptError: bad rows, unless they are skipped; the message names file and line of each.
          UsageError: a source that does not exist or has no rows, or whose rows are not the same on all processes.
        """
        encode, builder = HarmonyEncoder(self.tokenizer).encode, _CorpusBuilder()
        for source in sources:
            share = Share.of_process() if together else Share()

            def read(source=source, share=share):
                count = SourceCount(source)
                for numbers, examples in self._rendered(source, count, share, keep_bad or self.skip_bad_rows):
                    builder.add(_encode(encode, examples), numbers)
                    tick(len(builder), builder.documents.num_tokens)
                return [share.digest(), count.plain()]

            digests, counts = zip(*(on_each(read) if together else [read()]))
            share.check(source, digests)
            count = SourceCount.merged(source, counts)
            if not keep_bad:
                refuse_bad(source, count.num_rows, count.problems, self.skip_bad_rows)
            builder.counts.append(count)
        return builder.build(together)

    def _rendered(self, source: Source, count: SourceCount, share: Share, keep_bad: bool) -> Iterator[tuple[list[int], Examples]]:
        """Row numbers, and the training documents of each conversation (none, one or several; data/examples.py), chunk by chunk; counts what it
        reads."""
        for chunk in chunks(source, share):
            good = count.add(chunk)
            if keep_bad or not count.by_number:  # otherwise the set will be refused: look for more problems only
                numbers = [c.number for c in chunk if c.problem is None]
                yield numbers, [training_examples(row, system=self.system, train_on=self.train_on) for row in good]

    def pack(self, name: str, selected: "Selected") -> Packed:
        """The rows of a set. UsageError, beginning with `name`, where nothing is left to train on."""
        documents = selected.documents
        if not len(documents):
            what = f"none of its {len(selected.conversations)} conversations has a message with a weight in the channels {self.train_on!r}"
            raise UsageError(f"{name}: nothing to train: {what}")
        try:
            return pack(documents, self.row_length, packed=self.packing, too_long=self.too_long)
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from None


def _encode(encode: Callable[[list[list[Piece]]], list[Encoded]], examples: Examples) -> list[list[Encoded]]:
    """All documents of a chunk in one call of the tokenizer, which has threads for them."""
    encoded = iter(encode([document for of_row in examples for document in of_row]))
    return [list(islice(encoded, len(of_row))) for of_row in examples]


def chunks(source: Source, share: Share) -> Iterator[list[Conversation]]:
    """Lists of conversations of a share, closed after 1000 rows or 8 M characters, whichever comes first."""
    chunk: list[Conversation] = []
    characters = 0
    for conversation in conversations(source, share.takes):
        chunk.append(conversation)
        if conversation.row is not None:
            characters += sum(len(message.get("content") or "") + len(message.get("thinking") or "") for message in conversation.row["messages"])
        if len(chunk) >= CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


class Selected(NamedTuple):
    """One side of the split: which conversations of a corpus make an epoch, in order."""

    corpus: Corpus
    conversations: np.ndarray  # int64, with repeats
    weighted: bool = True  # by the weights of the sources; a held-out share is not

    @property
    def documents(self) -> Documents:
        return self.corpus.documents.select(self.corpus.span.documents_of(self.conversations))


def training_and_held_out(corpus: Corpus, held_out: Corpus | None, fraction: float | None, seed: int) -> tuple[Selected, Selected | None]:
    """The mixture of `corpus`, and that of `held_out`, or `fraction` of the conversations of `corpus`, held out before mixing.

    Raises:
      UsageError: the fraction leaves nothing on one side.
    """
    train, rest = np.arange(len(corpus.source_of)), None
    if fraction is not None:
        train, rest = split_rows(len(corpus.source_of), fraction, seed)
        if not len(train):
            raise UsageError(f"data.eval_fraction = {fraction} of {len(rest)} conversations leaves none to train on")
    training = Selected(corpus, _mixed(corpus, train, seed))
    if not len(training.conversations):
        raise UsageError("the weights of data.train leave no conversation in an epoch")
    if held_out is not None:
        return training, Selected(held_out, _mixed(held_out, np.arange(len(held_out.source_of)), seed))
    return training, None if rest is None else Selected(corpus, rest, weighted=False)


def _mixed(corpus: Corpus, rows: np.ndarray, seed: int) -> np.ndarray:
    rows_of = [rows[corpus.source_of[rows] == s] for s in range(len(corpus.counts))]
    return mix(rows_of, [count.source.weight for count in corpus.counts], seed)
