"""Rounding to small floats: E2M1 (the 4-bit elements) and E4M3 (the block scales of NVFP4).

A grid with M mantissa bits and smallest normal exponent `min_exp` holds the multiples of 2**(e-M) in each binade [2**e, 2**(e+1)),
and the multiples of 2**(min_exp-M) below. Its magnitudes, in increasing order, are the code indices. The nearest one, ties to the
even index, comes from one IEEE addition: y + 2**(e+23-M) has exactly the grid's step as its last place, so the adder's own
round-to-nearest-even does the work, on every backend alike. In particular 0.25 -> 0, 0.75 -> 1, 1.25 -> 1, 1.75 -> 2, 2.5 -> 2,
3.5 -> 4, 5 -> 4 for E2M1.

E2M1 code = sign << 3 | index, values of the indices 0 .5 1 1.5 2 3 4 6; no infinity, no NaN; -0 is 8.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32, UInt8, UInt32

from gptoss_jax.formats.bits import EXP_SHIFT, from_bits

E2M1_MAX = 6.0
E4M3_NAN = 0x7F

_BITS_OF_6 = 0x40C00000
_BITS_OF_448 = 0x43E00000


def _nearest_index(bits: Int32[Array, "*s"], mantissa_bits: int, min_exp: int, max_bits: int) -> Int32[Array, "*s"]:
    """Index of the grid magnitude nearest to the float32 with these bits (negative bits stand for anything tiny); saturates at max_bits."""
    drop = EXP_SHIFT - mantissa_bits
    bits = jnp.clip(bits, 0, max_bits)
    binade = jnp.maximum(bits, (127 + min_exp) << EXP_SHIFT) & (0xFF << EXP_SHIFT)
    magic = binade + (drop << EXP_SHIFT)
    steps = lax.bitcast_convert_type(from_bits(bits) + from_bits(magic), jnp.int32) - magic
    return steps + (binade >> drop) - ((127 + min_exp) << mantissa_bits)


def e2m1_index(bits: Int32[Array, "*s"]) -> Int32[Array, "*s"]:
    """Index 0..7 of the E2M1 magnitude nearest to the float32 with these bits, ties to even, saturating at 6."""
    return _nearest_index(bits, mantissa_bits=1, min_exp=0, max_bits=_BITS_OF_6)


def e4m3_byte(bits: Int32[Array, "*s"]) -> Int32[Array, "*s"]:
    """Byte 0..0x7E of the E4M3 magnitude nearest to the float32 with these bits, ties to even, saturating at 448."""
    return _nearest_index(bits, mantissa_bits=3, min_exp=-6, max_bits=_BITS_OF_448)


def e2m1_doubled(index: Int32[Array, "*s"]) -> Int32[Array, "*s"]:
    """Twice the E2M1 magnitude, an integer: 0 1 2 3 4 6 8 12."""
    return jnp.where(index < 2, index, (2 + (index & 1)) << ((index >> 1) - (index > 1)))


def e2m1_value(codes: UInt8[Array, "*s"] | UInt32[Array, "*s"]) -> Float32[Array, "*s"]:
    """Values of E2M1 codes 0..15, -0 included. The bits above 1 are `index + 252` shifted: half a binade per index."""
    index = (codes & 7).astype(jnp.int32)
    mag = jnp.where(index < 2, index * (126 << EXP_SHIFT), (index + 252) << (EXP_SHIFT - 1))
    return from_bits(mag | ((codes >> 3).astype(jnp.int32) << 31))


def e4m3_value(byte: UInt8[Array, "*s"]) -> Float32[Array, "*s"]:
    """Values of E4M3FN bytes (0x7F and 0xFF are NaN). Every value is a normal float32, so the float product of subnormals is exact."""
    mag = (byte & 0x7F).astype(jnp.int32)
    normal = from_bits((mag << 20) + (120 << EXP_SHIFT))
    value = jnp.where(mag < 8, mag.astype(jnp.float32) * 2.0**-9, normal)
    value = jnp.where(mag == E4M3_NAN, jnp.nan, value)
    return jnp.where(byte >= 0x80, -value, value)
