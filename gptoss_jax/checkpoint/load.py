"""Safetensors -> sharded parameters. Each device gets its slice alone: read from the file, decoded on that device, written into place.

A process reads only what its devices hold, each slice once, however many of its devices hold it. Threads read pieces of at most 128 MiB (in the
parameter dtype; 34 MiB of MXFP4) ahead of the one that is decoded.

A large shard (a stacked leaf of expert weights) is created as zeros on its device and filled by a jitted update with a donated buffer, layer by
layer and in groups of experts, so the host never holds more than the pieces that are ahead: 0.9 GiB at most. A small shard is put together on the
host and moved once, which needs no compilation.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Sharding

from gptoss_jax.checkpoint.ahead import Tick, in_order
from gptoss_jax.checkpoint.hf_layout import Piece, pieces_of
from gptoss_jax.checkpoint.source import EncodedSlice, SourceCheckpoint, decode_codes, open_checkpoint
from gptoss_jax.errors import UsageError
from gptoss_jax.formats import mxfp4
from gptoss_jax.model import GptOssConfig, abstract_params

PIECE_BYTES = 128 << 20
READ_THREADS, READ_AHEAD = 4, 6
Ranges = tuple[slice, ...]


def load_params(
    path: str | Path | SourceCheckpoint,
    dtype=jnp.bfloat16,
    shardings: Mapping[str, Sharding] | None = None,
    *,
    packed: bool = False,
    tick: Tick | None = None,
) -> tuple[GptOssConfig, dict[str, jax.Array | mxfp4.Codes]]:
    """Parameters of any checkpoint that `open_checkpoint` reads, decoded to `dtype` (bfloat16 or float32).

    MXFP4 decodes exactly in both dtypes; float32 sources are rounded to nearest even in bfloat16.

    Args:
      shardings: sharding per parameter name; None puts everything on the first device.
      packed: expert matrices of an MXFP4 checkpoint stay codes (for generation; on one device).
      tick: called with the bytes of parameters that have been read, and those of all that this process holds.

    Raises:
      UsageError, CorruptError: as `open_checkpoint`; also NaN or infinite weights and scale bytes that bfloat16 cannot hold.
    """
    source = path if isinstance(path, SourceCheckpoint) else open_checkpoint(path)
    if packed and shardings is not None:
        raise UsageError("packed experts cannot be sharded over devices: load them decoded")
    if packed and source.layout.experts != "mxfp4":
        raise UsageError(f"{source.path}: only MXFP4 experts can stay packed, these are {source.layout.experts.upper()}")
    leaves, first = abstract_params(source.config), jax.local_devices()[0]
    place = shardings or dict.fromkeys(leaves, jax.sharding.SingleDeviceSharding(first))
    params = _load_codes(source, first) if packed else {}
    held = {name: place[name].addressable_devices_indices_map(leaf.shape) for name, leaf in leaves.items() if name not in params}
    shards = [_shard(source, name, ranges, devices, dtype) for name in held for ranges, devices in _distinct(held[name], leaves[name].shape)]
    arrays: dict[str, dict[jax.Device, jax.Array]] = {name: {} for name in held}
    for shard, array in _load_shards(source, shards, np.dtype(dtype), tick):
        arrays[shard.name] |= {device: jax.device_put(array, device) for device in shard.devices}
    for name, devices in held.items():
        parts = [arrays[name][device] for device in devices]
        params[name] = jax.make_array_from_single_device_arrays(leaves[name].shape, place[name], parts)
    return source.config, {name: params[name] for name in leaves}


def load_share(
    source: SourceCheckpoint, dtype, shardings: Mapping[str, Sharding], device: jax.Device, tick: Tick | None = None
) -> dict[str, jax.Array]:
    """What one device of a mesh holds of every parameter, as `load_params` puts it there."""
    leaves = abstract_params(source.config)
    ranges = {name: _absolute(shardings[name].devices_indices_map(leaf.shape)[device], leaf.shape) for name, leaf in leaves.items()}
    shards = [_shard(source, name, ranges[name], [device], dtype) for name in leaves]
    return {shard.name: array for shard, array in _load_shards(source, shards, np.dtype(dtype), tick)}


# ---- what is to be read -------------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """What is read at once: `ranges` of a piece, which begin in the shard at `offsets`."""

    piece: Piece
    ranges: Ranges
    offsets: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(part.stop - part.start for part in self.ranges)


class _Shard(NamedTuple):
    """`ranges` of a parameter, the devices of this process that hold them, and the reads that make them up."""

    name: str
    ranges: Ranges
    devices: list[jax.Device]
    parts: list[_Part]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(part.stop - part.start for part in self.ranges)


def _absolute(index: Ranges, shape: tuple[int, ...]) -> Ranges:
    return tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))


def _distinct(indices: Mapping[jax.Device, Ranges], shape: tuple[int, ...]) -> Iterable[tuple[Ranges, list[jax.Device]]]:
    """Each slice with the devices that hold it."""
    out: dict[tuple, tuple[Ranges, list[jax.Device]]] = {}
    for device, index in indices.items():
        ranges = _absolute(index, shape)
        out.setdefault(tuple((part.start, part.stop) for part in ranges), (ranges, []))[1].append(device)
    return out.values()


def _shard(source: SourceCheckpoint, name: str, ranges: Ranges, devices: list[jax.Device], dtype) -> _Shard:
    """A shard as the layers in it, cut along their first dim (experts, rows) to `PIECE_BYTES`."""
    pieces = pieces_of(source.config, name, abstract_params(source.config)[name].shape)
    stacked = pieces[0].slot is not None
    inner = ranges[1:] if stacked else ranges
    row_bytes = math.prod(part.stop - part.start for part in inner[1:]) * np.dtype(dtype).itemsize
    step = max(1, PIECE_BYTES // max(row_bytes, 1))
    parts = []
    for piece in pieces[ranges[0].start : ranges[0].stop] if stacked else pieces:
        for start in range(inner[0].start, inner[0].stop, step):
            rows = slice(start, min(start + step, inner[0].stop))
            offsets = (start - inner[0].start, *([0] * (len(inner) - 1)))
            parts.append(_Part(piece, (rows, *inner[1:]), (piece.slot - ranges[0].start, *offsets) if stacked else offsets))
    return _Shard(name, ranges, devices, parts)


# ---- reading and placing ------------------------------------------------------------------------------------------------------


def _load_shards(source: SourceCheckpoint, shards: list[_Shard], dtype: np.dtype, tick: Tick | None) -> Iterator[tuple[_Shard, jax.Array]]:
    """Each shard on the first of its devices."""
    total = sum(math.prod(shard.shape) for shard in shards) * dtype.itemsize
    found = _read_ahead(source, [part for shard in shards for part in shard.parts], lambda size: tick and tick(size * dtype.itemsize, total))
    for shard in shards:
        large = math.prod(shard.shape) * dtype.itemsize > PIECE_BYTES
        yield shard, (_fill_device if large else _fill_host)(shard, itertools.islice(found, len(shard.parts)), dtype)


def _read_ahead(source: SourceCheckpoint, parts: list[_Part], done) -> Iterator[tuple[_Part, np.ndarray | EncodedSlice]]:
    reads = (functools.partial(source.read, part.piece, part.ranges) for part in parts)
    size = 0
    for part, values in zip(parts, in_order(reads, threads=READ_THREADS, ahead=READ_AHEAD), strict=True):
        size += part.size
        done(size)
        yield part, values


def _fill_host(shard: _Shard, found: Iterable[tuple[_Part, np.ndarray | EncodedSlice]], dtype: np.dtype) -> jax.Array:
    host = np.empty(shard.shape, dtype)
    for part, values in found:
        values = np.asarray(values.decode(dtype, shard.devices[0])) if isinstance(values, EncodedSlice) else values
        values = values.reshape([1] * (host.ndim - values.ndim) + list(values.shape))
        host[tuple(slice(o, o + n) for o, n in zip(part.offsets, values.shape, strict=True))] = values
    return jax.device_put(host, shard.devices[0])


def _fill_device(shard: _Shard, found: Iterable[tuple[_Part, np.ndarray | EncodedSlice]], dtype: np.dtype) -> jax.Array:
    device = shard.devices[0]
    buffer = jnp.zeros(shard.shape, dtype, device=device)
    for part, values in found:
        offsets = np.asarray(part.offsets, np.int32)
        if isinstance(values, EncodedSlice):
            buffer = _write_decoded(buffer, jax.device_put(values.codes, device), offsets, values.trim.start, values.trim.stop)
        else:
            buffer = _write(buffer, jax.device_put(np.ascontiguousarray(values, dtype), device), offsets)
        buffer.block_until_ready()  # transfers are asynchronous: without this, pieces pile up in host memory
    return buffer


def _load_codes(source: SourceCheckpoint, device: jax.Device) -> dict[str, mxfp4.Codes]:
    """The leaves of expert matrices as stored, layer by layer."""
    out = {}
    for name, leaf in abstract_params(source.config).items():
        pieces = pieces_of(source.config, name, leaf.shape)
        if pieces[0].row.matrix:
            *outer, width = leaf.shape
            codes = mxfp4.Codes(*(jnp.zeros((*outer, width // per_byte), jnp.uint8, device=device) for per_byte in (2, mxfp4.BLOCK_SIZE)))
            for piece in pieces:
                found = source.read(piece, tuple(slice(0, size) for size in piece.shape)).codes
                offsets = np.array([0] * len(piece.shape) if piece.slot is None else [piece.slot] + [0] * len(piece.shape), np.int32)
                codes = mxfp4.Codes(*(_write(old, jax.device_put(new, device), offsets) for old, new in zip(codes, found)))
                jax.block_until_ready(codes)
            out[name] = codes
    return out


@functools.partial(jax.jit, donate_argnums=0)
def _write(buffer: jax.Array, values: jax.Array, offsets: jax.Array) -> jax.Array:
    """Puts values into a buffer, whose first dim they may lack."""
    values = values.reshape((1,) * (buffer.ndim - values.ndim) + values.shape)
    return lax.dynamic_update_slice(buffer, values, [offsets[i] for i in range(buffer.ndim)])


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def _write_decoded(buffer: jax.Array, codes, offsets: jax.Array, start: int, stop: int) -> jax.Array:
    """`_write` of elements `start` to `stop` of what codes mean: one pass over memory, where decoding first makes two."""
    return _write(buffer, decode_codes(codes, buffer.dtype, start, stop), offsets)
