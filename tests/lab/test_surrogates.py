"""Stand-ins for rounding: soft from the identity to the format, noisy without bias; hard when deployed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.formats import Mxfp4, Nvfp4, get_format
from gptoss_jax.lab.surrogates import PseudoNoise, SoftRounding

NAME = "tail.0.mlp.experts.down_proj"


def weights():
    x = np.random.default_rng(91).standard_normal((2, 4, 64)).astype(np.float32)
    return {NAME: jnp.asarray(x), "router.weight": jnp.ones(3)}


@pytest.mark.parametrize("fmt", [Mxfp4("floor"), Nvfp4()], ids=str)
def test_soft_rounding_goes_from_the_weight_to_the_format(fmt):
    params, quantizer = weights(), SoftRounding(fmt, steps=10, start=50.0, end=1e-4)
    run = jax.jit(lambda params, step: quantizer(params, {}, None, step))
    w, w_q = params[NAME], quantizer.round(params, {})[NAME]
    np.testing.assert_array_equal(w_q, fmt.encode_decode(w, jnp.float32)[0])
    largest = 6 * np.repeat(np.asarray(fmt.parts(fmt.encode(w)).scale[..., 0]), fmt.block_size, axis=-1)
    np.testing.assert_allclose(run(params, 0)[NAME], np.clip(w, -largest, largest), atol=2e-3)
    assert np.isclose(run(params, 10)[NAME], w_q, atol=1e-5).mean() > 0.99  # all but those within 1e-3 of a border
    np.testing.assert_array_equal(run(params, 10)[NAME], run(params, 99)[NAME])
    np.testing.assert_allclose([quantizer.temperature(s) for s in (0, 5, 10)], [50, 25, 1e-4], atol=1e-3)


def test_soft_rounding_has_the_derivative_of_its_value():
    """By finite differences, with the maximum of each block, which sets the scale, left alone."""
    fmt, params = Mxfp4(), weights()
    quantizer = SoftRounding(fmt, steps=10, start=0.5, end=0.25)
    value = jax.jit(lambda w: quantizer({NAME: w}, {}, None, jnp.int32(4))[NAME])
    grad = jax.grad(lambda w: value(w).sum())(params[NAME])
    h = 2.0**-10
    difference = (value(params[NAME] + h) - value(params[NAME] - h)) / (2 * h)
    scales = lambda w: np.asarray(fmt.encode(w).scales)
    same = np.repeat(scales(params[NAME] + h) == scales(params[NAME] - h), 32, axis=-1)
    near = np.isclose(grad, difference, atol=0.02, rtol=0.05)
    assert same.mean() > 0.9 and near[same].mean() > 0.98  # the others have a border of two cells, where the slope jumps, within h


def test_noise_is_as_wide_as_the_cell_and_has_no_bias():
    params, quantizer = weights(), PseudoNoise("mxfp4")
    noisy = jax.jit(jax.vmap(lambda key: quantizer(params, {}, key, None)[NAME]))(jax.random.split(jax.random.key(5), 400))
    error = np.asarray(noisy - params[NAME])
    fmt = get_format("mxfp4")
    y = np.abs(np.asarray(params[NAME])) / np.repeat(np.asarray(fmt.parts(fmt.encode(params[NAME])).scale[..., 0]), 32, axis=-1)
    width = np.where(y < 2, 0.5, np.where(y < 4, 1, 2)) * np.abs(np.asarray(params[NAME])) / y
    assert (np.abs(error) <= width / 2 * 1.0001).all() and np.abs(error / width).max() > 0.49
    # mean of 400 uniforms: standard deviation .0144 of the width; the largest of 512 elements below 4.5 of it
    assert np.abs(error.mean(0) / width).max() < 4.5 * np.sqrt(1 / 12 / 400)
    grads = jax.grad(lambda w: quantizer({NAME: w}, {}, jax.random.key(1), None)[NAME].sum())(params[NAME])
    assert (np.asarray(grads) == 1).all()
    assert noisy[0].tobytes() != noisy[1].tobytes()


def test_settings_are_recorded_and_checked():
    assert json.loads(json.dumps(SoftRounding("nvfp4", steps=7).to_dict())) == {
        "name": "soft_rounding", "format": {"name": "nvfp4", "global_scale": "pow2"}, "steps": 7, "start": 1.0, "end": 0.01,
    }  # fmt: skip
    with pytest.raises(ValueError, match="0 < end <= start"):
        SoftRounding("mxfp4", steps=5, end=0)
    with pytest.raises(ValueError, match="at random"):
        PseudoNoise(Mxfp4(element_round="sr"))
