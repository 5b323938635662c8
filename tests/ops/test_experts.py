"""The expert layer, fused and composed, against the definition: every expert on every token, then a selection."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.ops.experts.composed import expert_mlp_composed
from gptoss_jax.ops.experts.fused import expert_mlp_fused
from gptoss_jax.ops.grouped_matmul import group_rows
from gptoss_jax.ops.swiglu import ALPHA
from tests.ops.routing import KINDS, routing

S, A, E, D, F = 23, 3, 8, 20, 14
LIMIT = 0.7  # low, so that both clamps act
WAYS = {"fused": expert_mlp_fused, "composed": expert_mlp_composed}


def inputs(dtype=jnp.float32):
    """x, weights, w_gate_up, bias_up, w_down, bias_down and a cotangent."""
    shapes = (S, D), (S, A), (E, 2 * F, D), (E, 2 * F), (E, D, F), (E, D), (S, D)
    x, weights, *rest = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    cast = lambda a: a.astype(dtype)
    return [cast(x), jax.nn.softmax(weights), *map(cast, rest)]


def by_definition(experts, x, weights, up, bias_up, down, bias_down):
    h_SEU = jnp.einsum("sd,eud->seu", x, up) + bias_up
    gate, value = jnp.minimum(h_SEU[..., 0::2], LIMIT), jnp.clip(h_SEU[..., 1::2], -LIMIT, LIMIT)
    y_SED = jnp.einsum("sef,edf->sed", gate * jax.nn.sigmoid(ALPHA * gate) * (value + 1), down) + bias_down
    return jnp.einsum("sad,sa->sd", jnp.take_along_axis(y_SED, experts[..., None], axis=1), weights)


def value_and_gradients(function, arguments, cotangent):
    loss = lambda *a: jnp.sum(function(*a).astype(jnp.float32) * cotangent.astype(jnp.float32))
    return jax.jit(lambda *a: (function(*a), *jax.grad(loss, argnums=range(6))(*a)))(*arguments)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [2, 8])
def test_value_and_all_gradients_match_the_definition(way, kind, block):
    experts = routing(kind, S, E, A)
    *arguments, cotangent = inputs()
    ours = lambda *a: WAYS[way](*a, group_rows(experts, E, block), LIMIT, "xla")
    got = value_and_gradients(ours, arguments, cotangent)
    expected = value_and_gradients(lambda *a: by_definition(experts, *a), arguments, cotangent)
    for name, a, b in zip(("out", "x", "weights", "up", "bias_up", "down", "bias_down"), got, expected):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5, err_msg=name)


def test_fused_and_composed_are_equal_in_bfloat16_up_to_summation():
    experts = routing("random", S, E, A)
    *arguments, cotangent = inputs(jnp.bfloat16)
    groups = group_rows(experts, E, 4)
    results = [value_and_gradients(lambda *a, way=way: way(*a, groups, LIMIT, "xla"), arguments, cotangent) for way in WAYS.values()]
    exact = value_and_gradients(lambda *a: by_definition(experts, *a), [a.astype(jnp.float32) for a in arguments], cotangent)
    for fused, composed, reference in zip(*results, exact):
        scale = np.abs(reference).max()
        np.testing.assert_allclose(np.float32(fused), np.float32(composed), atol=0.01 * scale)
        np.testing.assert_allclose(np.float32(fused), reference, atol=0.03 * scale)


@pytest.mark.parametrize("way", WAYS)
def test_an_expert_that_is_nan_reaches_only_its_own_tokens(way):
    experts = routing("random", S, E, A)
    x, weights, up, bias_up, down, bias_down, cotangent = inputs()
    poisoned = bias_up.at[3].set(jnp.nan)
    out, dx, *_ = value_and_gradients(
        lambda *a: WAYS[way](*a, group_rows(experts, E, 8), LIMIT, "xla"), (x, weights, up, poisoned, down, bias_down), cotangent
    )
    sent = np.asarray((experts == 3).any(axis=1))
    assert 0 < sent.sum() < S
    np.testing.assert_array_equal(np.isnan(out).any(axis=1), sent)
    np.testing.assert_array_equal(np.isnan(dx).any(axis=1), sent)
