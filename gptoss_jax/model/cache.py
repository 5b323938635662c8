"""Keys and values of the tokens that a batch of rows has read so far.

    full layers     [.., B, K, S, H], S = the longest row that fits
    sliding layers  [.., B, K, S, H], S = the window (128 in the releases): a ring, position p lies in slot p mod S

Layers at one position of the repeating pattern are stacked, as their weights are. Rows may have different lengths. On a CPU bfloat16 is kept as
uint16 bits, because XLA:CPU widens a whole bfloat16 array to float32 to read or write a slice of it.

gpt-oss-20b in bfloat16: 24 KiB per token and row in the full layers, and 3 MiB per row in the sliding ones however long it gets.

Legend: L layers  B rows  T tokens  K kv heads  S slots  H head dim
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from gptoss_jax.model.config import SLIDING, GptOssConfig
from gptoss_jax.ops.attention.decode import slot_positions
from gptoss_jax.ops.grouped_matmul.xla import bits, values


class LayerCache(NamedTuple):
    """Keys and values of one layer, or stacked ones of several."""

    k: Array
    v: Array

    @property
    def slots(self) -> int:
        return self.k.shape[-2]

    def layer(self, index) -> "LayerCache":
        """One of the stacked layers, as values."""
        return LayerCache(*(values(jax.lax.dynamic_index_in_dim(x, index, keepdims=False)) for x in self))


class KVCache(NamedTuple):
    """`blocks[j]` of the layers at position j of the pattern, stacked; `tail[j]` of the single layers after them, stacks of one."""

    blocks: tuple[LayerCache, ...]
    tail: tuple[LayerCache, ...]
    lengths_B: Int[Array, "B"]  # tokens of each row that have been read


def _empty(kind: str, config: GptOssConfig, layers: int, batch: int, max_length: int, dtype) -> LayerCache:
    slots = min(config.sliding_window, max_length) if kind == SLIDING else max_length
    shape = (layers, batch, config.num_key_value_heads, slots, config.head_dim)
    return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def init_cache(config: GptOssConfig, batch: int, max_length: int, dtype) -> KVCache:
    """An empty cache for rows of at most `max_length` tokens, prompt included."""
    dtype = jnp.dtype(dtype)
    if dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        dtype = jnp.dtype(jnp.uint16)
    make = lambda kind, layers: _empty(kind, config, layers, batch, max_length, dtype)
    kinds = config.layer_types
    blocks = tuple(make(kinds[j], config.repeats) for j in range(config.period))
    tail = tuple(make(kinds[j], 1) for j in range(config.num_tail_layers))
    return KVCache(blocks, tail, jnp.zeros(batch, jnp.int32))


def _stored(new, like):
    """In the form of the cache: its dtype, or its bits."""
    return bits(new) if like.dtype == jnp.uint16 else new.astype(like.dtype)


def fill(cache: LayerCache, k_LBKTH, v_LBKTH, lengths_B) -> LayerCache:
    """The cache after a prompt of `lengths_B` tokens (of T, the rest padding): the last S of them, and zeros."""
    tokens = k_LBKTH.shape[-2]
    position_BS = slot_positions(lengths_B, cache.slots)
    index = jnp.clip(position_BS, 0, tokens - 1)[None, :, None, :, None]
    there = (position_BS >= 0)[None, :, None, :, None]

    def place(x_LBKTH, like):
        return jnp.where(there, jnp.take_along_axis(_stored(x_LBKTH, like), index, axis=-2), 0)

    return LayerCache(place(k_LBKTH, cache.k), place(v_LBKTH, cache.v))


def append(cache: LayerCache, k_LBKH, v_LBKH, lengths_B) -> LayerCache:
    """The cache with one more token per row, at position `lengths_B`; in a ring it takes the place of the oldest."""
    rows_B, slot_B = jnp.arange(lengths_B.shape[0]), lengths_B % cache.slots

    def place(x_LBKSH, new_LBKH):
        new_BLKH = jnp.moveaxis(_stored(new_LBKH, x_LBKSH), 1, 0)  # indexed dims, being apart, come first
        return x_LBKSH.at[:, rows_B, :, slot_B].set(new_BLKH, unique_indices=True, mode="promise_in_bounds")

    return LayerCache(place(cache.k, k_LBKH), place(cache.v, v_LBKH))
