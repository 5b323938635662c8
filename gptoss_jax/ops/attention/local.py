"""Sliding-window attention at O(T * window): queries in chunks of one window, each against its own and the previous chunk of keys.

A query sees the keys q - window < k <= q, which lie in those two chunks, so the result equals the dense one exactly up to rounding.

Legend: B batch  C chunks  W window = queries of a chunk  X = 2W keys of a chunk  K kv heads  G query heads per kv head  H head dim
"""

import jax.numpy as jnp

from gptoss_jax.ops.attention.reference import MASKED, softmax_with_sink, visible


def local_attention(q_BTNH, k_BTKH, v_BTKH, sinks_N, segment_ids_BT, window: int):
    """See `gptoss_jax.ops.attention.attention`; `window` is static."""
    batch, length, heads, head_dim = q_BTNH.shape
    kv_heads = k_BTKH.shape[2]
    chunks = -(-length // window)

    def chunked(x, fill=0):
        pad = [(0, 0)] * x.ndim
        pad[1] = (0, chunks * window - length)
        return jnp.pad(x, pad, constant_values=fill).reshape(batch, chunks, window, *x.shape[2:])

    def with_previous(x_BCW, fill=0):
        previous = jnp.pad(x_BCW[:, :-1], [(0, 0), (1, 0)] + [(0, 0)] * (x_BCW.ndim - 2), constant_values=fill)
        return jnp.concatenate([previous, x_BCW], axis=2)

    q_BCWKGH = chunked(q_BTNH).reshape(batch, chunks, window, kv_heads, heads // kv_heads, head_dim)
    k_BCXKH, v_BCXKH = with_previous(chunked(k_BTKH)), with_previous(chunked(v_BTKH))
    # -1 marks keys before the row's start and after its end: no query carries that segment
    segments_BCW = chunked(segment_ids_BT, fill=-1)
    segments_BCX = with_previous(segments_BCW, fill=-1)

    scores = jnp.einsum("bcwkgh,bcxkh->bckgwx", q_BCWKGH, k_BCXKH, preferred_element_type=jnp.float32) * head_dim**-0.5
    query_index, key_index = jnp.arange(window)[:, None], jnp.arange(-window, window)
    mask_BCWX = visible(query_index, key_index, segments_BCW[..., None], segments_BCX[:, :, None], window)
    scores = jnp.where(mask_BCWX[:, :, None, None], scores, MASKED)
    probs = softmax_with_sink(scores, sinks_N.astype(jnp.float32).reshape(kv_heads, -1, 1)).astype(v_BTKH.dtype)
    out = jnp.einsum("bckgwx,bcxkh->bcwkgh", probs, v_BCXKH, preferred_element_type=jnp.float32)
    return out.reshape(batch, chunks * window, heads, head_dim)[:, :length].astype(q_BTNH.dtype)
