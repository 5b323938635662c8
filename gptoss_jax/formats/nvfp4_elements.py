"""The elements of NVFP4: to which E2M1 magnitude each |x| goes, given the step = block scale * global scale of its block.

With a power-of-two global scale midpoint * step is exact, so nearest rounding is three comparisons; otherwise, and for stochastic rounding, the
quotient |x| / step is rounded to float32 in integers and placed on the grid.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32

from gptoss_jax.formats import bits as fb
from gptoss_jax.formats.element_round import rounded_index
from gptoss_jax.formats.minifloat import E2M1, e2m1_index, e2m1_value, e4m3_value
from gptoss_jax.formats.noise import Key
from gptoss_jax.formats.nvfp4_scales import PerBlock, quotient_bits

Magnitudes = Int32[Array, "*batch C Q"]


def element_index(
    mag: Magnitudes, amax_block: PerBlock, step: Float32[Array, "*batch C 1"], kind: str, element_round: str, key: Key | None
) -> Int32[Array, "*batch C Q"]:
    """E2M1 index from the bits of |x|; 0 in a block that is not finite. kind: that of the global scale."""
    if kind == "pow2" and element_round in ("rne", "away"):
        return _nearest_by_products(fb.from_bits(mag), step, element_round == "away")
    quotient = quotient_bits(mag, lax.bitcast_convert_type(step, jnp.int32))
    if element_round == "rne":
        index = e2m1_index(quotient)
        return jnp.where(amax_block < fb.INF, index, 0)
    index = rounded_index(quotient, E2M1, element_round, key)
    return jnp.where((amax_block < fb.INF) & (mag > 0), index, 0)


def nearest_magnitude(mag: Magnitudes, amax_block: PerBlock, scale_e4m3: PerBlock, g: Float32[Array, "..."], kind: str) -> Magnitudes:
    """Bits of the magnitudes to which nearest rounding with this block scale leads."""
    step = e4m3_value(scale_e4m3.astype(jnp.uint8)) * g
    index = element_index(mag, amax_block, step, kind, "rne", None)
    return lax.bitcast_convert_type(e2m1_value(index.astype(jnp.uint32)) * step, jnp.int32)


def _nearest_by_products(a: Float32[Array, "..."], step: Float32[Array, "..."], is_away: bool) -> Int32[Array, "..."]:
    """E2M1 index of a/step without the division: three comparisons with midpoint * step, a binary search of the index. Of the ties, those of the
    last comparison go down to the even index, or away from zero."""
    above_4 = a >= 1.75 * step
    above_2 = a >= jnp.where(above_4, 3.5, 0.75) * step
    last = jnp.where(above_4, jnp.where(above_2, 5.0, 2.5), jnp.where(above_2, 1.25, 0.25))
    above_1 = a >= last * step if is_away else a > last * step
    return above_4.astype(jnp.int32) * 4 + above_2.astype(jnp.int32) * 2 + above_1.astype(jnp.int32)
