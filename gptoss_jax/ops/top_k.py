"""The k largest of a few, in elementwise operations and reductions.

On a mesh the compiler cuts those along the tokens, while it makes the operand of `jax.lax.top_k` whole on every device: the router logits of all
tokens, [65536, 32] float32 in a step of 16 rows of 4096 tokens, once per layer and pass, growing with the number of devices.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def top_k(x_SE: Float[Array, "*S E"], k: int) -> tuple[Float[Array, "*S A"], Int[Array, "*S A"]]:
    """`jax.lax.top_k` of rows with at least k entries above -inf: values in descending order and their indices; of equals (0.0 and -0.0 are) the
    first. Differentiable in the values."""
    index_E = jnp.arange(x_SE.shape[-1])
    values, indices, left_SE = [], [], x_SE
    for _ in range(k):
        index_S = jnp.argmax(left_SE, axis=-1).astype(jnp.int32)
        here_SE = index_E == index_S[..., None]
        values.append(jnp.sum(jnp.where(here_SE, x_SE, 0), axis=-1))
        indices.append(index_S)
        left_SE = jnp.where(here_SE, -jnp.inf, left_SE)
    return jnp.stack(values, axis=-1), jnp.stack(indices, axis=-1)
