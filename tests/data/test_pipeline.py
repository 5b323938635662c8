"""From sources to sets: chunks change nothing, memory holds tokens only, and the report says what is in a set and what is wrong with it."""

import json

import numpy as np
import pytest

from gptoss_jax.data import Pipeline, Source, encode_conversations, load_rows, report, shared_warning, training_and_held_out
from gptoss_jax.data import pipeline as pipeline_module
from gptoss_jax.data.documents import Documents, DocumentsBuilder
from gptoss_jax.errors import CorruptError, UsageError
from tests.support.documents import document


def conversation(i, thinking=True, words=1):
    answer = {"role": "assistant", "content": f"answer {i} " + "word " * words}
    return {"messages": [{"role": "user", "content": f"question {i}"}, {**answer, "thinking": "Hm."} if thinking else answer]}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def source(tmp_path):
    return Source(write(tmp_path / "d.jsonl", [conversation(i, thinking=i % 3 > 0, words=i) for i in range(12)]))


def make(tokenizer, row_length=64, **options):
    return Pipeline(tokenizer, row_length, **options)


def test_flat_documents_are_those_that_were_added_and_a_selection_shares_them():
    rng = np.random.default_rng(0)
    added = [document(rng.integers(0, 99, n), rng.random(n) < 0.5, rng.integers(0, 99, n)) for n in (3, 1, 7, 2)]
    builder = DocumentsBuilder()
    builder.add(added[:3])
    builder.add([])
    builder.add(added[3:])
    documents = builder.build()
    chosen = documents.select(np.array([2, 0, 2]))
    assert builder.num_tokens == 0 and len(chosen) == 3 and chosen.flat is documents.flat
    for found, expected in zip([*documents, *chosen], [*added, added[2], added[0], added[2]]):
        assert all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(found, expected))
    assert len(DocumentsBuilder().build()) == 0


@pytest.mark.parametrize("limit", [{"CHUNK_ROWS": 5}, {"CHUNK_CHARACTERS": 40}, {}])
def test_chunks_change_nothing(tokenizer, source, monkeypatch, limit):
    for name, value in limit.items():
        monkeypatch.setattr(pipeline_module, name, value)
    ticks = []
    corpus = make(tokenizer).tokenize([source], lambda *counts: ticks.append(counts))
    expected = encode_conversations(load_rows(source.path).rows, tokenizer)
    assert isinstance(corpus.documents, Documents) and len(corpus.documents) == 12
    for found, alone in zip(corpus.documents, expected):
        assert all(map(np.array_equal, found, alone))
    assert ticks[-1] == (12, sum(len(e.ids) for e in expected)) and (len(ticks) > 1) == bool(limit)


def test_the_report_counts_what_is_there(tokenizer, source):
    pipeline = make(tokenizer, row_length=512)
    training, _ = training_and_held_out(pipeline.tokenize([source]), None, None, 0)
    counts = report("train", training, pipeline)
    documents = encode_conversations(load_rows(source.path).rows, tokenizer)
    assert (counts.conversations, counts.documents) == (12, 12) and counts.tokens == sum(len(d.ids) for d in documents)
    assert counts.trained == sum(int((d.weights > 0).sum()) for d in documents)
    thought = len(tokenizer.encode("<|channel|>analysis<|message|>Hm.<|end|>", add_special_tokens=False))
    assert counts.trained_by_channel == {"analysis": 8 * thought, "final": counts.trained - 8 * thought}
    assert (counts.longest, counts.shortest) == (max(len(d.ids) for d in documents), min(len(d.ids) for d in documents))
    assert counts.sources[0].num_without_thinking == 4 and counts.sources[0].layouts == {"messages": 12}
    assert counts.rows == len(pipeline.pack("train", training).rows.tokens_BT) and counts.warnings() == []
    assert "12 conversations, 12 documents" in counts.describe()[0] and "4 without thinking" in counts.describe()[2]


@pytest.mark.parametrize(
    ("too_long", "says"), [("truncate", "are cut at its end; "), ("drop", "are left out"), ("error", "make training refuse the set")]
)
def test_documents_that_do_not_fit_are_warned_about(tokenizer, source, too_long, says):
    pipeline = make(tokenizer, row_length=40, too_long=too_long)
    training, _ = training_and_held_out(pipeline.tokenize([source]), None, None, 0)
    counts = report("train", training, pipeline)
    documents = encode_conversations(load_rows(source.path).rows, tokenizer)
    longer = [d for d in documents if len(d.ids) > 40]
    assert 0 < counts.num_longer == len(longer) < 12
    assert counts.num_cut_answers == sum(bool(d.weights[40:].any()) for d in longer) > 0
    assert any(f"{len(longer)} documents are longer than a row of 40 tokens and {says}" in line for line in counts.warnings())
    if too_long == "error":
        with pytest.raises(UsageError, match=r"^data\.train: .* longer than the rows of 40"):
            pipeline.pack("data.train", training)
    else:
        packed = pipeline.pack("data.train", training)
        assert counts.rows == len(packed.rows.tokens_BT) and counts.tokens == packed.length_of[packed.row_of >= 0].sum()
        assert counts.trained == (packed.rows.loss_weights_BT > 0).sum()


