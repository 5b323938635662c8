"""Safetensors -> sharded parameters. Each device gets its slice alone: read from the mapped file, decoded on that device, written into place.

A large shard (a stacked leaf of expert weights) is created as zeros on its device and filled by a jitted update with a donated buffer, layer by
layer and in groups of experts, so the host never holds more than one piece of at most 128 MiB (in the parameter dtype). A small shard is put
together on the host and moved once, which needs no compilation.
"""

import functools
import math
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gptoss_jax.checkpoint.hf_layout import Piece, pieces_of
from gptoss_jax.checkpoint.source import EncodedSlice, SourceCheckpoint, open_checkpoint
from gptoss_jax.model import GptOssConfig, abstract_params

PIECE_BYTES = 128 << 20
Ranges = tuple[slice, ...]


def load_params(
    path: str | Path | SourceCheckpoint,
    dtype=jnp.bfloat16,
    shardings: dict[str, jax.sharding.Sharding] | None = None,
) -> tuple[GptOssConfig, dict[str, jax.Array]]:
    """Parameters of any checkpoint that `open_checkpoint` reads, decoded to `dtype` (bfloat16 or float32).

    MXFP4 decodes exactly in both dtypes; float32 sources are rounded to nearest even in bfloat16.

    Args:
      shardings: sharding per parameter name; None puts everything on the first device.

    Raises:
      UsageError, CorruptError: as `open_checkpoint`; also NaN or infinite weights and scale bytes that bfloat16 cannot hold.
    """
    source = path if isinstance(path, SourceCheckpoint) else open_checkpoint(path)
    if shardings is None:
        single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = dict.fromkeys(abstract_params(source.config), single)
    params = {name: _load_leaf(source, name, leaf.shape, np.dtype(dtype), shardings[name]) for name, leaf in abstract_params(source.config).items()}
    return source.config, params


def _load_leaf(source: SourceCheckpoint, name: str, shape: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding) -> jax.Array:
    pieces = pieces_of(source.config, name, shape)
    shards = []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        ranges = tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))
        shards.append(_load_shard(source, pieces, ranges, dtype, device))
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _load_shard(source: SourceCheckpoint, pieces: list[Piece], ranges: Ranges, dtype: np.dtype, device: jax.Device) -> jax.Array:
    """The part `ranges` of a parameter on one device. Offsets below are relative to that part."""
    shape = tuple(part.stop - part.start for part in ranges)
    if math.prod(shape) * dtype.itemsize <= PIECE_BYTES:
        host = np.empty(shape, dtype)
        for offsets, values in _read_parts(source, pieces, ranges, dtype, device):
            host[tuple(slice(o, o + n) for o, n in zip(offsets, values.shape, strict=True))] = values
        return jax.device_put(host, device)
    buffer = jnp.zeros(shape, dtype, device=device)
    for offsets, values in _read_parts(source, pieces, ranges, dtype, device):
        values = values if isinstance(values, jax.Array) else np.ascontiguousarray(values, dtype)
        buffer = _write(buffer, jax.device_put(values, device), np.asarray(offsets, np.int32))
        buffer.block_until_ready()  # transfers are asynchronous: without this, pieces pile up in host memory
    return buffer


def _read_parts(
    source: SourceCheckpoint, pieces: list[Piece], ranges: Ranges, dtype: np.dtype, device: jax.Device
) -> Iterator[tuple[tuple[int, ...], np.ndarray | jax.Array]]:
    """(offsets, values) that together cover the shard: the layers in it, cut along their first dim to `PIECE_BYTES`."""
    stacked = pieces[0].slot is not None
    inner = ranges[1:] if stacked else ranges
    row_bytes = math.prod(part.stop - part.start for part in inner[1:]) * dtype.itemsize
    step = max(1, PIECE_BYTES // max(row_bytes, 1))
    for piece in pieces[ranges[0].start : ranges[0].stop] if stacked else pieces:
        for start in range(inner[0].start, inner[0].stop, step):
            rows = slice(start, min(start + step, inner[0].stop))
            found = source.read(piece, (rows, *inner[1:]))
            values = found.decode(dtype, device) if isinstance(found, EncodedSlice) else found
            offsets = (rows.start - inner[0].start, *([0] * (len(inner) - 1)))
            if stacked:
                offsets, values = (piece.slot - ranges[0].start, *offsets), values[None]
            yield offsets, values


@functools.partial(jax.jit, donate_argnums=0)
def _write(buffer: jax.Array, values: jax.Array, offsets: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice(buffer, values, [offsets[i] for i in range(buffer.ndim)])
