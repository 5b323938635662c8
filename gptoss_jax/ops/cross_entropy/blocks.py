"""What losses at the unembedding share: blocks of tokens, so that the logits of the whole batch (201,088 wide for gpt-oss) never exist at once, and
gradients made in the same pass as the loss, while a block's logits are at hand.

The backward pass then only scales them. That is three products of vocabulary size where recomputing the logits in the backward pass takes four, and
what is kept from forward to backward are the gradients themselves.

Inside a `jax.shard_map` the unembedding may be cut by rows over mesh axes `vocab`: every device makes the logits of its rows for the same tokens.
Results and the gradients of hidden then are shares, to be summed over these axes.

Legend: B batch  T tokens of a row  S tokens of a block  D hidden  V vocabulary (here: rows of this device)
"""

from collections.abc import Callable
from functools import reduce

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from gptoss_jax.precision import wide
from gptoss_jax.quant import Gather

# float32 logits of one block of tokens stay below this many elements (64 Mi = 256 MiB; 333 tokens of gpt-oss)
MAX_BLOCK_LOGITS = 1 << 26


def logits(hidden_SD, w_VD, dtype) -> Float[Array, "S V"]:
    """In the dtype of sums."""
    return jnp.einsum("sd,vd->sv", hidden_SD.astype(dtype), w_VD.astype(dtype), preferred_element_type=wide(dtype))


def picked(x_SV, targets_S) -> Float[Array, "S"]:
    """The values of the targets; 0 for targets of other devices."""
    return jnp.take_along_axis(x_SV, targets_S[:, None], axis=1, mode="fill", fill_value=0)[:, 0]


def targets_here(targets, rows: int, vocab: tuple[str, ...]) -> Int[Array, "..."]:
    """Targets as rows of this device's part of the unembedding; `rows`, which is past its end, for those of other devices."""
    if not vocab:
        return targets
    here = targets - lax.axis_index(vocab) * rows
    return jnp.where((here >= 0) & (here < rows), here, rows)


def exponentials(logits_SV, vocab: tuple[str, ...]) -> tuple[Float[Array, "S V"], Float[Array, "S"], Float[Array, "S"]]:
    """(exp(z - top), its sum, top): maximum and sum are over the whole vocabulary."""
    top_S = jnp.max(logits_SV, axis=1)
    if vocab:
        top_S = lax.pmax(top_S, vocab)
    exp_SV = jnp.exp(logits_SV - top_S[:, None])
    sum_S = jnp.sum(exp_SV, axis=1)
    return exp_SV, lax.psum(sum_S, vocab) if vocab else sum_S, top_S


def nll_share(weights_S, top_S, sum_S, picked_S, vocab: tuple[str, ...]) -> Float[Array, ""]:
    """This device's share of the cross-entropy of a block: the first adds the logsumexp, and each the targets whose logits it has."""
    lse_S = top_S + jnp.log(sum_S)
    if vocab:
        lse_S = jnp.where(lax.axis_index(vocab) == 0, lse_S, 0)
    return jnp.sum(weights_S * (lse_S - picked_S))


def split(num_tokens: int, vocab: int, *arrays: Array) -> tuple[Array, ...]:
    """[B, T, ...] arrays as [blocks, tokens of a block, ...]; the last block is padded with zeros."""
    block = max(1, min(num_tokens, MAX_BLOCK_LOGITS // vocab))
    num_blocks = -(-num_tokens // block)

    def of_blocks(x):
        x = x.reshape(num_tokens, *x.shape[2:])
        return jnp.pad(x, [(0, num_blocks * block - num_tokens)] + [(0, 0)] * (x.ndim - 1)).reshape(num_blocks, block, *x.shape[1:])

    return tuple(map(of_blocks, arrays))


def whole(w_VD, dtype, gathers: tuple[Gather, ...]) -> Float[Array, "V D"]:
    """The unembedding in the compute dtype, put together over `gathers`, in turn."""
    return reduce(lambda x, gather: gather.whole(x), gathers, w_VD.astype(dtype))


def sums_and_gradients(
    hidden_BTD: Float[Array, "B T D"],
    w_VD: Float[Array, "V D"],
    arrays: tuple[Array, ...],
    block_loss: Callable,
    num_sums: int,
    dtype,
    gathers: tuple[Gather, ...],
) -> tuple[Float[Array, "sums"], tuple[Float[Array, "B T D"], Float[Array, "V D"]]]:
    """Sums over tokens, and the gradients in hidden and w of the loss that `block_loss(z_SV, *arrays of the block) -> (sums, dloss/dz_SV)` defines.

    Products run in `dtype` with float32 accumulation; the gradient of w is summed over blocks in float32 and over the devices of `gathers`, and
    returned in w's own dtype.
    """
    w_cast_VD = whole(w_VD, dtype, gathers)
    num_tokens, num_rows = hidden_BTD.shape[0] * hidden_BTD.shape[1], w_cast_VD.shape[0]

    def body(carry, block):
        sums, dw_VD = carry
        hidden_SD, *rest = block
        new, dz_SV = block_loss(logits(hidden_SD, w_cast_VD, dtype), *rest)
        dz_SV = dz_SV.astype(dtype)
        dhidden_SD = jnp.einsum("sv,vd->sd", dz_SV, w_cast_VD, preferred_element_type=wide(dtype))
        dw_VD += jnp.einsum("sv,sd->vd", dz_SV, hidden_SD.astype(dtype), preferred_element_type=wide(dtype))
        return (sums + jnp.stack(new), dw_VD), dhidden_SD.astype(hidden_BTD.dtype)

    start = jnp.zeros(num_sums, wide(dtype)), jnp.zeros(w_cast_VD.shape, wide(dtype))
    (sums, dw_VD), dhidden = lax.scan(body, start, split(num_tokens, num_rows, hidden_BTD, *arrays))
    dhidden_BTD = dhidden.reshape(-1, hidden_BTD.shape[-1])[:num_tokens].reshape(hidden_BTD.shape)
    for gather in reversed(gathers):
        dw_VD = gather.scatter_sum(dw_VD)
    return sums, (dhidden_BTD, dw_VD.astype(w_VD.dtype))


def scaled(gradients: tuple[Array, Array], scale: Float[Array, ""]) -> tuple[Array, Array]:
    """The backward pass: gradients times that of the loss, each in its own dtype."""
    return tuple((gradient * scale).astype(gradient.dtype) for gradient in gradients)
