"""Rounding of bfloat16 masters: unbiased, reproducible on any mesh, and exact with a residual."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptoss_jax.training.optimizer import apply_updates, init_moments, make_optimizer
from gptoss_jax.training.rounding import float_bits, high_part, join, low_part, random_bits, rounding_key, stochastic_round
from tests.training.support import make_train


def cut(x, residual, key=None):
    bits = float_bits(x, residual, key)
    low = low_part(bits, residual)
    return high_part(bits, low), low


def test_stochastic_rounding_is_unbiased_and_keeps_what_bfloat16_holds():
    # k/4 of the way between two bfloat16 neighbours (spacing 2^-7), and a negative number
    x = np.float32([1 + k * 2**-9 for k in range(4)] + [-(1 + 2**-9)])
    draws = 40_000
    rounded = np.asarray(stochastic_round(jnp.tile(x, (draws, 1)), rounding_key(1, jnp.int32(0), "w")).astype(jnp.float32))
    low, high = np.float32([1, 1, 1, 1, -1 - 2**-7]), np.float32([1 + 2**-7] * 4 + [-1])
    assert ((rounded == low) | (rounded == high)).all()
    up, position = (rounded == high).mean(axis=0), (x - low) / (high - low)
    # 5 standard deviations of a binomial mean; 0 where bfloat16 holds the value
    assert (np.abs(up - position) <= 5 * np.sqrt(position * (1 - position) / draws)).all(), up


def test_rounding_bits_follow_seed_step_and_name_and_not_the_mesh():
    x = jnp.full((8, 24), 1 + 2**-9, jnp.float32)
    one = np.asarray(stochastic_round(x, rounding_key(3, jnp.int32(7), "a")))
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    for spec in (("x", "y"), (None, ("y", "x"))):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        rounding = jax.jit(lambda x: stochastic_round(x, rounding_key(3, jnp.int32(7), "a")), in_shardings=sharding, out_shardings=sharding)
        np.testing.assert_array_equal(np.asarray(rounding(jax.device_put(x, sharding))), one)
    for key in (rounding_key(4, jnp.int32(7), "a"), rounding_key(3, jnp.int32(8), "a"), rounding_key(3, jnp.int32(7), "b")):
        assert (np.asarray(stochastic_round(x, key)) != one).mean() > 0.2


def test_bits_are_uniform_and_rows_columns_and_keys_unrelated():
    """Each of 32 bits is set half of the time (5 standard deviations), in any row, column or neighbouring step."""
    key = [rounding_key(0, jnp.int32(step), "w") for step in (0, 1)]
    bits = np.stack([np.asarray(random_bits(k, (3, 256, 256))) for k in key])
    pairs = {"bits": bits, "step": bits[:1] ^ bits[1:], "row": bits[:, :, 1:] ^ bits[:, :, :-1], "column": bits[..., 1:] ^ bits[..., :-1]}
    for name, words in pairs.items():
        share = np.unpackbits(words.reshape(-1, 1).view(np.uint8), axis=1, bitorder="little").mean(axis=0)
        assert (np.abs(share - 0.5) < 5 * 0.5 / np.sqrt(words.size)).all(), (name, share)
    assert len(np.unique(bits)) > 0.999 * bits.size


def test_int16_residual_is_exact_and_the_master_is_the_nearest_bfloat16():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal(10_000) * 10.0 ** rng.integers(-30, 30, 10_000), [0.0, -0.0, 1 + 2**-8, 1 - 2**-9]]).astype(np.float32)
    master, residual = cut(jnp.asarray(x), "int16")
    assert residual.dtype == jnp.int16
    assert np.asarray(join(master, residual)).tobytes() == x.tobytes()
    nearest = np.abs(np.asarray(jnp.asarray(x).astype(jnp.bfloat16).astype(jnp.float32)) - x)
    np.testing.assert_array_equal(np.abs(np.asarray(master.astype(jnp.float32)) - x), nearest)


def test_int8_residual_keeps_sixteen_bits_and_is_unbiased():
    # between two values that 16 bits hold (spacing 2^-15), and at the border where the master changes
    x = np.float32([1 + 2**-17, -(1 + 3 * 2**-17), 1 + 2**-8 - 2**-18, 2 - 2**-20])
    master, residual = cut(jnp.tile(x, (40_000, 1)), "int8", rounding_key(0, jnp.int32(0), "w"))
    assert residual.dtype == jnp.int8
    back = np.asarray(join(master, residual), np.float64)
    assert np.abs(back - x).max() < 2**-15
    # 5 standard errors of a mean whose deviation is at most half a spacing
    assert np.abs(back.mean(axis=0) - x).max() < 5 * 2**-16 / np.sqrt(40_000)


@pytest.mark.parametrize("residual", ["int8", "int16"])
def test_masters_with_a_residual_move_like_float32_masters(residual):
    """The same gradients: with int16 the float32 trajectory bit for bit, with int8 within a few of its spacings of 2^-15."""
    changes = dict(steps=50, optimizer={"learning_rate": 1e-4, "weight_decay": 0.1})
    exact = make_optimizer(make_train(**changes), ["q_proj.weight"])
    changes["optimizer"]["master_residual"] = residual
    split = make_optimizer(make_train(**changes, master_dtype="bfloat16"), ["q_proj.weight"])
    rng = np.random.default_rng(0)
    masters = {"q_proj.weight": jnp.asarray(rng.standard_normal((64, 96)), jnp.bfloat16)}
    wide = {"q_proj.weight": masters["q_proj.weight"].astype(jnp.float32)}
    state, wide_state = init_moments(split, masters), init_moments(exact, wide)
    for step in range(20):
        grads = {"q_proj.weight": jnp.asarray(rng.standard_normal((64, 96)), jnp.float32)}
        masters, state, *_ = apply_updates(split, masters, grads, state, jnp.int32(step))
        wide, wide_state, *_ = apply_updates(exact, wide, grads, wide_state, jnp.int32(step))
    joined = np.asarray(join(masters["q_proj.weight"], state[-1]["q_proj.weight"]))
    expected = np.asarray(wide["q_proj.weight"])
    if residual == "int16":
        assert joined.tobytes() == expected.tobytes()
    np.testing.assert_allclose(joined, expected, rtol=2**-11, atol=1e-6)
    assert masters["q_proj.weight"].dtype == jnp.bfloat16
