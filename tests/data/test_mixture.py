"""The split and the mixture follow from row order and seed alone, keep the stated counts, and never put a row on both sides."""

import numpy as np
import pytest

from gptoss_jax.data.mixture import mix, split_rows


@pytest.mark.parametrize(("num_rows", "fraction", "held_out"), [(1000, 0.1, 100), (15, 0.1, 2), (7, 0.5, 4), (1, 0.5, 1)])
def test_the_split_is_a_partition_of_the_stated_size(num_rows, fraction, held_out):
    train, rest = split_rows(num_rows, fraction, 42)
    assert len(rest) == held_out and np.array_equal(np.sort(np.concatenate([train, rest])), np.arange(num_rows))
    again, other = split_rows(num_rows, fraction, 42), split_rows(num_rows, fraction, 43)
    assert all(map(np.array_equal, (train, rest), again))
    assert num_rows < 15 or not np.array_equal(rest, other[1])


@pytest.mark.parametrize(("num_rows", "fraction", "seed"), [(1000, 0.1, 42), (37, 0.3, 7)])
def test_the_split_holds_out_the_rows_that_datasets_holds_out(num_rows, fraction, seed):
    datasets = pytest.importorskip("datasets")
    theirs = datasets.Dataset.from_dict({"i": list(range(num_rows))}).train_test_split(test_size=fraction, seed=seed)
    train, rest = split_rows(num_rows, fraction, seed)
    assert sorted(theirs["test"]["i"]) == rest.tolist() and sorted(theirs["train"]["i"]) == train.tolist()


@pytest.mark.parametrize("weight", [1, 2, 0.5, 2.5, 0.01, 1 / 3])
def test_a_weight_repeats_whole_conversations_and_draws_the_rest(weight):
    rows = np.arange(100, 150)
    order = mix([rows], [weight], 0)
    times = np.bincount(order - 100, minlength=50)
    assert len(order) == round(weight * 50) and set(times) <= {int(weight), int(weight) + 1}
    assert np.array_equal(order, mix([rows], [weight], 0))
    assert weight != 0.5 or not np.array_equal(order, mix([rows], [weight], 1))


def test_one_source_of_weight_one_stays_as_it_is():
    rows = np.array([3, 1, 4, 1, 5])
    assert mix([rows], [1.0], 0).tolist() == rows.tolist()


def test_sources_are_interleaved_evenly():
    order = mix([np.arange(30), np.arange(30, 40)], [1.0, 2.0], 0)
    from_second = order >= 30
    for start in range(0, 50, 10):  # 20 of 50 are of the second source
        assert 3 <= from_second[start : start + 10].sum() <= 5


def test_what_is_drawn_from_a_source_does_not_depend_on_the_others():
    alone = mix([np.arange(50)], [0.5], 0)
    beside = mix([np.arange(50), np.arange(50, 70)], [0.5, 3.0], 0)
    assert np.array_equal(beside[beside < 50], alone)