def test_documents_without_a_trained_token_are_warned_about(tokenizer, tmp_path):
    long_question = {"messages": [{"role": "user", "content": "why " * 80}, {"role": "assistant", "content": "so"}]}
    path = write(tmp_path / "d.jsonl", [conversation(0), long_question])
    pipeline = make(tokenizer, row_length=64, too_long="truncate")
    training, _ = training_and_held_out(pipeline.tokenize([Source(path)]), None, None, 0)
    assert any("1 documents have no trained token within a row" in line for line in report("train", training, pipeline).warnings())


def test_repeated_and_shared_conversations_are_counted(tokenizer, tmp_path):
    train = Source(write(tmp_path / "a.jsonl", [conversation(i) for i in (0, 1, 2, 1)]), weight=2)
    held_out = Source(write(tmp_path / "b.jsonl", [conversation(i) for i in (2, 3)]))
    pipeline = make(tokenizer)
    training, evaluation = training_and_held_out(pipeline.tokenize([train]), pipeline.tokenize([held_out]), None, 0)
    counts = report("train", training, pipeline)
    assert counts.conversations == 8 and counts.num_duplicates == 1, "the repeats of the mixture are none"
    assert shared_warning(training, evaluation) == [
        "eval: 1 of 2 held-out conversations are also in the training set: its loss will look too good"
    ]
    assert shared_warning(training, None) == []


def test_a_mixture_has_its_weights_and_held_out_conversations_are_in_no_epoch(tokenizer, tmp_path):
    rows = {name: [conversation(f"{name}{i}") for i in range(n)] for name, n in (("a", 20), ("b", 30))}
    sources = [Source(write(tmp_path / f"{name}.jsonl", rows[name]), weight=weight) for name, weight in (("a", 2), ("b", 0.5))]
    pipeline = make(tokenizer)
    training, evaluation = training_and_held_out(pipeline.tokenize(sources), None, 0.1, 42)
    assert len(evaluation.conversations) == 5 and not np.isin(evaluation.conversations, training.conversations).any()
    left = np.bincount(training.corpus.source_of[np.setdiff1d(np.arange(50), evaluation.conversations)])
    counts = report("train", training, pipeline)
    assert [s.per_epoch for s in counts.sources] == [2 * left[0], round(0.5 * left[1])] and "(weight 2)" in counts.describe()[2]
    assert "(weight" not in "".join(report("eval", evaluation, pipeline).describe())
    again, _ = training_and_held_out(pipeline.tokenize(sources), None, 0.1, 42)
    assert np.array_equal(training.conversations, again.conversations)
    assert shared_warning(training, evaluation) == []


def test_bad_rows_are_refused_by_line_or_counted(tokenizer, tmp_path):
    good = [conversation(i) for i in range(3)]
    path = write(tmp_path / "d.jsonl", [good[0], {"messages": [{"role": "user", "content": "x"}]}, good[1], good[2]])
    with pytest.raises(CorruptError, match=r"1 of 4 rows of .*d\.jsonl cannot be used:\n  .*d\.jsonl:2: messages\[0\]\.role"):
        make(tokenizer).tokenize([Source(path)])
    pipeline = make(tokenizer, skip_bad_rows=True)
    training, _ = training_and_held_out(pipeline.tokenize([Source(path)]), None, None, 0)
    counts = report("train", training, pipeline)
    assert counts.conversations == 3 and "train: 1 bad rows are left out" in counts.warnings() and "1 BAD ROWS LEFT OUT" in counts.describe()[2]


def test_nothing_to_train_on_is_an_error_before_anything_else(tokenizer, tmp_path):
    empty = write(tmp_path / "empty.jsonl", [])
    pipeline = make(tokenizer)
    with pytest.raises(UsageError, match=r"empty\.jsonl has no rows"):
        pipeline.tokenize([Source(empty)])
    corpus = pipeline.tokenize([Source(write(tmp_path / "one.jsonl", [conversation(0)]), weight=0.4)])
    with pytest.raises(UsageError, match="weights of data.train leave no conversation"):
        training_and_held_out(corpus, None, None, 0)
    with pytest.raises(UsageError, match="eval_fraction = 0.5 of 1 conversations leaves none to train on"):
        training_and_held_out(corpus, None, 0.5, 0)
