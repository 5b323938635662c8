"""Distillation loss over the whole arrays of logits. Oracle of the tests."""

import jax
import jax.numpy as jnp

from gptoss_jax.precision import wide


def distillation_sums_reference(student, teacher, targets_BT, weights_BT, weight, temperature, dtype=jnp.float32):
    """See `gptoss_jax.ops.distillation.distillation_sums`."""
    logits = lambda side: jnp.einsum("btd,vd->btv", side[0].astype(dtype), side[1].astype(dtype), preferred_element_type=wide(dtype))
    z_BTV, z_teacher_BTV = logits(student), logits(teacher)
    log_p, log_q = jax.nn.log_softmax(z_teacher_BTV / temperature), jax.nn.log_softmax(z_BTV / temperature)
    kl = jnp.sum(weights_BT * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))
    picked_BT = jnp.take_along_axis(z_BTV, targets_BT[..., None], axis=-1)[..., 0]
    cross_entropy = jnp.sum(weights_BT * (jax.nn.logsumexp(z_BTV, axis=-1) - picked_BT))
    return (1 - weight) * cross_entropy + weight * temperature**2 * kl, cross_entropy, kl
