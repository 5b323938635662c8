"""Packed rows -> an endless, resumable stream of global batches.

The order is a grain `MapDataset`: every epoch is a fresh permutation made from (seed, epoch), epochs follow each other without a gap, and a batch may
hold rows of two epochs. It has random access, so the position is one number, and a resume continues exactly.
The order is that of the global batch whatever the number of processes and devices; a process takes only its share of the rows of each batch. The
packed rows of all are in every process (data/together.py).
"""

from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
import xxhash

from gptoss_jax.data.packing import Batch
from gptoss_jax.errors import UsageError

# which rows of every batch to make, ascending; a process makes those of its own devices (`gptoss_jax.sharding.local_rows`)
Share = slice | np.ndarray
WHOLE = slice(None)


def tokenizer_hash(tokenizer: Any) -> str:
    """xxh3-128 of the tokenizer's own JSON (vocabulary, merges, pre-tokenizer, special tokens)."""
    return xxhash.xxh3_128_hexdigest(tokenizer.backend_tokenizer.to_str().encode())


def rows_hash(rows: Batch) -> str:
    """xxh3-128 of all arrays of the rows."""
    state = xxhash.xxh3_128()
    for array in rows:
        state.update(f"{array.dtype}{array.shape}".encode())
        state.update(np.ascontiguousarray(array).data)
    return state.hexdigest()


def one_pass(rows: Batch, batch_size: int, share: Share = WHOLE) -> Iterator[Batch]:
    """All rows once, in order, in batches of one shape: the last is filled up with empty rows (segment 0, weight 0). For evaluation."""
    num_rows = len(rows.tokens_BT)
    for start in range(0, num_rows, batch_size):
        wanted_B = start + np.arange(batch_size)[share]
        taken_B, real_B1 = np.minimum(wanted_B, num_rows - 1), (wanted_B < num_rows)[:, None]
        yield Batch(*(np.where(real_B1, array[taken_B], 0) for array in rows))


class BatchStream:
    """Iterator of `Batch` [batch_size, T] (numpy), or of the rows `share` of each. `state()` is small and fits JSON; `restore(state)` continues with
    the very next batch.

    `rows` are the rows of a whole data set (`Packed.rows`). Row indices of batch k: `indices(k)`.
    """

    def __init__(self, rows: Batch, batch_size: int, seed: int, tokenizer: Any, share: Share = WHOLE):
        num_rows, row_length = rows.tokens_BT.shape
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, it is {batch_size}")
        self.rows, self.share, self.next_batch = rows, share, 0
        self.fingerprint = {
            "rows": rows_hash(rows),
            "num_rows": num_rows,
            "row_length": row_length,
            "batch_size": batch_size,
            "seed": seed,
            "tokenizer": tokenizer_hash(tokenizer),
        }
        self._order = grain.MapDataset.range(num_rows).seed(seed).shuffle().repeat().batch(batch_size)
        self.batches_per_epoch = num_rows / batch_size

    def indices(self, batch: int) -> np.ndarray:
        """int [batch_size]: which rows batch number `batch` consists of."""
        return self._order[batch]

    def __iter__(self) -> "BatchStream":
        return self

    def __next__(self) -> Batch:
        indices = self.indices(self.next_batch)[self.share]
        self.next_batch += 1
        return Batch(*(array[indices] for array in self.rows))

    def digest(self) -> str:
        """xxh3-128 of what the order and content of the batches depend on."""
        return xxhash.xxh3_128_hexdigest(repr(self.fingerprint).encode())

    def state(self) -> dict[str, Any]:
        return {"next_batch": self.next_batch, "fingerprint": dict(self.fingerprint)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved state. Raises UsageError when it belongs to other data, another order or another tokenizer."""
        saved = state["fingerprint"]
        changes = [f"{k}: {saved.get(k)} -> {v}" for k, v in self.fingerprint.items() if saved.get(k) != v]
        if changes:
            raise UsageError("cannot resume, the data differ from those of the saved run: " + ", ".join(changes))
        self.next_batch = state["next_batch"]
