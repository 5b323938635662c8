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
from gptoss_jax.errors import UsageError
from gptoss_jax.formats import mxfp4
from gptoss_jax.model import GptOssConfig, abstract_params

PIECE_BYTES = 128 << 20
Ranges = tuple[slice, ...]


def load_params(
    path: str | Path | SourceCheckpoint,
    dtype=jnp.bfloat16,
    shardings: dict[str, jax.sharding.Sharding] | None = None,
    *,
    packed: bool = False,
) -> tuple[GptOssConfig, dict[str, jax.Array | mxfp4.Codes]]:
    """Parameters of any checkpoint that `open_checkpoint` reads, decoded to `dtype` (bfloat16 or float32).

    MXFP4 decodes exactly in both dtypes; float32 sources are rounded to nearest even in bfloat16.

    Args:
      shardings: sharding per parameter name; None puts everything on the first device.
      packed: expert matrices of an MXFP4 checkpoint stay codes (for generation; on one device).

    Raises:
      UsageError, CorruptError: as `open_checkpoint`; also NaN or infinite weights and scale bytes that bfloat16 cannot hold.
    """
    source = path if isinstance(path, SourceCheckpoint) else open_checkpoint(path)
    if shardings is None:
        single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = dict.fromkeys(abstract_params(source.config), single)
    elif packed:
        raise UsageError("packed experts cannot be sharded over devices: load them decoded")
    if packed and source.layout.experts != "mxfp4":
        raise UsageError(f"{source.path}: only MXFP4 experts can stay packed, these are {source.layout.experts.upper()}")

    def load(name: str, shape: tuple[int, ...]):
        pieces = pieces_of(source.config, name, shape)
        if packed and pieces[0].row.matrix:
            return _load_codes(source, pieces, shape, *shardings[name].addressable_devices)
        return _load_leaf(source, pieces, shape, np.dtype(dtype), shardings[name])

    return source.config, {name: load(name, leaf.shape) for name, leaf in abstract_params(source.config).items()}


def _load_codes(source: SourceCheckpoint, pieces: list[Piece], shape: tuple[int, ...], device: jax.Device) -> mxfp4.Codes:
    """A leaf of expert matrices as stored, layer by layer."""
    *outer, width = shape
    codes = mxfp4.Codes(*(jnp.zeros((*outer, width // per_byte), jnp.uint8, device=device) for per_byte in (2, mxfp4.BLOCK_SIZE)))
    for piece in pieces:
        found = source.read(piece, tuple(slice(0, size) for size in piece.shape)).codes
        offsets = np.array([0] * len(piece.shape) if piece.slot is None else [piece.slot] + [0] * len(piece.shape), np.int32)
        layer = (np.ascontiguousarray(x if piece.slot is None else x[None]) for x in found)
        codes = mxfp4.Codes(*(_write(old, jax.device_put(new, device), offsets) for old, new in zip(codes, layer)))
        jax.block_until_ready(codes)  # transfers are asynchronous: without this, layers pile up in host memory
    return codes


def _load_leaf(source: SourceCheckpoint, pieces: list[Piece], shape: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding) -> jax.Array:
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
