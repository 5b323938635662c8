"""Hashes that tie three things together: codes computed inside the compiled training program, codes that export wrote, bytes of the files.

The hash of one quantized matrix is xxh3_128 over packed codes, then block scales, then (NVFP4) global scales, in C order. Packed codes
[E, out, in/2] and MXFP4's stored blocks [E, out, in/32, 16] are the same bytes, so a file's tensors hash to what training computed.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
import xxhash
from jax.sharding import NamedSharding, PartitionSpec

from gptoss_jax.checkpoint.hf_layout import pieces_of
from gptoss_jax.model import GptOssConfig

CHUNK_BYTES = 64 << 20


def hash_arrays(arrays: Iterable[np.ndarray]) -> str:
    """xxh3_128 (hex) of the bytes of arrays, one after the other; mapped files are read in chunks."""
    state = xxhash.xxh3_128()
    for array in arrays:
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        for start in range(0, flat.size, CHUNK_BYTES):
            state.update(flat[start : start + CHUNK_BYTES].data)
    return state.hexdigest()


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


def whole(array: Any) -> Any:
    """Of an array that spans processes, a copy that every device holds; every process must call this. Any other array as it is."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return array
    replicated = NamedSharding(array.sharding.mesh, PartitionSpec())
    return jax.jit(lambda x: x, out_shardings=replicated)(array)


def to_host(array: Any) -> np.ndarray:
    """The whole array on this host; of an array that spans processes every process must call this."""
    return np.asarray(whole(array))
