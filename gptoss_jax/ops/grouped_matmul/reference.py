"""Dense oracle of the grouped matmul: every expert on every row, then a selection. O(E) times the work; for tests."""

import jax.numpy as jnp

from gptoss_jax.ops.grouped_matmul.groups import RowGroups


def grouped_matmul_reference(x_PK, w_ENK, bias_EN, groups: RowGroups):
    """Same contract as `grouped_matmul`, by plain autodiff."""
    y_EPN = jnp.einsum("pk,enk->epn", x_PK, w_ENK, preferred_element_type=jnp.float32) + bias_EN[:, None].astype(jnp.float32)
    expert_P = jnp.repeat(groups.block_expert_G, groups.block_rows)
    return jnp.take_along_axis(y_EPN, expert_P[None, :, None], axis=0)[0].astype(x_PK.dtype)
