"""Sorting routed rows by expert, and moving rows to that order and back without a scatter-add.

The router sends each of S tokens to A experts: R = S*A assignments. They are laid out expert by expert in a buffer of P = G*M slots, each
expert starting at a multiple of M, so that every block of M slots belongs to one expert. Nothing is dropped; at most M-1 slots per expert are
padding (zero rows, whose results nobody reads). Both moves are gathers, and so are their gradients, through the same two index arrays.

Legend: S tokens  A experts per token  R=S*A  E experts  G blocks  M rows of a block  P=G*M slots  D width
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptoss_jax.precision import wide


class RowGroups(NamedTuple):
    """Where every routed row lies.

    Invariants: `assignment_P[slot_SA[s, a]] == s*A + a`, except that rows of experts that are not here have slots >= P; slots that no assignment
    uses hold R; blocks `0..num_blocks-1` are in use and sorted by expert, the others hold expert E-1 and only padding.
    """

    slot_SA: Int[Array, "S A"]
    assignment_P: Int[Array, "P"]
    block_expert_G: Int[Array, "G"]
    num_blocks: Int[Array, ""]
    group_sizes_E: Int[Array, "E"]

    @property
    def block_rows(self) -> int:
        return self.assignment_P.shape[0] // self.block_expert_G.shape[0]

    @property
    def token_P(self) -> Int[Array, "P"]:
        """Token of each slot; S (out of range) on padding."""
        return self.assignment_P // self.slot_SA.shape[1]


def max_slots(num_rows: int, num_experts: int, block_rows: int) -> int:
    """Slots that hold any routing of so many rows: the sum of ceil(n_e / M) over the experts is at most floor(R/M) + E, and at most R since a used
    block holds a row."""
    return block_rows * max(1, min(num_rows // block_rows + num_experts, num_rows))


def group_rows(experts_SA: Int[Array, "S A"], num_experts: int, block_rows: int) -> RowGroups:
    """Lays the assignments out in blocks of `block_rows`, each block of one expert.

    Experts are 0..num_experts-1; the number `num_experts` stands for an expert of another device: such rows get no slot, are read as zeros and
    have no gradient.
    """
    num_tokens, per_token = experts_SA.shape
    num_rows = num_tokens * per_token
    num_slots = max_slots(num_rows, num_experts, block_rows)
    max_blocks = num_slots // block_rows

    experts_R = experts_SA.reshape(num_rows)
    order_R = jnp.argsort(experts_R, stable=True)
    sorted_R = experts_R[order_R]
    ends_E = jnp.searchsorted(sorted_R, jnp.arange(num_experts), side="right")
    sizes_E = jnp.diff(ends_E, prepend=0)
    blocks_E = -(-sizes_E // block_rows)
    block_ends_E = jnp.cumsum(blocks_E)
    rank_R = jnp.arange(num_rows) - (ends_E - sizes_E)[sorted_R]
    slot_sorted_R = (block_ends_E - blocks_E)[sorted_R] * block_rows + rank_R
    slot_sorted_R = jnp.where(sorted_R < num_experts, slot_sorted_R, num_slots + jnp.arange(num_rows))  # out of range, each its own

    slot_R = jnp.zeros(num_rows, jnp.int32).at[order_R].set(slot_sorted_R.astype(jnp.int32), unique_indices=True)
    assignment_P = jnp.full(num_slots, num_rows, jnp.int32).at[slot_R].set(jnp.arange(num_rows, dtype=jnp.int32), unique_indices=True)
    block_expert_G = jnp.searchsorted(block_ends_E, jnp.arange(max_blocks), side="right").clip(max=num_experts - 1)
    return RowGroups(
        slot_SA=slot_R.reshape(num_tokens, per_token),
        assignment_P=assignment_P,
        block_expert_G=block_expert_G.astype(jnp.int32),
        num_blocks=block_ends_E[-1].astype(jnp.int32),
        group_sizes_E=sizes_E.astype(jnp.int32),
    )


def take_or_zero(x_XD: Array, index: Array) -> Array:
    """Rows of x; zeros where the index is past the end."""
    return jnp.take(x_XD, index, axis=0, mode="fill", fill_value=0)


def sum_slots(y_PD: Float[Array, "P D"], groups: RowGroups) -> Float[Array, "S D"]:
    """Sum of each token's A rows, accumulated in float32."""
    return jnp.sum(take_or_zero(y_PD, groups.slot_SA), axis=1, dtype=wide(y_PD.dtype)).astype(y_PD.dtype)


def weighted_sum(y_PD: Float[Array, "P D"], weights_SA: Float[Array, "S A"], groups: RowGroups) -> Float[Array, "S D"]:
    """`out[s] = sum_a weights[s, a] * y[slot[s, a]]`, accumulated in float32."""
    y_SAD = take_or_zero(y_PD, groups.slot_SA).astype(wide(y_PD.dtype))
    return jnp.einsum("sad,sa->sd", y_SAD, weights_SA.astype(y_SAD.dtype)).astype(y_PD.dtype)


def weighted_sum_gradients(y_PD, weights_SA, groups: RowGroups, g_SD) -> tuple[Float[Array, "P 1"], Float[Array, "S A"]]:
    """For the gradient g of `weighted_sum`: the weight of each slot, 0 on padding (dy is that times g of the slot's token), and dweights."""
    dtype = wide(y_PD.dtype)
    weights_P = take_or_zero(weights_SA.astype(dtype).reshape(-1, 1), groups.assignment_P)
    dweights_SA = jnp.einsum("sad,sd->sa", take_or_zero(y_PD, groups.slot_SA).astype(dtype), g_SD.astype(dtype))
    return weights_P, dweights_SA.astype(weights_SA.dtype)


@jax.custom_vjp
def dispatch(x_SD: Float[Array, "S D"], groups: RowGroups) -> Float[Array, "P D"]:
    """Copies each token's row to its A slots; padding slots are zero. Gradient: the sum over the token's slots, a gather."""
    return take_or_zero(x_SD, groups.token_P)


def _dispatch_forward(x_SD, groups):
    return dispatch(x_SD, groups), groups


def _dispatch_backward(groups, g_PD):
    return sum_slots(g_PD, groups), None


dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def combine(y_PD: Float[Array, "P D"], weights_SA: Float[Array, "S A"], groups: RowGroups) -> Float[Array, "S D"]:
    """`weighted_sum`, with gathers as its gradient."""
    return weighted_sum(y_PD, weights_SA, groups)


def _combine_forward(y_PD, weights_SA, groups):
    return combine(y_PD, weights_SA, groups), (y_PD, weights_SA, groups)


def _combine_backward(residual, g_SD):
    y_PD, weights_SA, groups = residual
    weights_P, dweights_SA = weighted_sum_gradients(y_PD, weights_SA, groups, g_SD)
    dy_PD = (weights_P * take_or_zero(g_SD.astype(weights_P.dtype), groups.token_P)).astype(y_PD.dtype)
    return dy_PD, dweights_SA, None


combine.defvjp(_combine_forward, _combine_backward)
