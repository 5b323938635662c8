"""One matrix per expert applied to the rows routed to it."""

from jaxtyping import Array, Float

from gptoss_jax.ops.grouped_matmul.groups import RowGroups, combine, dispatch, group_rows
from gptoss_jax.ops.grouped_matmul.xla import grouped_matmul_xla

# Rows of a block. Smaller pads less, larger feeds the matrix unit better.
DEFAULT_BLOCK_ROWS = 128


def grouped_matmul(
    x_PK: Float[Array, "P K"], w_ENK: Float[Array, "E N K"], bias_EN: Float[Array, "E N"], groups: RowGroups
) -> Float[Array, "P N"]:
    """`y[p] = w[e(p)] @ x[p] + bias[e(p)]` for the slots in use, with the gradients of x, w and bias.

    Slots of unused blocks come out as zeros; padding slots of used blocks hold the bias and must not be read (`combine` does not).
    Gradients of padding slots must be zero on entry (`combine` gives them so).
    """
    return grouped_matmul_xla(x_PK, w_ENK, bias_EN, groups)


__all__ = ["DEFAULT_BLOCK_ROWS", "RowGroups", "combine", "dispatch", "group_rows", "grouped_matmul"]
