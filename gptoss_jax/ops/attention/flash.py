"""Attention in blocks of queries and keys, in plain XLA: no array of scores larger than a pair of blocks, and no work on pairs that see nothing.

Queries and keys are cut into the same blocks of C tokens; query block i sees the key blocks from that of its first visible key to its own, i. Forward is
an online softmax that starts from the sink as if that were a first key without a value (maximum = sink, sum = 1), so a row's maximum is finite whatever
it sees. Kept for the backward pass are q, k, v, o and lse, the sink included. With delta = sum_h do o, which holds with a sink as it does without:

    p = exp(s - lse),  dv = p^T do,  ds = p (do v^T - delta),  dq = ds k / sqrt(H),  dk = ds^T q / sqrt(H),  dsink = -sum exp(sink - lse) delta

XLA's fast CPU products demand a left factor that contracts its last dim. The backward pass therefore works on transposed scores, s^T = k q^T: this way
all five of its products have it without a transposed array of scores.

Legend: B batch  T tokens  N query heads  K kv heads  G=N/K  H head dim  C queries of a block  U=C keys of a block  R=G*C
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from gptoss_jax.ops.attention.reference import MASKED, visible
from gptoss_jax.ops.remat import product

BLOCK = 128


def _dot(a, b, contract):
    """Batched over the two leading dims, float32 result."""
    return lax.dot_general(a, b, (contract, ((0, 1), (0, 1))), preferred_element_type=jnp.float32)


NT, NN = ((3,), (3,)), ((3,), (2,))


class _Blocks:
    """One call's arrays, padded to whole blocks and with heads first; views of them by block."""

    def __init__(self, window, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
        self.window, self.kv_heads = window, k_BTKH.shape[2]
        batch, self.length, heads, self.head_dim = q_BTNH.shape
        self.block = min(BLOCK, max(8, self.length))
        self.count = -(-self.length // self.block)
        self.q_BKGTH, self.k_BKTH, self.v_BKTH = self.queries_first(q_BTNH), self.pad(k_BTKH.transpose(0, 2, 1, 3), 2), self.pad(v_BTKH.transpose(0, 2, 1, 3), 2)
        self.segments_BT = self.pad(segment_ids_BT, 1)

    def pad(self, x, axis):
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, self.count * self.block - self.length)
        return jnp.pad(x, pad)

    def queries_first(self, x_BTN):
        """[B, T, N, ...] -> [B, K, G, T, ...]."""
        x = x_BTN.reshape(*x_BTN.shape[:2], self.kv_heads, -1, *x_BTN.shape[3:])
        return self.pad(jnp.moveaxis(x, 1, 3), 3)

    def tokens_first(self, x_IBKGC):
        """Blocks [I, B, K, G, C, ...] -> [B, T, N, ...]."""
        x = jnp.moveaxis(jnp.moveaxis(x_IBKGC, 4, 1), 2, 0)  # B I C K G
        return x.reshape(x.shape[0], self.count * self.block, -1, *x.shape[5:])[:, : self.length]

    def at(self, x, i, axis):
        return lax.dynamic_slice_in_dim(x, i * self.block, self.block, axis)

    def rows(self, x_BKGTH, i):
        x = self.at(x_BKGTH, i, 3)
        return x.reshape(*x.shape[:2], -1, x.shape[-1])

    def first(self, i):
        return 0 if self.window is None else jnp.maximum(i * self.block - (self.window - 1), 0) // self.block

    def mask_BCU(self, i, j):
        index = jnp.arange(self.block)
        return visible((i * self.block + index)[:, None], j * self.block + index, self.at(self.segments_BT, i, 1)[:, :, None], self.at(self.segments_BT, j, 1)[:, None], self.window)


def _forward_block(views, sinks_KG, i):
    q_BKRH = views.rows(views.q_BKGTH, i)
    batch, kv_heads, R, H = q_BKRH.shape
    group = R // views.block
    scale = views.head_dim**-0.5

    def turn(j, carry):
        top, total, o = carry
        k, v = views.at(views.k_BKTH, j, 2), views.at(views.v_BKTH, j, 2)
        s = _dot(q_BKRH, k, NT).reshape(batch, kv_heads, group, views.block, views.block)
        s = jnp.where(views.mask_BCU(i, j)[:, None, None], s * scale, MASKED)
        new = jnp.maximum(top, jnp.max(s, axis=-1))
        p = jnp.exp(s - new[..., None])
        shrink = jnp.exp(top - new)
        pv = _dot(p.reshape(batch, kv_heads, R, -1).astype(v.dtype), v, NN).reshape(o.shape)
        return new, total * shrink + jnp.sum(p, axis=-1), o * shrink[..., None] + pv

    shape = (batch, kv_heads, group, views.block)
    top = jnp.broadcast_to(sinks_KG[..., None], shape)
    top, total, o = lax.fori_loop(views.first(i), i + 1, turn, (top, jnp.ones(shape), jnp.zeros((*shape, H))))
    return (o / total[..., None]).astype(q_BKRH.dtype), top + jnp.log(total)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def flash(q_BTNH, k_BTKH, v_BTKH, sinks_N, segment_ids_BT, window):
    return _forward(q_BTNH, k_BTKH, v_BTKH, sinks_N, segment_ids_BT, window)[0]


def _forward(q_BTNH, k_BTKH, v_BTKH, sinks_N, segment_ids_BT, window):
    views = _Blocks(window, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
    sinks_KG = sinks_N.astype(jnp.float32).reshape(views.kv_heads, -1)
    outs, lses = lax.map(partial(_forward_block, views, sinks_KG), jnp.arange(views.count))
    out, lse = product((views.tokens_first(outs), views.tokens_first(lses)))
    return out, (q_BTNH, k_BTKH, v_BTKH, sinks_N, segment_ids_BT, out, lse)


def _backward(window, residual, do_BTNH):
    q_BTNH, k_BTKH, v_BTKH, sinks_N, segment_ids_BT, out_BTNH, lse_BTN = residual
    views = _Blocks(window, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
    delta_BTN = jnp.sum(do_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32), axis=-1)
    dsinks_N = -jnp.sum(jnp.exp(sinks_N.astype(jnp.float32) - lse_BTN) * delta_BTN, axis=(0, 1))
    do_BKGTH, lse_BKGT, delta_BKGT = views.queries_first(do_BTNH), views.queries_first(lse_BTN), views.queries_first(delta_BTN)
    scale = views.head_dim**-0.5
    C = views.block
    kT = views.k_BKTH.swapaxes(2, 3)

    def outer(carry, i):
        q, do = views.rows(views.q_BKGTH, i), views.rows(do_BKGTH, i)
        lse, delta = views.at(lse_BKGT, i, 3)[:, :, None], views.at(delta_BKGT, i, 3)[:, :, None]
        batch, kv_heads, R, H = q.shape

        def turn(j, carry):
            dk_all, dv_all, dq = carry
            k, v = views.at(views.k_BKTH, j, 2), views.at(views.v_BKTH, j, 2)
            by_query = lambda x: x.reshape(batch, kv_heads, C, -1, C)
            mask = views.mask_BCU(i, j).transpose(0, 2, 1)[:, None, :, None]
            s = by_query(_dot(k, q, NT))
            dp = by_query(_dot(v, do, NT))
            p = jnp.exp(jnp.where(mask, s * scale - lse, MASKED))
            ds = p * (dp - delta)
            p, ds = (x.reshape(batch, kv_heads, C, R).astype(q.dtype) for x in (p, ds))
            add = lambda x, dx: lax.dynamic_update_slice_in_dim(x, views.at(x, j, 2) + dx, j * C, 2)
            dv_all, dk_all = add(dv_all, _dot(p, do, NN)), add(dk_all, _dot(ds, q, NN))
            return dk_all, dv_all, dq + _dot(views.at(kT, j, 3), ds, NN)

        dk, dv, dq = lax.fori_loop(views.first(i), i + 1, turn, (*carry, jnp.zeros((batch, kv_heads, H, R))))
        return (dk, dv), (dq.swapaxes(2, 3).reshape(batch, kv_heads, -1, C, H) * scale).astype(q.dtype)

    zeros = jnp.zeros(views.k_BKTH.shape, jnp.float32)
    (dk, dv), dqs = lax.scan(outer, (zeros, zeros), jnp.arange(views.count))
    dk, dv = (x[:, :, : views.length].transpose(0, 2, 1, 3) for x in (dk * scale, dv))
    return views.tokens_first(dqs), dk.astype(k_BTKH.dtype), dv.astype(v_BTKH.dtype), dsinks_N.astype(sinks_N.dtype), None


flash.defvjp(_forward, _backward)
