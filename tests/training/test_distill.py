"""Distillation in the training step: what is minimised, what it does to a quantized student, and that a mesh changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.errors import UsageError
from gptoss_jax.model import init_params
from gptoss_jax.quant import default_policy, make_expert_quant
from gptoss_jax.sharding import make_mesh, param_shardings
from gptoss_jax.training.config import parse
from gptoss_jax.training.step import Shardings, Teacher, init_state, make_loss, make_train_step
from gptoss_jax.training.teacher import load_teacher
from tests.sharding.uneven import uneven
from tests.training.support import CONFIG, ROWS, make_params
from tests.training.test_step import packed_batch

TEACHER = dataclasses.replace(CONFIG, hidden_size=2 * CONFIG.hidden_size, num_hidden_layers=1, layer_types=())


def train_of(**changes):
    raw = {"steps": 40, "compute_dtype": "float32", "batch": {"rows": ROWS}, "optimizer": {"learning_rate": 2e-4}, "distill": {"teacher": "T"}}
    return parse({**raw, **changes})


def test_the_loss_is_mixed_of_cross_entropy_and_kl_to_a_teacher_of_another_shape():
    train = train_of(distill={"teacher": "T", "weight": 0.3, "temperature": 2.0}, batch={"rows": ROWS, "accumulation": 2})
    params = init_params(TEACHER, jax.random.key(8))
    step = make_train_step(CONFIG, train, None, teacher=Teacher(TEACHER, params))
    _, metrics = step(init_state(CONFIG, train, make_params()), packed_batch(), params)
    assert metrics["kl"] > 1e-3
    np.testing.assert_allclose(metrics["loss"], 0.7 * metrics["cross_entropy"] + 0.3 * 4 * metrics["kl"], rtol=1e-6)


def test_a_quantized_student_comes_nearer_to_its_unquantized_self():
    train, quant = train_of(), make_expert_quant(default_policy("mxfp4"), jnp.float32)
    teacher = make_params()
    step, state = make_train_step(CONFIG, train, quant, teacher=Teacher(CONFIG, teacher)), init_state(CONFIG, train, teacher)
    kl = []
    for _ in range(20):
        state, metrics = step(state, packed_batch(), teacher)
        kl.append(float(metrics["kl"]))
    assert kl[0] > 1e-5 and kl[-1] < 0.5 * kl[0], kl


def test_without_quantization_the_student_is_its_teacher():
    train, teacher = train_of(), make_params()
    _, metrics = make_train_step(CONFIG, train, teacher=Teacher(CONFIG, teacher))(init_state(CONFIG, train, teacher), packed_batch(), teacher)
    assert abs(metrics["kl"]) < 1e-6 and metrics["grad_norm"] < 1e-4


def test_gradients_on_a_mesh_equal_one_device_in_float64(tiny_config):
    config = dataclasses.replace(tiny_config, num_hidden_layers=2, layer_types=())
    teacher_config = dataclasses.replace(config, hidden_size=2 * config.hidden_size)
    mesh = make_mesh(fsdp=2, expert=2, tensor=2)

    def gradients(shardings):
        params, batch = uneven(config)
        batch = batch._replace(loss_weights_BT=batch.loss_weights_BT.astype(jnp.float64))
        params = {name: param.astype(jnp.float64) for name, param in params.items()}
        teacher = {name: param.astype(jnp.float64) for name, param in init_params(teacher_config, jax.random.key(5)).items()}
        train = parse({"distill": {"teacher": "T", "weight": 0.6}}).model_copy(update={"compute_dtype": "float64"})
        loss = make_loss(config, train, None, distribute=shardings and shardings.distribute, teacher_config=teacher_config)
        if shardings:
            params, batch = jax.device_put(params, shardings.params), jax.device_put(batch, shardings.batch)
            teacher = jax.device_put(teacher, param_shardings(teacher_config, mesh))
        run = jax.jit(jax.value_and_grad(lambda p, b, t: loss(p, {}, b, jnp.sum(b.loss_weights_BT), jnp.sum(b.segment_ids_BT > 0), t)[0]))
        return jax.device_get(run(params, batch, teacher))

    with jax.enable_x64(True):
        (loss, grads), (expected, expected_grads) = gradients(Shardings.on(config, mesh)), gradients(None)
    np.testing.assert_allclose(loss, expected, rtol=1e-10)
    for name, grad in expected_grads.items():
        np.testing.assert_allclose(grads[name], grad, atol=1e-10 * np.abs(grad).max(), rtol=0, err_msg=name)


def test_a_teacher_of_another_vocabulary_is_refused(monkeypatch):
    other = dataclasses.replace(CONFIG, vocab_size=CONFIG.vocab_size + 32)
    monkeypatch.setattr("gptoss_jax.training.teacher.look_at", lambda name: (other, None))
    with pytest.raises(UsageError, match="distill.teacher = 'T' has a vocabulary of .* tokens, the model that is trained"):
        load_teacher(train_of(), CONFIG, None)


def test_unknown_keys_are_named():
    with pytest.raises(UsageError, match=r"unknown key 'distill.temprature'; did you mean 'distill.temperature'"):
        train_of(distill={"teacher": "T", "temprature": 2.0})
