"""Rounding to the E2M1 grid of an MXFP4 block, and the values of its codes, on integer bits alone.

A block with scale byte b holds the magnitudes 0 .5 1 1.5 2 3 4 6 times 2**(b-127). Here they are written as the float32 bits of *twice* the
value (`doubled`): then 1 * 2**(b-127) is a normal number even for b = 0, and from it on neighbours of the grid are half a binade, 2**22,
apart. Below lie only `half` and 0. So one integer addition rounds everything from `one` on to nearest even, two comparisons place the rest,
and subnormals, infinity (exponent field 256) and NaN are ordinary numbers of uint32. Nothing is converted, shifted by a variable or flushed.

About 15 integer operations an element for an index and 19 for a value; going through float32 (normalize, scale, add a magic number) and
decoding the index took about 40.

    C blocks of a row   Q block size
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32, UInt8, UInt32

from gptoss_jax.formats.bits import EXP_SHIFT, INF, MIN_NORMAL

PerBlock = UInt32[Array, "*batch C 1"]
PerElement = UInt32[Array, "*batch C Q"]

_HALF_BINADE = EXP_SHIFT - 1  # log2 of the distance between neighbours
_STEP = np.uint32(1 << _HALF_BINADE)
_ROUND = np.uint32((1 << (_HALF_BINADE - 1)) - 1)  # plus the last kept bit: nearest even
_TWICE_INF = np.uint32(INF + MIN_NORMAL)
_TWICE_NAN = _TWICE_INF + _STEP
_NEVER = np.uint32(0xFFFFFFFF)
_SIGN = np.uint32(1 << 31)


def doubled(x_bits: Int32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Bits of 2|x| from bits of x: a subnormal doubles as an integer, any other number gains one exponent."""
    mag = x_bits.astype(jnp.uint32) & 0x7FFFFFFF
    return mag + jnp.minimum(mag, MIN_NORMAL)


def halved(bits: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Inverse of `doubled`, where the half is representable."""
    return bits - jnp.minimum(bits >> 1, MIN_NORMAL)


class Grid(NamedTuple):
    """The lower end of a block's grid, and where it begins to be nearest. All in bits of twice the value."""

    one: PerBlock
    half: PerBlock
    to_half: PerBlock  # least that rounds to `half` or more: just above the tie .25, which goes to the even index 0
    to_one: PerBlock  # least that rounds to `one` or more: the tie .75, which goes to the even index 2


def grid(scales: Int32[Array, "*batch C 1"]) -> Grid:
    """Grid of the blocks with these scale bytes."""
    one = (scales.astype(jnp.uint32) + 1) << EXP_SHIFT
    half = halved(one)
    return Grid(one, half, halved(half) + 1, (half + one) >> 1)


def nearest_index(x_bits: Int32[Array, "*batch C Q"], scales: Int32[Array, "*batch C 1"], is_finite: Bool[Array, "*batch C 1"]) -> PerElement:
    """Index 0..7 of the nearest magnitude, ties to even, saturating; 0 throughout a block that is not finite."""
    g, twice = grid(scales), doubled(x_bits)
    to_half, to_one = (jnp.where(is_finite, border, _NEVER) for border in (g.to_half, g.to_one))
    from_one = (twice + ((twice >> _HALF_BINADE) & 1) + (2 * _STEP + _ROUND - g.one)) >> _HALF_BINADE
    return jnp.where(twice >= to_one, jnp.clip(from_one, 2, 7), (twice >= to_half).astype(jnp.uint32))


def nearest_value_bits(
    x_bits: Int32[Array, "*batch C Q"], scales: Int32[Array, "*batch C 1"], is_finite: Bool[Array, "*batch C 1"]
) -> PerElement:
    """float32 bits of the signed value whose index is `nearest_index`; NaN throughout a block that is not finite."""
    g, twice = grid(scales), doubled(x_bits)
    lowest, highest = (
        jnp.where(is_finite, end, _TWICE_NAN) for end in (g.one, jnp.minimum(g.one + 5 * _STEP, _TWICE_INF))
    )
    to_one = jnp.where(is_finite, g.to_one, 0)
    rounded = (twice + ((twice >> _HALF_BINADE) & 1) + _ROUND) & ~(_STEP - 1)
    value = jnp.where(twice >= to_one, jnp.clip(rounded, lowest, highest), jnp.where(twice >= g.to_half, g.half, 0))
    return halved(value) | (x_bits.astype(jnp.uint32) & _SIGN)


def value_bits(
    codes: UInt8[Array, "*batch C Q"] | PerElement, scales: Int32[Array, "*batch C 1"], is_nan: Bool[Array, "*batch C 1"]
) -> PerElement:
    """float32 bits of the values of codes 0..15."""
    g, codes = grid(scales), codes.astype(jnp.uint32)
    index = codes & 7
    from_one = jnp.minimum((index << _HALF_BINADE) + (g.one - 2 * _STEP), _TWICE_INF)
    value = jnp.where(index >= 2, from_one, jnp.where(index == 1, g.half, 0))
    value = jnp.where(is_nan, _TWICE_NAN, value)
    return halved(value) | (codes >> 3 << 31)
