"""Attention on a mesh: `jax.shard_map` around the code for one device. Rows are cut over the batch axes, heads over `tensor`, and the length of
a row over `context`; only the last needs an exchange, and what is exchanged depends on the layer.

    sliding   the keys and values of the window's halo, the window - 1 tokens before this device's, from the neighbours that hold them
    full      all keys and values of the row (all-gather; their gradients come back as a float32 reduce-scatter)

The gathered keys and values of one gpt-oss layer at 131,072 tokens are 2 * 131072 * 8 * 64 * 2 bytes = 256 MiB in bf16 and live for that layer only,
which is why there is no ring: that would save this memory, and wait for a neighbour at every step.

Causal attention is uneven: of P devices the last one's queries see 2 - 1/P times the mean of keys. So every device's queries are halved, and the
halves are dealt out anew for the product: device r computes half r and half 2P-1-r of the row's 2P halves, which together see the same number of
keys everywhere. Queries and outputs travel, once each (128 MiB per device and layer for gpt-oss at 131,072 tokens on 8 devices); the order of tokens
in the batch, positions and everything else in the model stay as they are.

Legend: B batch  T tokens of this device  S tokens of the row  N query heads  K kv heads  H head dim  P devices of the length
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from gptoss_jax.ops.attention import Keys
from gptoss_jax.quant import Gather
from gptoss_jax.quant.gather import cast_and_gather
from gptoss_jax.sharding.rules import DEFAULT_RULES, ShardingRules


def attention_parallel(mesh: Mesh, rules: ShardingRules = DEFAULT_RULES) -> Callable[[Callable, int | None], Callable]:
    """How `forward` runs attention on this mesh: `distribute(run, window)` does what `run(q, k, v, sinks, segment_ids)` does on one device."""
    rows, length, heads, kv_heads = (rules.axes(logical, mesh) or None for logical in ("batch", "length", "heads", "kv_heads"))
    num_devices = math.prod(mesh.shape[axis] for axis in length or ())
    in_specs = (
        PartitionSpec(rows, length, heads), PartitionSpec(rows, length, kv_heads), PartitionSpec(rows, length, kv_heads),
        PartitionSpec(heads), PartitionSpec(rows, length),
    )  # fmt: skip

    def distribute(run: Callable, window: int | None) -> Callable:
        local = run
        if length:
            local = partial(_full, run, length, num_devices) if window is None else partial(_sliding, run, length, num_devices, window)
        # the loops inside carry zeros that vary over no axis, which the check of replication does not follow
        return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=in_specs[0], check_vma=False)

    return distribute


def _before(x_BT: Array, count: int, axes: tuple[str, ...], num_devices: int) -> Array:
    """The `count` tokens before this device's, from as many neighbours as hold them; zeros before the beginning of the row."""
    length = x_BT.shape[1]
    pieces = []
    for hop in range(-(-count // length), 0, -1):
        part = min(length, count - (hop - 1) * length)
        pieces.append(lax.ppermute(x_BT[:, length - part :], axes, [(i, i + hop) for i in range(num_devices - hop)]))
    return jnp.concatenate(pieces, axis=1)


def _sliding(run, axes, num_devices: int, window: int, q_BTNH, k_BTKH, v_BTKH, sinks_N, segment_ids_BT):
    length = q_BTNH.shape[1]
    count = min(window - 1, (num_devices - 1) * length)
    if not count:
        return run(q_BTNH, k_BTKH, v_BTKH, sinks_N, segment_ids_BT)
    k_BH, v_BH, segments_BH = (_before(x, count, axes, num_devices) for x in (k_BTKH, v_BTKH, segment_ids_BT))
    # no token has segment -1: padding (0) must not see what is before the row
    segments_BH = jnp.where(lax.axis_index(axes) * length >= count - jnp.arange(count), segments_BH, -1)
    k_BSKH, v_BSKH, segment_ids_BS = (jnp.concatenate(pair, axis=1) for pair in ((k_BH, k_BTKH), (v_BH, v_BTKH), (segments_BH, segment_ids_BT)))
    return run(q_BTNH, k_BSKH, v_BSKH, sinks_N, segment_ids_BT, keys=Keys(segment_ids_BS, jnp.int32(count)))


def _full(run, axes, num_devices: int, q_BTNH, k_BTKH, v_BTKH, sinks_N, segment_ids_BT):
    k_BSKH, v_BSKH = (cast_and_gather(x, x.dtype, Gather(axes, dim=1)) for x in (k_BTKH, v_BTKH))
    segment_ids_BS = lax.all_gather(segment_ids_BT, axes, axis=1, tiled=True)
    device, length = lax.axis_index(axes), q_BTNH.shape[1]

    def queries(q_BTNH, start):
        segments_BT = lax.dynamic_slice_in_dim(segment_ids_BS, start, q_BTNH.shape[1], axis=1)
        return run(q_BTNH, k_BSKH, v_BSKH, sinks_N, segments_BT, keys=Keys(segment_ids_BS, start))

    if length % 2:
        return queries(q_BTNH, device * length)
    # half h = 2r + parity of the row lies on device r and is computed on device h or 2P-1-h: of each parity, every device gets one
    half = length // 2
    computed_on = lambda h: h if h < num_devices else 2 * num_devices - 1 - h
    moves = [[(r, computed_on(2 * r + parity)) for r in range(num_devices)] for parity in (0, 1)]
    back = [[(there, r) for r, there in pairs] for pairs in moves]
    halves_2BTNH = jnp.stack([lax.ppermute(q_BTNH[:, parity * half :][:, :half], axes, moves[parity]) for parity in (0, 1)])
    half_of_2 = jnp.stack([jnp.where(device % 2 == parity, device, 2 * num_devices - 1 - device) for parity in (0, 1)])
    out_2BTNH = lax.map(lambda args: queries(*args), (halves_2BTNH, half_of_2 * half))
    return jnp.concatenate([lax.ppermute(out_2BTNH[parity], axes, back[parity]) for parity in (0, 1)], axis=1)
