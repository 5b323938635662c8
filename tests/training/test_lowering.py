"""The training step lowers for CUDA and TPU on a machine that has neither, so a CPU-only construct cannot creep in."""

import jax
import jax.numpy as jnp
import pytest

from gptoss_jax.data import Batch
from gptoss_jax.formats import Mxfp4
from gptoss_jax.quant import default_policy, make_expert_quant
from gptoss_jax.training.config import parse
from gptoss_jax.training.step import abstract_state, make_train_step


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("quantized", [False, True], ids=["sft", "qat"])
def test_training_step_lowers(platform, quantized, tiny_config):
    train = parse({"steps": 10, "batch": {"rows": 4, "accumulation": 2}})
    quant = make_expert_quant(default_policy(Mxfp4()), jnp.bfloat16) if quantized else None
    shapes = [jax.ShapeDtypeStruct((4, 40), dtype) for dtype in (jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32)]
    step = make_train_step(tiny_config, train, quant)
    lowered = step.trace(abstract_state(tiny_config, train), Batch(*shapes)).lower(lowering_platforms=(platform,))
    assert "stablehlo" in lowered.as_text()
