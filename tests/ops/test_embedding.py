"""Gradient of an embedding table: that of indexing in float32, and no worse than one rounding in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.ops.embedding import embedding, sum_scattered, sum_sorted


def test_gradient_is_summed_in_float32_also_for_a_bfloat16_table():
    rng = np.random.default_rng(0)
    weight_VD = jnp.asarray(rng.standard_normal((50, 24)), jnp.float32)
    tokens_BT = jnp.asarray(np.where(rng.random((4, 512)) < 0.5, 7, rng.integers(0, 50, (4, 512))))
    dx_BTD = jnp.asarray(rng.standard_normal((4, 512, 24)) + 0.5, jnp.bfloat16).astype(jnp.float32)

    def gradient(read, dtype):
        return jax.grad(lambda weight: jnp.sum(read(weight, tokens_BT) * dx_BTD))(weight_VD.astype(dtype))

    expected = gradient(lambda weight, tokens: weight[tokens], jnp.float32)
    np.testing.assert_array_equal(gradient(embedding, jnp.float32), expected)
    ours, plain = (np.asarray(gradient(read, jnp.bfloat16), np.float32) for read in (embedding, lambda weight, tokens: weight[tokens]))
    np.testing.assert_allclose(ours, expected, rtol=2**-8)
    assert np.linalg.norm(plain - expected) > 0.02 * np.linalg.norm(expected), "the mistake that this guards against"


def test_sorted_sum_equals_the_scatter_add():
    rng = np.random.default_rng(1)
    tokens_S = jnp.asarray(np.concatenate([rng.integers(0, 20, 300), np.full(200, 3), [19]]))
    rows_SD = jnp.asarray(rng.standard_normal((501, 24)), jnp.float32)
    ours = jax.jit(sum_sorted, static_argnums=2)(rows_SD, tokens_S, 20)
    exact = np.zeros((20, 24))
    np.add.at(exact, np.asarray(tokens_S), np.asarray(rows_SD, np.float64))
    np.testing.assert_allclose(ours, exact, atol=1e-5)
    np.testing.assert_allclose(ours, sum_scattered(rows_SD, tokens_S, 20), atol=1e-5)
