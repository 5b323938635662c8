"""Fake quantization: the forward value is decode(encode(x)), bit for bit; the gradient is the estimator's.

One codec serves training and export. What is encoded is the stored (master) weight in its own dtype, never a rounded copy: casting
float32 masters to bfloat16 first moves 0.73 % of the elements to another code. `dtype` chooses the dtype of the decoded values only.

Derivatives of second order take the cells, hence the estimator's factors, as constants: of L(fake_quant(x)) with a straight-through estimator the
Hessian is that of L at the quantized weight. Reverse mode over reverse mode gives it (`jax.grad` twice), and so does forward over reverse, which is
the cheaper way to a Hessian-vector product, with `mode="jvp"`: `jax.jvp(jax.grad(loss), (x,), (v,))`.
"""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from gptoss_jax.formats import Format, get_format
from gptoss_jax.formats.bits import as_input, join_blocks, split_blocks
from gptoss_jax.quant.cells import cells_of
from gptoss_jax.quant.estimators import Estimator, get_estimator
from gptoss_jax.quant.gather import Gather


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _encode_decode(x, key, fmt, estimator, dtypes, gather):
    if gather is None:
        return fmt.encode_decode(x, dtypes[1], key)
    codes = fmt.encode(x, key)
    return fmt.decode(jax.tree.map(gather.whole, codes), dtypes[1]), codes


def _encode_decode_fwd(x, key, fmt, estimator, dtypes, gather):
    return _encode_decode(x, key, fmt, estimator, dtypes, gather), (x, key) if estimator.needs_input else None


def _encode_decode_bwd(fmt, estimator, dtypes, gather, residual, grads):
    grad_w, _ = grads  # codes are integers and scales are constants: no gradient
    if gather is not None:
        grad_w = gather.scatter_sum(grad_w)
    return _to_input(fmt, estimator, residual, grad_w).astype(dtypes[0]), None


_encode_decode.defvjp(_encode_decode_fwd, _encode_decode_bwd)


def _to_input(fmt: Format, estimator: Estimator, residual: tuple[Array, Array | None] | None, grad_w: Float[Array, "*batch n"]):
    """dL/dx from dL/dw, blocks along the last dim."""
    if not estimator.needs_input:
        return estimator.backward(None, grad_w)
    x, key = residual
    with jax.named_scope(f"estimator_{estimator.name}"):
        cells = cells_of(lax.stop_gradient(x), fmt, key)
        return join_blocks(estimator.backward(cells, split_blocks(grad_w.astype(jnp.float32), fmt.block_size)))


@partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _decoded(x, key, fmt, estimator, dtype):
    return fmt.encode_decode(x, dtype, key)[0]


@_decoded.defjvp
def _decoded_jvp(fmt, estimator, dtype, primals, tangents):
    """The transpose of the estimator's (linear) backward pass, which JAX transposes again where it goes backward."""
    tangent = tangents[0].astype(jnp.float32)
    push = jax.linear_transpose(lambda grad: _to_input(fmt, estimator, primals, grad), tangent)
    return _decoded(*primals, fmt, estimator, dtype), push(tangent)[0].astype(dtype)


def fake_quant_with_codes(
    x: Float[Array, "*shape"], fmt: str | Format, estimator: str | Estimator = "ste", *, axis: int = -1, dtype=None, key: Array | None = None,
    gather: Gather | None = None,
) -> tuple[Float[Array, "*shape"], Any]:  # fmt: skip
    """(w, codes): w = decode(codes, dtype) and the codes = encode(x) that it was decoded from.

    Args:
      x: float32 or bfloat16.
      fmt: a format or its name.
      estimator: a gradient estimator or its name.
      axis: the dim along which blocks run, for linear weights the contraction dim. Codes have it moved last.
      dtype: dtype of w, by default that of x. The gradient that arrives in it is cast to x.dtype.
      key: of a format that rounds stochastically, and of no other.
      gather: inside a `jax.shard_map`: x is a shard, w is the whole weight, the codes are those of the shard. Blocks along the last dim only.

    Raises:
      TypeError: x has another dtype; a key missing or not wanted.
      ValueError: x.shape[axis] is not a multiple of the block size; unknown name.
    """
    x, fmt, estimator = as_input(x), get_format(fmt), get_estimator(estimator)
    dtypes = (x.dtype, jnp.dtype(x.dtype if dtype is None else dtype))
    w, codes = _encode_decode(jnp.moveaxis(x, axis, -1), key, fmt, estimator, dtypes, gather)
    return jnp.moveaxis(w, -1, axis), codes


def fake_quant(
    x: Float[Array, "*shape"], fmt: str | Format, estimator: str | Estimator = "ste", *, axis: int = -1, dtype=None, key: Array | None = None,
    mode: Literal["vjp", "jvp"] = "vjp",
) -> Float[Array, "*shape"]:  # fmt: skip
    """w = decode(encode(x), dtype), differentiable. Other arguments as in `fake_quant_with_codes`.

    Args:
      mode: "vjp" allows reverse mode alone and every estimator; "jvp" both modes, and estimators that are linear in the gradient.

    Raises:
      ValueError: also for mode "jvp" with an estimator that is not linear.
    """
    if mode == "vjp":
        return fake_quant_with_codes(x, fmt, estimator, axis=axis, dtype=dtype, key=key)[0]
    if mode != "jvp":
        raise ValueError(f"unknown mode {mode!r}; known are 'vjp', 'jvp'")
    x, fmt, estimator = as_input(x), get_format(fmt), get_estimator(estimator)
    if not estimator.linear:
        raise ValueError(f"estimator {estimator.name!r} is not linear in the gradient: it has no forward mode, use mode='vjp'")
    w = _decoded(jnp.moveaxis(x, axis, -1), key, fmt, estimator, jnp.dtype(x.dtype if dtype is None else dtype))
    return jnp.moveaxis(w, -1, axis)
