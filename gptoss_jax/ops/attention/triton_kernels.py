"""Kernels of the Triton attention: forward, gradient of queries, gradient of keys and values. No array of scores is written.

A row of a tile is a (token, query head) pair, the G heads of a kv head one after the other: row r is token r // G, head r % G. 128 rows are 16 tokens
of gpt-oss' 8 heads a group: keys and values are read once for all of them, and a window of 128 costs 192 keys a token in tiles of 64 keys, where 128
tokens of one head would cost 256. Rows are addressed through arrays of indices: nothing is copied, transposed or padded for the kernels, and masks at
the borders exist only where a size is no multiple of the tile.

Forward: online softmax in base 2 over tiles of keys. It starts from the sink as if that were a first key without a value (maximum = sink, sum = 1):
the maximum of a row is finite whatever it sees. Backward, from the saved output and lse (sink included), with delta = sum_h do o:

    p = exp(s - lse),  ds = p (do v^T - delta),  dq = ds k / sqrt(H)  (a program takes a tile of rows)
    dv = p^T do,  dk = ds^T q / sqrt(H)                               (a program takes a tile of keys, on transposed scores s^T = k q^T)

Two kernels instead of one with atomic additions: gradients are the same bit for bit in every run. Scores, softmax and all sums are float32;
probabilities and ds are rounded to the type of v and q for their products, as in the other implementations. Products of float32 arrays follow
`jax_default_matmul_precision`: TF32 by default, IEEE float32 at "highest".

Row numbers are 32 bit: 131,072 tokens of 8 heads are 2^20. Element offsets take 64 bits in the lowering where an array has more than 2^32 bytes;
below that they fit 31, an element having two bytes or more.

Query t is token `offset + t` of the keys: 0, or where this device's part of a row begins among the keys that it got.

Legend: B batch  T tokens  N query heads  K kv heads  G=N/K  H head dim, P its next power of two  R rows of a tile  U keys of a tile
"""

import math
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from gptoss_jax.ops.attention.reference import MASKED, visible
from gptoss_jax.ops.attention.tiles import Tile

LOG2_E = math.log2(math.e)
NT, NN = ((1,), (1,)), ((1,), (0,))  # contracted dims of a product


class Sizes(NamedTuple):
    """What a kernel knows at compile time."""

    length: int
    keys: int
    group: int
    head_dim: int
    window: int | None
    tile: Tile

    @property
    def score_scale(self) -> float:
        """Scores are in base 2."""
        return self.head_dim**-0.5 * LOG2_E


def padded(head_dim: int) -> int:
    """Shapes of Triton are powers of two, and its products contract 16 elements at least."""
    return max(16, pl.next_power_of_2(head_dim))


def _rows(sizes: Sizes, start):
    """Tokens and heads [R] of the rows from `start` on; which of them exist, None if all do."""
    rows_R = start + jnp.arange(sizes.tile.rows, dtype=jnp.int32)
    token_R, head_R = lax.div(rows_R, jnp.int32(sizes.group)), lax.rem(rows_R, jnp.int32(sizes.group))
    return token_R, head_R, None if sizes.length * sizes.group % sizes.tile.rows == 0 else token_R < sizes.length


def _keys(sizes: Sizes, start):
    """Numbers [U] of the keys from `start` on; which of them exist, None if all do."""
    token_U = start + jnp.arange(sizes.tile.keys, dtype=jnp.int32)
    return token_U, None if sizes.keys % sizes.tile.keys == 0 else token_U < sizes.keys


def _place(ref, index, inside):
    """The elements at arrays of indices [X] into the leading dims of `ref`, [X] or, with a further dim, [X, P]; which of them exist."""
    if len(index) == len(ref.shape):
        return ref.at[index], inside
    head_dim = ref.shape[-1]
    dims_P = jnp.arange(padded(head_dim), dtype=jnp.int32)[None]
    mask = None if inside is None else inside[:, None]
    if dims_P.shape[1] != head_dim:
        mask = dims_P < head_dim if mask is None else mask & (dims_P < head_dim)
    return ref.at[(*(x[:, None] for x in index), dims_P)], mask


