"""Rows to the devices that hold their experts and back: each row travels only to where it is needed, once, however many of its experts are there.

    send     rows sorted by destination, a row for each device that it is needed on          [N, D], N = S * min(A, P)
    receive  from each device its rows, in its order, at a place of its own                  [P*S, D], rows that nobody sent are zeros
    back     what the experts made of them to the place in the send buffer it came from, and the sum over a token's rows in float32

Sizes differ from device to device and step to step, hence `jax.lax.ragged_all_to_all`. XLA:CPU has none (jax 0.10): there, and on any platform but
CUDA, `_padded` does the same with an all-to-all of padded pieces, which sends as much as a gather. The indices around it are the same code. On GPUs
this has been compiled to StableHLO, not run.

Buffers hold any routing: P*S rows are received when all tokens of all devices need the same device. Nothing is dropped; only traffic depends on
routing. `to_experts` and `from_experts` are each other's transpose, so either is the gradient of the other.

Legend: S tokens of this device  A experts per token  P, Q devices of the exchange (as destination, as source)  N rows of the send buffer  D hidden
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from gptoss_jax.ops.grouped_matmul.groups import take_or_zero
from gptoss_jax.precision import wide


class Route(NamedTuple):
    """Where the rows of one layer go, seen from one device. `slot_SA` is the place of a token in the send buffer for its expert's device, and
    beyond the end where an earlier expert of the token is there too, or nobody is asked."""

    slot_SA: Int[Array, "S A"]
    token_N: Int[Array, "N"]
    starts_P: Int[Array, "P"]  # of the rows for each device in the send buffer here
    sizes_P: Int[Array, "P"]
    starts_Q: Int[Array, "Q"]  # of the rows for this device in the send buffer of each
    sizes_Q: Int[Array, "Q"]
    order_QS: Int[Array, "Q S"]  # tokens of each device, those that come here first


def expected_share(num_experts: int, per_token: int, devices: int) -> float:
    """At even routing, the rows that one device receives as a share of those it would by an all-gather: the probability that of `per_token`
    different experts at least one is among `num_experts / devices`."""
    elsewhere = num_experts - num_experts // devices
    return 1 - math.comb(elsewhere, per_token) / math.comb(num_experts, per_token)


def make_route(owner_QSA: Int[Array, "Q S A"], axes: tuple[str, ...]) -> Route:
    """The route of all tokens of the devices of `axes`, from the device that holds each chosen expert (Q: none of them)."""
    devices, tokens, per_token = owner_QSA.shape
    me = lax.axis_index(axes)
    owner_SA = lax.dynamic_index_in_dim(owner_QSA, me, keepdims=False)
    is_needed_SP = jnp.any(owner_SA[:, :, None] == jnp.arange(devices), axis=1)
    sizes_P = jnp.sum(is_needed_SP, axis=0, dtype=jnp.int32)
    starts_P = jnp.cumsum(sizes_P) - sizes_P
    place_SP = starts_P + jnp.cumsum(is_needed_SP, axis=0) - 1
    is_repeated_SA = jnp.any(jnp.tril(owner_SA[:, :, None] == owner_SA[:, None, :], k=-1), axis=2)
    is_sent_SA = (owner_SA < devices) & ~is_repeated_SA
    num_slots = tokens * min(per_token, devices)
    slot_SA = jnp.take_along_axis(place_SP, jnp.minimum(owner_SA, devices - 1), axis=1)
    beyond_SA = num_slots + jnp.arange(owner_SA.size).reshape(owner_SA.shape)  # each its own
    slot_SA = jnp.where(is_sent_SA, slot_SA, beyond_SA).astype(jnp.int32)
    token_SA = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32)[:, None], slot_SA.shape)
    token_N = jnp.full(num_slots, tokens, jnp.int32).at[slot_SA].set(token_SA, mode="drop", unique_indices=True)
    comes_QS = jnp.any(owner_QSA == me, axis=2)
    return Route(
        slot_SA,
        token_N,
        starts_P.astype(jnp.int32),
        sizes_P,
        lax.dynamic_index_in_dim(lax.all_gather(starts_P, axes), me, axis=1, keepdims=False).astype(jnp.int32),
        jnp.sum(comes_QS, axis=1, dtype=jnp.int32),
        jnp.argsort(~comes_QS, axis=1, stable=True).astype(jnp.int32),
    )


def is_received(route: Route) -> Bool[Array, "Q S"]:
    """Which rows of the receive buffer hold one."""
    return jnp.arange(route.order_QS.shape[1]) < route.sizes_Q[:, None]


def in_order(x_QSA: Array, route: Route) -> Array:
    """What is known of all tokens of all devices in the order of the receive buffer."""
    return jnp.take_along_axis(x_QSA, route.order_QS[:, :, None], axis=1)


def _padded(x_XD, out_YD, starts_P, sizes_P, there_P, sizes_Q, *, axes, piece: int):
    """`lax.ragged_all_to_all` by an all-to-all of pieces of `piece` rows, the most that one device sends to another."""
    row_M = jnp.arange(piece)
    x_PMD = take_or_zero(x_XD, jnp.where(row_M < sizes_P[:, None], starts_P[:, None] + row_M, x_XD.shape[0]))
    x_QMD, here_Q = (lax.all_to_all(x, axes, 0, 0, tiled=True) for x in (x_PMD, there_P))
    place_QM = jnp.where(row_M < sizes_Q[:, None], here_Q[:, None] + row_M, out_YD.shape[0])
    return out_YD.at[place_QM].set(x_QMD, mode="drop")


def _exchange(x_XD, num_rows: int, starts_P, sizes_P, there_P, sizes_Q, axes, piece: int) -> Float[Array, "Y D"]:
    """Rows `starts_P[p] + 0..sizes_P[p]` of x to device p, where they lie from `there_P[p]` on among `num_rows`; `sizes_Q[q]` come from q."""
    args = x_XD, jnp.zeros((num_rows, x_XD.shape[1]), x_XD.dtype), starts_P, sizes_P, there_P, sizes_Q
    ragged = partial(lax.ragged_all_to_all, axis_name=axes[0] if len(axes) == 1 else axes)
    return lax.platform_dependent(*args, cuda=ragged, default=partial(_padded, axes=axes, piece=piece))


def _to(x_SD, route: Route, axes):
    devices, tokens = route.order_QS.shape
    there_P = jnp.full(devices, lax.axis_index(axes) * tokens, jnp.int32)
    return _exchange(take_or_zero(x_SD, route.token_N), devices * tokens, route.starts_P, route.sizes_P, there_P, route.sizes_Q, axes, tokens)


def _from(y_RD, route: Route, axes):
    devices, tokens = route.order_QS.shape
    starts_Q = jnp.arange(devices, dtype=jnp.int32) * tokens
    back_ND = _exchange(y_RD, len(route.token_N), starts_Q, route.sizes_Q, route.starts_Q, route.sizes_P, axes, tokens)
    return jnp.sum(take_or_zero(back_ND, route.slot_SA), axis=1, dtype=wide(y_RD.dtype)).astype(y_RD.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def to_experts(x_SD: Float[Array, "S D"], route: Route, axes: tuple[str, ...]) -> Float[Array, "R D"]:
    """The receive buffer, R = P*S rows: from each device those of its tokens that are needed here."""
    return _to(x_SD, route, axes)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def from_experts(y_RD: Float[Array, "R D"], route: Route, axes: tuple[str, ...]) -> Float[Array, "S D"]:
    """Of each token here the sum over the devices that it was sent to of what they made of it."""
    return _from(y_RD, route, axes)


to_experts.defvjp(lambda x_SD, route, axes: (_to(x_SD, route, axes), route), lambda axes, route, g_RD: (_from(g_RD, route, axes), None))
from_experts.defvjp(lambda y_RD, route, axes: (_from(y_RD, route, axes), route), lambda axes, route, g_SD: (_to(g_SD, route, axes), None))
