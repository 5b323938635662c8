"""Grouped-query attention with rotary positions and one learned sink logit per query head."""

from functools import partial

import jax
from flax import nnx
from jaxtyping import Array, Float

from gptoss_jax.model.config import SLIDING, GptOssConfig
from gptoss_jax.model.context import Context
from gptoss_jax.model.layers import Linear
from gptoss_jax.model.rope import rotate
from gptoss_jax.model.weights import weight
from gptoss_jax.ops.attention import attention
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

    @jax.named_scope("attention")
    def __call__(self, x_BTD: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"]:
        batch, length, _ = x_BTD.shape
        heads = lambda x: x.reshape(batch, length, -1, self.config.head_dim)
        q_BTNH = rotate(product(heads(self.q_proj(x_BTD))), context.cos_BTC, context.sin_BTC)
        k_BTKH = rotate(product(heads(self.k_proj(x_BTD))), context.cos_BTC, context.sin_BTC)
        v_BTKH = product(heads(self.v_proj(x_BTD)))
        run = partial(attention, window=self.window, backend=context.backend)
        if context.distribute is not None:
            run = context.distribute.attention(run, self.window)
        out_BTNH = run(q_BTNH, k_BTKH, v_BTKH, self.sinks[...], context.segment_ids_BT)
        return self.o_proj(out_BTNH.reshape(batch, length, -1))
