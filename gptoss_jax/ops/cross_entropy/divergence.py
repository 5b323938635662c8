"""KL divergence between the next-token distributions of two models, in blocks of tokens as the loss: two blocks of logits exist at a time.

    KL(p || q) = sum_v p_v (log p_v - log q_v),   p = softmax(hidden_p @ head_p.T),  q = softmax(hidden_q @ head_q.T)

Legend: B batch  T tokens of a row  S tokens  D hidden  V vocabulary
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from gptoss_jax.ops.cross_entropy import _blocks, _logits


def token_kl(
    hidden_p_BTD: Float[Array, "B T D"],
    head_p_VD: Float[Array, "V D"],
    hidden_q_BTD: Float[Array, "B T D"],
    head_q_VD: Float[Array, "V D"],
    dtype=jnp.bfloat16,
) -> Float[Array, "B T"]:
    """KL(p || q) of every token in nats, float32. Logits are products in `dtype` with float32 accumulation, softmax is float32."""

    def block(hidden_p_SD, hidden_q_SD):
        log_p_SV = jax.nn.log_softmax(_logits(hidden_p_SD, head_p_VD, dtype), axis=1)
        log_q_SV = jax.nn.log_softmax(_logits(hidden_q_SD, head_q_VD, dtype), axis=1)
        return jnp.sum(jnp.exp(log_p_SV) * (log_p_SV - log_q_SV), axis=1)

    num_tokens = hidden_p_BTD.shape[0] * hidden_p_BTD.shape[1]
    kl = lax.map(lambda xs: block(*xs), _blocks(num_tokens, 2 * head_p_VD.shape[0], hidden_p_BTD, hidden_q_BTD))
    return kl.reshape(-1)[:num_tokens].reshape(hidden_p_BTD.shape[:2])
