"""Attention of one new token per row against the keys and values of the tokens before it.

The cache of a layer has S slots a row; the token at position p lies in slot p mod S. With S at least the longest row nothing is ever overwritten; a
sliding layer has S = window and keeps its last `window` tokens, a ring. Which position a slot holds follows from the number of tokens alone
(`slot_positions`), so no array of positions is stored, and padding and old contents need no clearing: they are at positions that are never visible.

The new token's own key and value come beside the cache, not in it: caches of all layers can then be written once per token, in one operation.
Scores and softmax are float32, as in training. Plain XLA; the work is a read of the cache.

Legend: B rows  N query heads  K kv heads  G=N/K  H head dim  S slots
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from gptoss_jax.ops.attention.reference import MASKED


def slot_positions(lengths_B: Int[Array, "B"], slots: int) -> Int[Array, "B S"]:
    """Position of the token in each slot of a row with `lengths_B` tokens; negative where the slot is empty."""
    last_B1 = lengths_B[:, None] - 1
    return last_B1 - (last_B1 - jnp.arange(slots)) % slots


def decode_attention(
    q_BNH: Float[Array, "B N H"],
    k_BKH: Float[Array, "B K H"],
    v_BKH: Float[Array, "B K H"],
    past_k_BKSH: Float[Array, "B K S H"],
    past_v_BKSH: Float[Array, "B K S H"],
    sinks_N: Float[Array, "N"],
    lengths_B: Int[Array, "B"],
    window: int | None = None,
) -> Float[Array, "B N H"]:
    """As `attention` for the token at position `lengths_B` of each row, whose first `lengths_B` tokens are in the cache (the last S of them)."""
    batch, kv_heads, slots, head_dim = past_k_BKSH.shape
    q_BKGH = q_BNH.reshape(batch, kv_heads, -1, head_dim)
    scale = head_dim**-0.5
    dims = (((3,), (3,)), ((0, 1), (0, 1)))
    s_BKGS = lax.dot_general(q_BKGH, past_k_BKSH, dims, preferred_element_type=jnp.float32) * scale
    position_BS = slot_positions(lengths_B, slots)
    see_BS = position_BS >= 0
    if window is not None:
        see_BS &= lengths_B[:, None] - position_BS < window
    s_BKGS = jnp.where(see_BS[:, None, None], s_BKGS, MASKED)
    own_BKG = jnp.sum(q_BKGH.astype(jnp.float32) * k_BKH[:, :, None].astype(jnp.float32), axis=-1) * scale
    sinks_KG = sinks_N.astype(jnp.float32).reshape(kv_heads, -1)

    top_BKG = jnp.maximum(jnp.maximum(jnp.max(s_BKGS, axis=-1), own_BKG), sinks_KG)
    p_BKGS, own_BKG = jnp.exp(s_BKGS - top_BKG[..., None]), jnp.exp(own_BKG - top_BKG)
    sum_BKG = jnp.sum(p_BKGS, axis=-1) + own_BKG + jnp.exp(sinks_KG - top_BKG)
    pv_dims = (((3,), (2,)), ((0, 1), (0, 1)))
    out_BKGH = lax.dot_general(p_BKGS.astype(v_BKH.dtype), past_v_BKSH, pv_dims, preferred_element_type=jnp.float32)
    out_BKGH = out_BKGH + own_BKG[..., None] * v_BKH[:, :, None].astype(jnp.float32)
    return (out_BKGH / sum_BKG[..., None]).reshape(q_BNH.shape).astype(q_BNH.dtype)
