"""Grouped-query attention with rotary positions and one learned sink logit per query head."""

from functools import partial

import jax
from flax import nnx
from jaxtyping import Array, Float

from gptoss_jax.model.cache import LayerCache
from gptoss_jax.model.config import SLIDING, GptOssConfig
from gptoss_jax.model.context import Context
from gptoss_jax.model.layers import Linear
from gptoss_jax.model.rope import rotate
from gptoss_jax.model.weights import weight
from gptoss_jax.ops.attention import attention
from gptoss_jax.ops.attention.decode import decode_attention
from gptoss_jax.ops.remat import product


class Attention(nnx.Module):
    def __init__(self, config: GptOssConfig, kind: str, *, rngs, dtype, layers: int | None):
        self.config = config
        self.window = config.sliding_window if kind == SLIDING else None
        q_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        make = dict(rngs=rngs, dtype=dtype, layers=layers)
        self.q_proj = Linear(config.hidden_size, q_size, ("heads", "embed"), **make)
        self.k_proj = Linear(config.hidden_size, kv_size, ("kv_heads", "embed"), **make)
        self.v_proj = Linear(config.hidden_size, kv_size, ("kv_heads", "embed"), **make)
        self.o_proj = Linear(q_size, config.hidden_size, ("embed", "heads"), **make)
        self.sinks = weight(rngs, (config.num_attention_heads,), ("heads",), layers=layers, dtype=dtype, init="zeros")

    def project(self, x_BTD: Float[Array, "B T D"], context: Context):
        """Rotated queries and keys, and values: [B, T, heads, H]."""
        heads = lambda x: x.reshape(*x_BTD.shape[:2], -1, self.config.head_dim)
        q_BTNH = rotate(product(heads(self.q_proj(x_BTD))), context.cos_BTC, context.sin_BTC)
        k_BTKH = rotate(product(heads(self.k_proj(x_BTD))), context.cos_BTC, context.sin_BTC)
        return q_BTNH, k_BTKH, product(heads(self.v_proj(x_BTD)))

    @jax.named_scope("attention")
    def __call__(self, x_BTD: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"]:
        q_BTNH, k_BTKH, v_BTKH = self.project(x_BTD, context)
        run = partial(attention, window=self.window, backend=context.backend)
        if context.distribute is not None:
            run = context.distribute.attention(run, self.window)
        out_BTNH = run(q_BTNH, k_BTKH, v_BTKH, self.sinks[...], context.segment_ids_BT)
        return self.o_proj(out_BTNH.reshape(*x_BTD.shape[:2], -1))

    @jax.named_scope("attention")
    def cached(self, x_BTD: Float[Array, "B T D"], context: Context, past: LayerCache | None):
        """The same with the keys and values of x beside it, [B, K, T, H] each: of a prompt (past None), or of one token after what `past` holds."""
        q_BTNH, k_BTKH, v_BTKH = self.project(x_BTD, context)
        if past is None:
            out_BTNH = attention(q_BTNH, k_BTKH, v_BTKH, self.sinks[...], context.segment_ids_BT, self.window, context.backend)
        else:
            new = q_BTNH[:, 0], k_BTKH[:, 0], v_BTKH[:, 0]
            out_BTNH = decode_attention(*new, past.k, past.v, self.sinks[...], context.lengths_B, self.window)
        return self.o_proj(out_BTNH.reshape(*x_BTD.shape[:2], -1)), LayerCache(k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2))
