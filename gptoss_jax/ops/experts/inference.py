"""The experts without gradients, for generation: few rows, and weights that are read where they lie.

A token reads 4 of 32 (or 128) expert matrices; everything else about its expert layer is small. So the matrices of all layers stay in one array
[X, U, D], X = layers * experts, from which the chosen ones are taken by index. A scan over layers would copy all experts of a layer first: 100 MB
per layer of the 112 M model of `scripts/bench`, where a token needs 13.

    one token         the matrices of its A experts are gathered, one product for all of them
    few rows          sorted by expert, blocks of 8 rows, one expert at a time: a matrix is read once, whoever shares it
    many (prefill)    the same in the pieces of training (`grouped_matmul.xla.over_pieces`)

Weights come as arrays of the compute dtype, as bfloat16 bits (uint16: XLA:CPU widens a whole bfloat16 array to slice it) or as packed MXFP4 codes.
Codes are decoded behind the read, on NVIDIA GPUs inside the kernel (`grouped_matmul.mxfp4_triton`): 4.25 bits of memory traffic per weight.

Legend: S tokens  A experts per token  X all expert matrices  E experts of the layer  D hidden  F expert hidden  U=2F  P slots  M rows of a block
"""

import importlib
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from gptoss_jax.formats import mxfp4
from gptoss_jax.ops.backend import resolve_backend
from gptoss_jax.ops.grouped_matmul import RowGroups, block_rows, dispatch, group_rows
from gptoss_jax.ops.grouped_matmul.groups import take_or_zero, weighted_sum
from gptoss_jax.ops.grouped_matmul.xla import bits, dot, over_pieces, values
from gptoss_jax.ops.swiglu import clamped_swiglu

FEW_ROWS = 256
FEW_BLOCK_ROWS = {"xla": 8, "triton": 16}
NT = ((1,), (1,))


def expert_mlp_inference(
    x_SD: Float[Array, "S D"],
    experts_SA: Int[Array, "S A"],
    weights_SA: Float[Array, "S A"],
    w_gate_up_XUD,
    bias_up_XU: Float[Array, "X U"],
    w_down_XDF,
    bias_down_XD: Float[Array, "X D"],
    *,
    first: Int[Array, ""] | int,
    num_experts: int,
    limit: float,
    backend: str | None = None,
    activations: Callable[[Array], Array] | None = None,
    elsewhere: bool = False,
) -> Float[Array, "S D"]:
    """`expert_mlp` with expert e of the layer at index `first + e` of the weights; not differentiable. With `elsewhere` the number `num_experts`
    stands for an expert of another device, which is not computed and adds zeros."""
    backend = resolve_backend(backend)
    weights = w_gate_up_XUD, bias_up_XU, w_down_XDF, bias_down_XD
    rounded = activations or (lambda x: x)
    x_SD = rounded(x_SD)
    act = lambda h: rounded(clamped_swiglu(h, limit))
    if backend == "xla" and x_SD.shape[0] == 1 and not elsewhere:
        return _one_token(x_SD, first + experts_SA[0], weights_SA, weights, act)
    few = experts_SA.size <= FEW_ROWS
    groups = group_few_rows(experts_SA, num_experts, FEW_BLOCK_ROWS[backend]) if few else group_rows(experts_SA, num_experts, block_rows(backend))
    if backend == "xla":
        return _piecewise(x_SD, weights_SA, weights, groups, first, act, _over_blocks if few else over_pieces)
    kernel = importlib.import_module(f"gptoss_jax.ops.grouped_matmul.{'mxfp4_triton' if _is_packed(w_gate_up_XUD) else 'triton'}")
    return composed(x_SD, weights_SA, weights, groups, first, act, kernel.forward)


