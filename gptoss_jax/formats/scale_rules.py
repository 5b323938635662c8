"""MXFP4 scale rules: which power of two a block is divided by. The scale is stored as an E8M0 byte b, value 2**(b-127), 255 = NaN.

With the block maximum amax = m * 2**e, 1 <= m < 2, the unbiased exponent is e-2 plus a bump:

    floor   0             amax/scale in [4, 8)     OCP MX v1.0; clips what lies above 6 (about 2 % of gaussian weights)
    rceil   m > 1.5       amax/scale in (3, 6]     2**ceil(log2(amax/6)); never clips; what NVIDIA trains with
    even    m >= 1.75     amax/scale in [3.5, 7)   best of the fixed rules in SQNR: 19.01 dB on gaussian weights, rceil 18.54, floor 18.87
    mse     chosen among e-2, e-1, e-3 by the smallest squared error of the block; equal errors keep the earlier of that order

clipped to bytes 0..254. Each rule maps magnitude bits [*batch, C, Q] and their block maxima [*batch, C, 1] to bytes [*batch, C, 1].
A maximum below 2**-126 (subnormal) has exponent field 0 and lands on byte 0 under every rule, as do all-zero blocks.
"""

from collections.abc import Callable
from types import MappingProxyType

import jax.numpy as jnp
from jaxtyping import Array, Int32

from gptoss_jax.formats.bits import EXP_SHIFT, MIN_NORMAL, normalized
from gptoss_jax.formats.minifloat import e2m1_doubled, e2m1_index

Magnitudes = Int32[Array, "*batch C Q"]
PerBlock = Int32[Array, "*batch C 1"]
ScaleRule = Callable[[Magnitudes, PerBlock], PerBlock]

_MANTISSA = MIN_NORMAL - 1


def scaled_bits(mag: Magnitudes, scale_e8m0: PerBlock) -> Magnitudes:
    """Bits of |x| / scale, exact. Results below the normal numbers are negative integers or anything under 2**-23: all round to zero."""
    return normalized(mag) - ((scale_e8m0 - 127) << EXP_SHIFT)


def _floor(mag: Magnitudes, amax: PerBlock) -> PerBlock:
    return jnp.maximum((amax >> EXP_SHIFT) - 2, 0)


def _rceil(mag: Magnitudes, amax: PerBlock) -> PerBlock:
    bump = (amax & _MANTISSA) > 0x400000
    return jnp.maximum((amax >> EXP_SHIFT) - 2 + bump, 0)


def _even(mag: Magnitudes, amax: PerBlock) -> PerBlock:
    bump = (amax & _MANTISSA) >= 0x600000
    return jnp.maximum((amax >> EXP_SHIFT) - 2 + bump, 0)


def _mse(mag: Magnitudes, amax: PerBlock) -> PerBlock:
    """Errors in int32 fixed point, unit 2**(e-12), |x| truncated to it: integer sums do not depend on the order of the reduction.

    The largest error is 1.25 * 2**e (16 clipped to 6 at exponent e-3), 5120 units; 64 * 5120**2 < 2**31.
    """
    exp_max = jnp.maximum(amax >> EXP_SHIFT, 1)
    exp = jnp.maximum(mag >> EXP_SHIFT, 1)
    significand = (mag & _MANTISSA) | jnp.where(mag < MIN_NORMAL, 0, MIN_NORMAL)
    units = significand >> jnp.clip(11 + exp_max - exp, 0, 31)

    best_scale = best_error = None
    for offset in (2, 1, 3):
        scale = jnp.maximum(exp_max - offset, 0)
        doubled = e2m1_doubled(e2m1_index(scaled_bits(mag, scale)))
        error = units - (doubled << (11 + scale - exp_max))
        total = jnp.sum(error * error, axis=-1, keepdims=True, dtype=jnp.int32)
        if best_error is None:
            best_scale, best_error = scale, total
        else:
            best_scale = jnp.where(total < best_error, scale, best_scale)
            best_error = jnp.minimum(total, best_error)
    return best_scale


SCALE_RULES: MappingProxyType[str, ScaleRule] = MappingProxyType({"rceil": _rceil, "floor": _floor, "even": _even, "mse": _mse})
