"""Attention in blocks of queries, in plain XLA: no array of scores larger than one block, work limited to the keys a block can see.

A block of C queries is taken against a run of U keys of static length: on sliding layers the C + window keys up to its end, on full layers the keys
up to the end of its eighth of the row (so 9/16 of the square are computed, not all of it). Forward: one softmax over the run, its sink included,

    s = q k^T / sqrt(H),  m = max(max_u s, sink),  l = sum_u exp(s - m) + exp(sink - m),  o = sum_u exp(s - m) v / l,  lse = m + log l

kept for the backward pass are q, k, v, o and lse. Backward, with delta = sum_h do o, which holds with a sink in lse as it does without one:

    p = exp(s - lse),  dv = p^T do,  ds = p (do v^T - delta),  dq = ds k / sqrt(H),  dk = ds^T q / sqrt(H),  dsink = -sum exp(sink - lse) delta

The backward pass works on transposed scores, s^T = k q^T. XLA's fast CPU products demand a left factor that contracts its last dimension, and this way
all five have it without transposing an array of scores.

Legend: B batch  T tokens  N query heads  K kv heads  G=N/K  H head dim  C queries of a block  R=G*C rows of a block  U keys of a block's run
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gptoss_jax.ops.attention.reference import MASKED, visible
from gptoss_jax.ops.remat import product

BLOCK_QUERIES = 128
MAX_BLOCK_SCORES = 1 << 26  # scores of one block, 256 MiB in float32
SPANS = 8  # of a full layer


class Span(NamedTuple):
    """Blocks `first .. first + blocks - 1`, whose runs have `keys` keys."""

    first: int
    blocks: int
    keys: int


class Plan(NamedTuple):
    """`rows` queries a block; keys are padded by `lead` in front, and block i's run starts at `rows * i` of these if `slides`, else at 0."""

    rows: int
    lead: int
    slides: bool
    spans: tuple[Span, ...]

    @property
    def length(self) -> int:
        return self.rows * sum(span.blocks for span in self.spans)


