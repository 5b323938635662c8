"""Learned scales: the gradients of their formulas in float64, the beginning at the least squared error, and codes that are what training used."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptoss_jax.formats import Mxfp4, Nvfp4, mxfp4, nvfp4
from gptoss_jax.lab.learned_scale import DualLsq, Lsq, nearest_elements
from tests.formats.inputs import BF16, random_bits
from tests.oracles.fp4 import _nearest_array

NAME = "blocks.0.mlp.experts.gate_up_proj"
GRID = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
BLOCK = {"mxfp4": 32, "nvfp4": 16}


def weights(seed=81, shape=(2, 3, 4, 64)):
    rng = np.random.default_rng(seed)
    return {NAME: jnp.asarray(rng.standard_t(4, shape) * 0.05, jnp.float32), "router.weight": jnp.ones(3)}


def moved(quantizer, params, by):
    """The quantizer's arrays after training moved each by a multiple of `by` times its own step (log2) or value (maximum)."""
    rng = np.random.default_rng(82)
    noise = {name: jnp.asarray(rng.uniform(-by, by, array.shape), jnp.float32) for name, array in quantizer.init(params).items()}
    if quantizer.format.name == "mxfp4":
        return {name: array + noise[name] / quantizer.rate for name, array in quantizer.init(params).items()}
    return {name: array * (1 + noise[name]) for name, array in quantizer.init(params).items()}


def call(quantizer, params, extra):
    return quantizer(params, extra, jax.random.key(0), jnp.int32(0))


def with_gradients(quantizer, params, extra, upstream):
    """(w_q, (gradients of the parameters, of the quantizer's arrays)), from one compiled program."""

    def loss(params, extra):
        w_q = call(quantizer, params, extra)[NAME]
        return (w_q * upstream).sum(), w_q

    grads, value = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, extra)
    return value, grads


def blocked(a, fmt):
    a = np.asarray(a, np.float64)
    return a.reshape(*a.shape[:-1], -1, BLOCK[fmt])


def elements(y):
    return np.sign(y) * np.asarray(GRID)[_nearest_array(np.abs(y), GRID)]


