"""Attention in blocks of queries and keys, in plain XLA: no array of scores larger than one pair of blocks, no work on pairs that see nothing.

Queries and keys are cut into blocks of C tokens; query block i runs over the key blocks from that of its first visible key to that of its last (block
i where queries and keys are the same tokens). Forward is an online softmax that starts from the sink as if that were a first key without a value
(maximum = sink, sum = 1): a row's maximum is finite whatever it sees. Kept for the backward pass are q, k, v, o and lse, the sink included. With
delta = sum_h do o, which holds with a sink as without,

    p = exp(s - lse),  dv = p^T do,  ds = p (do v^T - delta),  dq = ds k / sqrt(H),  dk = ds^T q / sqrt(H),  dsink = -sum exp(sink - lse) delta

Loops over blocks, not one expression per block: unrolled, every block gets scores of its own, and fresh memory costs a CPU more than the products
(B=2 T=1024 N=8 K=2 H=64 float32, value and gradient on 2 cores: 151 MB of temporaries and 64 ms with eight expressions, 22 MB and 43 ms in loops).

XLA's fast CPU products demand a left factor that contracts its last dim. The backward pass therefore works on transposed scores, s^T = k q^T, and has
k^T at hand: all five products have that form without a transposed array of scores.

Legend: B batch  T queries  S keys  N query heads  K kv heads  G=N/K  H head dim
        C queries of a block  U=C keys of a block  R=G*C rows of a block  I blocks
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from gptoss_jax.ops.attention.keys import Keys
from gptoss_jax.ops.attention.reference import MASKED, sink_gradient, visible
from gptoss_jax.ops.remat import product
from gptoss_jax.precision import wide

# Value and gradient for B=2 T=1024 N=8 K=2 H=64 in bf16 on 2 cores, blocks of 64 / 128 / 256: full layers 65 / 51 / 42 ms, a window of 128
# 18 / 17 / 22 ms. One block is a dense computation, and the dense reference takes twice as long on it (B=8 T=128 H=32: 7.8 against 3.0 ms).
SMALLEST_BLOCK, LARGEST_BLOCK = 64, 256
MAX_SCORES = 1 << 21  # of a pair of blocks, 8 MiB in float32. With 16 MiB, B=8 T=256 takes 25 ms, not 15: its temporaries are fresh pages each call
NT, NN = ((3,), (3,)), ((3,), (2,))  # contracted dims of products batched over [B, K]


def block_size(batch: int, length: int, heads: int, window: int | None) -> int:
    """Tokens of a block: about the window, or the largest. A short row is one block."""
    block = LARGEST_BLOCK if window is None else min(max(window, SMALLEST_BLOCK), LARGEST_BLOCK)
    while block > SMALLEST_BLOCK and batch * heads * block**2 > MAX_SCORES:
        block //= 2
    return min(block, length)


def _dot(a, b, contract):
    return lax.dot_general(a, b, (contract, ((0, 1), (0, 1))), preferred_element_type=wide(a.dtype))


class _Blocks:
    """One call's arrays with heads first, padded to whole blocks, and their views by block.

    Elementwise work keeps G and C apart, [B, K, G, C, U] or transposed [B, K, U, G, C]: a mask spread over R = G*C makes it three times slower.
    """

    def __init__(self, window, q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, keys: Keys):
        self.batch, self.length, heads, self.head_dim = q_BTNH.shape
        self.window, self.kv_heads, self.dtype = window, k_BSKH.shape[2], q_BTNH.dtype
        self.size = block_size(self.batch, self.length, heads, window)
        self.count, self.num_keys = -(-self.length // self.size), k_BSKH.shape[1]
        self.start = 0 if keys.start is None else keys.start
        self.scale = self.head_dim**-0.5
        self.q_BKGTH = self.heads_first(q_BTNH)
        self.k_BKSH, self.v_BKSH = (self.pad(x.swapaxes(1, 2), 2) for x in (k_BSKH, v_BSKH))
        self.segment_ids_BT, self.key_segment_ids_BS = self.pad(segment_ids_BT, 1), self.pad(keys.segment_ids_BS, 1)

    def pad(self, x, axis: int):
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, -x.shape[axis] % self.size)
        return jnp.pad(x, pad)

    def heads_first(self, x_BTN):
        """[B, T, N, ...] -> [B, K, G, T, ...], padded."""
        return self.pad(jnp.moveaxis(x_BTN.reshape(*x_BTN.shape[:2], self.kv_heads, -1, *x_BTN.shape[3:]), 1, 3), 3)

    def tokens_first(self, x_IBKGC):
        """Blocks [I, B, K, G, C, ...] -> [B, T, N, ...]."""
        x_BICKG = jnp.moveaxis(x_IBKGC, (1, 0, 4), (0, 1, 2))
        return x_BICKG.reshape(self.batch, self.count * self.size, -1, *x_IBKGC.shape[5:])[:, : self.length]

    def at(self, x, block, axis: int):
        return lax.dynamic_slice_in_dim(x, block * self.size, self.size, axis)

    def rows(self, x_BKGTH, block):
        """[B, K, R, H]."""
        return self.at(x_BKGTH, block, 3).reshape(self.batch, self.kv_heads, -1, self.head_dim)

    def seen(self, block):
        """The key blocks, from the first to before the last, that a query block sees."""
        start = self.start + block * self.size
        first = 0 if self.window is None else jnp.maximum(start - (self.window - 1), 0) // self.size
        return first, jnp.minimum(start + self.size - 1, self.num_keys - 1) // self.size + 1

    def mask_BCU(self, queries, keys):
        index = jnp.arange(self.size)
        query_segments_BC, key_segments_BU = self.at(self.segment_ids_BT, queries, 1), self.at(self.key_segment_ids_BS, keys, 1)
        tokens_C1, tokens_U = (self.start + queries * self.size + index)[:, None], keys * self.size + index
        return visible(tokens_C1, tokens_U, query_segments_BC[:, :, None], key_segments_BU[:, None], self.window)


def _forward_block(blocks: _Blocks, sinks_KG, i):
    """Output [B, K, G, C, H] and lse [B, K, G, C] of query block i."""
    q_BKRH = blocks.rows(blocks.q_BKGTH, i)
    shape = (blocks.batch, *sinks_KG.shape, blocks.size)

    def turn(j, carry):
        top_BKGC, sum_BKGC, o_BKGCH = carry
        k_BKUH, v_BKUH = (blocks.at(x, j, 2) for x in (blocks.k_BKSH, blocks.v_BKSH))
        s_BKGCU = _dot(q_BKRH, k_BKUH, NT).reshape(*shape, -1) * blocks.scale
        s_BKGCU = jnp.where(blocks.mask_BCU(i, j)[:, None, None], s_BKGCU, MASKED)
        new_top_BKGC = jnp.maximum(top_BKGC, jnp.max(s_BKGCU, axis=-1))
        p_BKGCU = jnp.exp(s_BKGCU - new_top_BKGC[..., None])
        shrink_BKGC = jnp.exp(top_BKGC - new_top_BKGC)
        pv_BKRH = _dot(p_BKGCU.reshape(*q_BKRH.shape[:3], -1).astype(v_BKUH.dtype), v_BKUH, NN)
        o_BKGCH = o_BKGCH * shrink_BKGC[..., None] + pv_BKRH.reshape(o_BKGCH.shape)
        return new_top_BKGC, sum_BKGC * shrink_BKGC + jnp.sum(p_BKGCU, axis=-1), o_BKGCH

    ones, zeros = jnp.ones(shape, sinks_KG.dtype), jnp.zeros((*shape, blocks.head_dim), sinks_KG.dtype)
    start = jnp.broadcast_to(sinks_KG[..., None], shape), ones, zeros
    top_BKGC, sum_BKGC, o_BKGCH = lax.fori_loop(*blocks.seen(i), turn, start)
    return (o_BKGCH / sum_BKGC[..., None]).astype(blocks.dtype), top_BKGC + jnp.log(sum_BKGC)


def _forward(q_BTNH, k_BSKH, v_BSKH, sinks_N, segment_ids_BT, keys, window):
    blocks = _Blocks(window, q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, keys)
    sinks_KG = sinks_N.astype(wide(blocks.dtype)).reshape(blocks.kv_heads, -1)
    results = lax.map(partial(_forward_block, blocks, sinks_KG), jnp.arange(blocks.count))
    out_BTNH, lse_BTN = product(tuple(map(blocks.tokens_first, results)))
    return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, sinks_N, segment_ids_BT, keys, out_BTNH, lse_BTN)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(q_BTNH, k_BSKH, v_BSKH, sinks_N, segment_ids_BT, keys, window):
    return _forward(q_BTNH, k_BSKH, v_BSKH, sinks_N, segment_ids_BT, keys, window)[0]


def _backward(window, residual, do_BTNH):
    q_BTNH, k_BSKH, v_BSKH, sinks_N, segment_ids_BT, keys, out_BTNH, lse_BTN = residual
    blocks = _Blocks(window, q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, keys)
    delta_BTN, dsinks_N = sink_gradient(do_BTNH, out_BTNH, lse_BTN, sinks_N)
    do_BKGTH, lse_BKGT, delta_BKGT = map(blocks.heads_first, (do_BTNH, lse_BTN, delta_BTN))
    k_BKHS = blocks.k_BKSH.swapaxes(2, 3)

    def queries(sums, i):
        """Adds what query block i gives to dk and dv; its dq [B, K, G, C, H]."""
        q_BKRH, do_BKRH = blocks.rows(blocks.q_BKGTH, i), blocks.rows(do_BKGTH, i)
        lse_BK1GC, delta_BK1GC = (blocks.at(x, i, 3)[:, :, None] for x in (lse_BKGT, delta_BKGT))
        by_head = lambda x_BKUR: x_BKUR.reshape(*x_BKUR.shape[:3], -1, blocks.size)

        def turn(j, carry):
            dk_BKSH, dv_BKSH, dq_BKHR = carry
            k_BKUH, v_BKUH = (blocks.at(x, j, 2) for x in (blocks.k_BKSH, blocks.v_BKSH))
            mask_BUC = blocks.mask_BCU(i, j).swapaxes(1, 2)
            s_BKUGC = by_head(_dot(k_BKUH, q_BKRH, NT)) * blocks.scale
            p_BKUGC = jnp.exp(jnp.where(mask_BUC[:, None, :, None], s_BKUGC - lse_BK1GC, MASKED))
            ds_BKUGC = p_BKUGC * (by_head(_dot(v_BKUH, do_BKRH, NT)) - delta_BK1GC)
            p_BKUR, ds_BKUR = (x.reshape(*x.shape[:3], -1).astype(blocks.dtype) for x in (p_BKUGC, ds_BKUGC))
            add = lambda x, dx: lax.dynamic_update_slice_in_dim(x, blocks.at(x, j, 2) + dx, j * blocks.size, 2)
            dq_BKHR = dq_BKHR + _dot(blocks.at(k_BKHS, j, 3), ds_BKUR, NN)
            return add(dk_BKSH, _dot(ds_BKUR, q_BKRH, NN)), add(dv_BKSH, _dot(p_BKUR, do_BKRH, NN)), dq_BKHR

        dq_BKHR = jnp.zeros(q_BKRH.swapaxes(2, 3).shape, wide(blocks.dtype))
        *sums, dq_BKHR = lax.fori_loop(*blocks.seen(i), turn, (*sums, dq_BKHR))
        dq_BKRH = (dq_BKHR.swapaxes(2, 3) * blocks.scale).astype(blocks.dtype)
        return tuple(sums), dq_BKRH.reshape(*dq_BKRH.shape[:2], -1, blocks.size, blocks.head_dim)

    zeros_BKSH = jnp.zeros(blocks.k_BKSH.shape, wide(blocks.dtype))
    (dk_BKSH, dv_BKSH), dq_IBKGCH = lax.scan(queries, (zeros_BKSH, zeros_BKSH), jnp.arange(blocks.count))
    dk_BSKH, dv_BSKH = (x.swapaxes(1, 2)[:, : blocks.num_keys] for x in (dk_BKSH * blocks.scale, dv_BKSH))
    return blocks.tokens_first(dq_IBKGCH), dk_BSKH.astype(k_BSKH.dtype), dv_BSKH.astype(v_BSKH.dtype), dsinks_N, None, None


_attention.defvjp(_forward, _backward)


def blockwise_attention(q_BTNH, k_BSKH, v_BSKH, sinks_N, segment_ids_BT, window: int | None, keys: Keys | None = None):
    """See `gptoss_jax.ops.attention.attention`."""
    return _attention(q_BTNH, k_BSKH, v_BSKH, sinks_N, segment_ids_BT, keys or Keys(segment_ids_BT), window)
