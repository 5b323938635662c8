"""Grouped matmul for NVIDIA GPUs: Pallas kernels (Triton lowering).

    forward          y[block] = x[block] @ w[e].T + bias[e]      a program takes a tile of rows of one block and a tile of outputs
    input_gradient   dx[block] = dy[block] @ w[e]                the same kernel, the other dim of w contracted
    weight_gradient  dw[e] = sum over e's rows of dy.T @ x       a program takes a tile of one expert's matrix and loops over its rows
                     dbias[e] = sum over e's rows of dy          by the programs of the first column of tiles

Operands are read where they lie, through arrays of indices: no copy, no transposed weights, no padding; masks exist only where a size is no multiple
of the tile. Programs of unused blocks take no turn of the loop and write zeros. A matrix of one expert is summed by one program in a fixed order:
nothing is added atomically, results are the same bit for bit in every run. Sums are float32. Products of float32 arrays follow
`jax_default_matmul_precision`: TF32 by default, as everywhere in JAX, IEEE float32 at "highest".

Reuse in the L2 cache: forward and input gradient number their programs so that GROUP_BLOCKS row tiles take the same tile of outputs, one after the
other, before the next tile of outputs comes. Tiles of weights are thus read once for all those rows (mostly of one expert) while the rows, 6 MB for
8 blocks of 128 x 2880 bf16, stay in the cache (50 MB on H100). Programs of the weight gradient go through one expert's matrix before the next
expert: its rows stay in the cache.

Offsets: the gate_up weights of gpt-oss-120b have 128 * 5760 * 2880 = 2.1e9 elements, 1 % below 2^31. Expert, row and column numbers are 32 bit and
enter the address separately; the lowering multiplies and adds them in 64 bits if the array has more than 2^32 bytes, and below that an element's
number fits 31 bits since it has two bytes or more (packed codes have one: `mxfp4_triton` checks them).

Legend: P slots  G blocks  M rows of a block  E experts  N outputs  K inputs;  of a tile: R rows  C columns  D depth
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from gptoss_jax.ops.grouped_matmul.groups import RowGroups
from gptoss_jax.ops.grouped_matmul.tiles import Tile, choose_tile, compute_capability

GROUP_BLOCKS = 8
MIN_DIM = 16  # of the operands of a Triton product
NT, NN, TN = ((1,), (1,)), ((1,), (0,)), ((0,), (0,))  # contracted dims of a product


class Span(NamedTuple):
    """`length` neighbouring indices, from `start` on, of a dim of `size`."""

    start: jax.Array | int
    length: int
    size: int

    def index(self) -> jax.Array:
        return self.start + jnp.arange(self.length, dtype=jnp.int32)

    def exists(self) -> jax.Array | None:
        """Which of them the dim has; None if it has all, known by its size (and spans that start at multiples of their length)."""
        return None if self.size % self.length == 0 else self.index() < self.size

    def groups(self, width: int) -> "Span":
        """Of the same dim, `width` elements in one."""
        return Span(lax.div(self.start, jnp.int32(width)), self.length // width, self.size // width)


def place(ref, lead: tuple, rows: Span, cols: Span):
    """The elements at rows x cols of the matrix `lead` of ref, and the mask of those that exist (None if all do)."""
    rows_exist, cols_exist = rows.exists(), cols.exists()
    mask = None if rows_exist is None else rows_exist[:, None]
    if cols_exist is not None:
        mask = cols_exist[None] if mask is None else mask & cols_exist[None]
    return ref.at[(*lead, rows.index()[:, None], cols.index()[None])], mask


def load(ref, lead: tuple, rows: Span, cols: Span):
    """[rows, cols]; zeros where there is nothing."""
    at, mask = place(ref, lead, rows, cols)
    return plt.load(at) if mask is None else plt.load(at, mask=mask, other=jnp.zeros((), ref.dtype))


def store(ref, lead: tuple, rows: Span, cols: Span, value):
    at, mask = place(ref, lead, rows, cols)
    plt.store(at, value.astype(ref.dtype), mask=mask)


def dot(a, b, contract):
    return lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)


def load_weight(refs, expert, rows: Span, cols: Span, dtype):
    """A tile of the expert's matrix; `refs` begin with what holds it, here one array [E, N, K] of the dtype."""
    return load(refs[0], (expert,), rows, cols)


