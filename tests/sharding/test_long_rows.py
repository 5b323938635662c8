"""Rows cut over 8 devices at the length where that pays: the nano model, loss and every gradient."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptoss_jax
from gptoss_jax.model import GptOssConfig, init_params
from gptoss_jax.sharding import make_mesh
from gptoss_jax.training.config import parse
from gptoss_jax.training.step import Shardings, make_loss
from scripts.bench.batches import random_batch

LENGTH = 32_768


@pytest.mark.slow
def test_a_long_row_on_eight_devices_equals_one():
    config = GptOssConfig.from_dict(json.loads((Path(gptoss_jax.__file__).parent / "nano" / "config.json").read_text()))
    params, batch = init_params(config, jax.random.key(0)), random_batch(config.vocab_size, rows=1, length=LENGTH)
    train = parse({"compute_dtype": "float32", "remat": "products"})

    def run(shardings):
        loss = make_loss(config, train, None, distribute=shardings and shardings.distribute)
        step = jax.jit(jax.value_and_grad(lambda p, b: loss(p, {}, b, jnp.float32(LENGTH), LENGTH)[0]))
        return jax.device_get(step(*(jax.device_put((params, batch), (shardings.params, shardings.batch)) if shardings else (params, batch))))

    loss, grads = run(None)
    sharded_loss, sharded = run(Shardings.on(config, make_mesh(context=8)))
    np.testing.assert_allclose(sharded_loss, loss, rtol=1e-6)
    for name, grad in grads.items():
        # float32 sums over 32,768 tokens; equality to 1e-10 is tested in float64 on short rows
        np.testing.assert_allclose(sharded[name], grad, atol=2e-4 * np.abs(grad).max(), rtol=0, err_msg=name)
