"""Grouped matmul in plain XLA: a loop over the blocks in use, one dense product per block.

    forward   y[block]  = x[block] @ w[e].T + bias[e]
    backward  dx[block] = dy[block] @ w[e]      dw[e] += dy[block].T @ x[block]      dbias[e] += sum over the block's rows of dy

with e the block's expert. The trip count is the number of blocks in use, so work is proportional to routed rows (plus less than one block per
expert), unlike `jax.lax.ragged_dot`, which expands to all experts on CPU and CUDA. Products accumulate in float32; weight and bias gradients
are summed over blocks in float32 and rounded once.

Legend: P slots  G blocks  M rows of a block  E experts  N outputs  K inputs
"""

import jax
import jax.numpy as jnp
from jax import lax

from gptoss_jax.ops.grouped_matmul.groups import RowGroups


def _dot(a, b, contract):
    return lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)


def _block(x_PK, g, rows):
    return lax.dynamic_slice_in_dim(x_PK, g * rows, rows)


@jax.custom_vjp
def grouped_matmul_xla(x_PK, w_ENK, bias_EN, groups: RowGroups):
    """See `gptoss_jax.ops.grouped_matmul.grouped_matmul`."""
    rows = groups.block_rows

    def body(g, y_PN):
        e = groups.block_expert_G[g]
        y_MN = _dot(_block(x_PK, g, rows), w_ENK[e], ((1,), (1,))) + bias_EN[e].astype(jnp.float32)
        return lax.dynamic_update_slice_in_dim(y_PN, y_MN.astype(y_PN.dtype), g * rows, 0)

    y_PN = jnp.zeros((x_PK.shape[0], w_ENK.shape[1]), x_PK.dtype)
    return lax.fori_loop(0, groups.num_blocks, body, y_PN)


def _fwd(x_PK, w_ENK, bias_EN, groups):
    return grouped_matmul_xla(x_PK, w_ENK, bias_EN, groups), (x_PK, w_ENK, bias_EN, groups)


def _bwd(residual, dy_PN):
    x_PK, w_ENK, bias_EN, groups = residual
    rows = groups.block_rows

    def body(g, carry):
        dx_PK, dw_ENK, dbias_EN = carry
        e = groups.block_expert_G[g]
        dy_MN = _block(dy_PN, g, rows)
        dx_MK = _dot(dy_MN, w_ENK[e], ((1,), (0,))).astype(dx_PK.dtype)
        dx_PK = lax.dynamic_update_slice_in_dim(dx_PK, dx_MK, g * rows, 0)
        dw_ENK = dw_ENK.at[e].add(_dot(dy_MN, _block(x_PK, g, rows), ((0,), (0,))))
        dbias_EN = dbias_EN.at[e].add(jnp.sum(dy_MN, axis=0, dtype=jnp.float32))
        return dx_PK, dw_ENK, dbias_EN

    start = jnp.zeros_like(x_PK), jnp.zeros(w_ENK.shape, jnp.float32), jnp.zeros(bias_EN.shape, jnp.float32)
    dx_PK, dw_ENK, dbias_EN = lax.fori_loop(0, groups.num_blocks, body, start)
    return dx_PK, dw_ENK.astype(w_ENK.dtype), dbias_EN.astype(bias_EN.dtype), None


grouped_matmul_xla.defvjp(_fwd, _bwd)
