"""One matrix per expert applied to the rows routed to it: `y[p] = w[e(p)] @ x[p] + bias[e(p)]`."""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptoss_jax.ops.backend import resolve_backend
from gptoss_jax.ops.grouped_matmul.groups import RowGroups, combine, dispatch, group_rows, max_slots
from gptoss_jax.precision import wide
from gptoss_jax.quant.lora import Adapted
from gptoss_jax.quant.two_way import TwoWay, forward_weight

# Rows of a block, to which each expert's rows are padded. XLA joins blocks to larger pieces, so there small ones pad less.
BLOCK_ROWS = {"xla": 32, "triton": 128}


def _module(backend: str):
    """The module with `forward` and `backward`, imported when it is asked for: Pallas takes 0.1 s, and only GPUs need it."""
    return importlib.import_module(f"gptoss_jax.ops.grouped_matmul.{backend}")


def block_rows(backend: str | None = None) -> int:
    """Rows of a block for `group_rows` where the grouped matmul runs on this backend."""
    return BLOCK_ROWS[resolve_backend(backend)]


def grouped_matmul(
    x_PK: Float[Array, "P K"],
    w_ENK: Float[Array, "E N K"] | TwoWay | Adapted,
    bias_EN: Float[Array, "E N"],
    groups: RowGroups,
    backend: str | None = None,
) -> Float[Array, "P N"]:
    """`y[p] = w[e(p)] @ x[p] + bias[e(p)]` for the slots in use, with the gradients of x, w and bias; products accumulate in float32.

    Slots of unused blocks come out as zeros; padding slots of used blocks hold the bias and must not be read (`combine` does not).
    Gradients of padding slots must be zero on entry (`combine` gives them so). An `Adapted` weight has gradients for its adapters alone.
    """
    if isinstance(w_ENK, Adapted):
        return _adapted_matmul(x_PK, w_ENK, bias_EN, groups, resolve_backend(backend))
    return _grouped_matmul(x_PK, w_ENK, bias_EN, groups, resolve_backend(backend))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _grouped_matmul(x_PK, w_ENK, bias_EN, groups, backend):
    return _module(backend).forward(x_PK, forward_weight(w_ENK), bias_EN, groups)


def _forward(x_PK, w_ENK, bias_EN, groups, backend):
    return _grouped_matmul(x_PK, w_ENK, bias_EN, groups, backend), (x_PK, w_ENK, bias_EN, groups)


def _backward(backend, residual, dy_PN):
    x_PK, w_ENK, bias_EN, groups = residual
    two_way = isinstance(w_ENK, TwoWay)
    through_ENK = w_ENK.backward if two_way else w_ENK
    dx_PK, dw_ENK, dbias_EN = _module(backend).backward(dy_PN, x_PK, through_ENK, groups)
    dw_ENK = dw_ENK.astype(through_ENK.dtype)
    return dx_PK, TwoWay(dw_ENK, jnp.zeros_like(dw_ENK)) if two_way else dw_ENK, dbias_EN.astype(bias_EN.dtype), None


_grouped_matmul.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _adapted_matmul(x_PK, w, bias_EN, groups, backend):
    y_PN = _module(backend).forward(x_PK, w.weight, bias_EN, groups)
    if not w.apart:
        return y_PN
    side_PN = _no_bias(backend, _no_bias(backend, x_PK, w.a, groups), w.b, groups)
    return (y_PN.astype(wide(y_PN.dtype)) + side_PN.astype(wide(y_PN.dtype))).astype(y_PN.dtype)


def _no_bias(backend, x_PK, w_ENK, groups):
    return _module(backend).forward(x_PK, w_ENK, jnp.zeros(w_ENK.shape[:2], x_PK.dtype), groups)


def _adapted_forward(x_PK, w, bias_EN, groups, backend):
    return _adapted_matmul(x_PK, w, bias_EN, groups, backend), (x_PK, w, bias_EN, groups)


def _adapted_backward(backend, residual, dy_PN):
    """Two narrow products more than the gradient of x alone, and none of [out, in] per expert (`quant.lora`)."""
    x_PK, w, bias_EN, groups = residual
    low_PR = _no_bias(backend, x_PK, w.a, groups)
    dlow_PR, db_ENR, dbias_EN = _module(backend).backward(dy_PN, low_PR, w.b, groups)
    side_PK, da_ERK, _ = _module(backend).backward(dlow_PR, x_PK, w.a, groups)
    dx_PK = _module(backend).input_gradient(dy_PN, w.weight, groups)
    if w.apart:
        dx_PK = (dx_PK.astype(wide(dx_PK.dtype)) + side_PK.astype(wide(dx_PK.dtype))).astype(dx_PK.dtype)
    adapters = Adapted(None, da_ERK.astype(w.a.dtype), db_ENR.astype(w.b.dtype), w.apart)
    return dx_PK, adapters, dbias_EN.astype(bias_EN.dtype), None


_adapted_matmul.defvjp(_adapted_forward, _adapted_backward)

__all__ = ["RowGroups", "block_rows", "combine", "dispatch", "group_rows", "grouped_matmul", "max_slots"]
