"""RMSNorm and the biased linear layer. Weights are stored [out, in] as in the checkpoints; nothing is transposed at load or export."""

from functools import partial

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from gptoss_jax.model.weights import weight
from gptoss_jax.precision import wide
from gptoss_jax.quant import LoraWeight


class RMSNorm(nnx.Module):
    """`x * rsqrt(mean(x^2) + eps) * weight`, all in float32 and cast at the very end (multiply, then cast; Llama casts first)."""

    def __init__(self, size: int, eps: float, *, rngs, dtype, layers: int | None = None):
        self.weight = weight(rngs, (size,), ("norm",), layers=layers, dtype=dtype, init="ones")
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        wide_x = x.astype(wide(x.dtype))
        normed = wide_x * lax.rsqrt(jnp.mean(wide_x * wide_x, axis=-1, keepdims=True) + self.eps)
        return (normed * self.weight[...].astype(wide_x.dtype)).astype(x.dtype)


class Linear(nnx.Module):
    """`x @ weight.T + bias` in the dtype of x with float32 accumulation; with an adapter `x @ W0.T + (x @ A.T) @ (s B).T + bias`."""

    def __init__(self, size_in: int, size_out: int, axes: tuple[str, str], *, rngs, dtype, layers: int | None = None):
        self.weight = weight(rngs, (size_out, size_in), axes, layers=layers, dtype=dtype)
        self.bias = weight(rngs, (size_out,), axes[:1], layers=layers, dtype=dtype, init="zeros")

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        stored = self.weight.get_value()
        product = partial(jnp.einsum, "...i,oi->...o", preferred_element_type=wide(x.dtype))
        if isinstance(stored, LoraWeight):
            a, b = stored.factors(x.dtype)
            out = product(x, stored.decoded_base(x.dtype)) + product(product(x, a).astype(x.dtype), b)
        else:
            out = product(x, stored.astype(x.dtype))
        return (out + self.bias[...].astype(out.dtype)).astype(x.dtype)
