"""Attention for NVIDIA GPUs: Pallas kernels (Triton lowering), a custom gradient around them. `triton_kernels` says how they compute.

Legend: B batch  T tokens  N query heads  K kv heads  G=N/K  H head dim
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from gptoss_jax.ops.attention.reference import MASKED, sink_gradient
from gptoss_jax.ops.attention.tiles import Tile, Tiles, choose_tiles
from gptoss_jax.ops.attention.triton_kernels import Sizes, dkv_kernel, dq_kernel, forward_kernel, padded
from gptoss_jax.ops.remat import product


def _spec(dims: str, x) -> pl.BlockSpec:
    """A program sees one batch row and one kv head of an array, and of its other dims everything."""
    block = tuple(None if dim in "BK" else size for dim, size in zip(dims, x.shape))
    return pl.BlockSpec(block, lambda _, kv_head, row: tuple({"B": row, "K": kv_head}.get(dim, 0) for dim in dims))


def _run(kernel, window, tile: Tile, programs: int, inputs, outputs, interpret: bool):
    """`kernel` on `programs` tiles of every batch row and kv head; inputs and outputs are (dims, array) pairs, the first input q [B, T, K, G, H]."""
    batch, length, kv_heads, group, head_dim = inputs[0][1].shape
    return pl.pallas_call(
        partial(kernel, sizes=Sizes(length, group, head_dim, window, tile)),
        grid=(programs, kv_heads, batch),  # tiles of one kv head run side by side and share its keys and values in the L2 cache
        in_specs=[_spec(*pair) for pair in inputs],
        out_specs=[_spec(*pair) for pair in outputs],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for _, x in outputs],
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name=kernel.__name__,
    )(*(x for _, x in inputs))


def flash_attention(q_BTNH, k_BTKH, v_BTKH, sinks_N, segment_ids_BT, window: int | None, tiles: Tiles | None = None, interpret: bool = False):
    """See `gptoss_jax.ops.attention.attention`. `interpret` runs the kernels' operations in plain JAX, for tests."""
    tiles = tiles or choose_tiles(padded(q_BTNH.shape[-1]), q_BTNH.dtype.itemsize)
    return _attention(q_BTNH, k_BTKH, v_BTKH, sinks_N, segment_ids_BT, window, tiles, interpret)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attention(q_BTNH, k_BTKH, v_BTKH, sinks_N, segment_ids_BT, window, tiles, interpret):
    return _forward(q_BTNH, k_BTKH, v_BTKH, sinks_N, segment_ids_BT, window, tiles, interpret)[0]


def _grouped(x, kv_heads: int):
    """[B, T, N, ...] -> [B, T, K, G, ...]; no copy."""
    return x.reshape(*x.shape[:2], kv_heads, -1, *x.shape[3:])


def _forward(q_BTNH, k_BTKH, v_BTKH, sinks_N, segment_ids_BT, window, tiles, interpret):
    length, kv_heads = k_BTKH.shape[1:3]
    q_BTKGH = _grouped(q_BTNH, kv_heads)
    sinks_KG = jnp.maximum(sinks_N.astype(jnp.float32), MASKED).reshape(kv_heads, -1)  # -inf as first maximum would give NaN
    inputs = ("BTKGH", q_BTKGH), ("BTKH", k_BTKH), ("BTKH", v_BTKH), ("KG", sinks_KG), ("BT", segment_ids_BT)
    outputs = ("BTKGH", q_BTKGH), ("BTKG", jax.ShapeDtypeStruct(q_BTKGH.shape[:-1], jnp.float32))
    programs = pl.cdiv(length * q_BTKGH.shape[3], tiles.forward.rows)
    out_BTKGH, lse_BTKG = _run(forward_kernel, window, tiles.forward, programs, inputs, outputs, interpret)
    out_BTNH, lse_BTN = product((out_BTKGH.reshape(q_BTNH.shape), lse_BTKG.reshape(q_BTNH.shape[:3])))
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, sinks_N, segment_ids_BT, out_BTNH, lse_BTN)


def _backward(window, tiles, interpret, residual, do_BTNH):
    q_BTNH, k_BTKH, v_BTKH, sinks_N, segment_ids_BT, out_BTNH, lse_BTN = residual
    length, kv_heads = k_BTKH.shape[1:3]
    delta_BTN, dsinks_N = sink_gradient(do_BTNH, out_BTNH, lse_BTN, sinks_N)
    q_BTKGH, do_BTKGH, lse_BTKG, delta_BTKG = (_grouped(x, kv_heads) for x in (q_BTNH, do_BTNH, lse_BTN, delta_BTN))
    arrays = ("BTKGH", q_BTKGH), ("BTKH", k_BTKH), ("BTKH", v_BTKH), ("BT", segment_ids_BT)
    inputs = *arrays, ("BTKGH", do_BTKGH), ("BTKG", lse_BTKG), ("BTKG", delta_BTKG)
    programs = pl.cdiv(length * q_BTKGH.shape[3], tiles.dq.rows)
    (dq_BTKGH,) = _run(dq_kernel, window, tiles.dq, programs, inputs, arrays[:1], interpret)
    dk_BTKH, dv_BTKH = _run(dkv_kernel, window, tiles.dkv, pl.cdiv(length, tiles.dkv.keys), inputs, arrays[1:3], interpret)
    return dq_BTKGH.reshape(q_BTNH.shape), dk_BTKH, dv_BTKH, dsinks_N, None


_attention.defvjp(_forward, _backward)
