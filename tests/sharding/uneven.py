"""Parameters and a batch with which no two devices have the same work."""

import jax.numpy as jnp

from scripts.bench.batches import random_batch
from tests.support.params import lively_params


def uneven(config, rows=8, length=24):
    """One expert is never chosen in the first layers, another by nearly all tokens; rows hold documents that end anywhere, some padding, and a
    weight of its own for every token."""
    params = lively_params(config)
    for name in params:
        if name.endswith("router.bias"):
            params[name] = params[name].at[..., 2].add(-100.0).at[..., 5].add(5.0)
    batch = random_batch(config.vocab_size, rows, length, seed=3)
    row_B1, token_T = jnp.arange(rows)[:, None], jnp.arange(length)
    cut_B1 = 3 + 2 * row_B1
    segments_BT = jnp.where(token_T < cut_B1, 1, 2) * (token_T < length - row_B1 % 3)
    weights_BT = jnp.where(segments_BT > 0, 0.5 + jnp.cos(token_T + row_B1) ** 2, 0)
    positions_BT = jnp.where(token_T < cut_B1, token_T, token_T - cut_B1)
    return params, batch._replace(segment_ids_BT=segments_BT, loss_weights_BT=weights_BT.astype(jnp.float32), positions_BT=positions_BT)
