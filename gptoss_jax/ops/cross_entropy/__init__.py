"""Cross-entropy of the unembedding, in blocks of tokens: the logits of the whole batch (201,088 wide for gpt-oss) never exist at once.

    loss = sum_s weight_s * (logsumexp(z_s) - z_s[target_s]),  z = hidden @ w.T
    dz_s = weight_s * (softmax(z_s) - onehot(target_s)),  dhidden = dz @ w,  dw = dz.T @ hidden

When the loss is differentiated, the gradients are made in the same pass over the blocks as the loss, while a block's logits are at hand; the backward
pass only scales them. That is three products of vocabulary size where recomputing the logits in the backward pass takes four, and what is kept
from forward to backward are the gradients themselves.

Legend: B batch  T tokens of a row  S tokens  D hidden  V vocabulary
"""

from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from gptoss_jax.precision import wide
from gptoss_jax.quant import Gather

# float32 logits of one block of tokens stay below this many elements (64 Mi = 256 MiB; 333 tokens of gpt-oss)
MAX_BLOCK_LOGITS = 1 << 26


def _logits(hidden_SD, w_VD, dtype):
    """In the dtype of sums."""
    return jnp.einsum("sd,vd->sv", hidden_SD.astype(dtype), w_VD.astype(dtype), preferred_element_type=wide(dtype))


def _picked(logits_SV, targets_S):
    return jnp.take_along_axis(logits_SV, targets_S[:, None], axis=1, mode="fill", fill_value=0)[:, 0]


def _targets_here(targets, rows: int, vocab: tuple[str, ...]):
    """Targets as rows of this device's part of the unembedding; `rows`, which is past its end, for those of other devices."""
    if not vocab:
        return targets
    here = targets - lax.axis_index(vocab) * rows
    return jnp.where((here >= 0) & (here < rows), here, rows)


def _exp(logits_SV, vocab: tuple[str, ...]):
    """(exp(z - top), its sum, top): maximum and sum are over the whole vocabulary."""
    top_S = jnp.max(logits_SV, axis=1)
    if vocab:
        top_S = lax.pmax(top_S, vocab)
    exp_SV = jnp.exp(logits_SV - top_S[:, None])
    sum_S = jnp.sum(exp_SV, axis=1)
    return exp_SV, lax.psum(sum_S, vocab) if vocab else sum_S, top_S


def _share(weights_S, top_S, sum_S, picked_S, vocab: tuple[str, ...]):
    """This device's share of the loss of a block: the first adds the logsumexp, and each the targets whose logits it has."""
    lse_S = top_S + jnp.log(sum_S)
    if vocab:
        lse_S = jnp.where(lax.axis_index(vocab) == 0, lse_S, 0)
    return jnp.sum(weights_S * (lse_S - picked_S))


