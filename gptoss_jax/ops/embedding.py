"""Rows of an embedding table, with a gradient that is summed in float32 whatever the dtype of the table.

The transpose of an indexed read is a scatter-add in the dtype of the table. In bfloat16 the sum of a token that occurs often stops growing at 256
times its terms: with one token at half of 2048 positions the nano model's gradient was 32 % wrong (0.1 % here).

Legend: B rows  T tokens of a row  V vocab  D hidden
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.custom_vjp
def embedding(weight_VD: Float[Array, "V D"], tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """`weight_VD[tokens_BT]`."""
    return weight_VD[tokens_BT]


def _forward(weight_VD, tokens_BT):
    # of the weight only shape and dtype are used
    return weight_VD[tokens_BT], (weight_VD, tokens_BT)


def _backward(residuals, dx_BTD):
    weight_VD, tokens_BT = residuals
    sums_VD = jnp.zeros(weight_VD.shape, jnp.float32).at[tokens_BT].add(dx_BTD.astype(jnp.float32))
    return sums_VD.astype(weight_VD.dtype), None


embedding.defvjp(_forward, _backward)