def scale_by_hand(trained, fmt, w):
    """X in float64: 2^round(theta), or E4M3(A / 6 global) * global."""
    if fmt == "mxfp4":
        return np.exp2(np.round(np.asarray(trained, np.float64) * 64))
    g = np.asarray(nvfp4.encode(w).global_scale, np.float64)[..., None, None]
    import ml_dtypes

    return np.minimum(np.asarray(trained, np.float64) / (6 * g), 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * g


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
def test_lsq_value_and_gradients_are_the_written_ones(fmt):
    quantizer, params = Lsq(fmt), weights()
    extra = moved(quantizer, params, by=0.8 if fmt == "mxfp4" else 0.4)
    (suffix,) = {name.removeprefix(NAME) for name in extra}
    upstream = jnp.asarray(np.random.default_rng(83).standard_normal(params[NAME].shape), jnp.float32)
    value, grads = with_gradients(quantizer, params, extra, upstream)

    X = scale_by_hand(extra[NAME + suffix], fmt, params[NAME])[..., None]
    y, g = blocked(params[NAME], fmt) / X, blocked(upstream, fmt)
    q, inside = elements(y), np.abs(y) <= 6
    assert 0.005 < 1 - inside.mean() < 0.2
    np.testing.assert_array_equal(blocked(value, fmt), q * X)
    np.testing.assert_allclose(blocked(grads[0][NAME], fmt), g * inside, rtol=1e-6)
    of_scale = np.sum(g * np.where(inside, q - y, np.sign(y) * 6), axis=-1) / np.sqrt(6 * BLOCK[fmt])
    of_trained = of_scale * X[..., 0] * np.log(2) * 64 if fmt == "mxfp4" else of_scale / 6
    np.testing.assert_allclose(grads[1][NAME + suffix], of_trained, rtol=2e-4, atol=1e-5 * np.abs(of_trained).max())


@pytest.mark.parametrize("on_grid", [True, False])
@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
def test_dual_lsq_value_and_gradients_are_the_written_ones(fmt, on_grid):
    quantizer, params = DualLsq(fmt, learn="both", on_grid=on_grid), weights(84)
    extra = moved(quantizer, params, by=0.8 if fmt == "mxfp4" else 0.4)
    what = quantizer.suffix
    upstream = jnp.asarray(np.random.default_rng(85).standard_normal(params[NAME].shape), jnp.float32)
    value, grads = with_gradients(quantizer, params, extra, upstream)

    pre, stored = scale_by_hand(extra[f"{NAME}{what}_pre"], fmt, params[NAME])[..., None], np.asarray(extra[f"{NAME}{what}_post"], np.float64)
    post = scale_by_hand(stored, fmt, params[NAME])[..., None] if on_grid else (np.exp2(stored * 64) if fmt == "mxfp4" else stored / 6)[..., None]
    y, g = blocked(params[NAME], fmt) / pre, blocked(upstream, fmt)
    q, inside = elements(y), np.abs(y) <= 6
    np.testing.assert_allclose(blocked(value, fmt), q * post, rtol=0 if on_grid else 1e-6)
    np.testing.assert_allclose(blocked(grads[0][NAME], fmt), g * inside * post / pre, rtol=1e-5)
    for which, scale, of_scale in (("post", post, (g * q).sum(-1)), ("pre", pre, -(g * y * inside * post / pre).sum(-1))):
        expected = of_scale / np.sqrt(6 * BLOCK[fmt]) * (scale[..., 0] * np.log(2) * 64 if fmt == "mxfp4" else 1 / 6)
        np.testing.assert_allclose(grads[1][f"{NAME}{what}_{which}"], expected, rtol=2e-4, atol=1e-5 * np.abs(expected).max())
    default = with_gradients(DualLsq(fmt, on_grid=on_grid), params, extra, upstream)[1][1]
    assert not np.any(default[f"{NAME}{what}_pre"]) and np.any(default[f"{NAME}{what}_post"])


@pytest.mark.parametrize("make", [Lsq, DualLsq])
@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
def test_codes_decode_to_what_training_computed_with_bit_for_bit(fmt, make):
    quantizer, params = make(fmt), weights(86)
    for extra in (quantizer.init(params), moved(quantizer, params, by=2.5 if fmt == "mxfp4" else 0.6)):
        trained = jax.jit(lambda p, e: call(quantizer, p, e)[NAME])(params, extra)
        codes = jax.jit(quantizer.encode)(params, extra)[NAME]
        assert quantizer.format.decode(codes, jnp.float32).tobytes() == trained.tobytes() == quantizer.round(params, extra)[NAME].tobytes()
        assert (np.asarray(quantizer.format.decode(codes), np.float32) == np.asarray(trained)).all()  # bfloat16 holds them


def test_mxfp4_files_hold_the_deployed_values_and_nvfp4_files_need_the_codes():
    params = weights(87)
    for make in (Lsq, DualLsq):
        extra = moved(make("mxfp4"), params, by=2.5)
        w_q = make("mxfp4").round(params, extra)[NAME]
        for rule in ("rceil", "floor", "even"):
            np.testing.assert_array_equal(Mxfp4(rule).encode_decode(w_q, jnp.float32)[0], w_q)
    extra = moved(Lsq("nvfp4"), params, by=0.4)
    w_q = Lsq("nvfp4").round(params, extra)[NAME]
    assert (np.asarray(Nvfp4().encode_decode(w_q, jnp.float32)[0]) != np.asarray(w_q)).mean() > 0.01
    with pytest.raises(ValueError, match="on_grid=False"):
        DualLsq("nvfp4", on_grid=False).encode(params, DualLsq("nvfp4").init(params))


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
def test_training_begins_at_the_least_squared_error(fmt):
    params = weights(88)
    w = np.asarray(params[NAME], np.float64)
    error = lambda w_q: ((np.asarray(w_q, np.float64) - w) ** 2).reshape(*w.shape[:-1], -1, BLOCK[fmt]).sum(-1)
    ours = error(Lsq(fmt).round(params, Lsq(fmt).init(params))[NAME])
    assert DualLsq(fmt).round(params, DualLsq(fmt).init(params))[NAME].tobytes() == Lsq(fmt).round(params, Lsq(fmt).init(params))[NAME].tobytes()
    if fmt == "mxfp4":
        np.testing.assert_array_equal(ours, error(Mxfp4("mse").encode_decode(params[NAME], jnp.float32)[0]))
    else:
        own = error(Nvfp4().encode_decode(params[NAME], jnp.float32)[0])
        assert (ours <= own).all() and ours.sum() < 0.95 * own.sum()


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
def test_elements_are_those_of_the_codec_under_its_own_scales(fmt):
    x = np.concatenate([random_bits((64, 64), seed=89, dtype=BF16).astype(np.float32), np.asarray(weights()[NAME]).reshape(-1, 64)])
    x = np.where(np.abs(x) < 1e30, x, 0) * (np.abs(x) > 1e-30)
    format = Mxfp4() if fmt == "mxfp4" else Nvfp4()
    codes = format.encode(x)

    @jax.jit
    def under_its_scales(x, codes):
        scale = format.parts(codes).scale[..., 0]
        return scale, nearest_elements(x, scale, BLOCK[fmt])

    scale, ours = map(np.asarray, under_its_scales(x, codes))
    normal = np.repeat(scale > 2.0**-124, BLOCK[fmt], axis=-1)
    theirs = np.stack([np.asarray(codes.packed) & 15, np.asarray(codes.packed) >> 4], -1).reshape(x.shape)
    np.testing.assert_array_equal(ours[normal], theirs[normal])


def test_zero_blocks_have_finite_gradients():
    params = {NAME: jnp.zeros((2, 4, 64)).at[0, 0, 0].set(1.0)}
    quantizers = [make(fmt, **options) for fmt in ("mxfp4", "nvfp4") for make, options in ((Lsq, {}), (DualLsq, {"learn": "both"}))]
    extras = [quantizer.init(params) for quantizer in quantizers]
    loss = lambda p, extras: jnp.stack([call(quantizer, p, extra)[NAME].sum() for quantizer, extra in zip(quantizers, extras)])
    values, pull = jax.jit(lambda p, extras: jax.vjp(loss, p, extras))(params, extras)
    np.testing.assert_allclose(values, 1, rtol=0.04)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.jit(pull)(jnp.ones(4))))