def _blocks(num_tokens: int, vocab: int, *arrays: Array) -> tuple[Array, ...]:
    """[B, T, ...] arrays as [blocks, tokens of a block, ...]; the last block is padded with zeros."""
    block = max(1, min(num_tokens, MAX_BLOCK_LOGITS // vocab))
    num_blocks = -(-num_tokens // block)

    def split(x):
        x = x.reshape(num_tokens, *x.shape[2:])
        return jnp.pad(x, [(0, num_blocks * block - num_tokens)] + [(0, 0)] * (x.ndim - 1)).reshape(num_blocks, block, *x.shape[1:])

    return tuple(map(split, arrays))


def _whole(w_VD, dtype, gathers):
    return reduce(lambda x, gather: gather.whole(x), gathers, w_VD.astype(dtype))


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def cross_entropy_sum(
    hidden_BTD: Float[Array, "B T D"],
    w_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    dtype=jnp.bfloat16,
    gathers: tuple[Gather, ...] = (),
    vocab: tuple[str, ...] = (),
) -> Float[Array, ""]:
    """Sum over tokens of `weight * -log softmax(hidden @ w.T)[target]`, float32. Differentiable in hidden and w.

    Inside a `jax.shard_map` w may be a shard: `gathers`, in turn, make its cast whole, and its gradient comes back as the shard of the float32 sum
    over those devices. Over the mesh axes `vocab` it stays cut by rows, and every device makes the logits of its rows for the same tokens: results
    and the gradients of hidden then are shares, to be summed over these axes.

    Products run in `dtype` with float32 accumulation; the gradient of w is summed over blocks in float32 and returned in w's own dtype, so pass
    the master weights.
    """

    w_cast_VD = _whole(w_VD, dtype, gathers)
    targets_BT = _targets_here(targets_BT, w_cast_VD.shape[0], vocab)

    def block_sum(hidden_SD, targets_S, weights_S):
        logits_SV = _logits(hidden_SD, w_cast_VD, dtype)
        _, sum_S, top_S = _exp(logits_SV, vocab)
        return _share(weights_S, top_S, sum_S, _picked(logits_SV, targets_S), vocab)

    return jnp.sum(lax.map(lambda xs: block_sum(*xs), _blocks(targets_BT.size, w_cast_VD.shape[0], hidden_BTD, targets_BT, weights_BT)))


def _forward(hidden_BTD, w_VD, targets_BT, weights_BT, dtype, gathers, vocab):
    w_cast_VD = _whole(w_VD, dtype, gathers)
    num_tokens, num_rows = targets_BT.size, w_cast_VD.shape[0]
    targets_BT = _targets_here(targets_BT, num_rows, vocab)

    def body(carry, block):
        total, dw_VD = carry
        hidden_SD, targets_S, weights_S = block
        logits_SV = _logits(hidden_SD, w_cast_VD, dtype)
        exp_SV, sum_S, top_S = _exp(logits_SV, vocab)
        total += _share(weights_S, top_S, sum_S, _picked(logits_SV, targets_S), vocab)
        is_target_SV = jnp.arange(num_rows) == targets_S[:, None]
        dz_SV = (exp_SV * (weights_S / sum_S)[:, None] - jnp.where(is_target_SV, weights_S[:, None], 0)).astype(dtype)
        dhidden_SD = jnp.einsum("sv,vd->sd", dz_SV, w_cast_VD, preferred_element_type=wide(dtype))
        dw_VD += jnp.einsum("sv,sd->vd", dz_SV, hidden_SD.astype(dtype), preferred_element_type=wide(dtype))
        return (total, dw_VD), dhidden_SD.astype(hidden_BTD.dtype)

    start = jnp.zeros((), wide(dtype)), jnp.zeros(w_cast_VD.shape, wide(dtype))
    (total, dw_VD), dhidden = lax.scan(body, start, _blocks(num_tokens, num_rows, hidden_BTD, targets_BT, weights_BT))
    dhidden_BTD = dhidden.reshape(-1, hidden_BTD.shape[-1])[:num_tokens].reshape(hidden_BTD.shape)
    for gather in reversed(gathers):
        dw_VD = gather.scatter_sum(dw_VD)
    return total, (dhidden_BTD, dw_VD.astype(w_VD.dtype))


def _backward(dtype, gathers, vocab, gradients, scale):
    dhidden_BTD, dw_VD = gradients
    return (dhidden_BTD * scale).astype(dhidden_BTD.dtype), (dw_VD * scale).astype(dw_VD.dtype), None, None


cross_entropy_sum.defvjp(_forward, _backward)


def token_losses(
    hidden_BTD: Float[Array, "B T D"], w_VD: Float[Array, "V D"], targets_BT: Int[Array, "B T"], dtype=jnp.bfloat16
) -> tuple[Float[Array, "B T"], Int[Array, "B T"]]:
    """Per token: cross-entropy of its target in nats (float32), and the most probable next token. For evaluation; same arithmetic as above."""

    def block(hidden_SD, targets_S):
        logits_SV = _logits(hidden_SD, w_VD, dtype)
        losses_S = jax.nn.logsumexp(logits_SV, axis=1) - _picked(logits_SV, targets_S)
        return losses_S, jnp.argmax(logits_SV, axis=1).astype(jnp.int32)

    num_tokens = targets_BT.size
    results = lax.map(lambda xs: block(*xs), _blocks(num_tokens, w_VD.shape[0], hidden_BTD, targets_BT))
    return tuple(x.reshape(-1)[:num_tokens].reshape(targets_BT.shape) for x in results)
