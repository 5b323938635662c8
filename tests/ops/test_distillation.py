"""Blockwise distillation against the whole arrays of logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.ops.cross_entropy import blocks, cross_entropy_sum
from gptoss_jax.ops.distillation import Side, distillation_sums
from gptoss_jax.ops.distillation.reference import distillation_sums_reference

VOCAB, D, TEACHER_D = 37, 12, 20


def case(scale=1.0):
    keys = jax.random.split(jax.random.key(0), 6)
    side = lambda a, b, width: Side(jax.random.normal(a, (3, 7, width)) * scale, jax.random.normal(b, (VOCAB, width)))
    targets = jax.random.randint(keys[4], (3, 7), 0, VOCAB)
    weights = jax.random.uniform(keys[5], (3, 7)).at[0, 2:].set(0)
    return side(keys[0], keys[1], D), side(keys[2], keys[3], TEACHER_D), targets, weights


@pytest.mark.parametrize("weight, temperature", [(1.0, 1.0), (0.3, 1.0), (0.7, 2.5), (0.0, 1.0)])
@pytest.mark.parametrize("block_logits", [1 << 26, VOCAB * 5])
def test_sums_and_gradients_equal_the_reference(monkeypatch, block_logits, weight, temperature):
    monkeypatch.setattr(blocks, "MAX_BLOCK_LOGITS", block_logits)
    student, teacher, targets, weights = case()

    def run(f):
        loss = lambda student: (lambda sums: (sums[0], sums))(f(student, teacher, targets, weights, weight, temperature, jnp.float32))
        (_, sums), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(student)
        return sums, grads

    (sums, grads), (expected, expected_grads) = run(distillation_sums), run(distillation_sums_reference)
    np.testing.assert_allclose(sums, expected, rtol=2e-6)
    for got, want in zip(grads, expected_grads):
        np.testing.assert_allclose(got, want, atol=3e-6)


def test_weight_zero_is_the_cross_entropy():
    student, teacher, targets, weights = case()
    loss, ce, _ = distillation_sums(student, teacher, targets, weights, 0.0, 1.0, jnp.float32)
    expected = cross_entropy_sum(*student, targets, weights, jnp.float32)
    np.testing.assert_allclose([loss, ce], [expected, expected], rtol=1e-6)


def test_a_student_that_is_its_teacher_has_kl_0_and_no_gradient():
    student, _, targets, weights = case()
    loss = lambda s: distillation_sums(s, student, targets, weights, 1.0, 1.0, jnp.float32)[0]
    value, grads = jax.value_and_grad(loss)(student)
    assert value == 0 and all(jnp.abs(g).max() == 0 for g in grads)


def test_large_logits_stay_finite():
    student, teacher, targets, weights = case(scale=1e3)
    value, grads = jax.value_and_grad(lambda s: distillation_sums(s, teacher, targets, weights, 1.0, 1.0, jnp.float32)[0])(student)
    assert jnp.isfinite(value) and all(jnp.isfinite(g).all() for g in grads)


def test_nothing_flows_to_the_teacher():
    student, teacher, targets, weights = case()
    grads = jax.grad(lambda t: distillation_sums(student, t, targets, weights, 0.5, 1.0, jnp.float32)[0])(teacher)
    assert all((g == 0).all() for g in grads)
