"""The dtype of sums: one rule for the whole library."""

import jax.numpy as jnp


def wide(dtype) -> jnp.dtype:
    """What products of `dtype` are accumulated in, and what norms, softmax, routing, loss and sums of gradients run in: float32 for float32 and
    everything narrower, float64 for float64. With float64 (tests only: `jax.enable_x64`) two layouts of one computation agree to 1e-10 or
    one of them is wrong; in float32 a small mistake can hide in the rounding."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
