"""MXFP4 (OCP MX v1.0): blocks of 32 E2M1 codes along the last dim with one E8M0 scale.

    encode: |x| bits -> block maximum (integer max) -> scale byte b (scale_rules) -> nearest of code value * 2**(b-127), ties to even
    decode: code value * 2**(b-127)

Everything happens on integer bits (block_grid), so eager, jit, CPU, GPU and any sharding give the same bytes, subnormals included. Facts of
the format:

- every finite decoded value of bytes 0..252 is exact in float32 and bfloat16 (subnormals from bytes 0 and 1); at byte 253 the
  magnitudes 4 and 6, at byte 254 those from 2 on, exceed float32 and decode to infinity; byte 255 decodes to NaN throughout;
- a block that holds NaN or infinity gets byte 255 and codes of magnitude 0, so it decodes to NaN;
- the sign of zero and of what underflows is kept (-0 is code 8);
- requantizing decoded values under `floor`, `rceil` or `even` changes no value, and no byte where the block's largest index is 6 or 7.

`compat="modelopt"` writes the bytes of NVIDIA's converter (Model-Optimizer `MXFP4QTensor.quantize`, 0.47.0): rceil scales, ties toward
zero, and code 8 for +0, for what underflows from below, and for positive values so small that the quotient is 0 in float32. Two known
differences: it stores byte 0 for non-finite blocks, where this codec stores 255; and it takes the exponent from a float32 `log2`, which
cannot tell a float32 maximum just above 1.5 * 2**k from 1.5 * 2**k (blind for 2 ulp at k = -3 or 6, 3 ulp at |k| = 10, 33 ulp at
|k| = 120, for none at -2 <= k <= 5), so that it stores one exponent less there and clips. bfloat16 weights cannot lie that near and
agree in every byte.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, UInt8, UInt32

from gptoss_jax.formats import bits as fb
from gptoss_jax.formats.bits import check_block_size
from gptoss_jax.formats.block_grid import nearest_index, nearest_value_bits, value_bits
from gptoss_jax.formats.element_round import check_element_round, checked_key, rounded_index
from gptoss_jax.formats.minifloat import E2M1, e2m1_value
from gptoss_jax.formats.noise import Key
from gptoss_jax.formats.parts import Parts
from gptoss_jax.formats.scale_rules import SCALE_RULES, scaled_bits

BLOCK_SIZE = 32
NAN_SCALE = 255

# Bits of the midpoints between neighbouring E2M1 magnitudes.
_MIDPOINTS = (0x3E800000, 0x3F400000, 0x3FA00000, 0x3FE00000, 0x40200000, 0x40600000, 0x40A00000)


class Codes(NamedTuple):
    """An encoded array of shape [*batch, n]; a pytree. value = e2m1(code) * 2**(scale - 127)."""

    packed: UInt8[Array, "*batch n_half"]  # two codes per byte, even element in the low nibble
    scales: UInt8[Array, "*batch C"]  # E8M0, C = n/32


class Options(NamedTuple):
    """What `encode` can be told.

    scale_rule: a name of `SCALE_RULES`. compat: "modelopt" for the bytes of NVIDIA's converter, see above. element_round: a name of
    `ELEMENT_ROUNDS`. block_size: 32 in every file; 16 and 64 for research.
    """

    scale_rule: str = "rceil"
    compat: str | None = None
    element_round: str = "rne"
    block_size: int = BLOCK_SIZE


def check_options(options: Options) -> None:
    """Raises ValueError unless `encode` can do this."""
    scale_rule, compat, element_round, block_size = options
    if scale_rule not in SCALE_RULES:
        raise ValueError(f"unknown scale rule {scale_rule!r}; known are {', '.join(SCALE_RULES)}")
    if compat not in (None, "modelopt"):
        raise ValueError(f"unknown compat {compat!r}; known is 'modelopt'")
    if compat == "modelopt" and scale_rule != "rceil":
        raise ValueError(f"compat 'modelopt' has scale rule 'rceil', not {scale_rule!r}")
    check_element_round(element_round)
    if compat == "modelopt" and element_round != "rne":
        raise ValueError(f"compat 'modelopt' rounds ties toward zero: no element rounding {element_round!r} beside it")
    check_block_size(block_size)


def encode(
    x: Float[Array | np.ndarray, "*batch n"],
    scale_rule: str = "rceil",
    compat: str | None = None,
    *,
    element_round: str = "rne",
    block_size: int = BLOCK_SIZE,
    key: Key | None = None,
) -> Codes:
    """Encodes float32 or bfloat16 along the last dim, whose width must be a multiple of the block size.

    Args:
      scale_rule: a name of `SCALE_RULES`.
      compat: "modelopt" for the bytes of NVIDIA's converter, see above.
      element_round: a name of `ELEMENT_ROUNDS`.
      block_size: 32 in every file; 16 and 64 for research.
      key: for stochastic rounding, and for nothing else; shape [*lead, 2] as in `noise`.

    Raises:
      TypeError: another dtype; a key missing, not wanted, or none.
      ValueError: bad width, unknown rule or compat name.
    """
    options = Options(scale_rule, compat, element_round, block_size)
    check_options(options)
    return _encode(fb.as_input(x), checked_key(element_round, key), options)


def decode(q: Codes, dtype=jnp.bfloat16, block_size: int = BLOCK_SIZE) -> Float[Array, "*batch n"]:
    """Values of the codes. Exact in float32 and bfloat16; any other dtype is a conversion of the float32 values.

    Raises:
      TypeError: packed or scales are not uint8.
      ValueError: their shapes do not belong together.
    """
    _check_codes(q, block_size)
    return _decode(q, jnp.dtype(dtype), block_size)


def encode_decode(
    x: Float[Array | np.ndarray, "*batch n"], options: Options, dtype, key: Key | None = None
) -> tuple[Float[Array, "*batch n"], Codes]:
    """(decode(q, dtype), q) with q = encode(x), bit for bit, but not unpacking what was just packed. For fake quantization."""
    check_options(options)
    return _encode_decode(fb.as_input(x), checked_key(options.element_round, key), options, jnp.dtype(dtype))


def parts(q: Codes, block_size: int = BLOCK_SIZE) -> Parts:
    """Elements and scales as float32; raises as `decode` does."""
    _check_codes(q, block_size)
    return Parts(e2m1_value(fb.split_blocks(fb.unpack(q.packed), block_size)), fb.e8m0_value(q.scales[..., None]))


def _check_codes(q: Codes, block_size: int) -> None:
    if q.packed.shape != (*q.scales.shape[:-1], q.scales.shape[-1] * block_size // 2):
        raise ValueError(
            f"packed {tuple(q.packed.shape)} and scales {tuple(q.scales.shape)} are not one MXFP4 array ({block_size // 2} bytes per scale)"
        )
    for array in q:
        if array.dtype != jnp.uint8:
            raise TypeError(f"packed codes and E8M0 scales must be uint8, not {array.dtype}")


@partial(jax.jit, static_argnums=2)
def _encode(x, key, options):
    blocks = _scaled_blocks(x, options)
    return Codes(fb.pack(fb.join_blocks(_codes(blocks, options, key))), blocks.scales)


@partial(jax.jit, static_argnums=(1, 2))
def _decode(q, dtype, block_size):
    return _from_value_bits(_value_bits(fb.split_blocks(fb.unpack(q.packed), block_size), q.scales), dtype)


@partial(jax.jit, static_argnums=(2, 3))
def _encode_decode(x, key, options, dtype):
    blocks = _scaled_blocks(x, options)
    codes = _codes(blocks, options, key)
    if options.compat or options.element_round != "rne":
        values = _value_bits(codes, blocks.scales)
    else:
        values = nearest_value_bits(blocks.bits, blocks.finite_scales, blocks.is_finite)
    return _from_value_bits(values, dtype), Codes(fb.pack(fb.join_blocks(codes)), blocks.scales)


class _Blocks(NamedTuple):
    bits: Int32[Array, "*batch C Q"]
    finite_scales: Int32[Array, "*batch C 1"]  # what the scale rule says; meaningless where the block is not finite
    is_finite: Bool[Array, "*batch C 1"]
    scales: UInt8[Array, "*batch C"]


def _scaled_blocks(x: Float[Array, "*batch n"], options: Options) -> _Blocks:
    bits = fb.split_blocks(fb.to_bits(x), options.block_size)
    amax = fb.block_maximum(bits)
    is_finite = amax < fb.INF
    finite_scales = SCALE_RULES[options.scale_rule](fb.magnitude(bits), amax)
    return _Blocks(bits, finite_scales, is_finite, jnp.where(is_finite, finite_scales, NAN_SCALE).astype(jnp.uint8)[..., 0])


def _codes(blocks: _Blocks, options: Options, key: Key | None) -> UInt32[Array, "*batch C Q"]:
    if options.compat:
        return _modelopt_codes(blocks)
    if options.element_round == "rne":
        index = nearest_index(blocks.bits, blocks.finite_scales, blocks.is_finite)
    else:
        mag = fb.magnitude(blocks.bits)
        index = rounded_index(scaled_bits(mag, blocks.finite_scales), E2M1, options.element_round, key)
        index = jnp.where(blocks.is_finite & (mag > 0), index, 0).astype(jnp.uint32)
    return index | ((blocks.bits.astype(jnp.uint32) >> 28) & 8)


def _modelopt_codes(blocks: _Blocks) -> UInt32[Array, "*batch C Q"]:
    mag = fb.magnitude(blocks.bits)
    y_bits = scaled_bits(mag, blocks.finite_scales)
    index = sum((y_bits > midpoint).astype(jnp.uint32) for midpoint in _MIDPOINTS)
    quotient_is_zero = (mag == 0) | (y_bits <= -23 << fb.EXP_SHIFT)  # float32 rounds 2**-150 and less to 0
    return jnp.where(blocks.is_finite, index, 0) | jnp.where((blocks.bits < 0) | quotient_is_zero, jnp.uint32(8), 0)


def _value_bits(codes: UInt8[Array, "*batch C Q"] | UInt32[Array, "*batch C Q"], scales: UInt8[Array, "*batch C"]) -> UInt32[Array, "*batch C Q"]:
    scales = scales[..., None].astype(jnp.int32)
    return value_bits(codes, scales, scales == NAN_SCALE)


def _from_value_bits(bits: UInt32[Array, "*batch C Q"], dtype) -> Float[Array, "*batch n"]:
    """The low 16 bits are zero, so bfloat16 is the upper half."""
    bits = fb.join_blocks(bits)
    if dtype == jnp.bfloat16:
        return lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return lax.bitcast_convert_type(bits, jnp.float32).astype(dtype)
