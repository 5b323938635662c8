"""Rows per process: together the processes make every row of the global batch, for any number of them, in the same order."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gptoss_jax.data import Batch, BatchStream, one_pass
from gptoss_jax.sharding import batch_sharding, local_rows, make_mesh, place_rows

ROWS, LENGTH = 8, 4


class OfProcess:
    """The sharding as a process sees it that has `devices` alone."""

    is_fully_addressable = False

    def __init__(self, sharding, devices):
        self.sharding, self.devices = sharding, devices

    def addressable_devices_indices_map(self, shape):
        return {d: index for d, index in self.sharding.devices_indices_map(shape).items() if d in self.devices}


def views(mesh, count, sharding=None):
    devices = list(mesh.devices.flat)
    per = len(devices) // count
    return [OfProcess(sharding or batch_sharding(mesh), devices[i * per : (i + 1) * per]) for i in range(count)]


def packed(num_rows=11):
    values = np.arange(num_rows * LENGTH).reshape(num_rows, LENGTH)
    return Batch(*(values.astype(np.float32 if name == "loss_weights_BT" else np.int32) for name in Batch._fields))


TOKENIZER = SimpleNamespace(backend_tokenizer=SimpleNamespace(to_str=lambda: "{}"))


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_processes_together_make_the_same_global_batches(count):
    mesh = make_mesh(data=2, fsdp=4)
    shares = [local_rows(ROWS, LENGTH, view) for view in views(mesh, count)]
    assert [len(share) for share in shares] == [ROWS // count] * count
    whole = BatchStream(packed(), ROWS, 3, TOKENIZER)
    parts = [BatchStream(packed(), ROWS, 3, TOKENIZER, share) for share in shares]
    for _ in range(5):
        expected, made = next(whole), [next(part) for part in parts]
        jax.tree.map(lambda a, *b: np.testing.assert_array_equal(a, np.concatenate(b)), expected, *made)
    assert all(part.state() == whole.state() and part.digest() == whole.digest() for part in parts)
    for expected, *made in zip(one_pass(packed(), ROWS), *(one_pass(packed(), ROWS, share) for share in shares), strict=True):
        jax.tree.map(lambda a, *b: np.testing.assert_array_equal(a, np.concatenate(b)), expected, *made)


def test_evaluation_ends_with_empty_rows():
    *_, last = one_pass(packed(11), ROWS)
    np.testing.assert_array_equal(last.tokens_BT, np.concatenate([packed(11).tokens_BT[8:], np.zeros((5, LENGTH))]))
    assert last.loss_weights_BT.dtype == np.float32 and last.tokens_BT.dtype == np.int32


def test_processes_of_one_tensor_group_make_the_same_rows():
    mesh = make_mesh(fsdp=4, tensor=2)
    shares = [local_rows(ROWS, LENGTH, view).tolist() for view in views(mesh, 8)]
    assert shares == [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5], [6, 7], [6, 7]]


def test_placed_rows_are_the_global_batch(monkeypatch):
    """Rows that lie apart in the batch, cut along their length too: a process holds rows 0-1 and 4-5, or the others."""
    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"))
    sharding = NamedSharding(mesh, PartitionSpec(("b", "a"), "c"))
    whole = packed(ROWS)
    for view in views(mesh, 2, sharding):
        rows = local_rows(ROWS, LENGTH, view)
        assert len(rows) == 4 and rows[1] == rows[0] + 1 and rows[2] != rows[1] + 1
        parts_here = lambda shape, s, part: [part(index) for index in s.addressable_devices_indices_map(shape).values()]
        monkeypatch.setattr(jax, "make_array_from_callback", parts_here)
        made = place_rows(Batch(*(array[rows] for array in whole)), ROWS, view)
        expected = [whole.tokens_BT[index] for index in view.addressable_devices_indices_map((ROWS, LENGTH)).values()]
        jax.tree.map(np.testing.assert_array_equal, made.tokens_BT, expected)
    with pytest.raises(ValueError, match="holds 4 of 8 rows, but was given 8"):
        place_rows(whole, ROWS, view)