def test_scales_learn_under_adam():
    """A post scale that has to shrink: half of the loss is gone after it has moved, and the weights stay where they are."""
    params, quantizer = weights(90), DualLsq("nvfp4")
    goal, extra, optimizer = 0.7 * params[NAME], quantizer.init(params), optax.adam(2e-3)
    loss = lambda extra: ((call(quantizer, params, extra)[NAME] - goal) ** 2).sum()

    def step(carry, _):
        extra, state = carry
        updates, state = optimizer.update(jax.grad(loss)(extra), state)
        return (optax.apply_updates(extra, updates), state), None

    (after, _), _ = jax.lax.scan(step, (extra, optimizer.init(extra)), length=40)
    assert loss(after) < 0.5 * loss(extra)


def test_settings_are_recorded_and_checked():
    assert json.loads(json.dumps(DualLsq("nvfp4", learn="both").to_dict())) == {
        "name": "dual_lsq", "format": {"name": "nvfp4", "global_scale": "pow2"}, "learn": "both", "on_grid": True,
    }  # fmt: skip
    assert hash(Lsq("mxfp4")) == hash(Lsq(Mxfp4()))
    with pytest.raises(ValueError, match="not of Nvfp4"):
        Lsq(Nvfp4("exact"))
    with pytest.raises(ValueError, match="not of Mxfp4"):
        Lsq(Mxfp4(element_round="sr"))
    with pytest.raises(ValueError, match="'post' or 'both', not 'pre'"):
        DualLsq("mxfp4", learn="pre")
    assert mxfp4.BLOCK_SIZE == BLOCK["mxfp4"] and nvfp4.BLOCK_SIZE == BLOCK["nvfp4"]
