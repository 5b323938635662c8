"""Gradients through another weight than the one that computes, and inputs of products rounded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.formats import Mxfp8, Nvfp4
from gptoss_jax.ops.experts import expert_mlp
from gptoss_jax.quant import QuantPolicy, TwoWay, activation_rounding, default_policy, fake_quant, make_expert_quant

S, A, D, E, F = 9, 2, 64, 3, 32
LIMIT = 7.0


def arrays():
    keys = jax.random.split(jax.random.key(0), 7)
    normal = lambda key, *shape: jax.random.normal(key, shape)
    experts = jax.random.randint(keys[0], (S, A), 0, E)
    return (normal(keys[1], S, D), experts, jax.random.uniform(keys[2], (S, A)),
            normal(keys[3], E, 2 * F, D) * 0.2, normal(keys[4], E, 2 * F), normal(keys[5], E, D, F) * 0.2, normal(keys[6], E, D))  # fmt: skip


def swiglu(h):
    gate, up = jnp.minimum(h[..., ::2], LIMIT), jnp.clip(h[..., 1::2], -LIMIT, LIMIT)
    return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)


def by_definition(product, rounded, x, experts, p, w_up, b_up, w_down, b_down):
    """Every token through each of its experts; `product(x, w)` is x @ w.T."""
    of = lambda w, e: jax.tree.map(lambda leaf: leaf[e], w)
    out = []
    for s in range(S):
        rows = [product(rounded(swiglu(product(rounded(x[s]), of(w_up, e)) + b_up[e])), of(w_down, e)) + b_down[e] for e in experts[s]]
        out.append(sum(p[s, a] * row for a, row in enumerate(rows)))
    return jnp.stack(out)


@jax.custom_vjp
def product_two_way(x, w):
    return w.forward @ x


product_two_way.defvjp(
    lambda x, w: (w.forward @ x, (x, w)), lambda kept, dy: (dy @ kept[1].backward, TwoWay(jnp.outer(dy, kept[0]), jnp.zeros_like(kept[1].backward)))
)


def test_input_gradients_go_through_the_backward_weight_and_weight_gradients_to_the_forward_weight():
    x, experts, p, w_up, b_up, w_down, b_down = arrays()
    two_way = lambda w: TwoWay(fake_quant(w, "mxfp4"), w)
    loss = lambda run: lambda x, w_up, w_down: jnp.sum(jnp.sin(run(x, experts, p, two_way(w_up), b_up, two_way(w_down), b_down)))
    ours = jax.value_and_grad(loss(lambda *a: expert_mlp(*a, limit=LIMIT)), argnums=(0, 1, 2))(x, w_up, w_down)
    defined = jax.value_and_grad(loss(lambda *a: by_definition(product_two_way, lambda v: v, *a)), argnums=(0, 1, 2))(x, w_up, w_down)
    for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(defined)):
        np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max(), rtol=0)
    one_way = jax.grad(loss(lambda x, e, p, up, b_up, down, b_down: expert_mlp(x, e, p, up.forward, b_up, down.forward, b_down, limit=LIMIT)))(
        x, w_up, w_down
    )
    assert np.abs(ours[1][0] - one_way).max() > 1e-2 * np.abs(one_way).max()


@pytest.mark.parametrize("fmt", [Mxfp8(), Nvfp4(tensor_amax=8.0)], ids=lambda fmt: fmt.name)
def test_inputs_of_both_products_are_rounded_in_training_and_generation(fmt):
    from gptoss_jax.ops.experts.inference import expert_mlp_inference

    x, experts, p, *weights = arrays()
    policy = QuantPolicy(default_policy("mxfp4").rules, activations=fmt)
    rounded = activation_rounding(make_expert_quant(policy, jnp.float32))
    want = by_definition(lambda x, w: w @ x, lambda v: fake_quant(v[None], fmt)[0], x, experts, p, *weights)
    plain = by_definition(lambda x, w: w @ x, lambda v: v, x, experts, p, *weights)
    assert np.abs(want - plain).max() > 1e-3
    got = expert_mlp(x, experts, p, *weights, limit=LIMIT, activations=rounded)
    # a sum in another order can move an activation to the neighbouring code
    assert np.abs(got - want).max() < 0.05 * np.abs(want - plain).max()
    for rows in (slice(None), slice(1)):
        generated = expert_mlp_inference(x[rows], experts[rows], p[rows], *weights, first=0, num_experts=E, limit=LIMIT, activations=rounded)
        assert np.abs(generated - want[rows]).max() < 0.05 * np.abs(want - plain).max()


def test_policy_is_recorded_and_refuses_activations_whose_rounding_depends_on_other_rows():
    policy = QuantPolicy(default_policy("mxfp4").rules, backward_weight="original", activations=Mxfp8("e5m2"))
    assert QuantPolicy.from_dict(policy.to_dict()) == policy
    assert QuantPolicy.from_dict({"rules": policy.to_dict()["rules"]}) == default_policy("mxfp4")
    with pytest.raises(ValueError, match="rows of other tokens"):
        QuantPolicy(policy.rules, activations=Nvfp4())
    with pytest.raises(ValueError, match="backward_weight = 'both' is not quantized or original"):
        QuantPolicy(policy.rules, backward_weight="both")
