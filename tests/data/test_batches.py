"""The stream of batches: each epoch sees every row once, a resume continues exactly, other data is refused."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from gptoss_jax.data import BatchStream, one_pass, pack, rows_hash
from gptoss_jax.errors import UsageError
from gptoss_jax.sharding import batch_sharding, make_mesh
from tests.support.documents import document


def make_rows(num_rows=23, seed=0):
    rng = np.random.default_rng(seed)
    return pack([document(rng.integers(0, 900, 8), np.ones(8)) for _ in range(num_rows)], 8).rows


def same(a, b):
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b))


def test_every_epoch_is_another_permutation_of_all_rows(tokenizer):
    stream = BatchStream(make_rows(), 4, 7, tokenizer)
    order = np.concatenate([stream.indices(k) for k in range(23)])  # 92 rows are exactly 4 epochs
    epochs = order.reshape(4, 23)
    assert (np.sort(epochs, axis=1) == np.arange(23)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_batches_are_the_rows_of_their_indices(tokenizer):
    rows = make_rows()
    stream = BatchStream(rows, 4, 7, tokenizer)
    for k in range(10):
        assert same(next(stream), [array[stream.indices(k)] for array in rows])


def test_resume_gives_the_same_batches_as_an_unbroken_run(tokenizer):
    stream = BatchStream(make_rows(), 4, 7, tokenizer)
    for _ in range(9):  # into the second epoch
        next(stream)
    state = json.loads(json.dumps(stream.state()))
    resumed = BatchStream(make_rows(), 4, 7, tokenizer)
    resumed.restore(state)
    for _ in range(12):
        assert same(next(stream), next(resumed))
    assert stream.state() == resumed.state() and len(json.dumps(state)) < 400


def test_seed_changes_the_order(tokenizer):
    rows = make_rows()
    assert not same(next(BatchStream(rows, 8, 0, tokenizer)), next(BatchStream(rows, 8, 1, tokenizer)))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (dict(rows=make_rows(seed=1)), "rows: "),
        (dict(rows=make_rows(num_rows=24)), "num_rows: 23 -> 24"),
        (dict(batch_size=5), "batch_size: 4 -> 5"),
        (dict(seed=8), "seed: 7 -> 8"),
    ],
)
def test_resume_with_other_data_is_refused_by_name(tokenizer, changed, named):
    original = dict(rows=make_rows(), batch_size=4, seed=7, tokenizer=tokenizer)
    state = BatchStream(**original).state()
    with pytest.raises(UsageError, match=named):
        BatchStream(**{**original, **changed}).restore(state)


def test_resume_with_another_tokenizer_is_refused(tokenizer):
    class Other:
        class backend_tokenizer:
            @staticmethod
            def to_str():
                return tokenizer.backend_tokenizer.to_str() + " "

    state = BatchStream(make_rows(), 4, 7, tokenizer).state()
    with pytest.raises(UsageError, match="tokenizer: "):
        BatchStream(make_rows(), 4, 7, Other()).restore(state)


def test_a_change_of_only_the_loss_mask_changes_the_fingerprint(tokenizer):
    rows = make_rows()
    weights = rows.loss_weights_BT.copy()
    weights[3, 2] = 0
    changed = BatchStream(rows._replace(loss_weights_BT=weights), 4, 7, tokenizer)
    assert changed.fingerprint != BatchStream(rows, 4, 7, tokenizer).fingerprint


def test_one_pass_covers_all_rows_once_in_batches_of_one_shape():
    rows = make_rows()
    batches = list(one_pass(rows, 5))
    assert {batch.tokens_BT.shape for batch in batches} == {(5, 8)}
    joined = [np.concatenate(arrays) for arrays in zip(*batches)]
    assert same([array[:23] for array in joined], rows) and not any(array[23:].any() for array in joined)


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_any_number_of_processes_sees_the_same_global_batches(tokenizer, processes):
    """Each makes the whole batch and keeps the rows of its devices, so process p of P holds the p-th slice of what one process would hold."""
    alone = BatchStream(make_rows(), 8, 7, tokenizer)
    streams = [BatchStream(make_rows(), 8, 7, tokenizer) for _ in range(processes)]
    for k in range(9):  # into the fourth epoch
        expected = next(alone)
        part = 8 // processes
        slices = [[array[p * part : (p + 1) * part] for array in next(stream)] for p, stream in enumerate(streams)]
        assert same([np.concatenate(arrays) for arrays in zip(*slices)], expected), k
    assert all(stream.state() == alone.state() for stream in streams)
    other = BatchStream(make_rows(), 8, 7, tokenizer)
    other.restore(streams[-1].state())  # a run of P processes continues in one, or the other way round
    assert same(next(other), next(alone))


@pytest.mark.parametrize("layout", [{"data": 8}, {"data": 2, "fsdp": 4}, {"fsdp": 2}])
def test_devices_hold_consecutive_rows_of_the_global_batch(tokenizer, layout):
    batch = next(BatchStream(make_rows(), 8, 7, tokenizer))
    mesh = make_mesh(**{"data": 1, "fsdp": 1, **layout})
    placed = jax.device_put(batch, batch_sharding(mesh))
    for array, expected in zip(placed, batch):
        shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        assert [shard.data.shape[0] for shard in shards] == [8 // mesh.size] * mesh.size
        assert np.array_equal(np.concatenate([shard.data for shard in shards]), expected)


def test_another_process_makes_the_same_batches(tokenizer):
    """Nothing in the order depends on the process: no hash seed, no clock, no thread."""
    program = (
        "from tests.data.test_batches import make_rows; from tests.data.conftest import NANO\n"
        "from gptoss_jax.data import BatchStream, load_tokenizer, rows_hash\n"
        "stream = BatchStream(make_rows(), 8, 7, load_tokenizer(NANO)); print([rows_hash(next(stream)) for _ in range(5)], stream.state())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    stream = BatchStream(make_rows(), 8, 7, tokenizer)
    assert done.stdout.strip() == f"{[rows_hash(next(stream)) for _ in range(5)]} {stream.state()}"
