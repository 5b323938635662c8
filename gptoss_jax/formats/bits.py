"""Floats as integers, and the two layouts every 4-bit format here shares: blocks along the last dim, two codes per byte.

XLA sets subnormal inputs to zero in every float operation (CPU and GPU), and its `log2`/`exp2` are inexact at powers of two (facts:
`jnp.log2` misses 46 of the 254 powers of two, `jnp.exp2` 221). So block maxima, exponents and scaling work on the IEEE bits: for
non-negative floats the order of the bits, read as integers, is the order of the values, and adding `k << 23` multiplies by 2**k.

    C blocks of a row   Q block size   n = C*Q row width
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32, UInt8, UInt32

EXP_SHIFT = 23  # float32 mantissa bits
MIN_NORMAL = 1 << EXP_SHIFT  # bits of 2**-126, the smallest normal float32
INF = 0xFF << EXP_SHIFT  # bits of +inf; larger magnitudes are NaN
NAN = 0x7FC00000
BLOCK_SIZES = (16, 32, 64)  # that the codecs compute with; what files hold is narrower


def to_bits(x: Float[Array, "*shape"]) -> Int32[Array, "*shape"]:
    """float32 bits of a float32 or bfloat16, which is the upper half of its float32: no float conversion, which would flush, is needed."""
    if x.dtype == jnp.bfloat16:
        return lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.int32) << 16
    return lax.bitcast_convert_type(x, jnp.int32)


def from_bits(bits: Int32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """The float32 with these bits."""
    return lax.bitcast_convert_type(bits, jnp.float32)


def e8m0_value(scales: UInt8[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """2**(scale - 127), and NaN for 255. Byte 0 is subnormal: a product with it may be flushed."""
    scales = scales.astype(jnp.int32)
    bits = jnp.where(scales == 0, MIN_NORMAL >> 1, scales << EXP_SHIFT)
    return from_bits(jnp.where(scales == 255, NAN, bits))


def magnitude(bits: Int32[Array, "*shape"]) -> Int32[Array, "*shape"]:
    """Bits of |x|."""
    return bits & 0x7FFFFFFF


def block_maximum(bits: Int32[Array, "*batch C Q"]) -> Int32[Array, "*batch C 1"]:
    """Largest magnitude of each block.

    The sign is shifted out and unsigned order made signed; the maximum of `bits & 0x7FFFFFFF` says the same, but LLVM turns that loop over 32
    float32 into code that takes 0.285 ns per element on two cores (AVX-512), and this one into 0.086.
    """
    keys = (bits << 1) ^ jnp.int32(-(2**31))
    return lax.shift_right_logical(jnp.max(keys, axis=-1, keepdims=True) ^ jnp.int32(-(2**31)), jnp.int32(1))


def normalized(mag: Int32[Array, "*shape"]) -> Int32[Array, "*shape"]:
    """Magnitude bits whose exponent field may be zero or negative, so that adding `k << 23` is exact for subnormals too.

    A subnormal is `mag * 2**-149` with an integer mag < 2**23; the conversion of that integer to float32 is exact and normal.
    Zero is taken for 2**-149, which no scale lifts to anything a 4-bit grid distinguishes from zero (at most 2**-22), and whose
    exponent field, -22, leaves room in int32 for any shift.
    """
    as_float = lax.bitcast_convert_type(jnp.maximum(mag, 1).astype(jnp.float32), jnp.int32)
    return jnp.where(mag < MIN_NORMAL, as_float - (149 << EXP_SHIFT), mag)


def check_block_size(block_size: int) -> None:
    """Raises ValueError for a block size that the integer sums of the scale rules were not made for."""
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"unknown block size {block_size!r}; known are {', '.join(map(str, BLOCK_SIZES))}")


def split_blocks(x: Array, block_size: int) -> Array:
    """[*batch, n] -> [*batch, C, Q].

    Raises:
      ValueError: n is not a multiple of the block size (there is no padding: a block never covers less than Q weights).
    """
    if x.ndim == 0 or x.shape[-1] % block_size:
        raise ValueError(f"the last dim of shape {tuple(x.shape)} is not a multiple of the block size {block_size}")
    return x.reshape(*x.shape[:-1], x.shape[-1] // block_size, block_size)


def join_blocks(x: Array) -> Array:
    """[*batch, C, Q] -> [*batch, n]."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def pack(codes: UInt8[Array, "*batch n"] | UInt32[Array, "*batch n"]) -> UInt8[Array, "*batch n_half"]:
    """Two codes per byte, the even element in the low nibble (the order of the MXFP4 files): low + 16 * high.

    As a sum over pairs XLA keeps it in one vectorized loop; two strided slices cost 10x the whole encoding on a CPU (9.7 against 0.6 ns
    per element). Codes that come as uint32 save the narrowing of each (0.22 against 0.29 ns for the whole encoding).
    """
    pairs = codes.astype(jnp.uint32).reshape(*codes.shape[:-1], codes.shape[-1] // 2, 2)
    return jnp.sum(pairs << jnp.array([0, 4], jnp.uint32), axis=-1, dtype=jnp.uint32).astype(jnp.uint8)


def unpack(packed: UInt8[Array, "*batch n_half"]) -> UInt8[Array, "*batch n"]:
    """Inverse of `pack`."""
    pairs = jnp.stack([packed & 0xF, packed >> 4], axis=-1)
    return pairs.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def as_input(x: Float[Array | np.ndarray, "*shape"]) -> Float[Array, "*shape"]:
    """A JAX array of what is to be encoded, from the device or the host (numpy, memory maps).

    Raises:
      TypeError: x is neither float32 nor bfloat16 (before JAX would turn float64 into float32 in silence).
    """
    if not isinstance(x, jax.Array):
        x = np.asarray(x)
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise TypeError(f"4-bit formats encode float32 or bfloat16, not {x.dtype}")
    return jnp.asarray(x)
