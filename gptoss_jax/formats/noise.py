"""Random bits for rounding that depend on a key and the position of the element alone: every sharding, transform and device gives the same.

A hash of (row, column) with the 32-bit finalizer of MurmurHash3 (Appleby, public domain) instead of threefry: a dozen integer operations that
fuse into the pass that uses them, where threefry takes a hundred and XLA's CPU backend writes them to memory first. Good enough for the noise of
rounding, not for drawing samples.

A key is two words of uint32, or one of JAX's typed keys. Keys of shape [*lead, 2] give every leading index its own noise, counted from the
first row of its matrix: then any slice of the leading dims, rounded with the same slice of the keys, has the same bits.
"""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, UInt32

Key = UInt32[Array, "*lead 2"]

_GOLDEN = np.uint32(0x9E3779B9)  # 2**32 / golden ratio: multiples of it fill the circle most evenly


def mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The finalizer: a bijection of uint32 in which every output bit depends on every input bit."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def as_words(key: jax.Array) -> Key:
    """The words of a key.

    Raises:
      TypeError: neither a typed key nor uint32 [*lead, 2].
    """
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
        key = key if key.shape[-1] == 2 else key[..., :2] ^ mix(key[..., 2:])  # rbg keys have four words
    if getattr(key, "dtype", None) != jnp.uint32 or key.ndim == 0 or key.shape[-1] != 2:
        found = f"{key.dtype} {key.shape}" if hasattr(key, "dtype") else type(key).__name__
        raise TypeError(f"a key is jax.random.key(...) or uint32 [..., 2], not {found}")
    return jnp.asarray(key)


def matrix_keys(seed: int, name: str, matrices: np.ndarray | range) -> UInt32[np.ndarray, "M 2"]:
    """Keys of the matrices with these indices in one named tensor, on the host. Each depends on seed, name and its own index alone."""
    with np.errstate(over="ignore"):
        seeds = np.uint32(seed) ^ np.array([0, _GOLDEN], np.uint32)
        of_tensor = mix(mix(seeds) ^ np.uint32(zlib.crc32(name.encode())))
        return mix(of_tensor + mix(np.asarray(matrices, np.uint32))[:, None])


def random_bits(key: Key, shape: tuple[int, ...]) -> UInt32[Array, "*shape"]:
    """Uniform bits. Rows are all dims but the last that the key does not lead: no index needs 64 bits below 2**32 rows."""
    return mix(_rows(key, shape, 0) + _columns(shape) ^ _word(key, shape, 1))


def dither_bits(key: Key, shape: tuple[int, ...]) -> UInt32[Array, "*shape"]:
    """Bits that are uniform over keys but spread evenly along each row: a random start, then steps of the golden ratio.

    Of any n neighbours, n * p fall below p * 2**32, up to O(log n) instead of the sqrt(n) of independent bits.
    """
    return mix(_rows(key, shape, 0) ^ _word(key, shape, 1)) + _columns(shape)


def _rows(key: Key, shape: tuple[int, ...], word: int) -> UInt32[Array, "*rows 1"]:
    lead = key.ndim - 1
    row = jnp.zeros((*shape[:-1], 1), jnp.uint32)
    for dim, size in list(enumerate(shape[:-1]))[lead:]:
        row = row * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, row.shape, dim)
    return mix(row ^ _word(key, shape, word))


def _columns(shape: tuple[int, ...]) -> UInt32[Array, "*shape"]:
    return lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1) * _GOLDEN


def _word(key: Key, shape: tuple[int, ...], word: int) -> UInt32[Array, "..."]:
    lead = key.shape[:-1]
    if lead != shape[: len(lead)] or len(lead) >= max(len(shape), 1):
        raise ValueError(f"keys for the leading dims {lead} do not fit an array of shape {shape}")
    return key[..., word].reshape(*lead, *[1] * (len(shape) - len(lead)))
