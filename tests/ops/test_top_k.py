"""`top_k` of few entries is `jax.lax.top_k`."""

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.ops.top_k import top_k


def test_values_indices_and_gradient_are_those_of_lax_with_ties_broken_alike():
    x_SE = jnp.round(jax.random.normal(jax.random.key(0), (500, 8)) * 2) / 2 + 0.0  # many ties; lax puts 0.0 before -0.0, which are equal here
    weights_SA = jax.random.normal(jax.random.key(1), (500, 3))
    for ours, theirs in zip(top_k(x_SE, 3), jax.lax.top_k(x_SE, 3)):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype
    gradient = lambda top: jax.grad(lambda x_SE: jnp.sum(weights_SA * top(x_SE, 3)[0]))(x_SE)
    ours, theirs = gradient(top_k), gradient(jax.lax.top_k)
    np.testing.assert_array_equal(ours, theirs)
