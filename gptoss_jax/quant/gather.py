"""Making a sharded weight whole for computing, inside a `jax.shard_map`: what travels is what the weight becomes, never the weight itself.

    quantized   encode the shard -> all-gather packed codes and scales -> decode           4.25 bits per weight (MXFP4) instead of 16
    otherwise   cast the shard to the compute dtype -> all-gather

Blocks never cross a shard (only the leading dim is cut), so the codes are those of one device, bit for bit. The gradient of the whole weight is
summed over the devices in float32 and each keeps its shard (a reduce-scatter).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from gptoss_jax.precision import wide


@dataclass(frozen=True)
class Gather:
    """The mesh axes over which one dim of an array (of a weight the leading one) is cut and has to be whole, outermost first."""

    axes: tuple[str, ...]
    dim: int = 0

    def whole(self, x: Array) -> Array:
        """The arrays of all devices together. float8 travels as bytes."""
        as_bytes = x.dtype.itemsize == 1
        gathered = lax.all_gather(lax.bitcast_convert_type(x, jnp.uint8) if as_bytes else x, self.axes, axis=self.dim, tiled=True)
        return lax.bitcast_convert_type(gathered, x.dtype) if as_bytes else gathered

    def scatter_sum(self, grad: Array) -> Float[Array, "..."]:
        """This device's shard of the float32 sum."""
        return lax.psum_scatter(grad.astype(wide(grad.dtype)), self.axes, scatter_dimension=self.dim, tiled=True)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def cast_and_gather(x: Float[Array, "*shard"], dtype: Any, gather: Gather) -> Float[Array, "*whole"]:
    """`gather.whole(x.astype(dtype))`, with the gradient above."""
    return gather.whole(x.astype(dtype))


def _forward(x, dtype, gather):
    return cast_and_gather(x, dtype, gather), jnp.zeros(0, x.dtype)  # of x the gradient needs the dtype


def _backward(dtype, gather, residual, grad):
    return (gather.scatter_sum(grad).astype(residual.dtype),)


cast_and_gather.defvjp(_forward, _backward)