def _load(ref, index, inside, outside=0):
    at, mask = _place(ref, index, inside)
    return plt.load(at) if mask is None else plt.load(at, mask=mask, other=jnp.asarray(outside, ref.dtype))


def _store(ref, index, inside, value):
    at, mask = _place(ref, index, inside)
    plt.store(at, value.astype(ref.dtype), mask=mask)


def _dot(a, b, contract):
    return lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)


def _key_tiles(sizes: Sizes, start, offset):
    """Key tiles `first .. last - 1` are seen by the rows from `start` on; before `border` all their keys are, segments apart."""
    group, keys = jnp.int32(sizes.group), jnp.int32(sizes.tile.keys)
    first_token = offset + lax.div(start, group)
    last_token = offset + jnp.minimum(lax.div(start + (sizes.tile.rows - 1), group), sizes.length - 1)
    last = lax.div(last_token, keys) + 1
    if sizes.window is None:
        return jnp.int32(0), lax.div(first_token + 1, keys), last
    first = lax.div(jnp.maximum(first_token - (sizes.window - 1), 0), keys)
    return first, first, last  # the few tiles of a window nearly all have a border in them


def _row_tiles(sizes: Sizes, start, offset):
    """Row tiles `first .. last - 1` see the keys from `start` on; from `whole` on they see all of them, segments apart."""
    rows, end_key = jnp.int32(sizes.tile.rows), start + sizes.tile.keys
    token_of = lambda key: jnp.maximum(key - offset, 0)
    tiles_of = lambda key: lax.div(token_of(key) * sizes.group + (sizes.tile.rows - 1), rows)
    first, last = lax.div(token_of(start) * sizes.group, rows), jnp.int32(-(-sizes.length * sizes.group // sizes.tile.rows))
    if sizes.window is None:
        return first, jnp.minimum(tiles_of(end_key - 1), last), last
    last = jnp.minimum(tiles_of(end_key + (sizes.window - 1)), last)
    return first, last, last


def forward_kernel(q_ref, k_ref, v_ref, segments_ref, key_segments_ref, offset_ref, sinks_ref, out_ref, lse_ref, *, sizes: Sizes):
    start = (pl.num_programs(0) - 1 - pl.program_id(0)) * sizes.tile.rows  # the longest programs first
    token_R, head_R, inside_R = _rows(sizes, start)
    q_RP = _load(q_ref, (token_R, head_R), inside_R)
    segment_R = _load(segments_ref, (token_R,), inside_R, -1)
    offset = offset_ref[0]

    def turn(i, carry, border):
        top_R, sum_R, out_RP = carry
        token_U, inside_U = _keys(sizes, i * sizes.tile.keys)
        see_RU = segment_R[:, None] == _load(key_segments_ref, (token_U,), inside_U, -2)[None]
        if border:
            see_RU &= visible(offset + token_R[:, None], token_U[None], 0, 0, sizes.window)
        s_RU = jnp.where(see_RU, _dot(q_RP, _load(k_ref, (token_U,), inside_U), NT) * sizes.score_scale, MASKED)
        new_top_R = jnp.maximum(top_R, jnp.max(s_RU, axis=1))
        shrink_R, p_RU = jnp.exp2(top_R - new_top_R), jnp.exp2(s_RU - new_top_R[:, None])
        v_UP = _load(v_ref, (token_U,), inside_U)
        return new_top_R, sum_R * shrink_R + jnp.sum(p_RU, axis=1), out_RP * shrink_R[:, None] + _dot(p_RU.astype(v_UP.dtype), v_UP, NN)

    first, border, last = _key_tiles(sizes, start, offset)
    carry = _load(sinks_ref, (head_R,), None) * LOG2_E, jnp.ones(token_R.shape, jnp.float32), jnp.zeros(q_RP.shape, jnp.float32)
    carry = lax.fori_loop(first, border, partial(turn, border=False), carry)
    top_R, sum_R, out_RP = lax.fori_loop(border, last, partial(turn, border=True), carry)
    _store(out_ref, (token_R, head_R), inside_R, out_RP / sum_R[:, None])
    _store(lse_ref, (token_R, head_R), inside_R, (top_R + jnp.log2(sum_R)) / LOG2_E)


def dq_kernel(q_ref, k_ref, v_ref, segments_ref, key_segments_ref, offset_ref, do_ref, lse_ref, delta_ref, dq_ref, *, sizes: Sizes):
    start = (pl.num_programs(0) - 1 - pl.program_id(0)) * sizes.tile.rows
    token_R, head_R, inside_R = _rows(sizes, start)
    q_RP, do_RP = (_load(ref, (token_R, head_R), inside_R) for ref in (q_ref, do_ref))
    lse_R, delta_R = (_load(ref, (token_R, head_R), inside_R) for ref in (lse_ref, delta_ref))
    segment_R = _load(segments_ref, (token_R,), inside_R, -1)
    lse2_R = lse_R * LOG2_E
    offset = offset_ref[0]

    def turn(i, dq_RP, border):
        token_U, inside_U = _keys(sizes, i * sizes.tile.keys)
        k_UP, v_UP = (_load(ref, (token_U,), inside_U) for ref in (k_ref, v_ref))
        see_RU = segment_R[:, None] == _load(key_segments_ref, (token_U,), inside_U, -2)[None]
        if border:
            see_RU &= visible(offset + token_R[:, None], token_U[None], 0, 0, sizes.window)
        p_RU = jnp.exp2(jnp.where(see_RU, _dot(q_RP, k_UP, NT) * sizes.score_scale - lse2_R[:, None], MASKED))
        ds_RU = p_RU * (_dot(do_RP, v_UP, NT) - delta_R[:, None])
        return dq_RP + _dot(ds_RU.astype(k_UP.dtype), k_UP, NN)

    first, border, last = _key_tiles(sizes, start, offset)
    dq_RP = lax.fori_loop(first, border, partial(turn, border=False), jnp.zeros(q_RP.shape, jnp.float32))
    dq_RP = lax.fori_loop(border, last, partial(turn, border=True), dq_RP)
    _store(dq_ref, (token_R, head_R), inside_R, dq_RP * sizes.head_dim**-0.5)


def dkv_kernel(q_ref, k_ref, v_ref, segments_ref, key_segments_ref, offset_ref, do_ref, lse_ref, delta_ref, dk_ref, dv_ref, *, sizes: Sizes):
    start = pl.program_id(0) * sizes.tile.keys  # the first keys are seen by most rows
    token_U, inside_U = _keys(sizes, start)
    k_UP, v_UP = (_load(ref, (token_U,), inside_U) for ref in (k_ref, v_ref))
    segment_U = _load(key_segments_ref, (token_U,), inside_U, -2)
    offset = offset_ref[0]

    def turn(i, carry, border):
        dk_UP, dv_UP = carry
        token_R, head_R, inside_R = _rows(sizes, i * sizes.tile.rows)
        q_RP, do_RP = (_load(ref, (token_R, head_R), inside_R) for ref in (q_ref, do_ref))
        lse_R, delta_R = (_load(ref, (token_R, head_R), inside_R) for ref in (lse_ref, delta_ref))
        see_UR = segment_U[:, None] == _load(segments_ref, (token_R,), inside_R, -1)[None]
        if border:
            see_UR &= visible(offset + token_R[None], token_U[:, None], 0, 0, sizes.window)
        p_UR = jnp.exp2(jnp.where(see_UR, _dot(k_UP, q_RP, NT) * sizes.score_scale - lse_R[None] * LOG2_E, MASKED))
        ds_UR = p_UR * (_dot(v_UP, do_RP, NT) - delta_R[None])
        return dk_UP + _dot(ds_UR.astype(q_RP.dtype), q_RP, NN), dv_UP + _dot(p_UR.astype(do_RP.dtype), do_RP, NN)

    first, whole, last = _row_tiles(sizes, start, offset)
    zeros_UP = jnp.zeros(k_UP.shape, jnp.float32)
    carry = lax.fori_loop(first, whole, partial(turn, border=True), (zeros_UP, zeros_UP))
    dk_UP, dv_UP = lax.fori_loop(whole, last, partial(turn, border=False), carry)
    _store(dk_ref, (token_U,), inside_U, dk_UP * sizes.head_dim**-0.5)
    _store(dv_ref, (token_U,), inside_U, dv_UP)
