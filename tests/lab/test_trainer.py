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
from gptoss_jax.training.config import DistillConfig, ScheduleConfig
from gptoss_jax.training.step import init_state, make_train_step
from tests.training.support import CONFIG, Batches, make_params, make_train

TRAIN = make_train(steps=3, clip=0.5, optimizer={"learning_rate": 1e-3, "weight_decay": 0.1}, cast_at="step")
MXFP4 = FakeQuant.of("mxfp4")


EXPERTS = "blocks.0.mlp.experts.down_proj"
TOY = {EXPERTS: jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 32)), jnp.float32), "norm.weight": jnp.ones(4)}


def toy_loss(weights, batch, context):
    """Pulls all weights to what the batch holds: no model, so that it compiles at once."""
    value = sum(jnp.sum((weight - batch) ** 2) for weight in weights.values())
    return value if context is None else context * value, {"loss": value}


def run_toy(quantizer=MXFP4, train=TRAIN, params=TOY, **options):
    return trainer.run(train, quantizer, params, iter(np.float32([0.5, 0.6, 0.7])), loss=toy_loss, **options)


@pytest.mark.parametrize("quantizer", [Unquantized(), MXFP4], ids=["sft", "qat"])
def test_straight_through_arm_is_the_training_step(quantizer):
    """Three steps with clipping, decay and schedule. A weight moves by 1e-3 a step; float32 rounding of gradients may move Adam's quotient."""
    policy = None if isinstance(quantizer, Unquantized) else default_policy(Mxfp4())
    step = make_train_step(CONFIG, TRAIN, make_expert_quant(policy, jnp.float32))
    state, batches, expected = init_state(CONFIG, TRAIN, make_params()), Batches(), []
    for _ in range(TRAIN.steps):
        state, metrics = step(state, next(batches))
        expected.append(metrics)
    found = trainer.run(TRAIN, quantizer, make_params(), Batches(), loss=trainer.training_loss(CONFIG, TRAIN))
    for ours, theirs in zip(found.history, expected):
        for key in ("loss", "grad_norm", "lr"):
            np.testing.assert_allclose(ours[key], float(theirs[key]), rtol=2e-5, err_msg=key)
    for name, param in state.params.items():
        # a gradient near 0 has no sign beyond rounding: such a weight may go the other way, and few may
        apart = np.abs(np.asarray(found.params[name]) - np.asarray(param))
        assert np.mean(apart > 2e-6) < 0.002, name
    assert all((found.w_q[name] == MXFP4.round(found.params, {})[name]).all() for name in found.w_q) or policy is None


def test_what_the_program_does_not_depend_on_shares_one():
    run_toy()
    before = trainer._program.cache_info().misses
    optimizer = TRAIN.optimizer.model_copy(update={"learning_rate": 2e-3})
    other = TRAIN.model_copy(update={"seed": 5, "steps": 2, "optimizer": optimizer, "schedule": ScheduleConfig(min_ratio=0.5)})
    first, second = run_toy(), run_toy(train=other, params={name: 2 * p for name, p in TOY.items()})
    assert trainer._program.cache_info().misses == before
    assert [len(found.history) for found in (first, second)] == [3, 2] and second.history[0]["lr"] == pytest.approx(2 * first.history[0]["lr"])
    assert trainer.training_loss(CONFIG, TRAIN) is trainer.training_loss(CONFIG, other)


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
    seen, large = [], TRAIN.model_copy(update={"optimizer": TRAIN.optimizer.model_copy(update={"learning_rate": 0.1})})
    found = run_toy(train=large, tools=(CountFlips(),), watch=lambda step, params, extra: seen.append(MXFP4.round(params, extra)))
    for step, (before, after) in enumerate(pairwise(seen)):
        assert found.history[step]["flips"] == int((before[EXPERTS] != after[EXPERTS]).sum()) > 0
    assert len(seen) == 4 and (seen[3][EXPERTS] == found.w_q[EXPERTS]).all()


@dataclass(frozen=True)
class Halve:
    """Halves what it is given: half the gradients leave Adam's step as it is, half the updates do not."""

    acts_on: str

    def transform(self, round):
        halve = lambda updates, state, params=None, **extra: (jax.tree.map(lambda u: u / 2, updates), state)
        return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), halve)


def test_tools_stand_before_or_after_adam():
    way = {place: np.asarray(run_toy(tools=tools).params["norm.weight"] - TOY["norm.weight"])
           for place, tools in (("none", ()), ("gradients", (Halve("gradients"),)), ("updates", (Halve("updates"),)))}  # fmt: skip
    np.testing.assert_allclose(way["gradients"], way["none"], rtol=1e-3)
    np.testing.assert_allclose(way["updates"], way["none"] / 2, rtol=1e-3)


@dataclass(frozen=True)
class Shrunk:
    """Multiplies experts by a trained scalar, and in training by a random sign."""

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
    found = run_toy(Shrunk())
    assert found.extra.keys() == {f"{EXPERTS}.factor"} and found.params.keys() == TOY.keys()
    assert 0 < abs(float(found.extra[f"{EXPERTS}.factor"]) - 0.5) < 0.01
    np.testing.assert_array_equal(found.w_q[EXPERTS], found.extra[f"{EXPERTS}.factor"] * found.params[EXPERTS])


def test_key_follows_seed_and_step():
    losses = [tuple(record["loss"] for record in run_toy(Shrunk(), TRAIN.model_copy(update={"seed": seed})).history) for seed in range(6)]
    first = {history[0] for history in losses}
    assert len(first) == 2, "one of two signs"
    assert len(set(losses)) > 2, "a new draw at every step"
    assert losses[3] == tuple(record["loss"] for record in run_toy(Shrunk(), TRAIN.model_copy(update={"seed": 3})).history)


def test_context_reaches_the_loss():
    one, three = run_toy(context=jnp.float32(1)), run_toy(context=jnp.float32(3))
    assert three.history[0]["grad_norm"] == pytest.approx(3 * one.history[0]["grad_norm"], rel=1e-6)


def test_distillation_pulls_to_the_teacher_and_reports_its_parts():
    """The student is the teacher itself, unquantized: no divergence, and no gradient."""
    train = TRAIN.model_copy(update={"steps": 1, "distill": DistillConfig(teacher="sft", weight=1.0)})
    params = {name: jnp.asarray(p) for name, p in make_params().items()}
    found = trainer.run(train, Unquantized(), params, Batches(), loss=trainer.training_loss(CONFIG, train), context=params)
    first = found.history[0]
    assert abs(first["kl"]) < 1e-6 and abs(first["loss"]) < 1e-6 and first["cross_entropy"] > 1 and first["grad_norm"] < 1e-4
