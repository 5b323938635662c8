"""Cross-entropy of the unembedding, in blocks of tokens: the logits of the whole batch (201,088 wide for gpt-oss) never exist at once.

    loss = sum_s weight_s * (logsumexp(z_s) - z_s[target_s]),  z = hidden @ w.T
    dz_s = weight_s * (softmax(z_s) - onehot(target_s)),  dhidden = dz @ w,  dw = dz.T @ hidden

When the loss is differentiated, the gradients are made in the same pass over the blocks as the loss, while a block's logits are at hand; the backward
pass only scales them. That is three products of vocabulary size where recomputing the logits in the backward pass takes four, and what is kept
from forward to backward are the gradients themselves.

Legend: B batch  T tokens of a row  S tokens  D hidden  V vocabulary
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from gptoss_jax.precision import wide
from gptoss_jax.quant import Gather

# float32 logits of one block of tokens stay below this many elements (64 Mi = 256 MiB; 333 tokens of gpt-oss)
MAX_BLOCK_LOGITS = 1 << 26


def _logits(hidden_SD, w_VD, dtype):
    return jnp.einsum("sd,vd->sv", hidden_SD.astype(dtype), w_VD.astype(dtype), preferred_element_type=wide(dtype))


def _picked(logits_SV, targets_S):
    return jnp.take_along_axis(logits_SV, targets_S[:, None], axis=1)[:, 0]


def _blocks(num_tokens: int, vocab: int, *arrays: Array) -> tuple[Array, ...]:
    """[B, T, ...] arrays as [blocks, tokens of a block, ...]; the last block is padded with zeros."""
    block = max(1, min(num_tokens, MAX_BLOCK_LOGITS // vocab))
    num_blocks = -(-num_tokens // block)

    def split(x):
        x = x.reshape(num_tokens, *x.shape[2:])
        return jnp.pad(x, [(0, num_blocks * block - num_tokens)] + [(0, 0)] * (x.ndim - 1)).reshape(num_blocks, block, *x.shape[1:])

    return tuple(map(split, arrays))


def _whole(w_VD, dtype, gathers):
    w_VD = w_VD.astype(dtype)
    for gather in gathers:
        w_VD = gather.whole(w_VD)
    return w_VD


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy_sum(
    hidden_BTD: Float[Array, "B T D"],
    w_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    dtype=jnp.bfloat16,
    gathers: tuple[Gather, ...] = (),
) -> Float[Array, ""]:
    """Sum over tokens of `weight * -log softmax(hidden @ w.T)[target]`, float32. Differentiable in hidden and w.

    Products run in `dtype` with float32 accumulation; the gradient of w is summed over blocks in float32 and returned in w's own dtype, so pass
    the master weights. Inside a `jax.shard_map` with `gathers`, w is a shard, which they make whole in `dtype`, and so is its gradient, summed over
    the devices in float32; the result is the sum over this device's tokens.
    """
    w_VD = _whole(w_VD, dtype, gathers)

    def block_sum(hidden_SD, targets_S, weights_S):
        logits_SV = _logits(hidden_SD, w_VD, dtype)
        return jnp.sum(weights_S * (jax.nn.logsumexp(logits_SV, axis=1) - _picked(logits_SV, targets_S)))

    return jnp.sum(lax.map(lambda xs: block_sum(*xs), _blocks(targets_BT.size, w_VD.shape[0], hidden_BTD, targets_BT, weights_BT)))


def _forward(hidden_BTD, w_VD, targets_BT, weights_BT, dtype, gathers):
    w_cast_VD = _whole(w_VD, dtype, gathers)
    num_tokens, vocab = targets_BT.size, w_cast_VD.shape[0]

    def body(carry, block):
        total, dw_VD = carry
        hidden_SD, targets_S, weights_S = block
        logits_SV = _logits(hidden_SD, w_cast_VD, dtype)
        top_S = jnp.max(logits_SV, axis=1)
        exp_SV = jnp.exp(logits_SV - top_S[:, None])
        sum_S = jnp.sum(exp_SV, axis=1)
        total += jnp.sum(weights_S * (top_S + jnp.log(sum_S) - _picked(logits_SV, targets_S)))
        is_target_SV = jnp.arange(vocab) == targets_S[:, None]
        dz_SV = (exp_SV * (weights_S / sum_S)[:, None] - jnp.where(is_target_SV, weights_S[:, None], 0)).astype(dtype)
        dhidden_SD = jnp.einsum("sv,vd->sd", dz_SV, w_cast_VD, preferred_element_type=wide(dtype))
        dw_VD += jnp.einsum("sv,sd->vd", dz_SV, hidden_SD.astype(dtype), preferred_element_type=wide(dtype))
        return (total, dw_VD), dhidden_SD.astype(hidden_BTD.dtype)

    start = jnp.zeros((), wide(dtype)), jnp.zeros(w_cast_VD.shape, wide(dtype))
    (total, dw_VD), dhidden = lax.scan(body, start, _blocks(num_tokens, vocab, hidden_BTD, targets_BT, weights_BT))
    dhidden_BTD = dhidden.reshape(-1, hidden_BTD.shape[-1])[:num_tokens].reshape(hidden_BTD.shape)
    for gather in reversed(gathers):
        dw_VD = gather.scatter_sum(dw_VD)
    return total, (dhidden_BTD, dw_VD.astype(w_VD.dtype))


def _backward(dtype, gathers, gradients, scale):
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
