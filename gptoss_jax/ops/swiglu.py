"""The clamped SwiGLU of gpt-oss on interleaved gate and up, with its gradient written out.

    act = g * sigmoid(alpha g) * (u + 1),   g = min(gate, limit),  u = clip(up, -limit, limit),  gate = h[0::2], up = h[1::2]

    dgate = dact * (u + 1) * s * (1 + alpha g (1 - s))   where gate <= limit, else 0,    s = sigmoid(alpha g)
    dup   = dact * g * s                                 where |up| <= limit, else 0

Only h is kept for the backward pass. Written out, the gradient is one pass over memory: on two cores 2.3 ms for [8448, 512] float32 and 9 ms for
bfloat16, against 10 and 71 ms by automatic differentiation. Computed in float32.

Legend: P rows  F expert hidden  U=2F gate/up interleaved
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptoss_jax.precision import wide

ALPHA = 1.702  # the release's constant; every client hard-codes it


def _gate_up(h_PU):
    wide_PFX = h_PU.astype(wide(h_PU.dtype)).reshape(*h_PU.shape[:-1], -1, 2)
    return wide_PFX[..., 0], wide_PFX[..., 1]


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def clamped_swiglu(h_PU: Float[Array, "*P U"], limit: float) -> Float[Array, "*P F"]:
    """Gate and up interleaved in the last dim; clamped above (gate) and on both sides (up); in the dtype of h."""
    gate_PF, up_PF = _gate_up(h_PU)
    g_PF, u_PF = jnp.minimum(gate_PF, limit), jnp.clip(up_PF, -limit, limit)
    return (g_PF * jax.nn.sigmoid(ALPHA * g_PF) * (u_PF + 1)).astype(h_PU.dtype)


def _forward(h_PU, limit):
    return clamped_swiglu(h_PU, limit), h_PU


def clamped_swiglu_gradient(h_PU: Float[Array, "*P U"], dact_PF: Float[Array, "*P F"], limit: float) -> Float[Array, "*P U"]:
    """dh from dact, in the dtype of h."""
    gate_PF, up_PF = _gate_up(h_PU)
    g_PF, u_PF = jnp.minimum(gate_PF, limit), jnp.clip(up_PF, -limit, limit)
    s_PF = jax.nn.sigmoid(ALPHA * g_PF)
    dact_PF = dact_PF.astype(gate_PF.dtype)
    # written so that a NaN fails the test and passes on
    dgate_PF = jnp.where(gate_PF > limit, 0, dact_PF * (u_PF + 1) * s_PF * (1 + ALPHA * g_PF * (1 - s_PF)))
    dup_PF = jnp.where(jnp.abs(up_PF) > limit, 0, dact_PF * g_PF * s_PF)
    return jnp.stack([dgate_PF, dup_PF], axis=-1).reshape(h_PU.shape).astype(h_PU.dtype)


def _backward(limit, h_PU, dact_PF):
    return (clamped_swiglu_gradient(h_PU, dact_PF, limit),)


clamped_swiglu.defvjp(_forward, _backward)
