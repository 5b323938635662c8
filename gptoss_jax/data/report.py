"""What a set of documents holds, counted before anything is compiled: said at the start of a run, shown at length by `data inspect`.

Counts are of an epoch, with the repeats that the weights of a mixture bring. "Trained" tokens are those whose production the loss rewards; a first
token is never one. Shares by channel are of whole documents; all other counts are after truncation or dropping.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gptoss_jax.data.documents import Documents
from gptoss_jax.data.packing import best_fit
from gptoss_jax.data.pipeline import Pipeline, Selected, SourceCount

CHANNELS = ("analysis", "commentary", "final")
QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(frozen=True)
class SourceReport:
    """One source: its good rows by column layout, its bad ones, and how many conversations of an epoch come from it."""

    path: str
    layouts: dict[str, int]
    num_rows: int
    num_bad: int
    num_without_thinking: int
    weight: float
    per_epoch: int

    def describe(self) -> str:
        layouts = ", ".join(self.layouts) if len(self.layouts) < 2 else ", ".join(f"{name}: {n:,}" for name, n in self.layouts.items())
        text = f"{self.path}: {self.num_rows:,} conversations ({layouts or 'none'}), {self.per_epoch:,} in one pass over this set"
        text += f" (weight {self.weight:g})" if self.weight != 1 else ""
        text += f", {self.num_without_thinking:,} without thinking in the last answer" if self.num_without_thinking else ""
        return text + (f", {self.num_bad:,} BAD ROWS LEFT OUT" if self.num_bad else "")


@dataclass(frozen=True)
class SetReport:
    """One set, training or held-out."""

    name: str
    sources: tuple[SourceReport, ...]
    conversations: int
    documents: int
    tokens: int
    trained: int
    trained_by_channel: dict[str, int]
    shortest: int
    longest: int
    quantiles: dict[str, int]
    row_length: int
    rows: int
    too_long: str
    num_longer: int  # than a row
    num_cut_answers: int  # of these, with trained tokens beyond the row
    num_untrained: int  # documents without a trained token within the row
    num_empty: int  # conversations without a document
    num_duplicates: int  # conversations that repeat an earlier one of the set, without the repeats of the mixture

    @property
    def trained_share(self) -> float:
        return self.trained / max(1, self.tokens)

    @property
    def fill(self) -> float:
        """Share of the room in packed rows that holds tokens."""
        return self.tokens / max(1, self.rows * self.row_length)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"trained_share": self.trained_share, "fill": self.fill}

    def describe(self) -> list[str]:
        channels = ", ".join(f"{name} {n / max(1, sum(self.trained_by_channel.values())):.0%}" for name, n in self.trained_by_channel.items())
        lengths = ", ".join(f"{100 * q:.0f}% up to {self.quantiles[name]:,}" for name, q in QUANTILES.items())
        return [
            f"{self.name}: {self.conversations:,} conversations, {self.documents:,} documents, {self.tokens:,} tokens, "
            f"{self.trained:,} trained ({self.trained_share:.1%}{': ' + channels if channels else ''})",
            f"  tokens of a document: {lengths}, longest {self.longest:,}; {self.rows:,} rows of {self.row_length:,}, filled to {self.fill:.1%}",
            *(f"  {source.describe()}" for source in self.sources),
        ]

    def warnings(self) -> list[str]:
        what = {"truncate": "are cut at its end", "drop": "are left out", "error": "make training refuse the set (data.too_long: error)"}
        cut = f"; {self.num_cut_answers:,} of them lose a part of their answer" if self.too_long == "truncate" and self.num_cut_answers else ""
        found = [
            (self.num_longer, f"documents are longer than a row of {self.row_length:,} tokens and {what[self.too_long]}{cut}"),
            (self.num_empty, "conversations have nothing to train: weight 0, or no message in the channels of data.loss"),
            (self.num_untrained, "documents have no trained token within a row: they cost time and teach nothing"),
            (self.num_duplicates, "conversations repeat an earlier one of the same set"),
            (sum(source.num_bad for source in self.sources), "bad rows are left out"),
        ]
        return [f"{self.name}: {n:,} {text}" for n, text in found if n]


def report(name: str, selected: Selected, pipeline: Pipeline) -> SetReport:
    """Counts of one set."""
    corpus, row_length = selected.corpus, pipeline.row_length
    order = corpus.span.documents_of(selected.conversations)
    documents = corpus.documents
    trained, cut = _trained(documents, row_length)
    lengths = documents.lengths[order]
    longer = lengths > row_length
    kept = order[~longer] if pipeline.too_long == "drop" else order
    inside = np.minimum(documents.lengths[kept], row_length)
    within = trained[kept] - cut[kept]
    distinct = np.unique(selected.conversations)
    filled = distinct[corpus.span.count[distinct] > 0]
    per_epoch = np.bincount(corpus.source_of[selected.conversations], minlength=len(corpus.counts))
    return SetReport(
        name=name,
        sources=tuple(_source_report(count, int(n), selected.weighted) for count, n in zip(corpus.counts, per_epoch)),
        conversations=len(selected.conversations),
        documents=len(order),
        tokens=int(inside.sum()),
        trained=int(within.sum()),
        trained_by_channel=_by_channel(documents, np.bincount(order, minlength=len(documents)), pipeline.tokenizer),
        shortest=int(lengths.min()) if len(lengths) else 0,
        longest=int(lengths.max(initial=0)),
        quantiles={name: int(np.quantile(lengths, q, method="higher")) if len(lengths) else 0 for name, q in QUANTILES.items()},
        row_length=row_length,
        rows=_num_rows(inside, row_length, pipeline.packing),
        too_long=pipeline.too_long,
        num_longer=int(longer.sum()),
        num_cut_answers=int((cut[order] > 0).sum()),
        num_untrained=int((within == 0).sum()),
        num_empty=int((corpus.span.count[selected.conversations] == 0).sum()),
        num_duplicates=len(filled) - len(np.unique(corpus.hash_of[filled])),
    )


def _source_report(count: SourceCount, per_epoch: int, weighted: bool) -> SourceReport:
    return SourceReport(
        path=str(count.source),
        layouts=dict(count.layouts),
        num_rows=count.num_rows,
        num_bad=len(count.problems),
        num_without_thinking=count.num_without_thinking,
        weight=count.source.weight if weighted else 1.0,
        per_epoch=per_epoch,
    )


def _num_rows(lengths: np.ndarray, row_length: int, packing: bool) -> int:
    if not len(lengths) or not packing:
        return len(lengths)
    return int(best_fit(lengths.tolist(), row_length)[0].max()) + 1


def _trained(documents: Documents, row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 [documents] each: trained tokens of every document, and how many of these lie beyond `row_length`."""
    if not len(documents):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    trained = np.add.reduceat(documents.flat.weights > 0, documents.starts, dtype=np.int64) - (documents.flat.weights[documents.starts] > 0)
    cut = np.zeros(len(documents), np.int64)
    for i in np.flatnonzero(documents.lengths > row_length):
        cut[i] = np.count_nonzero(documents[i].weights[row_length:])
    return trained, cut


