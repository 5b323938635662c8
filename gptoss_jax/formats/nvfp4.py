"""NVFP4: blocks of 16 E2M1 codes along the last dim, one E4M3 scale per block, one float32 scale per matrix (the last two dims).

    value = e2m1(code) * scale * global_scale

`global_scale="pow2"` (default): g is the smallest power of two >= amax/2688 (2688 = 6 * 448), at least 2**-115, and 1 for a zero matrix.
Then code * scale * g has at most 6 significant bits and is a normal number: exact in float32 and bfloat16 in any order of the products
(cost against the exact quotient: 0.00 dB). Block scale = E4M3(clip(amax_block / 6g, 2**-9, 448)), the quotient taken as an integer
division by 3 with a sticky bit; elements are compared with midpoint * scale * g, which is exact. No float division, so every device
gives the same bytes. A matrix that comes near the end of float32 (above 3.3e38) may decode to infinity.

`global_scale="exact"` is the compatibility mode: g = amax/2688 and all quotients rounded to float32, the arithmetic and the bytes of
NVIDIA's Model-Optimizer 0.47.0 (`NVFP4QTensor.quantize`): scale 1 for all-zero blocks and code 0 for -0. The quotients are computed in
integers, so these bytes do not depend on the device either; g is at least 2**-115 here too. Its values are not exact in bfloat16 (89 % of them
are rounded).

In both modes the maximum is taken over the finite elements, and a block with NaN or infinity gets scale 0x7F (E4M3 NaN) and codes of
magnitude 0: it alone decodes to NaN. Under sharding the maximum is an ordinary `max` over the whole matrix, so XLA reduces it
across shards.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float8e4m3fn, Float32, Int32, UInt8, UInt32

from gptoss_jax.formats import bits as fb
from gptoss_jax.formats.minifloat import E2M1_MAX, E4M3_NAN, e2m1_index, e2m1_value, e4m3_byte, e4m3_value
from gptoss_jax.formats.parts import Parts

BLOCK_SIZE = 16
GLOBAL_SCALES = ("pow2", "exact")

_MIN_GLOBAL_EXP = -115  # 0.25 * 2**-9 * 2**-115 = 2**-126: the smallest midpoint is still normal
_MIN_GLOBAL_BITS = (127 + _MIN_GLOBAL_EXP) << fb.EXP_SHIFT
_E4M3_MIN_BITS = (127 - 9) << fb.EXP_SHIFT  # 2**-9, the smallest positive E4M3
_E4M3_BYTE_OF_1 = 0x38
_BITS_OF_1 = 0x3F800000
_BITS_OF_2688 = 0x45280000  # 6 * 448


class Codes(NamedTuple):
    """An encoded array of shape [*batch, n]; a pytree. value = e2m1(code) * scale * global_scale."""

    packed: UInt8[Array, "*batch n_half"]  # two codes per byte, even element in the low nibble
    scales: Float8e4m3fn[Array, "*batch C"]  # C = n/16
    global_scale: Float32[Array, "*matrices"]  # x.shape[:-2]; a scalar for 1-D and 2-D arrays


def check_options(global_scale: str) -> None:
    """Raises ValueError unless `encode` can do this."""
    if global_scale not in GLOBAL_SCALES:
        raise ValueError(f"unknown global scale {global_scale!r}; known are {', '.join(GLOBAL_SCALES)}")


def encode(x: Float[Array | np.ndarray, "*batch n"], global_scale: str = "pow2") -> Codes:
    """Encodes float32 or bfloat16 along the last dim, whose width must be a multiple of 16.

    Raises:
      TypeError: another dtype.
      ValueError: bad width or unknown kind of global scale.
    """
    check_options(global_scale)
    return _encode(fb.as_input(x), global_scale)


def decode(q: Codes, dtype=jnp.bfloat16) -> Float[Array, "*batch n"]:
    """code * (scale * global_scale) in float32, then converted to dtype (exact for bfloat16 with a power-of-two global scale).

    Raises:
      TypeError: packed is not uint8, scales are not float8_e4m3fn or global_scale is not float32.
      ValueError: the shapes do not belong together.
    """
    if q.packed.shape != (*q.scales.shape[:-1], q.scales.shape[-1] * BLOCK_SIZE // 2) or q.global_scale.shape != q.scales.shape[:-2]:
        raise ValueError(
            f"packed {tuple(q.packed.shape)}, scales {tuple(q.scales.shape)} and global_scale {tuple(q.global_scale.shape)} are not one "
            "NVFP4 array (8 bytes per scale, one global scale per matrix)"
        )
    for field, dtype_of_field in zip(q._fields, (jnp.uint8, jnp.float8_e4m3fn, jnp.float32), strict=True):
        if getattr(q, field).dtype != dtype_of_field:
            raise TypeError(f"NVFP4 {field} must be {jnp.dtype(dtype_of_field)}, not {getattr(q, field).dtype}")
    return _decode(q, jnp.dtype(dtype))


def parts(q: Codes) -> Parts:
    """Elements, and block scale * global scale, as float32."""
    return Parts(e2m1_value(fb.split_blocks(fb.unpack(q.packed), BLOCK_SIZE)), _steps(q.scales, q.global_scale)[..., None])


def encode_decode(x: Float[Array | np.ndarray, "*batch n"], global_scale: str, dtype) -> tuple[Float[Array, "*batch n"], Codes]:
    """(decode(q, dtype), q) with q = encode(x), bit for bit, but not unpacking what was just packed. For fake quantization."""
    check_options(global_scale)
    return _encode_decode(fb.as_input(x), global_scale, jnp.dtype(dtype))


@partial(jax.jit, static_argnums=1)
def _encode(x, global_scale):
    codes, scales, g = _encode_unpacked(x, global_scale)
    return Codes(fb.pack(codes), scales, g)


@partial(jax.jit, static_argnums=1)
def _decode(q, dtype):
    return _decode_unpacked(fb.unpack(q.packed), q.scales, q.global_scale, dtype)


@partial(jax.jit, static_argnums=(1, 2))
def _encode_decode(x, global_scale, dtype):
    codes, scales, g = _encode_unpacked(x, global_scale)
    return _decode_unpacked(codes, scales, g, dtype), Codes(fb.pack(codes), scales, g)


def _encode_unpacked(
    x: Float[Array, "*batch n"], global_scale: str
) -> tuple[UInt32[Array, "*batch n"], Float8e4m3fn[Array, "*batch C"], Float32[Array, "*matrices"]]:
    """Codes, block scales and global scales."""
    x_bits = fb.split_blocks(fb.to_bits(x), BLOCK_SIZE)
    mag = fb.magnitude(x_bits)
    amax_block = fb.block_maximum(x_bits)
    matrix_dims = tuple(range(max(mag.ndim - 3, 0), mag.ndim))
    amax = jnp.max(fb.block_maximum(jnp.where(mag < fb.INF, x_bits, 0)), axis=matrix_dims, keepdims=True)
    if global_scale == "pow2":
        g, byte = _pow2_scales(amax, amax_block)
    else:
        g, byte = _exact_scales(amax, amax_block)
    byte = jnp.where(amax_block < fb.INF, byte, E4M3_NAN).astype(jnp.uint8)
    step = e4m3_value(byte) * g  # NaN in a non-finite block: every comparison below is false there

    if global_scale == "pow2":
        index = _nearest_by_products(fb.from_bits(mag), step)
        sign = (x_bits >> 28) & 8
    else:
        index = e2m1_index(_quotient_bits(mag, lax.bitcast_convert_type(step, jnp.int32)))
        index = jnp.where(amax_block < fb.INF, index, 0)
        sign = jnp.where(mag == 0, 0, (x_bits >> 28) & 8)
    codes = fb.join_blocks((index | sign).astype(jnp.uint32))
    scales = lax.bitcast_convert_type(byte[..., 0], jnp.float8_e4m3fn)
    return codes, scales, g.reshape(x.shape[:-2])


def _pow2_scales(amax: Int32[Array, "..."], amax_block: Int32[Array, "..."]):
    """Global scale as float32 and block scales as E4M3 bytes, from magnitude bits."""
    # amax/2688 = (m / 1.3125) * 2**(e-11)
    g_exp = (amax >> fb.EXP_SHIFT) - 127 - 11 + ((amax & 0x7FFFFF) > 0x280000)
    g_exp = jnp.where(amax == 0, 0, jnp.maximum(g_exp, _MIN_GLOBAL_EXP))
    # amax_block / 6g = M/3 * 2**(e-24-g_exp) with the 24-bit significand M. Twice the integer quotient plus a sticky bit is below 2**24,
    # so exact as a float32, and lies on the same side of every E4M3 midpoint as the true quotient. Subnormal maxima end under 2**-9.
    significand = (amax_block & 0x7FFFFF) | 0x800000
    third = 2 * (significand // 3) + (significand % 3 != 0)
    third_bits = lax.bitcast_convert_type(third.astype(jnp.float32), jnp.int32)
    quotient = third_bits + (((amax_block >> fb.EXP_SHIFT) - 127 - 25 - g_exp) << fb.EXP_SHIFT)
    byte = e4m3_byte(jnp.maximum(quotient, _E4M3_MIN_BITS))
    return fb.from_bits((g_exp + 127) << fb.EXP_SHIFT), byte


def _exact_scales(amax: Int32[Array, "..."], amax_block: Int32[Array, "..."]):
    """The same with float32 quotients, in the order of Model-Optimizer."""
    g = fb.from_bits(jnp.where(amax == 0, _BITS_OF_1, jnp.maximum(_quotient_bits(amax, jnp.int32(_BITS_OF_2688)), _MIN_GLOBAL_BITS)))
    quotient = _quotient_bits(amax_block, lax.bitcast_convert_type(E2M1_MAX * g, jnp.int32))
    byte = e4m3_byte(jnp.maximum(quotient, _E4M3_MIN_BITS))
    return g, jnp.where(amax_block == 0, _E4M3_BYTE_OF_1, byte)


def _quotient_bits(a: Int32[Array, "..."], b: Int32[Array, "..."]) -> Int32[Array, "..."]:
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


def _nearest_by_products(a: Float32[Array, "..."], step: Float32[Array, "..."]) -> Int32[Array, "..."]:
    """E2M1 index of a/step, ties to even, without the division: three comparisons with midpoint * step, a binary search of the index."""
    above_4 = a >= 1.75 * step
    above_2 = a >= jnp.where(above_4, 3.5, 0.75) * step
    last = jnp.where(above_4, jnp.where(above_2, 5.0, 2.5), jnp.where(above_2, 1.25, 0.25))
    above_1 = a > last * step
    return above_4.astype(jnp.int32) * 4 + above_2.astype(jnp.int32) * 2 + above_1.astype(jnp.int32)


def _decode_unpacked(
    codes: UInt8[Array, "*batch n"] | UInt32[Array, "*batch n"],
    scales: Float8e4m3fn[Array, "*batch C"],
    global_scale: Float32[Array, "*matrices"],
    dtype,
) -> Float[Array, "*batch n"]:
    step = _steps(scales, global_scale)
    values = e2m1_value(fb.split_blocks(codes, BLOCK_SIZE)) * step[..., None]
    return fb.join_blocks(values).astype(dtype)


def _steps(scales: Float8e4m3fn[Array, "*batch C"], global_scale: Float32[Array, "*matrices"]) -> Float32[Array, "*batch C"]:
    step = e4m3_value(lax.bitcast_convert_type(scales, jnp.uint8))
    return step * global_scale.reshape(*global_scale.shape, *[1] * (step.ndim - global_scale.ndim))
