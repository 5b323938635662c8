"""A frozen weight with a low-rank change that is trained: W = W0 + s * B @ A, as LoRA has it (Hu et al. 2021), and what training computes with.

    plain       y = x @ W0.T + s (x @ A.T) @ B.T       dx = dy @ W0 + s (dy @ B) @ A
    quantized   y = x @ Q(W).T                         dx = dy @ Q(W)
    both        dA = s (dy @ B).T @ x                  dB = s dy.T @ (x @ A.T)

Quantized training rounds the merged weight, so that merging before an export changes nothing; Q(W0) + s * B @ A would be another model, which no
4-bit file can hold. With a straight-through estimator dB and dA are what the chain rule makes of dW = dy.T @ x, without dW: [out, in] per expert.

`merged_weight` serves the compiled training step and the export, and gives both the same bits: A and s * B are rounded to 12 significant bits first
(TF32 has 11, bfloat16 8), so that a product is exact in float32 and a compiler may fuse it with the addition or not; products are added in the order
of the rank, element by element, which no cut of the weight changes. A matrix product would add in an order of the library's choice.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from gptoss_jax.formats import Format, mxfp4
from gptoss_jax.quant.fake_quant import fake_quant_with_codes

FACTOR_BITS = 11  # explicit bits of a factor's mantissa


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoraWeight:
    """Stands in place of a stored weight. `base` is an array [.., out, in], or its MXFP4 codes; leading dims are stacked layers and experts. Codes
    may be without adapters, a and b None."""

    base: Any
    a: Float[Array, "*lead r inputs"] | None
    b: Float[Array, "*lead out r"] | None
    scale: float = field(default=1.0, metadata={"static": True})

    def decoded_base(self, dtype) -> Float[Array, "*lead out inputs"]:
        return mxfp4.decode(self.base, dtype) if isinstance(self.base, mxfp4.Codes) else self.base.astype(dtype)

    def factors(self, dtype) -> tuple[Float[Array, "*lead r inputs"], Float[Array, "*lead out r"]]:
        """A and s * B as a product takes them."""
        return self.a.astype(dtype), (self.scale * self.b).astype(dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the merged weight."""
        if isinstance(self.base, mxfp4.Codes):
            return (*self.base.packed.shape[:-1], 2 * self.base.packed.shape[-1])
        return self.base.shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self):
        """That of the merged weight."""
        return jnp.dtype(jnp.float32)

    @property
    def size(self) -> int:
        """Elements of the merged weight."""
        return math.prod(self.shape)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapted:
    """What `ops` compute with in place of a weight [E, out, in]: A and s * B beside it, in its dtype. `apart`: the weight does not hold their
    product, which is added to the result; otherwise they only receive gradients."""

    weight: Float[Array, "E out inputs"]
    a: Float[Array, "E r inputs"]
    b: Float[Array, "E out r"]
    apart: bool = field(metadata={"static": True})


def merged_weight(stored: LoraWeight) -> Float[Array, "*lead out inputs"]:
    """W0 + s * B @ A in float32; see the head of the file for its bits."""
    base = stored.decoded_base(jnp.float32)
    if stored.a is None:
        return base
    a, b = (lax.reduce_precision(x, 8, FACTOR_BITS) for x in stored.factors(jnp.float32))
    terms = (b[..., :, k, None] * a[..., k, None, :] for k in range(a.shape[-2]))
    change = next(terms)
    for term in terms:
        change = change + term
    return base + change


def unquantized(stored: LoraWeight, dtype) -> Adapted | Float[Array, "E out inputs"]:
    """Base and adapters side by side in the compute dtype."""
    base = lax.stop_gradient(stored.decoded_base(dtype))
    return base if stored.a is None else Adapted(base, *stored.factors(dtype), apart=True)


def quantized(stored: LoraWeight, fmt: Format, dtype) -> tuple[Adapted | Float[Array, "E out inputs"], Any]:
    """The merged weight through the format, and its codes; straight-through. Expert by expert: what exists in float32 is one expert's matrix."""

    def of_expert(expert: LoraWeight):
        return fake_quant_with_codes(merged_weight(expert), fmt, dtype=dtype)

    one_each = jax.tree.map(lambda x: x[:, None], lax.stop_gradient(stored))
    weight, codes = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), lax.map(of_expert, one_each))
    return weight if stored.a is None else Adapted(weight, *stored.factors(dtype), apart=False), codes
