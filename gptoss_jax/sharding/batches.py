"""A global batch from the rows that each process made: every process makes the rows of its own devices, no more.

Legend: B rows of the global batch  b rows of a process  T tokens of a row
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding


def local_rows(num_rows: int, length: int, sharding: Sharding) -> np.ndarray:
    """int [b], ascending: the rows of a batch [B, T] of which this process's devices hold a part. Where a mesh axis that cuts no rows (tensor,
    context) spans processes, several of them make the same row."""
    parts = sharding.addressable_devices_indices_map((num_rows, length)).values()
    return np.unique(np.concatenate([np.arange(num_rows)[rows] for rows, _ in parts]))


def place_rows(batch: Any, num_rows: int, sharding: Sharding) -> Any:
    """The arrays [B, T] on the devices of all processes.

    Args:
      batch: tree of numpy arrays [b, T], whole rows: those of `local_rows` of this process. With a single process all rows.
      num_rows: B; not used by a single process.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(batch, sharding)

    def place(local_bT: np.ndarray) -> jax.Array:
        shape = (num_rows, local_bT.shape[1])
        here = local_rows(*shape, sharding)
        if len(here) != len(local_bT):
            raise ValueError(f"this process holds {len(here)} of {num_rows} rows, but was given {len(local_bT)}")

        def part(index):
            wanted = np.arange(num_rows)[index[0]]
            return local_bT[np.searchsorted(here, wanted), index[1]]

        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(place, batch)
