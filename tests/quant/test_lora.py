"""Adapters in the experts: values and gradients against dense weights and plain autodiff, and the bits of the merged weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.formats import get_format, mxfp4
from gptoss_jax.ops.experts import expert_mlp
from gptoss_jax.quant import LoraWeight, default_policy, fake_quant, make_expert_quant, merged_weight
from gptoss_jax.quant.lora import quantized

S, A, D, E, F, R = 14, 2, 64, 2, 32, 3
LIMIT, SCALE = 7.0, 0.7


def arrays():
    keys = jax.random.split(jax.random.key(0), 12)
    normal = lambda key, *shape: jax.random.normal(key, shape)
    x, experts, p = normal(keys[0], S, D), jax.random.randint(keys[1], (S, A), 0, E), jax.random.uniform(keys[2], (S, A))
    base = {"gate_up_proj": normal(keys[3], E, 2 * F, D) * 0.2, "down_proj": normal(keys[4], E, D, F) * 0.2}
    biases = normal(keys[5], E, 2 * F), normal(keys[6], E, D)
    factors = {
        "gate_up_proj": (normal(keys[7], E, R, D) * 0.1, normal(keys[8], E, 2 * F, R) * 0.3),
        "down_proj": (normal(keys[9], E, R, F) * 0.1, normal(keys[10], E, D, R) * 0.3),
    }
    return x, experts, p, base, biases, factors


def run(x, experts, p, weights, biases, backend="xla"):
    out = expert_mlp(x, experts, p, weights["gate_up_proj"], biases[0], weights["down_proj"], biases[1], limit=LIMIT, backend=backend)
    return jnp.sum(jnp.sin(out))


def dense(base, a, b, fmt):
    """The merged weight, with the gradient of a plain product; through the format straight-through."""
    product = base + SCALE * jnp.einsum("eor,eri->eoi", b, a)
    if fmt is None:
        return product
    w = jax.lax.stop_gradient(merged_weight(LoraWeight(base, a, b, SCALE))) + (product - jax.lax.stop_gradient(product))
    return fake_quant(w, fmt)


@pytest.mark.parametrize("fmt", [None, "mxfp4"])
def test_value_and_gradients_equal_those_of_dense_weights_under_autodiff(fmt):
    x, experts, p, base, biases, factors = arrays()
    expert_quant = make_expert_quant(fmt and default_policy(fmt), jnp.float32)

    def ours(x, factors, biases):
        weights = {name: expert_quant(name, LoraWeight(base[name], *factors[name], SCALE))[0] for name in base}
        return run(x, experts, p, weights, biases)

    def oracle(x, factors, biases):
        return run(x, experts, p, {name: dense(base[name], *factors[name], fmt) for name in base}, biases)

    got, want = (jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(x, factors, biases) for f in (ours, oracle))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, atol=1e-5 * max(np.abs(w).max(), 1), rtol=1e-5)


def test_one_projection_may_have_adapters_alone():
    x, experts, p, base, biases, factors = arrays()
    expert_quant = make_expert_quant(None, jnp.float32)
    weight = lambda factors: {**base, "down_proj": expert_quant("down_proj", LoraWeight(base["down_proj"], *factors, SCALE))[0]}
    got = jax.jit(jax.grad(lambda f: run(x, experts, p, weight(f), biases)))(factors["down_proj"])
    oracle = lambda f: run(x, experts, p, {**base, "down_proj": dense(base["down_proj"], *f, None)}, biases)
    want = jax.jit(jax.grad(oracle))(factors["down_proj"])
    for g, w in zip(got, want):
        np.testing.assert_allclose(g, w, atol=1e-5 * np.abs(w).max(), rtol=1e-5)


def twelve_bits(x):
    """float32 to 12 significant bits, to nearest even, in integers."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    drop = 23 - 11
    half = (np.uint32(1) << (drop - 1)) - 1 + (bits >> drop & 1)
    return ((bits + half) >> drop << drop).view(np.float32)


def merged_oracle(base, a, b, scale):
    """Products and sums of float32 one at a time, by numpy."""
    a, b = twelve_bits(a), twelve_bits(np.float32(scale) * np.asarray(b))
    change = np.zeros(base.shape, np.float32)
    for k in range(a.shape[1]):
        change = change + b[:, :, k, None] * a[:, k, None, :]
    return np.asarray(base) + change


def test_merged_weight_has_the_same_bits_however_it_is_compiled_and_cut():
    _, _, _, base, _, factors = arrays()
    base, (a, b) = base["gate_up_proj"], factors["gate_up_proj"]
    want = merged_oracle(base, a, b, SCALE)
    stored = LoraWeight(base, a, b, SCALE)
    same = lambda got: np.testing.assert_array_equal(np.asarray(got).view(np.uint32), want.view(np.uint32))
    same(merged_weight(stored))
    same(jax.jit(merged_weight)(stored))
    same(jax.lax.map(merged_weight, stored))
    same(jnp.concatenate([jax.jit(merged_weight)(LoraWeight(base[:, i : i + 8], a, b[:, i : i + 8], SCALE)) for i in range(0, 2 * F, 8)], axis=1))
    assert np.abs(want - (base + SCALE * jnp.einsum("eor,eri->eoi", b, a))).max() < 2**-10 * np.abs(want - base).max()


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_quantized_codes_are_those_of_the_merged_weight_also_over_packed_codes(name):
    _, _, _, base, _, factors = arrays()
    fmt, codes = get_format(name), mxfp4.encode(base["gate_up_proj"])
    for stored in (base["gate_up_proj"].astype(jnp.bfloat16), codes):
        w = LoraWeight(stored, *factors["gate_up_proj"], SCALE)
        adapted, got = jax.jit(lambda w: quantized(w, fmt, jnp.bfloat16))(w)
        want = fmt.encode(merged_weight(w))
        jax.tree.map(np.testing.assert_array_equal, got, want)
        np.testing.assert_array_equal(adapted.weight, fmt.decode(want, jnp.bfloat16))
        assert w.shape == adapted.weight.shape == (E, 2 * F, D) and w.size == adapted.weight.size