class Product(NamedTuple):
    """What the kernel of `y = x @ w` knows at compile time."""

    tile: Tile
    block_rows: int
    row_tiles: int
    inputs: int
    outputs: int
    outputs_first: bool  # w is [outputs, inputs], else [inputs, outputs]
    has_bias: bool
    load_weight: Callable

    def row_and_col_tile(self, program):
        """Numbers the programs as the file's head says."""
        col_tiles = pl.cdiv(self.outputs, self.tile.cols)
        together = GROUP_BLOCKS * self.block_rows // self.tile.rows
        first = lax.div(program, jnp.int32(together * col_tiles)) * together
        inside = lax.rem(program, jnp.int32(together * col_tiles))
        present = jnp.minimum(self.row_tiles - first, together)
        return first + lax.rem(inside, present), lax.div(inside, present)


def _product_kernel(experts_ref, num_blocks_ref, x_ref, *refs, static: Product):
    tile, y_ref = static.tile, refs[-1]
    row_tile, col_tile = static.row_and_col_tile(pl.program_id(0))
    block = lax.div(row_tile * tile.rows, jnp.int32(static.block_rows))
    expert, is_used = experts_ref[block], block < num_blocks_ref[0]
    rows, cols = Span(row_tile * tile.rows, tile.rows, x_ref.shape[0]), Span(col_tile * tile.cols, tile.cols, static.outputs)

    def turn(i, sum_RC):
        deep = Span(i * tile.depth, tile.depth, static.inputs)
        x_RD = load(x_ref, (), rows, deep)
        if static.outputs_first:
            return sum_RC + dot(x_RD, static.load_weight(refs, expert, cols, deep, x_RD.dtype), NT)
        return sum_RC + dot(x_RD, static.load_weight(refs, expert, deep, cols, x_RD.dtype), NN)

    turns = is_used.astype(jnp.int32) * pl.cdiv(static.inputs, tile.depth)
    y_RC = lax.fori_loop(0, turns, turn, jnp.zeros((tile.rows, tile.cols), jnp.float32))
    if static.has_bias:
        bias_1C = load(refs[-2], (), Span(expert, 1, refs[-2].shape[0]), cols).astype(jnp.float32)
        y_RC = jnp.where(is_used, y_RC + bias_1C, 0)  # a bias of NaN stays out of the unused blocks
    store(y_ref, (), rows, cols, y_RC)


def _weight_kernel(first_ref, sizes_ref, dy_ref, x_ref, dw_ref, dbias_ref, *, tile: Tile):
    expert, outputs, inputs = pl.program_id(2), *dw_ref.shape[1:]
    outs, ins = Span(pl.program_id(1) * tile.rows, tile.rows, outputs), Span(pl.program_id(0) * tile.cols, tile.cols, inputs)
    first = first_ref[expert]
    turns = lax.div(sizes_ref[expert] + (tile.depth - 1), jnp.int32(tile.depth))  # rows of padding beyond the last step are zero
    rows_of = lambda i: Span(first + i * tile.depth, tile.depth, x_ref.shape[0])

    def turn(i, sum_RC):
        rows = rows_of(i)
        return sum_RC + dot(load(dy_ref, (), rows, outs), load(x_ref, (), rows, ins), TN)

    store(dw_ref, (expert,), outs, ins, lax.fori_loop(0, turns, turn, jnp.zeros((tile.rows, tile.cols), jnp.float32)))

    @pl.when(pl.program_id(0) == 0)
    def _():
        add = lambda i, sum_DR: sum_DR + load(dy_ref, (), rows_of(i), outs).astype(jnp.float32)
        dbias_R = jnp.sum(lax.fori_loop(0, turns, add, jnp.zeros((tile.depth, tile.rows), jnp.float32)), axis=0)
        store(dbias_ref, (), Span(expert, 1, dbias_ref.shape[0]), outs, dbias_R[None])


def fit(tile: Tile | None, dtype, block_rows: int, **at_most: int) -> Tile:
    """The tile asked for, or the card's, no larger than a block of rows (`at_most` says which of its dims run along the block).

    Raises:
      ValueError: blocks that no tile of Triton can make up.
    """
    if block_rows < MIN_DIM or block_rows & (block_rows - 1):
        raise ValueError(f"the Triton grouped matmul takes blocks of 16, 32, 64, ... rows, not {block_rows}")
    tile = tile or choose_tile(jnp.dtype(dtype).itemsize, compute_capability())
    return tile._replace(**{dim: min(getattr(tile, dim), most) for dim, most in at_most.items()})


