"""Cross-entropy over the whole array of logits. Oracle of the tests."""

import jax
import jax.numpy as jnp

from gptoss_jax.precision import wide


def cross_entropy_sum_reference(hidden_BTD, w_VD, targets_BT, weights_BT, dtype=jnp.float32):
    """See `gptoss_jax.ops.cross_entropy.cross_entropy_sum`."""
    logits_BTV = jnp.einsum("btd,vd->btv", hidden_BTD.astype(dtype), w_VD.astype(dtype), preferred_element_type=wide(dtype))
    picked_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jnp.sum(weights_BT * (jax.nn.logsumexp(logits_BTV, axis=-1) - picked_BT))