def group_few_rows(experts_SA: Int[Array, "S A"], num_experts: int, rows: int) -> RowGroups:
    """`group_rows` by comparing every row with every row, every slot with every row: a few small passes.

    Sorting, searching and scattering are loops on XLA:CPU, with one turn per row or more: they took longer than the products of 32 rows.
    """
    num_rows = experts_SA.size
    max_blocks = max(1, min(num_rows // rows + num_experts, num_rows))
    experts_R, index_R = experts_SA.reshape(-1), jnp.arange(num_rows, dtype=jnp.int32)
    is_mine_ER = jnp.arange(num_experts)[:, None] == experts_R
    sizes_E = jnp.sum(is_mine_ER, axis=1, dtype=jnp.int32)
    rank_R = jnp.sum((experts_R[:, None] == experts_R) & (index_R < index_R[:, None]), axis=1, dtype=jnp.int32)
    blocks_E = -(-sizes_E // rows)
    before_EE = jnp.tri(num_experts, k=-1, dtype=bool)
    first_E = jnp.sum(jnp.where(before_EE, blocks_E, 0), axis=1, dtype=jnp.int32)
    slot_R = jnp.sum(jnp.where(is_mine_ER, first_E[:, None], 0), axis=0, dtype=jnp.int32) * rows + rank_R
    slot_R = jnp.where(experts_R < num_experts, slot_R, max_blocks * rows + index_R)  # out of range, each its own
    is_there_PR = jnp.arange(max_blocks * rows)[:, None] == slot_R
    assignment_P = num_rows + jnp.sum(jnp.where(is_there_PR, index_R - num_rows, 0), axis=1, dtype=jnp.int32)
    block_expert_G = jnp.sum((first_E + blocks_E) <= jnp.arange(max_blocks)[:, None], axis=1, dtype=jnp.int32).clip(max=num_experts - 1)
    return RowGroups(slot_R.reshape(experts_SA.shape), assignment_P, block_expert_G, jnp.sum(blocks_E), sizes_E)


def _is_packed(w) -> bool:
    return isinstance(w, mxfp4.Codes)


def _take(w, index, dtype):
    """`w[index]` as values; one matrix, or several for an array of indices."""
    if _is_packed(w):
        return mxfp4.decode(mxfp4.Codes(*(part[index] for part in w)), dtype)
    return values(w[index])


def _one_token(x_1D, experts_A, weights_1A, weights, act):
    w_up, bias_up, w_down, bias_down = weights
    dtype = x_1D.dtype
    up_AUD = _take(w_up, experts_A, dtype)
    h_AU = dot(x_1D, up_AUD.reshape(-1, up_AUD.shape[-1]), NT).reshape(up_AUD.shape[:2])
    act_AF = act((h_AU + bias_up[experts_A].astype(jnp.float32)).astype(dtype))
    down_ADF = _take(w_down, experts_A, dtype)
    y_AD = lax.dot_general(down_ADF, act_AF, (((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32)
    y_AD = (y_AD + bias_down[experts_A].astype(jnp.float32)).astype(dtype)
    return jnp.einsum("ad,sa->sd", y_AD.astype(jnp.float32), weights_1A.astype(jnp.float32)).astype(dtype)


def _over_blocks(groups: RowGroups, body, carry):
    """As `over_pieces`, a block at a time: nothing to compute about pieces."""

    def turn(g, carry):
        start = g * groups.block_rows
        take = lambda x: values(lax.dynamic_slice_in_dim(x, start, groups.block_rows))
        put = lambda x, rows: lax.dynamic_update_slice_in_dim(x, bits(rows.astype(values(x).dtype)), start, 0)
        return body(carry, groups.block_expert_G[g], take, put)

    return lax.fori_loop(0, groups.num_blocks, turn, carry)


def _piecewise(x_SD, weights_SA, weights, groups: RowGroups, first, act, loop: Callable):
    w_up, bias_up, w_down, bias_down = weights
    dtype, x_bits_SD = x_SD.dtype, bits(x_SD)

    def body(y_PD, e, take, put):
        e = first + e
        x_MD = values(take_or_zero(x_bits_SD, take(groups.token_P)))
        h_MU = (dot(x_MD, _take(w_up, e, dtype), NT) + bias_up[e].astype(jnp.float32)).astype(dtype)
        return put(y_PD, dot(act(h_MU), _take(w_down, e, dtype), NT) + bias_down[e].astype(jnp.float32))

    y_PD = loop(groups, body, bits(jnp.zeros((groups.token_P.shape[0], x_SD.shape[1]), dtype)))
    return weighted_sum(values(y_PD), weights_SA, groups)


def composed(x_SD, weights_SA, weights, groups: RowGroups, first, act, grouped_matmul: Callable):
    """The chain over all rows, with the forward product of a kernel module; its blocks are told where their matrices lie."""
    w_up, bias_up, w_down, bias_down = weights
    groups = groups._replace(block_expert_G=first + groups.block_expert_G)
    h_PU = grouped_matmul(dispatch(x_SD, groups), w_up, bias_up, groups)
    y_PD = grouped_matmul(act(h_PU), w_down, bias_down, groups)
    return weighted_sum(y_PD, weights_SA, groups)