def _check_dtypes(**arrays):
    dtypes = {name: str(x.dtype) for name, x in arrays.items()}
    if len(set(dtypes.values())) > 1 or next(iter(arrays.values())).dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise TypeError(f"operands of the Triton grouped matmul must be of one float type of 16 or 32 bits, not {dtypes}")


def product(x_PK, weights: tuple, sizes: tuple[int, int], groups: RowGroups, *, outputs_first, load_weight, tile, interpret, bias_EN=None):
    """`y_PN` in the dtype of x; `weights` are the arrays that `load_weight` reads tiles of, sizes (outputs, inputs) of the product."""
    outputs, inputs = sizes
    tile = fit(tile, x_PK.dtype, groups.block_rows, rows=groups.block_rows)
    row_tiles = x_PK.shape[0] // tile.rows
    static = Product(tile, groups.block_rows, row_tiles, inputs, outputs, outputs_first, bias_EN is not None, load_weight)
    biases = () if bias_EN is None else (bias_EN,)
    return pl.pallas_call(
        partial(_product_kernel, static=static),
        grid=(row_tiles * pl.cdiv(outputs, tile.cols),),
        out_shape=jax.ShapeDtypeStruct((x_PK.shape[0], outputs), x_PK.dtype),
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="grouped_matmul",
    )(groups.block_expert_G, groups.num_blocks.reshape(1), x_PK, *weights, *biases)


def forward(x_PK, w_ENK, bias_EN, groups: RowGroups, tile: Tile | None = None, interpret: bool = False):
    """y_PN in the dtype of x. `interpret` runs the kernel's operations in plain JAX, for tests."""
    _check_dtypes(x=x_PK, w=w_ENK)
    return product(
        x_PK, (w_ENK,), w_ENK.shape[1:], groups, bias_EN=bias_EN, outputs_first=True, load_weight=load_weight, tile=tile, interpret=interpret
    )


def input_gradient(dy_PN, w_ENK, groups: RowGroups, tile: Tile | None = None, interpret: bool = False):
    """dx_PK in the dtype of dy."""
    _check_dtypes(dy=dy_PN, w=w_ENK)
    outputs, inputs = w_ENK.shape[2], w_ENK.shape[1]  # of this product
    return product(
        dy_PN, (w_ENK,), (outputs, inputs), groups, outputs_first=False, load_weight=load_weight, tile=tile, interpret=interpret
    )


def weight_gradient(dy_PN, x_PK, groups: RowGroups, tile: Tile | None = None, interpret: bool = False):
    """(dw_ENK, dbias_EN), both float32; zero for experts without rows."""
    _check_dtypes(dy=dy_PN, x=x_PK)
    tile = fit(tile, x_PK.dtype, groups.block_rows, depth=groups.block_rows)
    experts, outputs, inputs = groups.group_sizes_E.shape[0], dy_PN.shape[1], x_PK.shape[1]
    blocks_E = -(-groups.group_sizes_E // groups.block_rows)
    first_E = ((jnp.cumsum(blocks_E) - blocks_E) * groups.block_rows).astype(jnp.int32)
    return pl.pallas_call(
        partial(_weight_kernel, tile=tile),
        grid=(pl.cdiv(inputs, tile.cols), pl.cdiv(outputs, tile.rows), experts),
        out_shape=(jax.ShapeDtypeStruct((experts, outputs, inputs), jnp.float32), jax.ShapeDtypeStruct((experts, outputs), jnp.float32)),
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="grouped_matmul_weight_gradient",
    )(first_E, groups.group_sizes_E, dy_PN, x_PK)


def backward(dy_PN, x_PK, w_ENK, groups: RowGroups, tile: Tile | None = None, interpret: bool = False):
    """(dx_PK in the dtype of dy, dw_ENK float32, dbias_EN float32)."""
    return input_gradient(dy_PN, w_ENK, groups, tile, interpret), *weight_gradient(dy_PN, x_PK, groups, tile, interpret)
