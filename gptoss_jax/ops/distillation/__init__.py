"""Knowledge distillation at the unembedding, in blocks of tokens (see `ops.cross_entropy.blocks`): neither the student's nor the teacher's logits of
the batch ever exist at once.

    z = hidden @ w.T,   p = softmax(z_teacher / T),   q = softmax(z / T)
    loss = sum_s weight_s * ((1 - a) * CE_s + a * T**2 * KL(p_s || q_s)),   CE_s = logsumexp(z_s) - z_s[target_s]
    dz_s = weight_s * ((1 - a) * (softmax(z_s) - onehot(target_s)) + a * T * (q_s - p_s))

T**2 keeps the size of the gradient when the temperature T is raised (Hinton et al., arXiv 1503.02531). NVIDIA's quantization-aware distillation has
a = 1, T = 1 and the BF16 model as its teacher (Model-Optimizer, examples/llm_qat). Nothing flows to the teacher.

Legend: B batch  T tokens of a row  S tokens  D hidden  V vocabulary
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptoss_jax.ops.cross_entropy import blocks
from gptoss_jax.quant import Gather


class Side(NamedTuple):
    """Hidden states after the last norm, and the unembedding, of student or teacher; their widths may differ, their vocabularies may not."""

    hidden_BTD: Float[Array, "B T D"]
    w_VD: Float[Array, "V D"]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7, 8))
def distillation_sums(
    student: Side,
    teacher: Side,
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    weight: float,
    temperature: float,
    dtype=jnp.bfloat16,
    gathers: tuple[Gather, ...] = (),
    vocab: tuple[str, ...] = (),
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """(loss, cross-entropy, KL), sums over tokens in float32, the last two without the factors `1 - a` and `a * T**2`.

    The loss is differentiable in the student's hidden states and unembedding; the other two are numbers to report and have no gradient.

    Args:
      weight: a, the share of the KL.
      gathers, vocab: as in `cross_entropy_sum`, for both unembeddings.
    """
    return _forward(student, teacher, targets_BT, weights_BT, weight, temperature, dtype, gathers, vocab)[0]


def _forward(student, teacher, targets_BT, weights_BT, weight, temperature, dtype, gathers, vocab):
    w_teacher_VD = blocks.whole(teacher.w_VD, dtype, gathers)

    def log_softmax(z_SV):
        _, sum_S, top_S = blocks.exponentials(z_SV, vocab)
        return z_SV - (top_S + jnp.log(sum_S))[:, None]

    def block_loss(z_SV, teacher_SD, targets_S, weights_S):
        targets_S = blocks.targets_here(targets_S, z_SV.shape[1], vocab)
        exp_SV, sum_S, top_S = blocks.exponentials(z_SV, vocab)
        cross_entropy = blocks.nll_share(weights_S, top_S, sum_S, blocks.picked(z_SV, targets_S), vocab)
        log_p_SV = log_softmax(blocks.logits(teacher_SD, w_teacher_VD, dtype) / temperature)
        log_q_SV, p_SV = log_softmax(z_SV / temperature), jnp.exp(log_p_SV)
        kl = jnp.sum(weights_S * jnp.sum(p_SV * (log_p_SV - log_q_SV), axis=1))
        is_target_SV = jnp.arange(z_SV.shape[1]) == targets_S[:, None]
        dz_SV = (1 - weight) * (exp_SV / sum_S[:, None] - is_target_SV) + weight * temperature * (jnp.exp(log_q_SV) - p_SV)
        return (cross_entropy, kl), dz_SV * weights_S[:, None]

    arrays = teacher.hidden_BTD, targets_BT, weights_BT
    (cross_entropy, kl), gradients = blocks.sums_and_gradients(*student, arrays, block_loss, 2, dtype, gathers)
    loss = (1 - weight) * cross_entropy + weight * temperature**2 * kl
    return (loss, cross_entropy, kl), gradients


def _backward(weight, temperature, dtype, gathers, vocab, gradients, scales):
    return Side(*blocks.scaled(gradients, scales[0])), None, None, None


distillation_sums.defvjp(_forward, _backward)
