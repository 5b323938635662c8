"""The teacher of a distillation: a frozen model beside the trained one, in the compute dtype and on the same mesh.

Quantization-aware distillation takes the SFT model that QAT starts from: the student, quantized, learns its probabilities instead of the labels.
"""

import jax
import jax.numpy as jnp

from gptoss_jax.checkpoint.models import load_model, look_at
from gptoss_jax.errors import UsageError
from gptoss_jax.model import GptOssConfig
from gptoss_jax.quant.expert_quant import PROJECTIONS
from gptoss_jax.sharding import param_shardings
from gptoss_jax.training.config import TrainConfig
from gptoss_jax.training.step import Shardings, Teacher


def check_vocabulary(config: GptOssConfig, teacher: GptOssConfig, name: str) -> None:
    """Raises UsageError unless teacher and student predict the same tokens."""
    if teacher.vocab_size != config.vocab_size:
        raise UsageError(
            f"config: distill.teacher = {name!r} has a vocabulary of {teacher.vocab_size:,} tokens, the model that is trained {config.vocab_size:,}"
        )


def load_teacher(train: TrainConfig, config: GptOssConfig, shardings: Shardings | None) -> Teacher:
    """The model of `train.distill`, with the weights that it computes with (those of a QAT checkpoint are its quantized ones).

    Raises:
      UsageError: nothing readable there, or another vocabulary.
      CorruptError: damaged files.
    """
    name, dtype = train.distill.teacher, jnp.dtype(train.compute_dtype)
    teacher, _ = look_at(name)
    check_vocabulary(config, teacher, name)
    places = shardings and param_shardings(teacher, shardings.scalar.mesh)
    model = load_model(name, dtype, places)
    quant = model.expert_quant(dtype)

    def compute_weights(params):
        return {key: quant(key.rpartition(".")[2], x)[0] if key.endswith(PROJECTIONS) else x.astype(dtype) for key, x in params.items()}

    params = jax.jit(compute_weights, out_shardings=places, donate_argnums=0)(model.params)
    return Teacher(model.config, params, places)
