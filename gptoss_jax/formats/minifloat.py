"""Small floats: E2M1 (the 4-bit elements), E4M3 (the block scales of NVFP4), and the element types of MXFP8 and MXFP6.

A grid with M mantissa bits and smallest normal exponent `min_exp` holds the multiples of 2**(e-M) in each binade [2**e, 2**(e+1)),
and the multiples of 2**(min_exp-M) below. Its magnitudes, in increasing order, are the code indices. The nearest one, ties to the
even index, comes from one IEEE addition: y + 2**(e+23-M) has exactly the grid's step as its last place, so the adder's own
round-to-nearest-even does the work, on every backend alike. In particular 0.25 -> 0, 0.75 -> 1, 1.25 -> 1, 1.75 -> 2, 2.5 -> 2,
3.5 -> 4, 5 -> 4 for E2M1.

E2M1 code = sign << 3 | index, values of the indices 0 .5 1 1.5 2 3 4 6; no infinity, no NaN; -0 is 8.
"""

import struct
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32, UInt8, UInt32

from gptoss_jax.formats.bits import EXP_SHIFT, from_bits

E2M1_MAX = 6.0
E4M3_NAN = 0x7F


class Element(NamedTuple):
    """A grid: mantissa bits M, exponent of the smallest normal number, largest finite magnitude."""

    mantissa_bits: int
    min_exp: int
    largest: float

    @property
    def max_bits(self) -> int:
        """float32 bits of the largest magnitude."""
        return struct.unpack("<i", struct.pack("<f", self.largest))[0]

    @property
    def max_index(self) -> int:
        return (self.max_bits >> (EXP_SHIFT - self.mantissa_bits)) - ((126 + self.min_exp) << self.mantissa_bits)

    @property
    def magnitudes(self) -> tuple[float, ...]:
        """All of them, by index."""
        steps, smallest = 1 << self.mantissa_bits, 2.0 ** (self.min_exp - self.mantissa_bits)
        return tuple((i if i < steps else (steps + i % steps) << (i // steps - 1)) * smallest for i in range(self.max_index + 1))


E2M1 = Element(1, 0, E2M1_MAX)
E2M3 = Element(3, 0, 7.5)
E3M2 = Element(2, -2, 28.0)
E4M3 = Element(3, -6, 448.0)
E5M2 = Element(2, -14, 57344.0)


def nearest_index(bits: Int32[Array, "*s"], element: Element) -> Int32[Array, "*s"]:
    """Index of the magnitude nearest to the float32 with these bits (negative bits stand for anything tiny); saturates."""
    mantissa_bits, min_exp, _ = element
    drop = EXP_SHIFT - mantissa_bits
    bits = jnp.clip(bits, 0, element.max_bits)
    binade = jnp.maximum(bits, (127 + min_exp) << EXP_SHIFT) & (0xFF << EXP_SHIFT)
    magic = binade + (drop << EXP_SHIFT)
    steps = lax.bitcast_convert_type(from_bits(bits) + from_bits(magic), jnp.int32) - magic
    return steps + (binade >> drop) - ((127 + min_exp) << mantissa_bits)


def cell(bits: Int32[Array, "*s"], element: Element) -> tuple[Int32[Array, "*s"], UInt32[Array, "*s"]]:
    """(index of the largest magnitude not above, position between it and the next in units of 2**-32, truncated), without saturation.

    The bits are those of a float32 whose exponent field may be zero or negative (`scaled_bits`). The position is exact except far below the smallest
    magnitude, under 2**-8 of it, where truncation takes off less than 2**-32.
    """
    drop = EXP_SHIFT - element.mantissa_bits
    min_field = 127 + element.min_exp
    unsigned = bits.astype(jnp.uint32)
    index = (bits >> drop) - ((min_field - 1) << element.mantissa_bits)
    position = unsigned << (32 - drop)
    # below the smallest normal the grid is even: the significand, shifted, is a fixed-point number of steps
    significand = (unsigned & 0x7FFFFF) | 0x800000
    right = drop + min_field - (bits >> EXP_SHIFT)
    whole = (significand >> jnp.clip(right, 0, 31).astype(jnp.uint32)).astype(jnp.int32)
    rest = jnp.where(
        right < 32, significand << jnp.clip(32 - right, 0, 31).astype(jnp.uint32), significand >> jnp.clip(right - 32, 0, 31).astype(jnp.uint32)
    )
    is_low = bits < (min_field << EXP_SHIFT)
    return jnp.where(is_low, whole, index), jnp.where(is_low, rest, position)


def e2m1_index(bits: Int32[Array, "*s"]) -> Int32[Array, "*s"]:
    """Index 0..7 of the E2M1 magnitude nearest to the float32 with these bits, ties to even, saturating at 6."""
    return nearest_index(bits, E2M1)


def e4m3_byte(bits: Int32[Array, "*s"]) -> Int32[Array, "*s"]:
    """Byte 0..0x7E of the E4M3 magnitude nearest to the float32 with these bits, ties to even, saturating at 448."""
    return nearest_index(bits, E4M3)


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
