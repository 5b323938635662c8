"""Grouped matmul in plain XLA: loops over pieces of rows of one expert, one dense product per piece.

    forward   y[piece]  = x[piece] @ w[e].T + bias[e]
    backward  dx[piece] = dy[piece] @ w[e]      dw[e] += dy[piece].T @ x[piece]      dbias[e] += sum over the piece's rows of dy

with e the piece's expert. Work is proportional to routed rows, rounded up to a block per expert, unlike `jax.lax.ragged_dot`, which expands to all
experts on CPU and CUDA. Shapes are static in XLA, so an expert's run of q blocks is cut into pieces of 2**k blocks: as many of the largest size
as fit, then the binary digits of the rest; one loop per size, each with as many turns as there are pieces. Large pieces are what makes it fast:
on two cores a float32 product of 512 rows of 512 -> 1024 runs at 387 GFLOP/s, of 128 rows at 298, of 32 rows at 141 (a dense product at 400).

Products accumulate in float32; weight and bias gradients are summed over pieces in float32.

Legend: P slots  G blocks  M rows of a piece  E experts  N outputs  K inputs  J pieces
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from gptoss_jax.ops.grouped_matmul.groups import RowGroups
from gptoss_jax.precision import wide

# Rows of the largest piece. Beyond it the products gain little, and an expert's last rows would fall into more small pieces.
MAX_PIECE_ROWS = 1024


class Pieces(NamedTuple):
    """The pieces of one size: `count` of them are in use."""

    rows: int
    expert_J: Int[Array, "J"]
    start_J: Int[Array, "J"]  # first slot
    count: Int[Array, ""]


def cut(groups: RowGroups) -> list[Pieces]:
    """All used blocks in pieces, largest first. Every block lies in exactly one piece."""
    num_blocks = groups.block_expert_G.shape[0]
    num_experts = groups.group_sizes_E.shape[0]
    blocks_E = -(-groups.group_sizes_E // groups.block_rows)
    first_E = jnp.cumsum(blocks_E) - blocks_E
    largest = 1
    while 2 * largest * groups.block_rows <= MAX_PIECE_ROWS and 2 * largest <= num_blocks:
        largest *= 2
    pieces, size = [], largest
    while size:
        if size == largest:
            count_E, done_E, most = blocks_E // size, jnp.zeros_like(blocks_E), num_blocks // size
        else:
            count_E, done_E, most = blocks_E // size % 2, blocks_E // (2 * size) * (2 * size), min(num_experts, num_blocks // size)
        ends_E = jnp.cumsum(count_E)
        index_J = jnp.arange(most)
        expert_J = jnp.searchsorted(ends_E, index_J, side="right").clip(max=num_experts - 1)
        start_J = (first_E + done_E)[expert_J] + size * (index_J - (ends_E - count_E)[expert_J])
        pieces.append(Pieces(size * groups.block_rows, expert_J, start_J * groups.block_rows, ends_E[-1]))
        size //= 2
    return pieces


def dot(a, b, contract):
    return lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=wide(a.dtype))


def bits(x):
    """bfloat16 as uint16, which the loops below cut and write instead; other dtypes as they are.

    XLA:CPU has no bfloat16 slices: it widens the whole array to float32 to cut one out, and the whole array at every turn to write one.
    """
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def values(x):
    """Inverse of `bits`; no other array here is uint16."""
    return lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def of_expert(w_EXX, e):
    """`w_EXX[e]` of bits."""
    return values(lax.dynamic_index_in_dim(w_EXX, e, keepdims=False))


def over_pieces(groups: RowGroups, body, carry):
    """`carry = body(carry, expert, take, put)` for every piece: `take(x)` reads the piece's rows of x, `put(x, rows)` writes them; both on bits."""
    for pieces in cut(groups):

        def turn(j, carry, pieces=pieces):
            start = pieces.start_J[j]
            take = lambda x: values(lax.dynamic_slice_in_dim(x, start, pieces.rows))
            put = lambda x, rows: lax.dynamic_update_slice_in_dim(x, bits(rows.astype(values(x).dtype)), start, 0)
            return body(carry, pieces.expert_J[j], take, put)

        carry = lax.fori_loop(0, pieces.count, turn, carry)
    return carry


def forward(x_PK, w_ENK, bias_EN, groups: RowGroups):
    """y_PN in the dtype of x."""
    x_bits_PK, w_bits_ENK = bits(x_PK), bits(w_ENK)

    def body(y_PN, e, take, put):
        return put(y_PN, dot(take(x_bits_PK), of_expert(w_bits_ENK, e), ((1,), (1,))) + bias_EN[e].astype(wide(x_PK.dtype)))

    return values(over_pieces(groups, body, bits(jnp.zeros((x_PK.shape[0], w_ENK.shape[1]), x_PK.dtype))))


def input_gradient(dy_PN, w_ENK, groups: RowGroups):
    """dx_PK in the dtype of dy: the first part of `backward`, alone."""
    dy_bits_PN, w_bits_ENK = bits(dy_PN), bits(w_ENK)

    def body(dx_PK, e, take, put):
        return put(dx_PK, dot(take(dy_bits_PN), of_expert(w_bits_ENK, e), ((1,), (0,))))

    return values(over_pieces(groups, body, bits(jnp.zeros((dy_PN.shape[0], w_ENK.shape[2]), dy_PN.dtype))))


def backward(dy_PN, x_PK, w_ENK, groups: RowGroups):
    """(dx_PK in the dtype of dy, dw_ENK and dbias_EN in that of sums)."""
    dy_bits_PN, x_bits_PK, w_bits_ENK = bits(dy_PN), bits(x_PK), bits(w_ENK)

    def body(carry, e, take, put):
        dx_PK, dw_ENK, dbias_EN = carry
        dy_MN = take(dy_bits_PN)
        dx_PK = put(dx_PK, dot(dy_MN, of_expert(w_bits_ENK, e), ((1,), (0,))))
        dw_ENK = dw_ENK.at[e].add(dot(dy_MN, take(x_bits_PK), ((0,), (0,))))
        return dx_PK, dw_ENK, dbias_EN.at[e].add(jnp.sum(dy_MN, axis=0, dtype=wide(dy_PN.dtype)))

    start = bits(jnp.zeros(x_PK.shape, dy_PN.dtype)), *(jnp.zeros(shape, wide(dy_PN.dtype)) for shape in (w_ENK.shape, w_ENK.shape[:2]))
    dx_PK, dw_ENK, dbias_EN = over_pieces(groups, body, start)
    return values(dx_PK), dw_ENK, dbias_EN
