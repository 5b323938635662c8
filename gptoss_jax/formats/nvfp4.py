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

For research, in both modes (`Options`): four-over-six, which keeps of two block scales the one with the smaller error of the block; block scales
rounded up, so that nothing is clipped (nearest ones clip what lies up to 6.25 % above 6); one global scale for all experts of a projection; and a
maximum that is given instead of measured, be it a constant or that of an earlier step: what exceeds it saturates, first the scales at 448, then
the elements at 6.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float8e4m3fn, Float32, Int32, UInt8, UInt32

from gptoss_jax.formats import bits as fb
from gptoss_jax.formats.bits import check_block_size
from gptoss_jax.formats.element_round import check_element_round, checked_key
from gptoss_jax.formats.minifloat import E4M3_NAN, e2m1_value, e4m3_value
from gptoss_jax.formats.noise import Key
from gptoss_jax.formats.nvfp4_elements import element_index, nearest_magnitude
from gptoss_jax.formats.nvfp4_scales import block_error, exact_scales, is_less, pow2_scales
from gptoss_jax.formats.parts import Parts

BLOCK_SIZE = 16
GLOBAL_SCALES = ("pow2", "exact")
FOUR_SIX = (None, "mse", "mae")
SCALE_ROUNDS = ("rne", "up")


class Codes(NamedTuple):
    """An encoded array of shape [*batch, n]; a pytree. value = e2m1(code) * scale * global_scale."""

    packed: UInt8[Array, "*batch n_half"]  # two codes per byte, even element in the low nibble
    scales: Float8e4m3fn[Array, "*batch C"]  # C = n/16
    global_scale: Float32[Array, "*matrices"]  # x.shape[:-2]; a scalar for 1-D and 2-D arrays


class Options(NamedTuple):
    """What `encode` can be told.

    global_scale: "pow2" or "exact". element_round: a name of `ELEMENT_ROUNDS`. block_size: 16 in every file; 32 and 64 for research.
    four_six: the error ("mse", "mae") by which a block takes the scale amax/4 instead of amax/6, elements rounded to nearest in both cases.
    scale_round: block scales to "rne" or "up". per_expert: one global scale per matrix, or per stack of matrices (the last three dims).
    """

    global_scale: str = "pow2"
    element_round: str = "rne"
    block_size: int = BLOCK_SIZE
    four_six: str | None = None
    scale_round: str = "rne"
    per_expert: bool = True


def check_options(options: Options) -> None:
    """Raises ValueError unless `encode` can do this."""
    for what, value, known in (
        ("global scale", options.global_scale, GLOBAL_SCALES),
        ("four_six", options.four_six, FOUR_SIX),
        ("scale rounding", options.scale_round, SCALE_ROUNDS),
        ("per_expert", options.per_expert, (True, False)),
    ):
        if value not in known:
            raise ValueError(f"unknown {what} {value!r}; known are {', '.join(map(str, known))}")
    check_element_round(options.element_round)
    check_block_size(options.block_size)


def encode(
    x: Float[Array | np.ndarray, "*batch n"],
    global_scale: str = "pow2",
    *,
    options: Options | None = None,
    key: Key | None = None,
    amax: Float[Array | np.ndarray, "*matrices"] | float | None = None,
) -> Codes:
    """Encodes float32 or bfloat16 along the last dim, whose width must be a multiple of the block size.

    Args:
      options: everything that can be told, instead of `global_scale` alone.
      key: for stochastic rounding, and for nothing else; shape [*lead, 2] as in `noise`.
      amax: positive, taken for the maximum of every matrix; shape x.shape[:-2] or a scalar.

    Raises:
      TypeError: another dtype; a key missing, not wanted, or none.
      ValueError: bad width or unknown option.
    """
    options = options or Options(global_scale)
    check_options(options)
    return _encode(fb.as_input(x), checked_key(options.element_round, key), _amax_bits(amax), options)


def decode(q: Codes, dtype=jnp.bfloat16, block_size: int = BLOCK_SIZE) -> Float[Array, "*batch n"]:
    """code * (scale * global_scale) in float32, then converted to dtype (exact for bfloat16 with a power-of-two global scale).

    Raises:
      TypeError: packed is not uint8, scales are not float8_e4m3fn or global_scale is not float32.
      ValueError: the shapes do not belong together.
    """
    _check_codes(q, block_size)
    return _decode(q, jnp.dtype(dtype), block_size)


def encode_decode(
    x: Float[Array | np.ndarray, "*batch n"], options: Options, dtype, key: Key | None = None, amax: Float[Array, "*matrices"] | float | None = None
) -> tuple[Float[Array, "*batch n"], Codes]:
    """(decode(q, dtype), q) with q = encode(x), bit for bit, but not unpacking what was just packed. For fake quantization."""
    check_options(options)
    return _encode_decode(fb.as_input(x), checked_key(options.element_round, key), _amax_bits(amax), options, jnp.dtype(dtype))


def parts(q: Codes, block_size: int = BLOCK_SIZE) -> Parts:
    """Elements, and block scale * global scale, as float32; raises as `decode` does."""
    _check_codes(q, block_size)
    return Parts(e2m1_value(fb.split_blocks(fb.unpack(q.packed), block_size)), _steps(q.scales, q.global_scale)[..., None])


def tensor_amax(x: Float[Array, "*batch n"], per_expert: bool = True) -> Float32[Array, "*matrices"]:
    """The largest finite magnitude of every matrix (or of every stack of them), as `encode` measures it and takes as `amax` at a later step."""
    x = fb.as_input(x)
    bits = fb.to_bits(x)[..., None, :]
    return fb.from_bits(_measured_amax(bits, fb.magnitude(bits), per_expert)).reshape(x.shape[:-2])


