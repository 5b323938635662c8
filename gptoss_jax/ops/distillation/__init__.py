"""Knowledge distillation at the unembedding, in blocks of tokens: neither the student's nor the teacher's logits of the batch ever exist at once.

    z = hidden @ w.T,   p = softmax(z_teacher / T),   q = softmax(z / T)
    loss = sum_s weight_s * ((1 - a) * CE_s + a * T**2 * KL(p_s || q_s)),   CE_s = logsumexp(z_s) - z_s[target_s]
    dz_s = weight_s * ((1 - a) * (softmax(z_s) - onehot(target_s)) + a * T * (q_s - p_s))

T**2 keeps the size of the gradient when the temperature T is raised (Hinton et al., arXiv 1503.02531). NVIDIA's quantization-aware distillation has
a = 1, T = 1 and the BF16 model as its teacher (Model-Optimizer, examples/llm_qat). As in `cross_entropy_sum`, gradients are made in the pass that
makes the loss, and nothing flows to the teacher.

Legend: B batch  T tokens of a row  S tokens  D hidden  V vocabulary
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from gptoss_jax.ops.cross_entropy import _blocks, _logits, _picked, _whole
from gptoss_jax.precision import wide
from gptoss_jax.quant import Gather


class Side(NamedTuple):
    """Hidden states after the last norm, and the unembedding, of student or teacher; their widths may differ, their vocabularies may not."""

    hidden_BTD: Float[Array, "B T D"]
    w_VD: Float[Array, "V D"]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def distillation_sums(
    student: Side,
    teacher: Side,
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    weight: float,
    temperature: float,
    dtype=jnp.bfloat16,
    gathers: tuple[Gather, ...] = (),
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """(loss, cross-entropy, KL), sums over tokens in float32, the last two without the factors `1 - a` and `a * T**2`.

    The loss is differentiable in the student's hidden states and unembedding; the other two are numbers to report and have no gradient.

    Args:
      weight: a, the share of the KL.
      gathers: as in `cross_entropy_sum`, for both unembeddings.
    """
    return _forward(student, teacher, targets_BT, weights_BT, weight, temperature, dtype, gathers)[0]


def _forward(student, teacher, targets_BT, weights_BT, weight, temperature, dtype, gathers):
    w_VD, w_teacher_VD = (_whole(side.w_VD, dtype, gathers) for side in (student, teacher))
    num_tokens, vocab = targets_BT.size, w_VD.shape[0]

    def body(carry, block):
        sums, dw_VD = carry
        hidden_SD, teacher_SD, targets_S, weights_S = block
        z_SV, z_teacher_SV = _logits(hidden_SD, w_VD, dtype), _logits(teacher_SD, w_teacher_VD, dtype)
        log_q_SV, log_p_SV = (jax.nn.log_softmax(z / temperature) for z in (z_SV, z_teacher_SV))
        p_SV, log_softmax_SV = jnp.exp(log_p_SV), jax.nn.log_softmax(z_SV)
        cross_entropy = -jnp.sum(weights_S * _picked(log_softmax_SV, targets_S))
        kl = jnp.sum(weights_S * jnp.sum(p_SV * (log_p_SV - log_q_SV), axis=1))
        is_target_SV = jnp.arange(vocab) == targets_S[:, None]
        dz_SV = (1 - weight) * (jnp.exp(log_softmax_SV) - is_target_SV) + weight * temperature * (jnp.exp(log_q_SV) - p_SV)
        dz_SV = (dz_SV * weights_S[:, None]).astype(dtype)
        dhidden_SD = jnp.einsum("sv,vd->sd", dz_SV, w_VD, preferred_element_type=wide(dtype))
        dw_VD += jnp.einsum("sv,sd->vd", dz_SV, hidden_SD.astype(dtype), preferred_element_type=wide(dtype))
        return (sums + jnp.stack([cross_entropy, kl]), dw_VD), dhidden_SD.astype(student.hidden_BTD.dtype)

    start = jnp.zeros(2, wide(dtype)), jnp.zeros(w_VD.shape, wide(dtype))
    blocks = _blocks(num_tokens, vocab, student.hidden_BTD, teacher.hidden_BTD, targets_BT, weights_BT)
    ((cross_entropy, kl), dw_VD), dhidden = lax.scan(body, start, blocks)
    shape = student.hidden_BTD.shape
    dhidden_BTD = dhidden.reshape(-1, shape[-1])[:num_tokens].reshape(shape)
    for gather in reversed(gathers):
        dw_VD = gather.scatter_sum(dw_VD)
    loss = (1 - weight) * cross_entropy + weight * temperature**2 * kl
    return (loss, cross_entropy, kl), (dhidden_BTD, dw_VD.astype(student.w_VD.dtype))


def _backward(weight, temperature, dtype, gathers, gradients, scales):
    scale, _, _ = scales
    return Side(*((gradient * scale).astype(gradient.dtype) for gradient in gradients)), None, None, None


distillation_sums.defvjp(_forward, _backward)
