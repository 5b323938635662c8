"""Sliding chunks against the dense oracle, and the dense oracle against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.ops.attention import attention
from gptoss_jax.ops.attention.blockwise import blockwise_attention
from gptoss_jax.ops.attention.reference import attention_reference

B, N, K, H = 2, 6, 2, 10


def inputs(length, seed=0):
    keys = jax.random.split(jax.random.key(seed), 5)
    q = jax.random.normal(keys[0], (B, length, N, H))
    k, v = jax.random.normal(keys[1], (B, length, K, H)), jax.random.normal(keys[2], (B, length, K, H))
    sinks = jax.random.normal(keys[3], (N,))
    cuts = np.arange(length)
    segments = jnp.array([1 + (cuts > length // 3) + (cuts > length // 2), np.where(cuts < length - 3, 1, 0)], jnp.int32)
    return q, k, v, sinks, segments


def by_definition(q, k, v, sinks, segments, window):
    """Token by token with float64 softmax over the visible keys and the sink."""
    out = np.zeros(q.shape)
    for b in range(B):
        for t in range(q.shape[1]):
            for n in range(N):
                keys = [u for u in range(t + 1) if segments[b, u] == segments[b, t] and (window is None or u > t - window)]
                scores = [float(q[b, t, n] @ k[b, u, n // (N // K)]) / H**0.5 for u in keys]
                weights = np.exp(scores) / (np.exp(scores).sum() + np.exp(float(sinks[n])))
                out[b, t, n] = sum(w * v[b, u, n // (N // K)] for w, u in zip(weights, keys))
    return out


@pytest.mark.parametrize("window", [None, 1, 4])
def test_dense_attention_follows_the_definition(window):
    args = [np.asarray(x, np.float64) for x in inputs(11)]
    np.testing.assert_allclose(attention_reference(*inputs(11), window), by_definition(*args, window), atol=1e-6)


@pytest.mark.parametrize("length,window", [(1, 4), (4, 4), (9, 4), (32, 4), (33, 7), (40, 1)])
def test_sliding_chunks_equal_dense_values_and_gradients(length, window):
    args = inputs(length)
    cotangent = jax.random.normal(jax.random.key(7), args[0].shape)

    def run(function):
        loss = lambda q, k, v, s: jnp.sum(function(q, k, v, s, args[4], window) * cotangent)
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(*args[:4])

    (value, grads), (expected, expected_grads) = run(blockwise_attention), run(attention_reference)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
    for got, want in zip(grads, expected_grads):
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("sink", [-1e4, 1e4])
def test_huge_sinks_stay_finite(window, sink):
    q, k, v, _, segments = inputs(20)
    sinks = jnp.full((N,), sink)
    out, grads = jax.value_and_grad(lambda q, s: jnp.sum(attention(q, k, v, s, segments, window)), argnums=(0, 1))(q, sinks)
    assert np.isfinite(out) and all(np.isfinite(g).all() for g in grads)
    assert (abs(float(out)) < 1e-6) == (sink > 0)


def test_sliding_attention_memory_does_not_grow_with_the_square_of_the_row():
    def temp_bytes(length):
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs(length)]
        return jax.jit(lambda *a: attention(*a, window=8)).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temp_bytes(2048) < 2.5 * temp_bytes(1024)
