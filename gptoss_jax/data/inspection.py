"""What `data inspect` shows: the counts of a run's data, and some documents token by token as training sees them."""

import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gptoss_jax.data.harmony import Encoded
from gptoss_jax.data.pipeline import Corpus, Pipeline, Selected, training_and_held_out
from gptoss_jax.data.report import SetReport, histogram, report, shared_warning

# control characters would act on the terminal, direction marks would reorder the line
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
MAX_CHARACTER_TOKENS = 8  # a character has at most 4 bytes; longer runs are bytes that are no text


class Shown(NamedTuple):
    """A stretch of text: one token, or several that share a character."""

    text: str
    ids: tuple[int, ...]
    trained: bool
    special: bool
    label: str | None = None  # what the model is trained to write here, where that is another token than the one that stands here


class Sample(NamedTuple):
    """One document of a set. Tokens from `cut` on do not fit into a row."""

    title: str
    tokens: list[Shown]
    cut: int | None  # index into `tokens`


class InspectedSet(NamedTuple):
    report: SetReport
    edges: np.ndarray  # int64 [bins + 1], tokens
    counts: np.ndarray  # int64 [bins], documents
    samples: list[Sample]


class Inspection(NamedTuple):
    sets: list[InspectedSet]
    warnings: list[str]
    problems: list[str]  # bad rows, file:line: reason

    def to_dict(self) -> dict[str, Any]:
        """Counts for JSON, without the samples."""
        sets = [s.report.to_dict() | {"histogram": {"edges": s.edges.tolist(), "documents": s.counts.tolist()}} for s in self.sets]
        return {"sets": sets, "warnings": self.warnings, "problems": self.problems}


def inspect(
    corpus: Corpus, held_out: Corpus | None, pipeline: Pipeline, *, eval_fraction: float | None, split_seed: int, samples: int
) -> Inspection:
    """Counts of the training set and of the held-out set if there is one, and `samples` documents of each, evenly spread."""
    training, evaluation = training_and_held_out(corpus, held_out, eval_fraction, split_seed)
    named = [("train", training)] + ([("eval", evaluation)] if evaluation else [])
    sets = []
    for name, selected in named:
        edges, counts = histogram(selected.documents.lengths)
        sets.append(InspectedSet(report(name, selected, pipeline), edges, counts, _samples(selected, pipeline, samples)))
    warnings = [line for s in sets for line in s.report.warnings()] + shared_warning(training, evaluation)
    problems = [problem for c in (corpus, held_out) if c is not None for count in c.counts for problem in count.problems]
    return Inspection(sets, warnings, problems)


def _samples(selected: Selected, pipeline: Pipeline, number: int) -> list[Sample]:
    documents = selected.documents
    chosen = np.unique(np.linspace(0, len(documents) - 1, min(number, len(documents))).astype(int)) if number else []
    out = []
    for i in chosen:
        tokens = shown_tokens(documents[i], pipeline.tokenizer)
        ends = np.cumsum([len(token.ids) for token in tokens])
        cut = int(np.searchsorted(ends, pipeline.row_length, "right")) if documents.lengths[i] > pipeline.row_length else None
        out.append(Sample(f"document {i + 1:,} of {len(documents):,}, {documents.lengths[i]:,} tokens", tokens, cut))
    return out


def shown_tokens(document: Encoded, tokenizer: Any) -> list[Shown]:
    """The document as text, a piece per token; tokens that are parts of one character stand together. The first token is never trained."""
    special_ids = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    out: list[Shown] = []
    pending: list[int] = []
    for i, (token, label, weight) in enumerate(zip(document.ids.tolist(), document.labels.tolist(), document.weights.tolist())):
        pending.append(token)
        text = decode(pending)
        if text.endswith("\ufffd") and len(pending) < MAX_CHARACTER_TOKENS and i + 1 < len(document.ids):
            continue
        out.append(Shown(visible(text), tuple(pending), weight > 0 and i > 0, token in special_ids, decode([label]) if label != token else None))
        pending = []
    return out


def visible(text: str) -> str:
    """Text with control characters and direction marks written out, as \\x1b."""
    return _INVISIBLE.sub(lambda match: f"\\x{ord(match[0]):02x}" if ord(match[0]) < 256 else f"\\u{ord(match[0]):04x}", text)


def text_with_label(token: Shown) -> str:
    """The text of a token, and what the model is trained to write in its place."""
    return token.text if token.label is None else f"{token.text} (learns {token.label})"


def runs(tokens: Sequence[Shown]) -> list[tuple[str, bool]]:
    """(text, trained) of the longest stretches of tokens that are all trained, or all not."""
    stretches = itertools.groupby(tokens, lambda token: token.trained)
    return [("".join(map(text_with_label, stretch)), trained) for trained, stretch in stretches]