def make_plan(batch: int, length: int, heads: int, window: int | None) -> Plan:
    rows = min(BLOCK_QUERIES, max(8, length))
    seen = length if window is None else window + rows
    while rows > 8 and batch * heads * rows * seen > MAX_BLOCK_SCORES:
        rows //= 2
    blocks = -(-length // rows)
    if window is not None:
        return Plan(rows, window, True, (Span(0, blocks, window + rows),))
    share = -(-blocks // SPANS)
    spans = tuple(Span(first, min(share, blocks - first), min(first + share, blocks) * rows) for first in range(0, blocks, share))
    return Plan(rows, 0, False, spans)


def _dot(a, b, contract):
    """Batched over the two leading dims, float32 result."""
    return lax.dot_general(a, b, (contract, ((0, 1), (0, 1))), preferred_element_type=jnp.float32)


def _heads_first(x_BTNH, kv_heads: int):
    """[B, T, K*G, H] -> [B, K, G, T, H]."""
    batch, length, heads, head_dim = x_BTNH.shape
    return x_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)


def _pad(x, axis: int, front: int, length: int, fill=0):
    pad = [(0, 0)] * x.ndim
    pad[axis] = (front, length - x.shape[axis])
    return jnp.pad(x, pad, constant_values=fill)


class _Blocks:
    """Views of one call's arrays by block. Scores are scaled through q."""

    def __init__(self, plan: Plan, window: int | None, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
        self.plan, self.window = plan, window
        self.kv_heads = k_BTKH.shape[2]
        scale = q_BTNH.shape[-1] ** -0.5
        self.q_BKGTH = _pad(_heads_first((q_BTNH.astype(jnp.float32) * scale).astype(q_BTNH.dtype), self.kv_heads), 3, 0, plan.length)
        self.k_BKTH, self.v_BKTH = (_pad(x.transpose(0, 2, 1, 3), 2, plan.lead, plan.length) for x in (k_BTKH, v_BTKH))
        # 0 .. are documents and padding of the row; -1 and -2 match nothing
        self.query_segments_BT = _pad(segment_ids_BT, 1, 0, plan.length, -2)
        self.key_segments_BT = _pad(segment_ids_BT, 1, plan.lead, plan.length, -1)

    def queries(self, x, block, axis: int):
        """Block's part of an array with a dim of queries."""
        return lax.dynamic_slice_in_dim(x, block * self.plan.rows, self.plan.rows, axis)

    def rows(self, x_BKGTH, block):
        """[B, K, R, H] of an array [B, K, G, T, H]."""
        x = self.queries(x_BKGTH, block, 3)
        return x.reshape(*x.shape[:2], -1, x.shape[-1])

    def start(self, block):
        return block * self.plan.rows if self.plan.slides else 0

    def keys(self, x, block, keys: int, axis: int):
        return lax.dynamic_slice_in_dim(x, self.start(block), keys, axis)

    def mask_BCU(self, block, keys: int):
        queries_C = block * self.plan.rows + jnp.arange(self.plan.rows)
        keys_U = self.start(block) + jnp.arange(keys) - self.plan.lead
        query_segments_BC = self.queries(self.query_segments_BT, block, 1)
        key_segments_BU = self.keys(self.key_segments_BT, block, keys, 1)
        return visible(queries_C[:, None], keys_U, query_segments_BC[:, :, None], key_segments_BU[:, None], self.window)


def _split_rows(x_BKRX, rows: int):
    """[B, K, R, ...] -> [B, K, G, C, ...]."""
    return x_BKRX.reshape(*x_BKRX.shape[:2], -1, rows, *x_BKRX.shape[3:])


def _over(span: Span, function):
    """`function(block)` for the blocks of a span; results [blocks, ...]."""
    if span.blocks == 1:
        return jax.tree.map(lambda x: x[None], function(span.first))
    return lax.map(function, jnp.arange(span.first, span.first + span.blocks))


def _forward_block(views: _Blocks, sinks_KG, keys: int, block):
    """Output [B, K, G, C, H] and lse [B, K, G, C] of one block."""
    rows = views.plan.rows
    v_BKUH = views.keys(views.v_BKTH, block, keys, 2)
    s_BKRU = _dot(views.rows(views.q_BKGTH, block), views.keys(views.k_BKTH, block, keys, 2), ((3,), (3,)))
    s_BKGCU = jnp.where(views.mask_BCU(block, keys)[:, None, None], _split_rows(s_BKRU, rows), MASKED)
    top_BKGC = jnp.maximum(jnp.max(s_BKGCU, axis=-1), sinks_KG[..., None])
    p_BKGCU = jnp.exp(s_BKGCU - top_BKGC[..., None])
    sum_BKGC = jnp.sum(p_BKGCU, axis=-1) + jnp.exp(sinks_KG[..., None] - top_BKGC)
    o_BKRH = _dot(p_BKGCU.reshape(s_BKRU.shape).astype(v_BKUH.dtype), v_BKUH, ((3,), (2,)))
    return (_split_rows(o_BKRH, rows) / sum_BKGC[..., None]).astype(v_BKUH.dtype), top_BKGC + jnp.log(sum_BKGC)


def _backward_block(views: _Blocks, lse_BKGT, delta_BKGT, do_BKGTH, keys: int, block):
    """dq [B, K, G, C, H], dk and dv [B, K, U, H] of one block, float32; dq not scaled yet."""
    rows = views.plan.rows
    q_BKRH, do_BKRH = views.rows(views.q_BKGTH, block), views.rows(do_BKGTH, block)
    k_BKUH, v_BKUH = (views.keys(x, block, keys, 2) for x in (views.k_BKTH, views.v_BKTH))
    # elementwise work keeps G and C apart: with the mask spread over R = G*C it is three times slower
    by_query = lambda x_BKUR: x_BKUR.reshape(*x_BKUR.shape[:3], -1, rows)
    of_queries = lambda x_BKGT: views.queries(x_BKGT, block, 3)[:, :, None]
    mask_BUC = views.mask_BCU(block, keys).transpose(0, 2, 1)
    s_BKUGC = by_query(_dot(k_BKUH, q_BKRH, ((3,), (3,))))
    dp_BKUGC = by_query(_dot(v_BKUH, do_BKRH, ((3,), (3,))))
    p_BKUGC = jnp.where(mask_BUC[:, None, :, None], jnp.exp(s_BKUGC - of_queries(lse_BKGT)), 0)
    ds_BKUGC = p_BKUGC * (dp_BKUGC - of_queries(delta_BKGT))
    p_BKUR, ds_BKUR = (x.reshape(*x.shape[:3], -1).astype(q_BKRH.dtype) for x in (p_BKUGC, ds_BKUGC))
    dv_BKUH = _dot(p_BKUR, do_BKRH, ((3,), (2,)))
    dk_BKUH = _dot(ds_BKUR, q_BKRH, ((3,), (2,)))
    # the barrier keeps XLA from merging the transposes into one product whose left factor contracts its first dim
    dq_BKHR = lax.optimization_barrier(_dot(k_BKUH.swapaxes(2, 3), ds_BKUR, ((3,), (2,))))
    return _split_rows(dq_BKHR.swapaxes(2, 3), rows), dk_BKUH, dv_BKUH


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def blockwise_attention(q_BTNH, k_BTKH, v_BTKH, sinks_N, segment_ids_BT, window: int | None):
    """See `gptoss_jax.ops.attention.attention`."""
    return _forward(q_BTNH, k_BTKH, v_BTKH, sinks_N, segment_ids_BT, window)[0]


def _tokens_first(blocks, length: int):
    """Blocks [., B, K, G, C, H] in order -> [B, T, N, H]."""
    x = jnp.concatenate(blocks) if len(blocks) > 1 else blocks[0]
    num, batch, kv_heads, group, rows, head_dim = x.shape
    return x.transpose(1, 0, 4, 2, 3, 5).reshape(batch, num * rows, kv_heads * group, head_dim)[:, :length]


def _forward(q_BTNH, k_BTKH, v_BTKH, sinks_N, segment_ids_BT, window):
    batch, length, heads, _ = q_BTNH.shape
    plan = make_plan(batch, length, heads, window)
    views = _Blocks(plan, window, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
    sinks_KG = sinks_N.astype(jnp.float32).reshape(views.kv_heads, -1)
    outs, lses = zip(*(_over(span, partial(_forward_block, views, sinks_KG, span.keys)) for span in plan.spans))
    out_BTNH = product(_tokens_first(outs, length).astype(q_BTNH.dtype))
    lse_BTN = product(_tokens_first([lse[..., None] for lse in lses], length)[..., 0])
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, sinks_N, segment_ids_BT, out_BTNH, lse_BTN)


def _backward(window, residual, do_BTNH):
    q_BTNH, k_BTKH, v_BTKH, sinks_N, segment_ids_BT, out_BTNH, lse_BTN = residual
    batch, length, heads, head_dim = q_BTNH.shape
    plan = make_plan(batch, length, heads, window)
    views = _Blocks(plan, window, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
    delta_BTN = jnp.sum(do_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32), axis=-1)
    dsinks_N = -jnp.sum(jnp.exp(sinks_N.astype(jnp.float32) - lse_BTN) * delta_BTN, axis=(0, 1))
    by_head = lambda x: _pad(_heads_first(x, views.kv_heads), 3, 0, plan.length)
    lse_BKGT, delta_BKGT = (by_head(x[..., None])[..., 0] for x in (lse_BTN, delta_BTN))
    do_BKGTH = by_head(do_BTNH)

    dk_BKTH = dv_BKTH = jnp.zeros(views.k_BKTH.shape, jnp.float32)
    dqs = []
    for span in plan.spans:

        def turn(carry, block, keys=span.keys):
            dq, dk_BKUH, dv_BKUH = _backward_block(views, lse_BKGT, delta_BKGT, do_BKGTH, keys, block)
            start = views.start(block)
            add = lambda x, dx: lax.dynamic_update_slice_in_dim(x, lax.dynamic_slice_in_dim(x, start, keys, 2) + dx, start, 2)
            return (add(carry[0], dk_BKUH), add(carry[1], dv_BKUH)), dq

        blocks = jnp.arange(span.first, span.first + span.blocks)
        (dk_BKTH, dv_BKTH), dq = lax.scan(turn, (dk_BKTH, dv_BKTH), blocks, unroll=span.blocks == 1)
        dqs.append(dq)
    dq_BTNH = (_tokens_first(dqs, length) * head_dim**-0.5).astype(q_BTNH.dtype)
    dk_BTKH, dv_BTKH = (x[:, :, plan.lead : plan.lead + length].transpose(0, 2, 1, 3) for x in (dk_BKTH, dv_BKTH))
    return dq_BTNH, dk_BTKH.astype(k_BTKH.dtype), dv_BTKH.astype(v_BTKH.dtype), dsinks_N.astype(sinks_N.dtype), None


blockwise_attention.defvjp(_forward, _backward)
