"""Blockwise cross-entropy against the whole array of logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptoss_jax.ops.cross_entropy as op
from gptoss_jax.ops.cross_entropy import blocks
from gptoss_jax.ops.cross_entropy.reference import cross_entropy_sum_reference


@pytest.mark.parametrize("block_logits", [1 << 26, 37 * 5, 37])
def test_value_and_gradients_do_not_depend_on_the_blocks(monkeypatch, block_logits):
    monkeypatch.setattr(blocks, "MAX_BLOCK_LOGITS", block_logits)
    hidden, w = jax.random.normal(jax.random.key(0), (3, 7, 12)), jax.random.normal(jax.random.key(1), (37, 12))
    targets = jax.random.randint(jax.random.key(2), (3, 7), 0, 37)
    weights = jax.random.uniform(jax.random.key(3), (3, 7)).at[0, 2:].set(0)
    run = lambda f: jax.jit(jax.value_and_grad(lambda h, w: f(h, w, targets, weights, jnp.float32), argnums=(0, 1)))(hidden, w)
    (value, grads), (expected, expected_grads) = run(op.cross_entropy_sum), run(cross_entropy_sum_reference)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for got, want in zip(grads, expected_grads):
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_peak_memory_does_not_hold_all_logits(monkeypatch):
    monkeypatch.setattr(blocks, "MAX_BLOCK_LOGITS", 1 << 16)
    arguments = ((4, 512, 8), jnp.float32), ((1024, 8), jnp.float32), ((4, 512), jnp.int32), ((4, 512), jnp.float32)
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in arguments]
    compiled = jax.jit(jax.grad(lambda h, w, t, u: op.cross_entropy_sum(h, w, t, u, jnp.float32), argnums=(0, 1))).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 512 * 1024 * 4 / 4


def test_token_losses_add_up_and_name_the_most_probable_token(monkeypatch):
    monkeypatch.setattr(blocks, "MAX_BLOCK_LOGITS", 37 * 5)
    hidden, w = jax.random.normal(jax.random.key(0), (3, 7, 12)), jax.random.normal(jax.random.key(1), (37, 12))
    targets = jax.random.randint(jax.random.key(2), (3, 7), 0, 37)
    losses, best = op.token_losses(hidden, w, targets, jnp.float32)
    np.testing.assert_allclose(jnp.sum(losses), cross_entropy_sum_reference(hidden, w, targets, jnp.ones((3, 7))), rtol=1e-6)
    np.testing.assert_array_equal(best, jnp.argmax(jnp.einsum("btd,vd->btv", hidden, w), axis=-1))
