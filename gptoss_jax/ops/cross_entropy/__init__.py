"""Cross-entropy of the unembedding, in blocks of tokens: the logits of the whole batch (201,088 wide for gpt-oss) never exist at once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

# float32 logits of one block of tokens stay below this many elements (64 Mi = 256 MiB; 333 tokens of gpt-oss)
MAX_BLOCK_LOGITS = 1 << 26


def _losses(hidden_SD, w_VD, targets_S, dtype):
    """(cross-entropy of the target, most probable token) of each token of one block; logits float32."""
    logits_SV = jnp.einsum("sd,vd->sv", hidden_SD.astype(dtype), w_VD.astype(dtype), preferred_element_type=jnp.float32)
    picked_S = jnp.take_along_axis(logits_SV, targets_S[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits_SV, axis=1) - picked_S, jnp.argmax(logits_SV, axis=1).astype(jnp.int32)


def _map_blocks(function: Callable, vocab: int, *arrays: Array):
    """`function` over blocks of tokens of [B, T, ...] arrays; results [blocks, ...]. The last block is padded with zeros."""
    num_tokens = arrays[0].shape[0] * arrays[0].shape[1]
    block = max(1, min(num_tokens, MAX_BLOCK_LOGITS // vocab))
    num_blocks = -(-num_tokens // block)

    def blocks(x):
        x = x.reshape(num_tokens, *x.shape[2:])
        return jnp.pad(x, [(0, num_blocks * block - num_tokens)] + [(0, 0)] * (x.ndim - 1)).reshape(num_blocks, block, *x.shape[1:])

    return lax.map(lambda xs: function(*xs), tuple(map(blocks, arrays)))


def cross_entropy_sum(
    hidden_BTD: Float[Array, "B T D"],
    w_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    dtype=jnp.bfloat16,
) -> Float[Array, ""]:
    """Sum over tokens of `weight * -log softmax(hidden @ w.T)[target]`, float32.

    The product runs in `dtype` with float32 accumulation; each block is recomputed in the backward pass; the gradient of w is summed over
    blocks in w's own dtype, so pass the master weights.
    """

    @jax.checkpoint
    def block_sum(hidden_SD, targets_S, weights_S):
        return jnp.sum(weights_S * _losses(hidden_SD, w_VD, targets_S, dtype)[0])

    return jnp.sum(_map_blocks(block_sum, w_VD.shape[0], hidden_BTD, targets_BT, weights_BT))


def token_losses(
    hidden_BTD: Float[Array, "B T D"], w_VD: Float[Array, "V D"], targets_BT: Int[Array, "B T"], dtype=jnp.bfloat16
) -> tuple[Float[Array, "B T"], Int[Array, "B T"]]:
    """Per token: cross-entropy of its target in nats (float32), and the most probable next token. For evaluation; same arithmetic as above."""
    num_tokens = targets_BT.size
    blocks = _map_blocks(lambda hidden_SD, targets_S: _losses(hidden_SD, w_VD, targets_S, dtype), w_VD.shape[0], hidden_BTD, targets_BT)
    return tuple(x.reshape(-1)[:num_tokens].reshape(targets_BT.shape) for x in blocks)
