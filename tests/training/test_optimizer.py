"""AdamW on named parameters: what decays, what is frozen, how the rate moves, and bfloat16 masters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptoss_jax.errors import UsageError
from gptoss_jax.model import abstract_params
from gptoss_jax.training.optimizer import (
    apply_updates,
    cosine_schedule,
    decays,
    init_moments,
    make_optimizer,
    split_frozen,
)
from tests.training.support import CONFIG, make_train

NAMES = tuple(abstract_params(CONFIG))


def test_weight_decay_covers_the_projections_and_nothing_else():
    decayed = {name.removeprefix("blocks.0.") for name in NAMES if decays(name)}
    attention = {f"self_attn.{p}_proj.weight" for p in "qkvo"}
    assert decayed == attention | {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}


def test_freeze_patterns_split_names_and_an_unmatched_one_is_refused():
    trained, frozen = split_frozen(NAMES, ["*.router.*", "embed_tokens.weight"])
    assert set(frozen) == {"blocks.0.mlp.router.weight", "blocks.0.mlp.router.bias", "embed_tokens.weight"}
    assert set(trained) | set(frozen) == set(NAMES)
    with pytest.raises(UsageError, match=r"'\*.ruoter.\*' matches no parameter; nearest are .*router"):
        split_frozen(NAMES, ["*.ruoter.*"])
    with pytest.raises(UsageError, match="nothing to train"):
        split_frozen(NAMES, ["*"])


def test_cosine_schedule_values():
    config = make_train(schedule={"warmup_ratio": 0.1, "min_ratio": 0.1}).schedule
    rate = cosine_schedule(config, peak=2.0, steps=100)
    np.testing.assert_allclose([rate(0), rate(4), rate(9), rate(10)], [0.2, 1.0, 2.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose([rate(55), rate(100), rate(1000)], [2.0 * 0.55, 0.2, 0.2], rtol=1e-6)
    # shorter than the warm-up would be: no division by zero, the peak is reached
    assert float(cosine_schedule(config, 2.0, 1)(0)) == 2.0


def test_float32_updates_are_those_of_optax_adamw():
    train = make_train(optimizer={"learning_rate": 1e-2, "weight_decay": 0.1}, schedule={"warmup_ratio": 0.0}, clip=0.5)
    names = ("a.q_proj.weight", "a.sinks")
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.standard_normal((3, 5)), jnp.float32) for name in names}
    optimizer = make_optimizer(train, names)
    reference = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(optimizer.schedule, 0.9, 0.999, 1e-8, weight_decay=0.1, mask={"a.q_proj.weight": True, "a.sinks": False}),
    )
    state, expected, expected_state = init_moments(optimizer, params), params, reference.init(params)
    for step in range(3):
        grads = {name: jnp.asarray(rng.standard_normal((3, 5)), jnp.float32) for name in names}
        params, state, *_ = apply_updates(optimizer, params, grads, state, jnp.int32(step))
        updates, expected_state = reference.update(grads, expected_state, expected)
        expected = optax.apply_updates(expected, updates)
    for name in names:
        np.testing.assert_allclose(params[name], expected[name], rtol=1e-6, atol=1e-7)


def test_bfloat16_masters_follow_small_updates_on_average():
    """An update of 1/50 of the spacing: with plain rounding no weight ever moves."""
    train = make_train(steps=100, master_dtype="bfloat16", optimizer={"learning_rate": 2**-7 / 50}, schedule={"warmup_ratio": 0, "min_ratio": 1})
    optimizer = make_optimizer(train, ["w"])
    params = {"w": jnp.ones(4096, jnp.bfloat16)}
    state = init_moments(optimizer, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim} == {jnp.dtype(jnp.float32)}
    step = jax.jit(lambda p, s, i: apply_updates(optimizer, p, {"w": jnp.full(4096, -1.0)}, s, i)[:2])
    for i in range(25):
        params, state = step(params, state, jnp.int32(i))
    moved = float(params["w"].astype(jnp.float32).mean()) - 1
    # Adam's update of a constant gradient is its sign; standard error here is 1.1 %
    assert params["w"].dtype == jnp.bfloat16 and abs(moved / (25 * 2**-7 / 50) - 1) < 0.05


def test_frozen_parameters_have_no_moments():
    optimizer = make_optimizer(make_train(freeze=["*experts*"]), NAMES)
    params = {name: jnp.zeros(leaf.shape, jnp.float32) for name, leaf in abstract_params(CONFIG).items()}
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(init_moments(optimizer, params))[0]]
    assert not [path for path in paths if "experts" in path] and [path for path in paths if "q_proj" in path]


def test_unknown_length_is_refused():
    with pytest.raises(UsageError, match="number of steps"):
        make_optimizer(make_train(steps=None, epochs=1), NAMES)