def _by_channel(documents: Documents, times: np.ndarray, tokenizer: Any) -> dict[str, int]:
    """Trained tokens per channel, document i counted `times[i]` times; a message without a channel (trained with loss: all) counts as "other"."""
    ids, trained = documents.flat.ids, documents.flat.weights > 0
    start, channel = tokenizer.convert_tokens_to_ids(["<|start|>", "<|channel|>"])
    begins = np.flatnonzero(ids == start)
    if not len(begins):
        return {}
    weights = np.add.reduceat(trained, begins, dtype=np.int64) * times[np.searchsorted(documents.starts, begins, "right") - 1]
    places = np.flatnonzero(ids[:-1] == channel)
    message = np.searchsorted(begins, places, "right") - 1
    name = ids[places + 1]
    totals = {}
    for channel_name in CHANNELS:  # the first token of a name tells it from the two others
        first = tokenizer.encode(channel_name, add_special_tokens=False)[0]
        totals[channel_name] = int(weights[message[name == first]].sum())
    totals["other"] = int(weights.sum()) - sum(totals.values())
    return {name: total for name, total in totals.items() if total}


def shared_warning(training: Selected, held_out: Selected | None) -> list[str]:
    """Says how many held-out conversations the training set has as well, token for token; empty where none."""
    if held_out is None:
        return []
    both = np.isin(held_out.corpus.hash_of[held_out.conversations], training.corpus.hash_of[training.conversations])
    text = f"eval: {both.sum():,} of {len(both):,} held-out conversations are also in the training set: its loss will look too good"
    return [text] if both.any() else []


def histogram(lengths: np.ndarray, bins: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """(edges int64 [n + 1], counts int64 [n]) of document lengths, in at most `bins` + 1 bins of equal, round width."""
    low, high = int(lengths.min()), int(lengths.max())
    width = -(-(high - low + 1) // bins)
    unit = 10 ** (len(str(width)) - 1)
    width = -(-width // unit) * unit
    edges = np.arange(low // width * width, high + width + 1, width)
    return edges, np.histogram(lengths, edges)[0]
