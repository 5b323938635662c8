"""MXFP8 and MXFP6 (OCP MX v1.0): blocks of 32 elements of a small float type along the last dim with one E8M0 scale, as activations have them.

    element   largest   values per sign   used as
    e4m3      448       127               MXFP8 activations beside 4-bit weights (W4A8)
    e5m2      57344     124               MXFP8 gradients
    e2m3      7.5       32                MXFP6
    e3m2      28        32                MXFP6

    scale exponent   floor   e - emax, emax the exponent of the largest magnitude (OCP's rule, clips what lies above it: up to 2/1.75)
                     rceil   2**ceil(log2(amax/largest)): never clips; what TensorRT-LLM does to the activations of MXFP4 models

An element is stored as one byte: sign bit 7, below it the index of its magnitude, which for e4m3 and e5m2 are their usual bytes. No model file holds
weights like this. Blocks with NaN or infinity get scale byte 255 and elements of magnitude 0: they decode to NaN. Encoding and decoding work on
integer bits, subnormals included; every decoded value is exact in float32, and in bfloat16 from 2**-126 on (below, it may be rounded or flushed).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8

from gptoss_jax.formats import bits as fb
from gptoss_jax.formats.bits import check_block_size
from gptoss_jax.formats.element_round import check_element_round, checked_key, rounded_index
from gptoss_jax.formats.minifloat import E2M3, E3M2, E4M3, E5M2, Element, nearest_index
from gptoss_jax.formats.noise import Key
from gptoss_jax.formats.parts import Parts
from gptoss_jax.formats.scale_rules import scaled_bits

BLOCK_SIZE = 32
ELEMENTS = {"e4m3": E4M3, "e5m2": E5M2, "e2m3": E2M3, "e3m2": E3M2}
SCALE_RULES = ("rceil", "floor")

_NAN_SCALE = 255


class Codes(NamedTuple):
    """An encoded array of shape [*batch, n]; a pytree. value = element * 2**(scale - 127)."""

    elements: UInt8[Array, "*batch n"]  # sign << 7 | index of the magnitude
    scales: UInt8[Array, "*batch C"]  # E8M0


class Options(NamedTuple):
    """What `encode` can be told: a name of `ELEMENTS`, of `SCALE_RULES`, of `ELEMENT_ROUNDS`, and the block size (32 in the standard)."""

    element: str = "e4m3"
    scale_rule: str = "rceil"
    element_round: str = "rne"
    block_size: int = BLOCK_SIZE


DEFAULT = Options()


def check_options(options: Options) -> None:
    """Raises ValueError unless `encode` can do this."""
    for what, value, known in (("element", options.element, ELEMENTS), ("scale rule", options.scale_rule, SCALE_RULES)):
        if value not in known:
            raise ValueError(f"unknown {what} {value!r}; known are {', '.join(known)}")
    check_element_round(options.element_round)
    check_block_size(options.block_size)


def encode(x: Float[Array | np.ndarray, "*batch n"], options: Options = DEFAULT, key: Key | None = None) -> Codes:
    """Encodes float32 or bfloat16 along the last dim, whose width must be a multiple of the block size.

    Raises:
      TypeError: another dtype; a key missing, not wanted, or none.
      ValueError: bad width or unknown option.
    """
    check_options(options)
    return _encode(fb.as_input(x), checked_key(options.element_round, key), options)


def decode(q: Codes, options: Options = DEFAULT, dtype=jnp.bfloat16) -> Float[Array, "*batch n"]:
    """Values of the codes.

    Raises:
      TypeError: elements or scales are not uint8.
      ValueError: their shapes do not belong together.
    """
    _check_codes(q, options)
    return _decode(q, options, jnp.dtype(dtype))


def parts(q: Codes, options: Options = DEFAULT) -> Parts:
    """Elements and scales as float32; raises as `decode` does."""
    _check_codes(q, options)
    element = ELEMENTS[options.element]
    values = fb.from_bits(_value_bits(fb.split_blocks(q.elements, options.block_size), jnp.int32(127), element))
    return Parts(values, fb.e8m0_value(q.scales[..., None]))


def _check_codes(q: Codes, options: Options) -> None:
    if q.elements.shape != (*q.scales.shape[:-1], q.scales.shape[-1] * options.block_size):
        raise ValueError(
            f"elements {tuple(q.elements.shape)} and scales {tuple(q.scales.shape)} are not one array ({options.block_size} bytes per scale)"
        )
    for array in q:
        if array.dtype != jnp.uint8:
            raise TypeError(f"elements and E8M0 scales must be uint8, not {array.dtype}")


@partial(jax.jit, static_argnums=2)
def _encode(x, key, options):
    element = ELEMENTS[options.element]
    bits = fb.split_blocks(fb.to_bits(x), options.block_size)
    mag, amax = fb.magnitude(bits), fb.block_maximum(bits)
    is_finite = amax < fb.INF
    scale = jnp.maximum((amax >> fb.EXP_SHIFT) - _emax(element) + _bump(amax, element, options.scale_rule), 0)
    scaled = scaled_bits(mag, scale)
    if options.element_round == "rne":
        index = nearest_index(scaled, element)
    else:
        index = rounded_index(scaled, element, options.element_round, key)
    index = jnp.where(is_finite & (mag > 0), index, 0)
    codes = (index | ((bits >> 24) & 0x80)).astype(jnp.uint8)
    return Codes(fb.join_blocks(codes), jnp.where(is_finite, scale, _NAN_SCALE).astype(jnp.uint8)[..., 0])


@partial(jax.jit, static_argnums=(1, 2))
def _decode(q, options, dtype):
    codes, scales = fb.split_blocks(q.elements, options.block_size), q.scales[..., None].astype(jnp.int32)
    bits = jnp.where(scales == _NAN_SCALE, fb.NAN, _value_bits(codes, scales, ELEMENTS[options.element]))
    return fb.join_blocks(fb.from_bits(bits)).astype(dtype)


def _emax(element: Element) -> int:
    return (element.max_bits >> fb.EXP_SHIFT) - 127


def _bump(amax: Int32[Array, "*batch C 1"], element: Element, scale_rule: str) -> Int32[Array, "*batch C 1"] | int:
    return ((amax & 0x7FFFFF) > (element.max_bits & 0x7FFFFF)).astype(jnp.int32) if scale_rule == "rceil" else 0


def _value_bits(codes: UInt8[Array, "*batch C Q"], scale_e8m0: Int32[Array, "..."], element: Element) -> Int32[Array, "*batch C Q"]:
    """float32 bits of element * 2**(scale_e8m0 - 127), subnormal results included."""
    index = (codes & 0x7F).astype(jnp.int32)
    steps = 1 << element.mantissa_bits
    # a magnitude is m * 2**(exp - M): with the hidden bit, or below the smallest normal one m = index
    m = jnp.where(index < steps, index, steps + index % steps)
    exp = jnp.maximum(index >> element.mantissa_bits, 1) - 1 + element.min_exp
    bits = jax.lax.bitcast_convert_type(m.astype(jnp.float32), jnp.int32)
    # exponent field of the product: below 1 it is subnormal, from 255 on infinite
    field = (bits >> fb.EXP_SHIFT) + exp - element.mantissa_bits + scale_e8m0 - 127
    mantissa = bits & 0x7FFFFF
    subnormal = (mantissa | fb.MIN_NORMAL) >> jnp.clip(1 - field, 0, 31)
    product = jnp.where(field < 1, subnormal, jnp.where(field < 255, (field << fb.EXP_SHIFT) | mantissa, fb.INF))
    return jnp.where(m == 0, 0, product) | ((codes >> 7).astype(jnp.int32) << 31)
