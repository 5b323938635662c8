"""Routing to blocks, dispatch, combine and the grouped matmul: values and gradients against dense oracles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.ops.grouped_matmul import combine, dispatch, group_rows, grouped_matmul
from gptoss_jax.ops.grouped_matmul.reference import grouped_matmul_reference

S, A, E, K, N = 23, 3, 8, 20, 14


def routing(kind: str):
    """[S, A] distinct experts per token."""
    if kind == "one_takes_all":
        return jnp.tile(jnp.array([[5, 0, 1]]), (S, 1))
    if kind == "empty_experts":
        return jnp.stack([jax.random.permutation(jax.random.key(s), 3) + 4 for s in range(S)])
    return jnp.stack([jax.random.permutation(jax.random.key(s), E)[:A] for s in range(S)])


@pytest.mark.parametrize("block", [1, 4, 7, 64])
@pytest.mark.parametrize("kind", ["random", "one_takes_all", "empty_experts"])
def test_every_assignment_has_one_slot_in_a_block_of_its_expert(kind, block):
    experts = routing(kind)
    groups = group_rows(experts, E, block)
    slots = np.asarray(groups.slot_SA).ravel()
    assert len(set(slots.tolist())) == S * A
    np.testing.assert_array_equal(np.asarray(groups.assignment_P)[slots], np.arange(S * A))
    np.testing.assert_array_equal(np.asarray(groups.block_expert_G)[slots // block], np.asarray(experts).ravel())
    assert slots.max() < int(groups.num_blocks) * block <= groups.assignment_P.shape[0]
    np.testing.assert_array_equal(groups.group_sizes_E, np.bincount(np.asarray(experts).ravel(), minlength=E))


@pytest.mark.parametrize("block", [4, 64])
@pytest.mark.parametrize("kind", ["random", "one_takes_all", "empty_experts"])
def test_expert_layer_and_all_gradients_match_a_loop_over_assignments(kind, block):
    experts = routing(kind)
    keys = jax.random.split(jax.random.key(9), 5)
    x, w, bias = jax.random.normal(keys[0], (S, K)), jax.random.normal(keys[1], (E, N, K)), jax.random.normal(keys[2], (E, N))
    weights, cotangent = jax.random.uniform(keys[3], (S, A)), jax.random.normal(keys[4], (S, N))

    def ours(x, w, bias, weights):
        groups = group_rows(experts, E, block)
        return jnp.sum(combine(grouped_matmul(dispatch(x, groups), w, bias, groups), weights, groups) * cotangent)

    def dense(x, w, bias, weights):
        y_SEN = jnp.einsum("sk,enk->sen", x, w) + bias
        chosen = jnp.take_along_axis(y_SEN, experts[..., None], axis=1)
        return jnp.sum(jnp.einsum("san,sa->sn", chosen, weights) * cotangent)

    value, grads = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2, 3)))(x, w, bias, weights)
    expected, expected_grads = jax.value_and_grad(dense, argnums=(0, 1, 2, 3))(x, w, bias, weights)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for got, want in zip(grads, expected_grads):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_slots_in_use_match_the_reference_and_padding_does_not_leak():
    groups = group_rows(routing("random"), E, 4)
    x = dispatch(jax.random.normal(jax.random.key(0), (S, K)), groups)
    w, bias = jax.random.normal(jax.random.key(1), (E, N, K)), jnp.full((E, N), jnp.nan).at[:, 0].set(1.0)
    used = np.sort(np.asarray(groups.slot_SA).ravel())
    finite = jnp.zeros((E, N))
    np.testing.assert_allclose(grouped_matmul(x, w, finite, groups)[used], grouped_matmul_reference(x, w, finite, groups)[used], atol=1e-5)

    # a bias of one expert that is NaN may only reach tokens routed there
    experts = routing("empty_experts")
    groups = group_rows(experts, E, 4)
    poisoned = jnp.zeros((E, N)).at[0].set(jnp.nan)
    y = grouped_matmul(dispatch(jnp.ones((S, K)), groups), w, poisoned, groups)
    assert np.isfinite(combine(y, jnp.ones((S, A)), groups)).all()
    assert np.isnan(bias).any()


def test_work_follows_routed_rows_not_experts():
    """The loop's trip count is the number of blocks in use: 32 experts cost as many blocks as their rows fill."""
    experts = jnp.tile(jnp.array([[3, 17]]), (256, 1))
    groups = group_rows(experts, 32, 64)
    assert int(groups.num_blocks) == 256 * 2 // 64
