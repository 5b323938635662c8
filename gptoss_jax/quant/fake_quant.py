"""Fake quantization: the forward value is decode(encode(x)), bit for bit; the gradient is the estimator's.

One codec serves training and export. What is encoded is the stored (master) weight in its own dtype, never a rounded copy: casting
float32 masters to bfloat16 first moves 0.73 % of the elements to another code. `dtype` chooses the dtype of the decoded values only.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptoss_jax.formats import Format, get_format
from gptoss_jax.formats.bits import as_input
from gptoss_jax.quant.estimators import Estimator, get_estimator
from gptoss_jax.quant.gather import Gather


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _encode_decode(x, fmt, estimator, dtypes, gather):
    if gather is None:
        return fmt.encode_decode(x, dtypes[1])
    codes = fmt.encode(x)
    return fmt.decode(jax.tree.map(gather.whole, codes), dtypes[1]), codes


def _encode_decode_fwd(x, fmt, estimator, dtypes, gather):
    return _encode_decode(x, fmt, estimator, dtypes, gather), estimator.residual(x)


def _encode_decode_bwd(fmt, estimator, dtypes, gather, residual, grads):
    grad_w, _ = grads  # codes are integers and scales are constants: no gradient
    if gather is not None:
        grad_w = gather.scatter_sum(grad_w)
    return (estimator.backward(residual, grad_w).astype(dtypes[0]),)


_encode_decode.defvjp(_encode_decode_fwd, _encode_decode_bwd)


def fake_quant_with_codes(
    x: Float[Array, "*shape"], fmt: str | Format, estimator: str | Estimator = "ste", *, axis: int = -1, dtype=None, gather: Gather | None = None
) -> tuple[Float[Array, "*shape"], Any]:
    """(w, codes): w = decode(codes, dtype) and the codes = encode(x) that it was decoded from.

    Args:
      x: float32 or bfloat16.
      fmt: a format or its name.
      estimator: a gradient estimator or its name.
      axis: the dim along which blocks run, for linear weights the contraction dim. Codes have it moved last.
      dtype: dtype of w, by default that of x. The gradient that arrives in it is cast to x.dtype.
      gather: inside a `jax.shard_map`: x is a shard, w is the whole weight, the codes are those of the shard. Blocks along the last dim only.

    Raises:
      TypeError: x has another dtype.
      ValueError: x.shape[axis] is not a multiple of the block size; unknown name.
    """
    fmt, estimator = get_format(fmt), get_estimator(estimator)
    x = as_input(x)
    dtypes = (x.dtype, jnp.dtype(x.dtype if dtype is None else dtype))
    w, codes = _encode_decode(jnp.moveaxis(x, axis, -1), fmt, estimator, dtypes, gather)
    return jnp.moveaxis(w, -1, axis), codes


def fake_quant(
    x: Float[Array, "*shape"], fmt: str | Format, estimator: str | Estimator = "ste", *, axis: int = -1, dtype=None
) -> Float[Array, "*shape"]:
    """w = decode(encode(x), dtype), differentiable. Arguments as in `fake_quant_with_codes`."""
    return fake_quant_with_codes(x, fmt, estimator, axis=axis, dtype=dtype)[0]
