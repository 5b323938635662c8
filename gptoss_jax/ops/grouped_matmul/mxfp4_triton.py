"""Grouped matmul with MXFP4 weights for NVIDIA GPUs: programs read packed codes and decode each tile in registers.

The same kernel as `triton`, with `mxfp4.decode` itself in the place of the load, so that results equal decoding first and multiplying then, bit for
bit. Weights take 4.25 bits in memory and on the way to the chip instead of 16, and no decoded copy of a layer exists (1.6 GB of bf16 for a layer of
gpt-oss-20b, 6.4 for 120b). The price is that every tile of rows decodes its weights again: about 27 instructions for each weight in the program
compiled for sm90, on paper three times as long as its products with 128 rows take. It is meant for frozen weights and few rows per expert:
generation, adapters. With many rows, decoding a layer first and `triton` is less work. There is no gradient of the weights.

Legend: P slots  E experts  N outputs  K inputs  C=K/32 scale blocks of a row
"""

from gptoss_jax.formats import mxfp4
from gptoss_jax.ops.grouped_matmul import triton
from gptoss_jax.ops.grouped_matmul.groups import RowGroups
from gptoss_jax.ops.grouped_matmul.tiles import TILES, Tile
from gptoss_jax.ops.grouped_matmul.triton import Span


def _load_codes(refs, expert, rows: Span, cols: Span, dtype):
    """A tile of the expert's matrix [N, K] from packed codes [E, N, K/2] and scales [E, N, C]; zeros where there is nothing, as both are 0."""
    packed, scales = (triton.load(ref, (expert,), rows, cols.groups(width)) for ref, width in zip(refs, (2, mxfp4.BLOCK_SIZE)))
    return mxfp4.decode(mxfp4.Codes(packed, scales), dtype)


def _product(x, codes: mxfp4.Codes, outputs_first: bool, tile: Tile | None, **options):
    outputs, inputs = codes.packed.shape[1], 2 * codes.packed.shape[2]
    if codes.packed.size >= 2**31:  # offsets have 32 bits up to 2^32 bytes, one of them a sign
        raise ValueError(f"packed codes of shape {codes.packed.shape} have 2^31 bytes or more; split the experts")
    sizes = (outputs, inputs) if outputs_first else (inputs, outputs)
    tile = tile or TILES[x.dtype.itemsize][-1]  # the smallest: decoding takes registers, 128 x 256 would spill
    return triton.product(x, codes, sizes, outputs_first=outputs_first, load_weight=_load_codes, tile=tile, **options)


def forward(x_PK, codes: mxfp4.Codes, bias_EN, groups: RowGroups, tile: Tile | None = None, interpret: bool = False):
    """y_PN in the dtype of x (bfloat16 or float32) for the weights [E, N, K] that `codes` hold."""
    return _product(x_PK, codes, True, tile, groups=groups, bias_EN=bias_EN, interpret=interpret)


def input_gradient(dy_PN, codes: mxfp4.Codes, groups: RowGroups, tile: Tile | None = None, interpret: bool = False):
    """dx_PK in the dtype of dy."""
    return _product(dy_PN, codes, False, tile, groups=groups, interpret=interpret)
