"""Random tokens as a batch of full rows of one document each; every token is trained."""

import jax
import jax.numpy as jnp

from gptoss_jax.data import Batch


def random_batch(vocab_size: int, rows: int, length: int, seed: int = 1) -> Batch:
    """Arrays on the default device."""
    tokens = jax.random.randint(jax.random.key(seed), (rows, length), 0, vocab_size, jnp.int32)
    ones = jnp.ones(tokens.shape, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
    return Batch(
        tokens_BT=tokens,
        targets_BT=jnp.roll(tokens, -1, axis=1),
        loss_weights_BT=ones.astype(jnp.float32),
        segment_ids_BT=ones,
        positions_BT=positions,
    )
