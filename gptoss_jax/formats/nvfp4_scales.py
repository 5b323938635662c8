"""The scales of NVFP4 from maxima, on integer bits: one float32 per matrix and one E4M3 per block. Facts and modes: `nvfp4`.

    matrix   g = amax/(6*448), or its power of two; amax/(6*256) under four-over-six, so that a block scale has room for 1.5 times itself
    block    E4M3(amax_block / 6g): the largest element becomes 6; under four-over-six also
             E4M3(amax_block / 4g): it becomes 4, and 6, beside which the grid has its widest step, stays unused
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from gptoss_jax.formats import bits as fb
from gptoss_jax.formats.minifloat import E2M1_MAX, E4M3, e4m3_byte, e4m3_value

_MIN_GLOBAL_EXP = -115  # 0.25 * 2**-9 * 2**-115 = 2**-126: the smallest midpoint is still normal
_MIN_GLOBAL_BITS = (127 + _MIN_GLOBAL_EXP) << fb.EXP_SHIFT
_E4M3_MIN_BITS = (127 - 9) << fb.EXP_SHIFT  # 2**-9, the smallest positive E4M3
_E4M3_BYTE_OF_1 = 0x38
_BITS_OF_1 = 0x3F800000
_BITS_OF_1536 = 0x44C00000  # 6 * 256
_BITS_OF_2688 = 0x45280000  # 6 * 448

PerMatrix = Int32[Array, "..."]
PerBlock = Int32[Array, "*batch C 1"]
Scales = tuple[Float32[Array, "..."], tuple[PerBlock, ...]]  # global scale; bytes for the target 6, then for 4 where it is asked for


def pow2_scales(amax: PerMatrix, amax_block: PerBlock, four_six: bool, is_up: bool) -> Scales:
    """Global scale as float32 and block scales as E4M3 bytes, from magnitude bits.

    is_up: block scales are the smallest E4M3 not below their quotient, so that no element is clipped.
    """
    # amax/2688 = (m / 1.3125) * 2**(e-11), amax/1536 = (m / 1.5) * 2**(e-10)
    exp, mantissa = (10, 0x400000) if four_six else (11, 0x280000)
    g_exp = (amax >> fb.EXP_SHIFT) - 127 - exp + ((amax & 0x7FFFFF) > mantissa)
    g_exp = jnp.where(amax == 0, 0, jnp.maximum(g_exp, _MIN_GLOBAL_EXP))
    # amax_block / 6g = M/3 * 2**(e-24-g_exp) with the 24-bit significand M. Twice the integer quotient plus a sticky bit is below 2**24,
    # so exact as a float32, and lies on the same side of every E4M3 midpoint as the true quotient. Subnormal maxima end under 2**-9.
    significand = (amax_block & 0x7FFFFF) | 0x800000
    third = 2 * (significand // 3) + (significand % 3 != 0)
    third_bits = lax.bitcast_convert_type(third.astype(jnp.float32), jnp.int32)
    quotients = {6: third_bits + (((amax_block >> fb.EXP_SHIFT) - 127 - 25 - g_exp) << fb.EXP_SHIFT)}
    if four_six:
        quotients[4] = amax_block - ((g_exp + 2) << fb.EXP_SHIFT)
    scales = tuple(e4m3_byte(jnp.maximum(quotient, _E4M3_MIN_BITS)) for quotient in quotients.values())
    g = fb.from_bits((g_exp + 127) << fb.EXP_SHIFT)
    if is_up:
        scales = tuple(_not_below(byte, amax_block, target * g) for byte, target in zip(scales, quotients, strict=True))
    return g, scales


def exact_scales(amax: PerMatrix, amax_block: PerBlock, four_six: bool, is_up: bool) -> Scales:
    """The same with float32 quotients, in the order of Model-Optimizer."""
    divisor = jnp.int32(_BITS_OF_1536 if four_six else _BITS_OF_2688)
    g = fb.from_bits(jnp.where(amax == 0, _BITS_OF_1, jnp.maximum(quotient_bits(amax, divisor), _MIN_GLOBAL_BITS)))
    scales = []
    for target in (E2M1_MAX, 4.0) if four_six else (E2M1_MAX,):
        byte = e4m3_byte(jnp.maximum(quotient_bits(amax_block, lax.bitcast_convert_type(target * g, jnp.int32)), _E4M3_MIN_BITS))
        if is_up:
            byte = _not_below(byte, amax_block, target * g)
        scales.append(jnp.where(amax_block == 0, _E4M3_BYTE_OF_1, byte))
    return g, tuple(scales)


def _not_below(byte: PerBlock, amax_block: PerBlock, unit: Float32[Array, "..."]) -> PerBlock:
    """The next byte where value * unit falls short of the maximum. The product has 6 significant bits under a power of two: exact."""
    is_short = fb.from_bits(amax_block) > e4m3_value(byte.astype(jnp.uint8)) * unit
    return jnp.minimum(byte + is_short, E4M3.max_index)


def block_error(
    x: Int32[Array, "*batch C Q"], amax_block: PerBlock, w: Int32[Array, "*batch C Q"], kind: str
) -> tuple[PerBlock, PerBlock, PerBlock]:
    """Sum over a block of |x - w| ("mae") or its square ("mse") from magnitude bits, as three digits, the leading one first.

    Integer sums do not depend on the order of the reduction. With the maximum in [2**e, 2**(e+1)) the unit is 2**(e-22), to which x and w are
    truncated: |x - w| < 2**23, since no error reaches the maximum. Squares have 46 bits: with |x - w| = a * 2**12 + b the sums of a*a, a*b and b*b
    over up to 64 elements stay below 2**30.
    """
    exp_max = jnp.maximum(amax_block >> fb.EXP_SHIFT, 1)

    def units(mag):
        exp = jnp.maximum(mag >> fb.EXP_SHIFT, 1)
        significand = (mag & 0x7FFFFF) | jnp.where(mag < fb.MIN_NORMAL, 0, fb.MIN_NORMAL)
        return significand >> jnp.clip(1 + exp_max - exp, 0, 31)

    def total(terms):
        return jnp.sum(terms, axis=-1, keepdims=True, dtype=jnp.int32)

    error = jnp.abs(units(x) - units(w))
    if kind == "mae":
        return total(error), jnp.zeros_like(amax_block), jnp.zeros_like(amax_block)
    a, b = error >> 12, error & 0xFFF
    low = total(b * b)
    middle = total(a * b) + (low >> 13)  # the sum is total(a * a) * 2**24 + middle * 2**13 + low
    return total(a * a) + (middle >> 11), middle & 0x7FF, low & 0x1FFF


def is_less(a: tuple[PerBlock, PerBlock, PerBlock], b: tuple[PerBlock, PerBlock, PerBlock]) -> Bool[Array, "*batch C 1"]:
    """Comparison of two such numbers."""
    return (a[0] < b[0]) | ((a[0] == b[0]) & ((a[1] < b[1]) | ((a[1] == b[1]) & (a[2] < b[2]))))


def quotient_bits(a: Int32[Array, "..."], b: Int32[Array, "..."]) -> Int32[Array, "..."]:
    """Bits of the float32 quotient of magnitudes, rounded once to nearest even; b normal. Results below 2**-126 have bits under 2**23.
    a = 0 counts as 2**-149: no matter beside steps of at least 2**-124.

    In integers, because XLA turns float division by a constant or a broadcast into a product with the reciprocal: 1 ulp off, enough to
    move ties, and not the same in every program.
    """
    a, b = jnp.broadcast_arrays(fb.normalized(a), b)
    significand_a = ((a & 0x7FFFFF) | 0x800000).astype(jnp.uint32)
    significand_b = ((b & 0x7FFFFF) | 0x800000).astype(jnp.uint32)
    is_less = significand_a < significand_b
    exp = (a >> fb.EXP_SHIFT) - (b >> fb.EXP_SHIFT) + 127 - is_less
    rest = (significand_a << is_less) - significand_b  # the leading bit of the quotient is 1
    digits = jnp.ones_like(rest)
    for _ in range(3):  # 24 more bits, 8 at a time: rest * 2**8 < 2**32
        rest = rest << 8
        digit = lax.div(rest, significand_b)
        rest = rest - digit * significand_b
        digits = (digits << 8) + digit
    kept, guard = digits >> 1, digits & 1
    round_up = guard & ((rest != 0) | (kept & 1))
    return (exp << fb.EXP_SHIFT) + (kept + round_up).astype(jnp.int32) - 0x800000
