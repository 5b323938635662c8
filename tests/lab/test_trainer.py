"""The step of experiments: the numbers of the training step, any quantizer and any Optax tool, and one program for what does not change it."""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptoss_jax.formats import Mxfp4
from gptoss_jax.lab import trainer
from gptoss_jax.lab.quantizer import FakeQuant, Unquantized, expert_names
from gptoss_jax.quant import default_policy, make_expert_quant
from gptoss_jax.training.step import init_state, make_train_step
from tests.training.support import CONFIG, Batches, make_params, make_train

TRAIN = make_train(steps=3, clip=0.5, optimizer={"learning_rate": 1e-3, "weight_decay": 0.1}, cast_at="step")
MXFP4 = FakeQuant.of("mxfp4")


def run(quantizer=MXFP4, train=TRAIN, **options):
    return trainer.run(train, quantizer, make_params(), Batches(), loss=trainer.training_loss(CONFIG, train), **options)


@pytest.mark.parametrize("quantizer", [Unquantized(), MXFP4], ids=["sft", "qat"])
def test_straight_through_arm_is_the_training_step(quantizer):
    """Three steps with clipping, decay and schedule. A weight moves by 1e-3 a step; float32 rounding of gradients may move Adam's quotient."""
    policy = None if isinstance(quantizer, Unquantized) else default_policy(Mxfp4())
    step = make_train_step(CONFIG, TRAIN, make_expert_quant(policy, jnp.float32))
    state, batches, expected = init_state(CONFIG, TRAIN, make_params()), Batches(), []
    for _ in range(TRAIN.steps):
        state, metrics = step(state, next(batches))
        expected.append(metrics)
    found = run(quantizer)
    for ours, theirs in zip(found.history, expected):
        for key in ("loss", "grad_norm", "lr"):
            np.testing.assert_allclose(ours[key], float(theirs[key]), rtol=2e-5, err_msg=key)
    for name, param in state.params.items():
        # a gradient near 0 has no sign beyond rounding: such a weight may go the other way, and few may
        apart = np.abs(np.asarray(found.params[name]) - np.asarray(param))
        assert np.mean(apart > 2e-6) < 0.002, name
    assert all((found.w_q[name] == MXFP4.round(found.params, {})[name]).all() for name in found.w_q) or policy is None


def test_learning_rate_seed_and_start_share_one_program():
    run()
    before = trainer._program.cache_info().misses
    other = TRAIN.model_copy(update={"seed": 5, "optimizer": TRAIN.optimizer.model_copy(update={"learning_rate": 2e-3})})
    first, second = run(), run(train=other)
    assert trainer._program.cache_info().misses == before
    assert second.history[0]["lr"] == pytest.approx(2 * first.history[0]["lr"])


class CountState(NamedTuple):
    changed: jax.Array
    before: dict

    def report(self):
        return {"flips": self.changed}


@dataclass(frozen=True)
class CountFlips:
    """Weights whose rounded value an update changes."""

    acts_on = "updates"

    def transform(self, round):
        w_q = lambda params: {name: round(params)[name] for name in expert_names(params)}

        def update(updates, state, params, **extra):
            after = w_q(optax.apply_updates(params, updates))
            changed = sum(jnp.sum(after[name] != old) for name, old in w_q(params).items())
            return updates, CountState(changed, after)

        return optax.GradientTransformationExtraArgs(lambda params: CountState(jnp.int32(0), w_q(params)), update)


def test_tool_sees_params_and_updates_and_reports_every_step():
    seen = []
    found = run(tools=(CountFlips(),), watch=lambda step, params, extra: seen.append(MXFP4.round(params, extra)))
    for step, (before, after) in enumerate(pairwise(seen)):
        flips = sum(int((before[name] != after[name]).sum()) for name in expert_names(before))
        assert found.history[step]["flips"] == flips > 0


@dataclass(frozen=True)
class Shrunk:
    """Multiplies experts by a trained scalar each, and by a random sign that has no business in a deployed model."""

    def init(self, params):
        return {f"{name}.factor": jnp.float32(0.5) for name in expert_names(params)}

    def __call__(self, params, extra, key, step):
        sign = jax.random.rademacher(key, (), jnp.float32)
        return {**params, **{name: sign * extra[f"{name}.factor"] * params[name] for name in expert_names(params)}}

    def round(self, params, extra):
        return {**params, **{name: extra[f"{name}.factor"] * params[name] for name in expert_names(params)}}

    def to_dict(self):
        return {"name": "shrunk"}


def test_arrays_of_the_quantizer_are_trained_and_stay_apart():
    found = run(Shrunk())
    assert set(found.extra) == {f"{name}.factor" for name in expert_names(found.params)} and not set(found.extra) & set(found.params)
    assert all(0 < abs(float(value) - 0.5) < 0.01 for value in found.extra.values())
    name = next(iter(expert_names(found.params)))
    np.testing.assert_array_equal(found.w_q[name], found.extra[f"{name}.factor"] * found.params[name])


def test_context_reaches_the_loss_and_key_follows_the_seed():
    seen = trainer.training_loss(CONFIG, TRAIN)
    scaled = lambda params, batch, context: (context * seen(params, batch, None)[0], {"loss": context * seen(params, batch, None)[0]})
    one, three = run(Unquantized()), trainer.run(TRAIN, Unquantized(), make_params(), Batches(), loss=scaled, context=jnp.float32(3))
    assert three.history[0]["loss"] == pytest.approx(3 * one.history[0]["loss"], rel=1e-6)
    losses = {run(Shrunk(), TRAIN.model_copy(update={"seed": seed})).history[0]["loss"] for seed in range(6)}
    assert len(losses) == 2  # one of two signs