def _amax_bits(amax) -> Int32[Array, "*matrices"] | None:
    return None if amax is None else fb.magnitude(fb.to_bits(jnp.asarray(amax, jnp.float32)))


def _check_codes(q: Codes, block_size: int) -> None:
    if q.packed.shape != (*q.scales.shape[:-1], q.scales.shape[-1] * block_size // 2) or q.global_scale.shape != q.scales.shape[:-2]:
        raise ValueError(
            f"packed {tuple(q.packed.shape)}, scales {tuple(q.scales.shape)} and global_scale {tuple(q.global_scale.shape)} are not one "
            f"NVFP4 array ({block_size // 2} bytes per scale, one global scale per matrix)"
        )
    for field, dtype_of_field in zip(q._fields, (jnp.uint8, jnp.float8_e4m3fn, jnp.float32), strict=True):
        if getattr(q, field).dtype != dtype_of_field:
            raise TypeError(f"NVFP4 {field} must be {jnp.dtype(dtype_of_field)}, not {getattr(q, field).dtype}")


@partial(jax.jit, static_argnums=3)
def _encode(x, key, amax, options):
    codes, scales, g = _encode_unpacked(x, key, amax, options)
    return Codes(fb.pack(codes), scales, g)


@partial(jax.jit, static_argnums=(1, 2))
def _decode(q, dtype, block_size):
    return _decode_unpacked(fb.unpack(q.packed), q.scales, q.global_scale, dtype, block_size)


@partial(jax.jit, static_argnums=(3, 4))
def _encode_decode(x, key, amax, options, dtype):
    codes, scales, g = _encode_unpacked(x, key, amax, options)
    return _decode_unpacked(codes, scales, g, dtype, options.block_size), Codes(fb.pack(codes), scales, g)


def _encode_unpacked(
    x: Float[Array, "*batch n"], key: Key | None, amax: Int32[Array, "*matrices"] | None, options: Options
) -> tuple[UInt32[Array, "*batch n"], Float8e4m3fn[Array, "*batch C"], Float32[Array, "*matrices"]]:
    """Codes, block scales and global scales. amax: bits of the maxima, where they are given."""
    x_bits = fb.split_blocks(fb.to_bits(x), options.block_size)
    mag = fb.magnitude(x_bits)
    amax_block = fb.block_maximum(x_bits)
    if amax is None:
        amax = _measured_amax(x_bits, mag, options.per_expert)
    else:
        amax = jnp.broadcast_to(amax, x.shape[:-2]).reshape(*x.shape[:-2], *[1] * (x_bits.ndim - len(x.shape[:-2])))
    scales = pow2_scales if options.global_scale == "pow2" else exact_scales
    g, (byte, *at_4) = scales(amax, amax_block, options.four_six is not None, options.scale_round == "up")
    if options.four_six:
        candidates = [nearest_magnitude(mag, amax_block, candidate, g, options.global_scale) for candidate in (byte, *at_4)]
        errors = [block_error(mag, amax_block, w, options.four_six) for w in candidates]
        byte = jnp.where(is_less(errors[1], errors[0]), at_4[0], byte)
    byte = jnp.where(amax_block < fb.INF, byte, E4M3_NAN).astype(jnp.uint8)
    step = e4m3_value(byte) * g  # NaN in a non-finite block: every comparison below is false there

    index = element_index(mag, amax_block, step, options.global_scale, options.element_round, key)
    if options.global_scale == "pow2":
        sign = (x_bits >> 28) & 8
    else:
        sign = jnp.where(mag == 0, 0, (x_bits >> 28) & 8)
    codes = fb.join_blocks((index | sign).astype(jnp.uint32))
    scales = lax.bitcast_convert_type(byte[..., 0], jnp.float8_e4m3fn)
    return codes, scales, g.reshape(x.shape[:-2])


def _measured_amax(x_bits: Int32[Array, "*batch C Q"], mag: Int32[Array, "*batch C Q"], per_expert: bool) -> Int32[Array, "*matrices 1 1 1"]:
    """Bits of the largest finite magnitude."""
    dims = tuple(range(max(x_bits.ndim - (3 if per_expert else 4), 0), x_bits.ndim))
    amax = jnp.max(fb.block_maximum(jnp.where(mag < fb.INF, x_bits, 0)), axis=dims, keepdims=True)
    return amax if per_expert else jnp.broadcast_to(amax, (*x_bits.shape[:-3], *[1] * min(x_bits.ndim, 3)))


def _decode_unpacked(
    codes: UInt8[Array, "*batch n"] | UInt32[Array, "*batch n"],
    scales: Float8e4m3fn[Array, "*batch C"],
    global_scale: Float32[Array, "*matrices"],
    dtype,
    block_size: int,
) -> Float[Array, "*batch n"]:
    step = _steps(scales, global_scale)
    values = e2m1_value(fb.split_blocks(codes, block_size)) * step[..., None]
    return fb.join_blocks(values).astype(dtype)


def _steps(scales: Float8e4m3fn[Array, "*batch C"], global_scale: Float32[Array, "*matrices"]) -> Float32[Array, "*batch C"]:
    step = e4m3_value(lax.bitcast_convert_type(scales, jnp.uint8))
    return step * global_scale.reshape(*global_scale.shape, *[1] * (step.ndim - global_scale.ndim))
