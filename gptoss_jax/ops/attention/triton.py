"""Attention for NVIDIA GPUs: Pallas kernels (Triton lowering), a custom gradient around them. `triton_kernels` says how they compute.

Legend: B batch  T queries  S keys  N query heads  K kv heads  G=N/K  H head dim  O one number
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas import triton as plt
from jax.sharding import NamedSharding, PartitionSpec

from gptoss_jax.ops.attention.keys import Keys
from gptoss_jax.ops.attention.reference import MASKED, sink_gradient
from gptoss_jax.ops.attention.tiles import Tile, Tiles, choose_tiles
from gptoss_jax.ops.attention.triton_kernels import Sizes, dkv_kernel, dq_kernel, forward_kernel, padded
from gptoss_jax.ops.remat import product


def _spec(dims: str, x) -> pl.BlockSpec:
    """A program sees one batch row and one kv head of an array, and of its other dims everything."""
    block = tuple(None if dim in "BK" else size for dim, size in zip(dims, x.shape))
    return pl.BlockSpec(block, lambda _, kv_head, row: tuple({"B": row, "K": kv_head}.get(dim, 0) for dim in dims))


def _run(kernel, window, tile: Tile, over: str, inputs, outputs, interpret: bool):
    """`kernel` on every batch row and kv head.

    Args:
      over: what the tiles of the programs divide, "rows" or "keys".
      inputs: (dims, array) pairs, the first two of them q [B, T, K, G, H] and k [B, S, K, H].
      outputs: (dims, dtype) pairs.
    """
    in_dims, out_dims = ([dims for dims, _ in pairs] for pairs in (inputs, outputs))

    def launch(*arrays):
        sizes = dict(zip("BTKGH", arrays[0].shape)) | {"S": arrays[1].shape[1], "O": 1}
        tokens, keys, group = sizes["T"], sizes["S"], sizes["G"]
        programs = pl.cdiv(tokens * group, tile.rows) if over == "rows" else pl.cdiv(keys, tile.keys)
        shapes = tuple(jax.ShapeDtypeStruct(tuple(sizes[dim] for dim in dims), dtype) for dims, dtype in outputs)
        return pl.pallas_call(
            partial(kernel, sizes=Sizes(tokens, keys, group, sizes["H"], window, tile)),
            grid=(programs, sizes["K"], sizes["B"]),  # tiles of one kv head run side by side and share its keys and values in the L2 cache
            in_specs=[_spec(*pair) for pair in zip(in_dims, arrays)],
            out_specs=[_spec(*pair) for pair in zip(out_dims, shapes)],
            out_shape=shapes,
            compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
            interpret=interpret,
            name=kernel.__name__,
        )(*arrays)

    def partition(mesh, arguments, _):
        spec = (*arguments[0].sharding.spec, *[None] * 5)
        axes = {"B": spec[0], "K": spec[2]}
        place = lambda dims: NamedSharding(mesh, PartitionSpec(*map(axes.get, dims)))
        return mesh, launch, tuple(map(place, out_dims)), tuple(map(place, in_dims))

    # Without this, XLA gathers the arrays of all devices for a kernel that it cannot look into. Batch rows and kv heads are independent.
    letters = lambda all_dims: ", ".join(" ".join(dims.lower()) for dims in all_dims)
    rule = f"{letters(in_dims)} -> {letters(out_dims)}"
    call = custom_partitioning(launch)
    call.def_partition(partition, sharding_rule=rule, need_replication_factors=tuple("tghso"))
    return call(*(x for _, x in inputs))


def flash_attention(
    q_BTNH, k_BSKH, v_BSKH, sinks_N, segment_ids_BT, window: int | None, keys: Keys | None = None, tiles: Tiles | None = None, interpret: bool = False
):
    """See `gptoss_jax.ops.attention.attention`. `interpret` runs the kernels' operations in plain JAX, for tests."""
    tiles = tiles or choose_tiles(padded(q_BTNH.shape[-1]), q_BTNH.dtype.itemsize)
    return _attention(q_BTNH, k_BSKH, v_BSKH, sinks_N, segment_ids_BT, keys or Keys(segment_ids_BT), window, tiles, interpret)


@partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _attention(q_BTNH, k_BSKH, v_BSKH, sinks_N, segment_ids_BT, keys, window, tiles, interpret):
    return _forward(q_BTNH, k_BSKH, v_BSKH, sinks_N, segment_ids_BT, keys, window, tiles, interpret)[0]


def _grouped(x, kv_heads: int):
    """[B, T, N, ...] -> [B, T, K, G, ...]; no copy."""
    return x.reshape(*x.shape[:2], kv_heads, -1, *x.shape[3:])


def _start_O(keys: Keys):
    return jnp.zeros(1, jnp.int32) if keys.start is None else jnp.asarray(keys.start, jnp.int32).reshape(1)


def _forward(q_BTNH, k_BSKH, v_BSKH, sinks_N, segment_ids_BT, keys, window, tiles, interpret):
    kv_heads = k_BSKH.shape[2]
    q_BTKGH = _grouped(q_BTNH, kv_heads)
    sinks_KG = jnp.maximum(sinks_N.astype(jnp.float32), MASKED).reshape(kv_heads, -1)  # -inf as first maximum would give NaN
    inputs = (
        ("BTKGH", q_BTKGH),
        ("BSKH", k_BSKH),
        ("BSKH", v_BSKH),
        ("BT", segment_ids_BT),
        ("BS", keys.segment_ids_BS),
        ("O", _start_O(keys)),
        ("KG", sinks_KG),
    )
    outputs = ("BTKGH", q_BTNH.dtype), ("BTKG", jnp.float32)
    out_BTKGH, lse_BTKG = _run(forward_kernel, window, tiles.forward, "rows", inputs, outputs, interpret)
    out_BTNH, lse_BTN = product((out_BTKGH.reshape(q_BTNH.shape), lse_BTKG.reshape(q_BTNH.shape[:3])))
    return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, sinks_N, segment_ids_BT, keys, out_BTNH, lse_BTN)


def _backward(window, tiles, interpret, residual, do_BTNH):
    q_BTNH, k_BSKH, v_BSKH, sinks_N, segment_ids_BT, keys, out_BTNH, lse_BTN = residual
    kv_heads = k_BSKH.shape[2]
    delta_BTN, dsinks_N = sink_gradient(do_BTNH, out_BTNH, lse_BTN, sinks_N)
    q_BTKGH, do_BTKGH, lse_BTKG, delta_BTKG = (_grouped(x, kv_heads) for x in (q_BTNH, do_BTNH, lse_BTN, delta_BTN))
    inputs = (
        ("BTKGH", q_BTKGH),
        ("BSKH", k_BSKH),
        ("BSKH", v_BSKH),
        ("BT", segment_ids_BT),
        ("BS", keys.segment_ids_BS),
        ("O", _start_O(keys)),
        ("BTKGH", do_BTKGH),
        ("BTKG", lse_BTKG),
        ("BTKG", delta_BTKG),
    )
    (dq_BTKGH,) = _run(dq_kernel, window, tiles.dq, "rows", inputs, [("BTKGH", q_BTNH.dtype)], interpret)
    dk_BSKH, dv_BSKH = _run(dkv_kernel, window, tiles.dkv, "keys", inputs, [("BSKH", k_BSKH.dtype), ("BSKH", v_BSKH.dtype)], interpret)
    return dq_BTKGH.reshape(q_BTNH.shape), dk_BSKH, dv_BSKH, dsinks_N, None, None


_attention.defvjp(_forward, _backward)
