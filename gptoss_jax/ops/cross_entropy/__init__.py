"""Cross-entropy of the unembedding, in blocks of tokens (see `blocks`).

    loss = sum_s weight_s * (logsumexp(z_s) - z_s[target_s]),  z = hidden @ w.T
    dz_s = weight_s * (softmax(z_s) - onehot(target_s)),  dhidden = dz @ w,  dw = dz.T @ hidden

Legend: B batch  T tokens of a row  S tokens  D hidden  V vocabulary
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from gptoss_jax.ops.cross_entropy import blocks
from gptoss_jax.quant import Gather


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
    over those devices. Over the mesh axes `vocab` it stays cut by rows, and results and the gradients of hidden are shares.

    Products run in `dtype` with float32 accumulation; the gradient of w is summed over blocks in float32 and returned in w's own dtype, so pass
    the master weights.
    """
    w_cast_VD = blocks.whole(w_VD, dtype, gathers)
    targets_BT = blocks.targets_here(targets_BT, w_cast_VD.shape[0], vocab)

    def block_sum(hidden_SD, targets_S, weights_S):
        logits_SV = blocks.logits(hidden_SD, w_cast_VD, dtype)
        _, sum_S, top_S = blocks.exponentials(logits_SV, vocab)
        return blocks.nll_share(weights_S, top_S, sum_S, blocks.picked(logits_SV, targets_S), vocab)

    parts = blocks.split(targets_BT.size, w_cast_VD.shape[0], hidden_BTD, targets_BT, weights_BT)
    return jnp.sum(lax.map(lambda xs: block_sum(*xs), parts))


def _forward(hidden_BTD, w_VD, targets_BT, weights_BT, dtype, gathers, vocab):
    def block_loss(logits_SV, targets_S, weights_S):
        targets_S = blocks.targets_here(targets_S, logits_SV.shape[1], vocab)
        exp_SV, sum_S, top_S = blocks.exponentials(logits_SV, vocab)
        loss = blocks.nll_share(weights_S, top_S, sum_S, blocks.picked(logits_SV, targets_S), vocab)
        is_target_SV = jnp.arange(logits_SV.shape[1]) == targets_S[:, None]
        return (loss,), exp_SV * (weights_S / sum_S)[:, None] - jnp.where(is_target_SV, weights_S[:, None], 0)

    (loss,), gradients = blocks.sums_and_gradients(hidden_BTD, w_VD, (targets_BT, weights_BT), block_loss, 1, dtype, gathers)
    return loss, gradients


def _backward(dtype, gathers, vocab, gradients, scale):
    return *blocks.scaled(gradients, scale), None, None


cross_entropy_sum.defvjp(_forward, _backward)


def token_losses(
    hidden_BTD: Float[Array, "B T D"], w_VD: Float[Array, "V D"], targets_BT: Int[Array, "B T"], dtype=jnp.bfloat16
) -> tuple[Float[Array, "B T"], Int[Array, "B T"]]:
    """Per token: cross-entropy of its target in nats (float32), and the most probable next token. For evaluation; same arithmetic as above."""

    def block(hidden_SD, targets_S):
        logits_SV = blocks.logits(hidden_SD, w_VD, dtype)
        losses_S = jax.nn.logsumexp(logits_SV, axis=1) - blocks.picked(logits_SV, targets_S)
        return losses_S, jnp.argmax(logits_SV, axis=1).astype(jnp.int32)

    num_tokens = targets_BT.size
    results = lax.map(lambda xs: block(*xs), blocks.split(num_tokens, w_VD.shape[0], hidden_BTD, targets_BT))
    return tuple(x.reshape(-1)[:num_tokens].reshape(targets_BT.shape) for x in results)
