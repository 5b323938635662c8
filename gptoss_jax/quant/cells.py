"""Where values lie on the grid of their block: what a gradient estimator sees of the forward pass.

    y = x / scale        q = Q(y), the element that the forward pass chose        lower <= |y| < upper, neighbours on the grid of magnitudes

Everything is recomputed from x in the backward pass: x is a parameter, so keeping it costs no memory, and what an estimator does not look at, XLA
leaves out (`dge` and `ste_clip` need the block scales alone, not the codes).

    C blocks of a row   Q block size
"""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from gptoss_jax.formats import Format
from gptoss_jax.formats.bits import split_blocks

_MIN_NORMAL = 2.0**-126


@partial(
    jax.tree_util.register_dataclass, data_fields=("y", "q", "scale", "magnitude", "lower", "upper", "inside"), meta_fields=("magnitudes",)
)
@dataclass(frozen=True)
class Cells:
    """Values in units of their block scale, with the cell of the grid that each lies in. All float32, blocked.

    Attributes:
      y: x / scale.
      q: the grid point that the forward pass rounded y to. For stochastic formats the one that the key drew.
      magnitude: |y|.
      lower, upper: the cell: lower <= |y| < upper. On a grid point the cell above it; at and beyond the largest magnitude the last cell.
      inside: |y| <= largest magnitude: not clipped.
      magnitudes: the grid, from 0 on.
    """

    y: Float32[Array, "*batch C Q"]
    q: Float32[Array, "*batch C Q"]
    scale: Float32[Array, "*batch C 1"]
    magnitude: Float32[Array, "*batch C Q"]
    lower: Float32[Array, "*batch C Q"]
    upper: Float32[Array, "*batch C Q"]
    inside: Bool[Array, "*batch C Q"]
    magnitudes: tuple[float, ...]

    @property
    def width(self) -> Float32[Array, "*batch C Q"]:
        return self.upper - self.lower

    @property
    def middle(self) -> Float32[Array, "*batch C Q"]:
        return 0.5 * (self.lower + self.upper)


def cells_of(x: Float[Array, "*batch n"], fmt: Format, key: Array | None = None) -> Cells:
    """Cells of float32 or bfloat16 values, blocks along the last dim. `key` as in `fmt.encode`."""
    q, scale = fmt.parts(fmt.encode(x, key))
    return place(split_blocks(x.astype(jnp.float32), fmt.block_size), q, scale, fmt.magnitudes)


def place(
    x: Float32[Array, "*batch C Q"], q: Float32[Array, "*batch C Q"], scale: Float32[Array, "*batch C 1"], magnitudes: tuple[float, ...]
) -> Cells:
    """Cells of values whose scale is known.

    Borders are compared as |x| >= border * scale: with a power of two, or with an E4M3 scale times one, the product is exact where the quotient
    is not. A block whose scale is not a normal number (an all-zero block of MXFP4 has 2**-127, which XLA flushes) counts as zeros.
    """
    is_zero = scale < _MIN_NORMAL
    unit = jnp.where(is_zero, 1.0, scale)
    x, q = jnp.where(is_zero, 0.0, x), jnp.where(is_zero, 0.0, q)
    size = jnp.abs(x)
    lower, upper = jnp.zeros_like(size), jnp.full_like(size, magnitudes[1])
    for border, following in pairwise(magnitudes[1:]):
        above = size >= border * unit
        lower, upper = jnp.where(above, border, lower), jnp.where(above, following, upper)
    return Cells(x / unit, q, scale, size / unit, lower, upper, size <= magnitudes[-1] * unit, tuple(magnitudes))
