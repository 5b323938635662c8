"""MXFP4 codes as NVFP4 codes of the same values: nothing is rounded.

Both formats have the same elements, so the packed codes stay byte for byte; only scales are said anew. A block of 32 with scale 2**k becomes two
blocks of 16 with scale 2**(k - top + 8), relative to the global scale 2**(top - 8), where `top` is the largest k of the matrix (of the stack of
matrices without `per_expert`). E4M3 holds the powers from 2**-9 to 2**8, so k may lie up to 17 below `top`; blocks of zeros do not count. A block
that lies lower, or below 2**-124 (the global scale is at least 2**-115), or holds NaN, gets scale 0x7F (E4M3 NaN), by which an export refuses it
with the tensor's name.

The ordinary NVFP4 encoder is no such cast: a block whose largest value is 4 gets the scale E4M3(4/6), which no power of two equals.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from gptoss_jax.formats import bits as fb
from gptoss_jax.formats import mxfp4, nvfp4
from gptoss_jax.formats.minifloat import E4M3_NAN

SPAN = 17  # how far below the largest exponent of a matrix E4M3 reaches: 2**8 down to 2**-9
MIN_EXPONENT = -115  # of the global scale, as in `nvfp4`: all products stay normal numbers
_NOTHING = -(2**20)  # exponent of a block of zeros


def from_mxfp4(q: mxfp4.Codes, per_expert: bool = True) -> nvfp4.Codes:
    """NVFP4 codes with `nvfp4.decode(out, float32) == mxfp4.decode(q, float32)`, NaN in the blocks that E4M3 does not reach."""
    return _cast(q, None, per_expert)


def encode(
    x: Float[Array, "*batch n"], scale_rule: str, per_expert: bool = True, amax: Float[Array, "*matrices"] | float | None = None
) -> nvfp4.Codes:
    """x in MXFP4 by a scale rule, cast.

    Args:
      amax: the largest magnitude of the matrix or stack of which x is a part, from which `top` then follows; shape x.shape[:-2] or a scalar.
    """
    top = None
    if amax is not None:
        alone = jnp.zeros((*jnp.shape(amax), mxfp4.BLOCK_SIZE), jnp.float32).at[..., 0].set(amax)
        largest = mxfp4.encode(alone, scale_rule).scales[..., 0].astype(jnp.int32) - 127
        top = jnp.broadcast_to(jnp.where(jnp.asarray(amax) > 0, largest, _NOTHING), x.shape[:-2])
    return _cast(mxfp4.encode(x, scale_rule), top, per_expert)


@partial(jax.jit, static_argnums=2)
def _cast(q: mxfp4.Codes, top: Int32[Array, "*matrices"] | None, per_expert: bool) -> nvfp4.Codes:
    k = q.scales.astype(jnp.int32) - 127
    block_bytes = fb.split_blocks(q.packed, mxfp4.BLOCK_SIZE // 2)
    is_zero = jnp.all((block_bytes & 0x77) == 0, axis=-1)
    if top is None:
        top = _largest(jnp.where(is_zero | (q.scales == 255), _NOTHING, k), per_expert)
    else:
        top = top.reshape(*top.shape, *[1] * (k.ndim - top.ndim))
    g = jnp.where(top == _NOTHING, 0, jnp.maximum(top - 8, MIN_EXPONENT))
    shift = jnp.where(is_zero, -9, k - g)
    byte = jnp.where(shift >= -6, (shift + 7) << 3, 1 << jnp.clip(shift + 9, 0, 2))  # below 2**-6 E4M3 is subnormal
    byte = jnp.where((shift < -9) | (shift > 8) | (q.scales == 255), E4M3_NAN, byte).astype(jnp.uint8)
    scales = lax.bitcast_convert_type(jnp.repeat(byte, mxfp4.BLOCK_SIZE // nvfp4.BLOCK_SIZE, axis=-1), jnp.float8_e4m3fn)
    return nvfp4.Codes(q.packed, scales, _power(g, k.shape[:-2]))


def _largest(k: Int32[Array, "*batch C"], per_expert: bool) -> Int32[Array, "..."]:
    dims = tuple(range(max(k.ndim - (2 if per_expert else 3), 0), k.ndim))
    return jnp.max(k, axis=dims, keepdims=True)


def _power(exponent: Int32[Array, "..."], shape: tuple[int, ...]) -> Float32[Array, "*matrices"]:
    """2**exponent for every matrix; the exponent has one element per matrix, or one per stack of them."""
    flat = exponent.reshape(exponent.shape[: len(shape)])
    return jnp.broadcast_to(fb.from_bits((flat + 127) << fb.EXP_SHIFT), shape)
