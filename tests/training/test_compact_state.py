"""The smallest state (residual, 8-bit first moment, factored second) through the training step: on a mesh, out of a checkpoint, and learning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.checkpoint import orbax_store
from gptoss_jax.sharding import batch_sharding, make_mesh, param_shardings, replicated
from gptoss_jax.training.step import Shardings, abstract_state, init_state, make_train_step
from tests.training.support import CONFIG, Batches, bits, make_params, make_train

TRAIN = make_train(
    master_dtype="bfloat16", optimizer={"learning_rate": 1e-3, "first_moment": "int8", "second_moment": "int8", "master_residual": "int8"}
)


@pytest.fixture(scope="module")
def step():
    return make_train_step(CONFIG, TRAIN)


def run(step, state, batches, count):
    losses = []
    for _ in range(count):
        state, metrics = step(state, next(batches))
        losses.append(float(metrics["loss"]))
    return state, losses


def test_a_restored_state_goes_on_bit_for_bit(step, tmp_path):
    batches = Batches()
    state, _ = run(step, init_state(CONFIG, TRAIN, make_params()), batches, 2)
    orbax_store.save(tmp_path / "checkpoints", 2, state.params, orbax_store.Meta(model=CONFIG.to_dict()), state.opt_state)
    position = batches.index
    unbroken, _ = run(step, state, batches, 2)
    target = abstract_state(CONFIG, TRAIN)
    params, opt_state = orbax_store.restore(tmp_path / "checkpoints", 2, target.params, target.opt_state)
    assert {leaf.dtype for leaf in jax.tree.leaves(opt_state)} >= {jnp.dtype(d) for d in ("int8", "uint8", "float32", "int32")}
    batches.index = position
    resumed, _ = run(step, target._replace(step=jnp.int32(2), params=params, opt_state=opt_state, skipped=jnp.int32(0), skipped_in_row=jnp.int32(0)),
                     batches, 2)  # fmt: skip
    assert bits(resumed) == bits(unbroken)


def test_eight_devices_train_as_one(step):
    """Codes are split as their parameters are; the noise of rounding is that of the element wherever it lies."""
    mesh = make_mesh(fsdp=4, data=2)
    shardings = Shardings(param_shardings(CONFIG, mesh), batch_sharding(mesh), replicated(mesh))
    sharded_step = make_train_step(CONFIG, TRAIN, shardings=shardings)
    one, losses = run(step, init_state(CONFIG, TRAIN, make_params()), Batches(), 3)
    many, sharded = run(sharded_step, init_state(CONFIG, TRAIN, make_params(), shardings), Batches(), 3)
    np.testing.assert_allclose(sharded, losses, rtol=2e-3)
    name = "blocks.0.mlp.experts.gate_up_proj"
    assert not many.opt_state[0].mu[name].codes.sharding.is_fully_replicated
    difference = np.abs(np.asarray(one.params[name], np.float32) - np.asarray(many.params[name], np.float32))
    # sums in another order move few elements, and those by a spacing
    assert np.mean(difference > 0) < 0.05 and difference.max() < 3e-3
