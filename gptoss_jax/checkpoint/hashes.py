"""Hashes that tie three things together: codes computed inside the compiled training program, codes that export wrote, bytes of the files.

The hash of one quantized matrix is xxh3_128 over packed codes, then block scales, then (NVFP4) global scales, in C order. Packed codes
[E, out, in/2] and MXFP4's stored blocks [E, out, in/32, 16] are the same bytes, so a file's tensors hash to what training computed.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
import xxhash
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from gptoss_jax.checkpoint.hf_layout import pieces_of
from gptoss_jax.model import GptOssConfig


def hash_arrays(arrays: Iterable[np.ndarray]) -> str:
    """xxh3_128 (hex) of the bytes of arrays, one after the other."""
    state = xxhash.xxh3_128()
    for array in arrays:
        state.update(bytes_of(array))
    return state.hexdigest()


def bytes_of(array: np.ndarray) -> memoryview:
    """The bytes of an array in C order."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def code_hashes(config: GptOssConfig, codes: Mapping[str, Any]) -> dict[str, str]:
    """Hash per layer of quantized parameters.

    Args:
      codes: mxfp4.Codes or nvfp4.Codes by parameter name, stacked like the parameter (`captured` of `forward`, without the weights).

    Returns:
      {"model.layers.{i}.mlp.experts.gate_up_proj": hex, ...} under the HF layer index.
    """
    out = {}
    for name, parts in codes.items():
        for piece in pieces_of(config, name, parts.packed.shape):
            layer = parts if piece.slot is None else jax.tree.map(lambda part, slot=piece.slot: part[slot], parts)
            out[piece.hf_key] = hash_arrays(to_host(part) for part in layer)
    return out


def params_hash(params: Mapping[str, Any]) -> str:
    """xxh3_128 over names and values of parameters (arrays, or codes), in the order of names. Stacked arrays come to the host layer by layer."""
    state = xxhash.xxh3_128()
    for name in sorted(params):
        for part in jax.tree.leaves(params[name]):
            state.update(f"{name} {part.dtype}{list(part.shape)}".encode())
            layers = (take_rows(part, slot, 0, part.shape[1]) for slot in range(part.shape[0])) if part.ndim > 2 else (part,)
            for layer in layers:
                state.update(bytes_of(to_host(layer)))
    return state.hexdigest()


def whole(array: Any) -> Any:
    """Of an array that spans processes, a copy that every device holds; every process must call this. Any other array as it is."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return array
    replicated = NamedSharding(array.sharding.mesh, PartitionSpec())
    return jax.jit(lambda x: x, out_shardings=replicated)(array)


def to_host(array: Any) -> np.ndarray:
    """The whole array on this host; of an array that spans processes every process must call this."""
    return np.asarray(whole(array))


def rows_to_host(array: Any, start: int, stop: int) -> np.ndarray:
    """Rows `start` to `stop` (first dim) on this host, which no others reach. Every row must be on a device of this process (`whole`)."""
    if not isinstance(array, jax.Array):
        return array[start:stop]
    out = np.empty((stop - start, *array.shape[1:]), array.dtype)
    different = {str(shard.index): shard for shard in array.addressable_shards}  # of copies one is enough
    for shard in different.values():
        first, last, _ = shard.index[0].indices(array.shape[0])
        begin, end = max(start, first), min(stop, last)
        if begin < end:
            out[(slice(begin - start, end - start), *shard.index[1:])] = np.asarray(take_rows(shard.data, None, begin - first, end - begin))
    return out


@functools.partial(jax.jit, static_argnames="count")
def take_rows(array: jax.Array, slot: int | None, start: int, count: int) -> jax.Array:
    """`array[start : start + count]`, or with a `slot` `array[slot, start : start + count]`; one program for all slots and starts."""
    if slot is None:
        return lax.dynamic_slice_in_dim(array, start, count)
    begin = (slot, start, *([0] * (array.ndim - 2)))
    return lax.dynamic_slice(array, begin, (1, count, *array.shape[2:]))[0]
