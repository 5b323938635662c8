"""Expert choices that shake a grouped product: [S, A] distinct experts per token."""

import jax
import jax.numpy as jnp

KINDS = ("random", "one_takes_all", "empty_experts")


def routing(kind: str, tokens: int, experts: int, per_token: int):
    if kind == "one_takes_all":
        return jnp.tile((jnp.arange(per_token) * 2 + 5) % experts, (tokens, 1))
    choice = jnp.stack([jax.random.permutation(jax.random.key(s), experts if kind == "random" else per_token) for s in range(tokens)])
    return choice[:, :per_token] + (experts - per_token if kind == "empty_experts" else 0)
