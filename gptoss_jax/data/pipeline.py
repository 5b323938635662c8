"""Sources -> checked, rendered and tokenized in chunks -> training and held-out sets of documents, with a report of what they hold.

Texts of a chunk are dropped once they are tokens, so memory is that of the token arrays and one chunk. Everything is decided here before anything is
compiled: what cannot be trained on is an error, what looks like a mistake a warning.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import xxhash

from gptoss_jax.data.documents import Documents, DocumentsBuilder, Span
from gptoss_jax.data.harmony import Encoded, HarmonyEncoder, System, TrainOn, training_examples
from gptoss_jax.data.mixture import mix, split_rows
from gptoss_jax.data.packing import Packed, TooLong, pack
from gptoss_jax.data.sources import Conversation, Source, conversations, refuse_bad
from gptoss_jax.errors import UsageError

CHUNK_ROWS, CHUNK_CHARACTERS = 1000, 8_000_000
# called with (conversations read, tokens so far) after every chunk
Tick = Callable[[int, int], None]


class SourceCount(NamedTuple):
    """What a source holds. `layouts` counts its rows by the layout of their columns, `problems` are its bad rows."""

    source: Source
    layouts: Counter[str]
    num_rows: int
    problems: list[str]
    num_without_thinking: int


class Corpus(NamedTuple):
    """All conversations of some sources, tokenized; conversation r has the documents `span.documents_of([r])`."""

    documents: Documents
    span: Span
    source_of: np.ndarray  # int32 [conversations]
    hash_of: np.ndarray  # uint64 [conversations]: of its token ids
    counts: list[SourceCount]


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

    def tokenize(self, sources: Sequence[Source], tick: Tick = lambda rows, tokens: None, *, keep_bad: bool = False) -> Corpus:
        """Reads and encodes every row. With `keep_bad`, bad rows and empty sources are only counted.

        Raises:
          CorruptError: bad rows, unless they are skipped; the message names file and line of each.
          UsageError: a source that does not exist or has no rows.
        """
        encoder, builder = HarmonyEncoder(self.tokenizer), DocumentsBuilder()
        counts, per_conversation, source_of, hashes = [], [], [], []
        for s, source in enumerate(sources):
            layouts, problems, without, before = Counter(), [], 0, len(source_of)
            for chunk in chunks(source):
                good = [c.row for c in chunk if c.problem is None]
                layouts.update(c.layout for c in chunk if c.problem is None)
                problems += [c.problem for c in chunk if c.problem is not None]
                if problems and not (self.skip_bad_rows or keep_bad):
                    continue  # the run will be refused: only look for more problems
                encoded = self._encode(encoder, good)
                without += sum(not row["messages"][-1].get("thinking") for row in good)
                per_conversation += map(len, encoded)
                source_of += [s] * len(good)
                hashes += [xxhash.xxh3_64_intdigest(b"".join(d.ids.tobytes() for d in documents)) for documents in encoded]
                builder.add(document for documents in encoded for document in documents)
                tick(len(source_of), builder.num_tokens)
            num_rows = sum(layouts.values())
            if not keep_bad:
                refuse_bad(source, num_rows, problems, self.skip_bad_rows)
            counts.append(SourceCount(source, layouts, len(source_of) - before, problems, without))
        count = np.array(per_conversation, np.int64)
        span = Span(np.cumsum(count) - count, count)
        return Corpus(builder.build(), span, np.array(source_of, np.int32), np.array(hashes, np.uint64), counts)

    def _encode(self, encoder: HarmonyEncoder, rows: list[dict[str, Any]]) -> list[list[Encoded]]:
        """The training documents of each conversation: none, one or several (data/examples.py)."""
        examples = [training_examples(row, system=self.system, train_on=self.train_on) for row in rows]
        encoded = iter(encoder.encode([document for of_row in examples for document in of_row]))
        return [list(islice(encoded, len(of_row))) for of_row in examples]

    def pack(self, name: str, selected: "Selected") -> Packed:
        """The rows of a set. UsageError, beginning with `name`, where nothing is left to train on."""
        try:
            return pack(selected.documents, self.row_length, packed=self.packing, too_long=self.too_long)
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from None


def chunks(source: Source):
    """Lists of conversations, closed after 1000 rows or 8 M characters, whichever comes first."""
    chunk: list[Conversation] = []
    characters = 0
    for conversation in conversations(source):
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
    return training, None if rest is None else Selected(corpus, rest)


def _mixed(corpus: Corpus, rows: np.ndarray, seed: int) -> np.ndarray:
    rows_of = [rows[corpus.source_of[rows] == s] for s in range(len(corpus.counts))]
    return mix(rows_of, [count.source.weight for count in corpus.counts], seed)
