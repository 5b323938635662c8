"""Cross-entropy of the unembedding, in blocks of tokens: the logits of the whole batch (201,088 wide for gpt-oss) never exist at once."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

# float32 logits of one block of tokens stay below this many elements (64 Mi = 256 MiB; 333 tokens of gpt-oss)
MAX_BLOCK_LOGITS = 1 << 26


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
    num_tokens = targets_BT.size
    block = max(1, min(num_tokens, MAX_BLOCK_LOGITS // w_VD.shape[0]))
    num_blocks = -(-num_tokens // block)

    def blocks(x):
        x = x.reshape(num_tokens, *x.shape[2:])
        return jnp.pad(x, [(0, num_blocks * block - num_tokens)] + [(0, 0)] * (x.ndim - 1)).reshape(num_blocks, block, *x.shape[1:])

    @jax.checkpoint
    def block_sum(hidden_SD, targets_S, weights_S):
        logits_SV = jnp.einsum("sd,vd->sv", hidden_SD.astype(dtype), w_VD.astype(dtype), preferred_element_type=jnp.float32)
        picked_S = jnp.take_along_axis(logits_SV, targets_S[:, None], axis=1)[:, 0]
        return jnp.sum(weights_S * (jax.nn.logsumexp(logits_SV, axis=1) - picked_S))

    if num_blocks == 1:
        return block_sum(*(x.reshape(num_tokens, *x.shape[2:]) for x in (hidden_BTD, targets_BT, weights_BT)))
    total, _ = lax.scan(lambda sum_, xs: (sum_ + block_sum(*xs), None), jnp.float32(0), (blocks(hidden_BTD), blocks(targets_BT), blocks(weights_BT)))
    return total
