"""Packing loses nothing, mixes nothing, and no label crosses the border of a document."""

import numpy as np
import pytest

from gptoss_jax.data import pack
from gptoss_jax.data.packing import best_fit
from gptoss_jax.errors import UsageError
from tests.support.documents import document

PAD = 9999


def documents(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [document(rng.integers(1, 1000, n), rng.random(n) * (rng.random(n) < 0.5), rng.integers(1, 1000, n)) for n in lengths]


def random_lengths(n, longest, seed=1):
    return np.random.default_rng(seed).integers(1, longest + 1, n)


@pytest.mark.parametrize("packed", [True, False])
def test_every_document_is_found_whole_with_its_own_labels(packed):
    docs = documents(random_lengths(200, 40))
    result = pack(docs, 40, pad_id=PAD, packed=packed)
    rows = result.rows
    covered = np.zeros(rows.tokens_BT.shape, bool)
    for doc, row, start, length in zip(docs, result.row_of, result.start_of, result.length_of):
        span = (row, slice(start, start + length))
        assert not covered[span].any()
        covered[span] = True
        np.testing.assert_array_equal(rows.tokens_BT[span], doc.ids)
        np.testing.assert_array_equal(rows.targets_BT[span], [*doc.labels[1:], PAD])
        np.testing.assert_array_equal(rows.loss_weights_BT[span], [*doc.weights[1:], 0])
        np.testing.assert_array_equal(rows.positions_BT[span], np.arange(length))
        assert len(set(rows.segment_ids_BT[span])) == 1
    np.testing.assert_array_equal(covered, rows.segment_ids_BT > 0)
    assert (rows.tokens_BT[~covered] == PAD).all() and (rows.targets_BT[~covered] == PAD).all() and not rows.loss_weights_BT[~covered].any()
    for segments in rows.segment_ids_BT:  # 1, 2, .. in order of their columns, then padding
        steps = np.diff(segments)
        assert segments[0] == 1 and (((steps == 0) | (steps == 1)) | (segments[1:] == 0)).all()
    assert packed or len(rows.tokens_BT) == len(docs)


def test_each_document_goes_into_the_fullest_row_with_room():
    lengths = random_lengths(300, 50)
    row_of, start_of = best_fit(lengths.tolist(), 50)
    used = np.zeros(row_of.max() + 1, int)
    opened = 0
    for length, row, start in zip(lengths, row_of, start_of):
        fits = [u for u in used[:opened] if u + length <= 50]
        assert start == (max(fits) if fits else 0)
        assert used[row] == start and row <= opened
        opened = max(opened, row + 1)
        used[row] += length
    assert opened <= 1.1 * lengths.sum() / 50


def test_packing_is_deterministic_and_depends_on_the_order_of_documents():
    docs = documents(random_lengths(100, 30))
    first, second, other = pack(docs, 30), pack(docs, 30), pack(docs[::-1], 30)
    assert all((a == b).all() for a, b in zip(first.rows, second.rows))
    assert not np.array_equal(first.rows.tokens_BT[0], other.rows.tokens_BT[0])


def test_too_long_documents_are_an_error_or_cut_or_dropped_and_counted():
    docs = documents([5, 12, 8, 30])
    with pytest.raises(UsageError, match=r"2 of 4 documents are longer than the rows of 10 tokens \(the longest has 30"):
        pack(docs, 10)
    cut = pack(docs, 10, too_long="truncate")
    assert cut.num_truncated == 2 and cut.num_dropped == 0 and cut.length_of.tolist() == [5, 10, 8, 10]
    dropped = pack(docs, 10, too_long="drop")
    assert dropped.num_dropped == 2 and dropped.row_of.tolist().count(-1) == 2 and "2 dropped" in dropped.describe()


def test_a_truncated_document_has_no_label_beyond_its_cut():
    doc = document(np.arange(1, 13), np.ones(12))
    rows = pack([doc], 8, pad_id=PAD, too_long="truncate").rows
    assert rows.targets_BT[0].tolist() == [2, 3, 4, 5, 6, 7, 8, PAD] and rows.loss_weights_BT[0, -1] == 0


@pytest.mark.parametrize(
    ("docs", "options", "message"),
    [
        ([], {}, "empty"),
        (documents([20, 30]), {"too_long": "drop"}, "no document is left"),
        ([document(np.arange(5), np.zeros(5))], {}, "none of the 1 documents has a token to train on"),
        ([document(np.arange(20), np.arange(20) > 15)], {"too_long": "truncate"}, "within the first 10 tokens"),
    ],
)
def test_nothing_to_train_on_is_said_before_training(docs, options, message):
    with pytest.raises(UsageError, match=message):
        pack(docs, 10, **options)
