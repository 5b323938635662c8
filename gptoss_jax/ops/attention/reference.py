"""Dense attention with sinks: the whole T x S array of scores, written out. Oracle of the tests."""

import jax.numpy as jnp

from gptoss_jax.ops.attention.keys import Keys
from gptoss_jax.precision import wide

# A masked score. Finite, so that a row without any visible key gives 0 and not NaN; exp(MASKED - m) is exactly 0 for every real maximum m.
MASKED = -1e30


def visible(query_index, key_index, query_segment, key_segment, window: int | None):
    """Causal mask inside a segment; with a window, the last `window` keys including the query itself: q - window < k <= q."""
    see = (key_index <= query_index) & (key_segment == query_segment)
    return see if window is None else see & (query_index - key_index < window)


def softmax_with_sink(scores, sinks):
    """Softmax over the last dim with one further logit per head that takes probability and gives no value.

    Args:
      scores: float32 [..., keys]; sinks: float32, broadcastable to scores without the last dim.
    """
    top = jnp.maximum(jnp.max(scores, axis=-1), sinks)[..., None]
    weights = jnp.exp(scores - top)
    return weights / (jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sinks[..., None] - top))


def sink_gradient(do_BTNH, out_BTNH, lse_BTN, sinks_N):
    """delta = sum_h do o [B, T, N] in the dtype of lse, which every gradient of attention needs, and dsinks = -sum_bt exp(sink - lse) delta.

    Args:
      lse_BTN: float32 (float64 for float64 arrays), log of the softmax's denominator, the sink included.
    """
    delta_BTN = jnp.sum(do_BTNH.astype(lse_BTN.dtype) * out_BTNH.astype(lse_BTN.dtype), axis=-1)
    dsinks_N = -jnp.sum(jnp.exp(sinks_N.astype(lse_BTN.dtype) - lse_BTN) * delta_BTN, axis=(0, 1))
    return delta_BTN, dsinks_N.astype(sinks_N.dtype)


def attention_reference(q_BTNH, k_BSKH, v_BSKH, sinks_N, segment_ids_BT, window=None, keys: Keys | None = None):
    """See `gptoss_jax.ops.attention.attention`."""
    batch, length, heads, head_dim = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    keys = keys or Keys(segment_ids_BT)
    q_BTKGH = q_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    scores_BKGTS = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=wide(q_BTNH.dtype)) * head_dim**-0.5
    index_T, index_S = jnp.arange(length) + (0 if keys.start is None else keys.start), jnp.arange(k_BSKH.shape[1])
    mask_BTS = visible(index_T[:, None], index_S, segment_ids_BT[:, :, None], keys.segment_ids_BS[:, None, :], window)
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, MASKED)
    sinks_KG1 = sinks_N.astype(scores_BKGTS.dtype).reshape(kv_heads, -1, 1)
    probs_BKGTS = softmax_with_sink(scores_BKGTS, sinks_KG1).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("bkgts,bskh->btkgh", probs_BKGTS, v_BSKH, preferred_element_type=wide(q_BTNH.dtype))
    return out_BTKGH.reshape(q_BTNH.shape).astype(q_BTNH.dtype)
