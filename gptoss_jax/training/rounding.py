"""bfloat16 masters: stochastic rounding, or a residual that keeps the bits below; and the noise of all rounding in the optimizer.

    1.0101011 | 10110100 | 01101001        24 bits of significand of a float32
    bfloat16  | int8     |                 of the power of two below, values are 2^-7 apart in bfloat16, 2^-15 with an int8 residual
    bfloat16  | int16               |      the float32, exactly

Without a residual an update is rounded to one of two bfloat16 neighbours at random, so that updates count on average; the noise of a step is up
to half a spacing. Master and int16 residual are the float32 master, and training differs from float32 masters only in that the model
reads the bfloat16 part (rounded to nearest), in QAT as in the export.
"""

import zlib
from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float, Int, UInt32

from gptoss_jax.formats.noise import mix, random_bits

Residual = Literal["int8", "int16"]


def rounding_key(seed: int, step: Array, name: str) -> UInt32[Array, "2"]:
    """Key of the rounding of one array at one step; the same after a resume and on any mesh."""
    step, name_hash = jnp.asarray(step).astype(jnp.uint32), zlib.crc32(name.encode())
    words = [mix(mix(mix(jnp.uint32(seed) ^ jnp.uint32(salt)) + step) ^ jnp.uint32(name_hash)) for salt in (0, 0x9E3779B9)]
    return jnp.stack(words)


def stochastic_round(x: Float[Array, "..."], key: UInt32[Array, "2"]) -> BFloat16[Array, "..."]:
    """Rounds float32 to one of the two bfloat16 neighbours, up with probability equal to the position between them.

    E[result] = x: 16 uniform bits are added below the 16 bits that are kept, then cut. Values that bfloat16 holds stay. The bits depend on
    key and element alone, so every sharding gives the same result. Not for NaN (the cut could turn it into an infinity).
    """
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    noise = random_bits(key, x.shape) >> 16
    return lax.bitcast_convert_type(((bits + noise) >> 16).astype(jnp.uint16), jnp.bfloat16)


def float_bits(x: Float[Array, "..."], residual: Residual, key: UInt32[Array, "2"] | None = None) -> UInt32[Array, "..."]:
    """The bits of x that master and residual hold: all of them with int16; with int8 the last 8 are rounded stochastically."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    return bits if residual == "int16" else (bits + (random_bits(key, x.shape) >> 24)) & jnp.uint32(0xFFFFFF00)


def low_part(bits: UInt32[Array, "..."], residual: Residual) -> Int[Array, "..."]:
    """The residual: what is left when the master is rounded to the nearest bfloat16 (ties away from zero)."""
    low = lax.bitcast_convert_type(bits - (((bits + 0x8000) >> 16) << 16), jnp.int32)
    return (low >> 8).astype(jnp.int8) if residual == "int8" else low.astype(jnp.int16)


def high_part(bits: UInt32[Array, "..."], low: Int[Array, "..."]) -> BFloat16[Array, "..."]:
    """The master, given the residual."""
    high = (bits - lax.bitcast_convert_type(_widen(low), jnp.uint32)) >> 16
    return lax.bitcast_convert_type(high.astype(jnp.uint16), jnp.bfloat16)


def join(master: BFloat16[Array, "..."], low: Int[Array, "..."]) -> Float[Array, "..."]:
    """The float32 value of master and residual."""
    high = lax.bitcast_convert_type(master, jnp.uint16).astype(jnp.int32) << 16
    return lax.bitcast_convert_type(high + _widen(low), jnp.float32)


def _widen(low):
    return low.astype(jnp.int32) << (8 if low.dtype == jnp.int8 else 0)
