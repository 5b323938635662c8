"""Storage of Adam's moments: error bounds and unbiasedness of 8 bits, the factored moment, updates left out, memory of the compiled update."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptoss_jax.model import abstract_params
from gptoss_jax.sharding import make_mesh, param_shardings
from gptoss_jax.training.moments import Codes, Int8, block_size, scale_by_adam
from gptoss_jax.training.optimizer import apply_updates, init_moments, make_optimizer
from gptoss_jax.training.rounding import random_bits, rounding_key
from gptoss_jax.training.step import Shardings, abstract_state
from tests.training.support import CONFIG, make_train

FIRST, SECOND = Int8(power=2, signed=True), Int8(power=4, signed=False)
KINDS = [("float32", "float32"), ("bfloat16", "float32"), ("int8", "int8"), ("float32", "int8"), ("bfloat16", "factored"), ("int8", "factored")]


def bits(name, moment, count, shape):
    return random_bits(rounding_key(0, count, f"{name}.{moment}"), shape)


def encode(store, x, key=0):
    return store.encode(store.split(x), lambda shape: random_bits(rounding_key(key, jnp.int32(0), "w"), shape))


def test_blocks_divide_the_released_sizes_and_their_shards():
    assert [block_size(n) for n in (2880, 4096, 128, 576, 96, 64, 47, 31)] == [180, 256, 128, 36, 96, 64, 47, None]
    for size in (2880, 4096):
        assert size % block_size(size) == 0 and size // block_size(size) % 16 == 0


@pytest.mark.parametrize("store,low,high", [(FIRST, -1, 1), (SECOND, 0, 1)])
def test_codes_are_one_of_the_two_neighbours_and_unbiased(store, low, high):
    x = np.random.default_rng(0).uniform(low, high, 128).astype(np.float32) ** (3 if low else 6)
    x[0] = 0
    draws = 4000
    stored = encode(store, jnp.tile(x, (draws, 1)))
    assert stored.codes.dtype == (jnp.int8 if store.signed else jnp.uint8) and stored.scales.shape == (draws, 1)
    back = np.asarray(store.decode(stored), np.float64)[:, 0]
    # neighbours of the power map around |x| / max
    share, top = np.abs(x) / np.abs(x).max(), store.top
    k = np.floor(share ** (1 / store.power) * top + 1e-4).clip(max=top - 1)
    gap = (((k + 1) / top) ** store.power - (k / top) ** store.power) * np.abs(x).max()
    assert (np.abs(back - x) <= gap * 1.01 + 1e-12).all()
    assert (np.sign(back) * np.sign(x) >= 0).all() and (back[:, 0] == 0).all()
    # positive second moments below the first code are raised to it, and only those are biased
    unbiased = (k > 0) | store.signed
    error = np.abs(back.mean(axis=0) - x)
    assert (error <= 5 * 0.5 * gap / np.sqrt(draws) + 1e-7)[unbiased].all()
    if not store.signed:
        assert (back[:, x > 0] > 0).all()


def test_a_second_moment_decays_though_a_step_is_less_than_half_a_spacing():
    """b2 = 0.999 without gradient for 500 steps: e^-0.5; with rounding to nearest it would not move."""
    value = np.random.default_rng(0).uniform(0.2, 1, (64, 128)).astype(np.float32)
    stored = encode(SECOND, jnp.asarray(value))

    @jax.jit
    def decay(stored, i):
        return SECOND.encode(0.999 * SECOND.decode(stored), lambda shape: random_bits(rounding_key(1, i, "w"), shape))

    for i in range(500):
        stored = decay(stored, i)
    assert abs(float(SECOND.decode(stored).sum()) / value.sum() / 0.999**500 - 1) < 0.02


def test_float32_moments_are_those_of_optax():
    rng = np.random.default_rng(0)
    params = {"w": jnp.zeros((64, 96)), "b": jnp.zeros(5)}
    ours, theirs = scale_by_adam(0.9, 0.99, 1e-8, "float32", "float32", bits), optax.scale_by_adam(0.9, 0.99, 1e-8)
    state, expected = ours.init(params), theirs.init(params)
    for _ in range(3):
        grads = {name: jnp.asarray(rng.standard_normal(p.shape), jnp.float32) for name, p in params.items()}
        (updates, state), (wanted, expected) = ours.update(grads, state, params), theirs.update(grads, expected, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), (updates, state), (wanted, expected))


def test_factored_second_moment_is_adam_where_squares_have_rank_one():
    """g_ij = +-r_i c_j: then row and column means say everything. Over steps of different size; first moments are off (b1 = 0)."""
    rng = np.random.default_rng(0)
    grads = rng.uniform(0.5, 2, (2, 160, 1)) * rng.uniform(0.5, 2, (2, 1, 96)) * rng.choice([-1, 1], (2, 160, 96))
    params = {"w": jnp.zeros((2, 160, 96))}
    factored, adam = (scale_by_adam(0.0, 0.9, 0.0, "float32", kind, bits) for kind in ("factored", "float32"))
    states = [t.init(params) for t in (factored, adam)]
    assert sum(leaf.size for leaf in jax.tree.leaves(states[0].nu)) == 2 * (160 + 96)
    for scale in (1.0, 3.0, 0.5):
        scaled = {"w": jnp.asarray(scale * grads, jnp.float32)}
        (got, states[0]), (wanted, states[1]) = (t.update(scaled, s, params) for t, s in zip((factored, adam), states))
        np.testing.assert_allclose(got["w"], wanted["w"], rtol=1e-4)


@pytest.mark.parametrize("first,second", KINDS)
def test_every_storage_follows_adam_and_leaves_out_what_is_not_finite(first, second):
    train = dict(steps=100, clip=1.0, schedule={"warmup_ratio": 0})
    names, rng = ("w", "small"), np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.standard_normal((2, 160, 256)), jnp.float32), "small": jnp.ones(7)}
    scale = {"w": 10.0 ** rng.uniform(-3, 0, (2, 160, 1)) * 10.0 ** rng.uniform(-1, 0, (2, 1, 256)), "small": 1.0}
    true = {name: rng.standard_normal(p.shape) for name, p in params.items()}
    results = []
    for kinds in (("float32", "float32"), (first, second)):
        optimizer = make_optimizer(make_train(**train, optimizer={"learning_rate": 0.01, "first_moment": kinds[0], "second_moment": kinds[1]}), names)
        update = jax.jit(lambda *args, optimizer=optimizer: apply_updates(optimizer, *args))
        noise, moved, state = np.random.default_rng(1), params, init_moments(optimizer, params)
        for step in range(20):
            grads = {n: jnp.asarray(scale[n] * (true[n] + noise.standard_normal(p.shape)), jnp.float32) for n, p in params.items()}
            moved, state, norm, made = update(moved, grads, state, jnp.int32(step))
            assert made and np.isfinite(norm)
        bad = {**grads, "small": grads["small"].at[3].set(jnp.nan)}
        kept = update(moved, bad, state, jnp.int32(20))
        assert not kept.made
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), (kept.params, kept.opt_state), (moved, state))
        results.append(np.asarray(moved["w"] - params["w"]).ravel())
    adam, ours = results
    # the direction of 20 steps; without any second moment (plain momentum) the cosine is below 0.5
    assert adam @ ours / np.linalg.norm(adam) / np.linalg.norm(ours) > (0.9 if second == "factored" else 0.99)
    plain = (scale["w"] * true["w"]).ravel()
    assert -adam @ plain / np.linalg.norm(adam) / np.linalg.norm(plain) < 0.5


@pytest.mark.parametrize("first,second", KINDS)
def test_the_compiled_update_writes_in_place(first, second):
    """No copy of a master or moment, which XLA makes where an update reads an array that it has overwritten; every array is donated."""
    optimizer = make_optimizer(make_train(master_dtype="bfloat16", optimizer={"first_moment": first, "second_moment": second}), ["a", "b"])
    params = {"a": jax.ShapeDtypeStruct((4, 320, 512), jnp.bfloat16), "b": jax.ShapeDtypeStruct((256, 1024), jnp.bfloat16)}
    state = jax.eval_shape(lambda p: init_moments(optimizer, p), params)
    step = jax.jit(lambda p, s, g: apply_updates(optimizer, p, g, s, jnp.int32(0))[:2], donate_argnums=(0, 1))
    compiled = step.lower(params, state, params).compile()
    copies = [int(np.prod([int(d) for d in dims.split(",")])) for dims in re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", compiled.as_text())]
    # scales of blocks are copied: 1/32 of the elements here
    assert max(copies, default=0) < 0.1 * max(p.size for p in params.values())
    memory = compiled.memory_analysis()
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((params, state)))
    assert abs(memory.alias_size_in_bytes / held - 1) < 0.02


@pytest.mark.parametrize("first,second", KINDS)
def test_states_lie_where_their_parameters_lie(first, second):
    """On 8 devices: as many bytes on each, but for factors and the scales of blocks that the mesh does not divide."""
    mesh = make_mesh(fsdp=4, data=2)
    sharded = param_shardings(CONFIG, mesh)
    shardings = Shardings(sharded, None, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    train = make_train(master_dtype="bfloat16", optimizer={"first_moment": first, "second_moment": second, "master_residual": "int8"})
    state = abstract_state(CONFIG, train, shardings)
    name = "blocks.0.mlp.experts.gate_up_proj"
    assert not sharded[name].is_fully_replicated and abstract_params(CONFIG)[name].size >= 4096
    leaves = [(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state) if f"'{name}'" in jax.tree_util.keystr(path)]
    for path, leaf in leaves:
        if leaf.ndim >= 4:
            assert np.prod(leaf.sharding.shard_shape(leaf.shape)) * 4 == leaf.size, jax.tree_util.keystr(path)
    assert leaves[-1][1].dtype == jnp.int8 and leaves[-1][1].sharding == sharded[name], "the residual"


def test_codes_are_plain_arrays():
    stored = encode(FIRST, jnp.ones((3, 64)))
    assert isinstance(stored, Codes) and [leaf.shape for leaf in jax.tree.leaves(stored)] == [(3, 1, 64), (3, 1)]
