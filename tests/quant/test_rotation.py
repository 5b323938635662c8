"""The random Hadamard rotation: orthogonal, undone exactly enough, and transparent to gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.checkpoint import export_hf
from gptoss_jax.errors import UsageError
from gptoss_jax.formats import Mxfp4, Nvfp4
from gptoss_jax.quant import Hadamard, fake_quant, rotated_fake_quant
from tests.support.params import lively_params


def matrix(rotation: Hadamard, width: int) -> np.ndarray:
    """H as float64, from the rotated unit vectors."""
    return np.asarray(rotation.rotate(jnp.eye(width)), np.float64).T


@pytest.mark.parametrize("size", [16, 32, 128])
def test_it_is_walsh_times_signs_in_groups(size):
    width = 2 * size
    h = matrix(Hadamard(size, seed=3), width)
    signs = np.sign(h[0, :size].tolist() + h[size, size:].tolist())
    expected = scipy.linalg.block_diag(*[scipy.linalg.hadamard(size)] * 2) * signs / np.sqrt(size)
    np.testing.assert_allclose(h, expected, rtol=1e-6, atol=0)
    assert 0.2 < (signs > 0).mean() < 0.8 and (signs[:size] != signs[size:]).any()
    assert (matrix(Hadamard(size, seed=4), width) != h).any()


def test_there_and_back_is_the_identity_to_float32_rounding():
    x = np.random.default_rng(1).standard_normal((3, 64, 96)).astype(np.float32)
    rotation = Hadamard(32, 5)
    for axis, y in ((-1, rotation.rotate(x)), (1, rotation.rotate(x, 1))):
        np.testing.assert_allclose(rotation.rotate_back(y, axis), x, atol=2e-6)
        np.testing.assert_allclose(np.linalg.norm(y), np.linalg.norm(x), rtol=1e-6)
    np.testing.assert_array_equal(rotation.rotate(x.swapaxes(1, 2), 1), np.asarray(rotation.rotate(x)).swapaxes(1, 2))


@pytest.mark.parametrize("fmt", [Mxfp4(), Nvfp4(), Mxfp4(element_round="sr")], ids=str)
def test_value_is_the_quantized_rotation_rotated_back(fmt):
    x = np.random.default_rng(2).standard_normal((8, 64)).astype(np.float32)
    rotation, key = Hadamard(32, 1), jax.random.key(1) if fmt.stochastic else None
    h = matrix(rotation, 64)
    rounded = np.asarray(fmt.decode(fmt.encode(rotation.rotate(x), key), jnp.float32), np.float64)
    w = np.asarray(rotated_fake_quant(x, fmt, rotation, key=key))
    np.testing.assert_allclose(w, rounded @ h, atol=1e-6)
    assert w.dtype == x.dtype and rotated_fake_quant(x, fmt, rotation, dtype=jnp.bfloat16, key=key).dtype == jnp.bfloat16


@pytest.mark.parametrize("estimator", ["ste", "ste_clip", "dge"])
def test_gradient_is_that_of_the_estimator_in_rotated_coordinates(estimator):
    x = np.random.default_rng(3).standard_normal((4, 64)).astype(np.float32)
    upstream = np.random.default_rng(4).standard_normal((4, 64)).astype(np.float32)
    fmt, rotation = Mxfp4("floor"), Hadamard(32, 2)
    grad = jax.grad(lambda x: jnp.vdot(rotated_fake_quant(x, fmt, rotation, estimator), upstream))(x)
    h = matrix(rotation, 64)
    _, pull = jax.vjp(lambda y: fake_quant(y, fmt, estimator), rotation.rotate(x))
    (inner,) = pull((upstream.astype(np.float64) @ h.T).astype(np.float32))
    np.testing.assert_allclose(grad, np.asarray(inner, np.float64) @ h, atol=3e-6)
    if estimator == "ste":
        np.testing.assert_allclose(grad, upstream, atol=3e-6)


def test_outliers_cost_less_after_rotation():
    """One element of 20 standard deviations in every block of 32: about 9 dB for MXFP4."""
    x = (np.random.default_rng(5).standard_normal((64, 512)) * 0.02).astype(np.float32)
    x[:, ::32] = 0.4
    error = lambda w: float(((np.asarray(w, np.float64) - x)[np.abs(x) < 0.2] ** 2).sum())
    assert error(rotated_fake_quant(x, "mxfp4", Hadamard(32))) < 0.7 * error(fake_quant(x, "mxfp4"))


def test_every_sharding_gives_the_same_bits():
    x = np.random.default_rng(6).standard_normal((8, 16, 64)).astype(np.float32)
    run = jax.jit(lambda x: rotated_fake_quant(x, "mxfp4", Hadamard(32, 7)))
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    expected = np.asarray(run(x)).tobytes()
    for spec in (P("a", "b"), P(None, "a", "b")):
        assert np.asarray(run(jax.device_put(x, NamedSharding(mesh, spec)))).tobytes() == expected


def test_refusals(tiny_config, tmp_path):
    with pytest.raises(ValueError, match="size 16, 32.*not 48"):
        Hadamard(48)
    with pytest.raises(ValueError, match="-1"):
        Hadamard(32, -1)
    with pytest.raises(ValueError, match="96 is not a multiple of the size 64"):
        rotated_fake_quant(np.zeros((2, 96), np.float32), "mxfp4", Hadamard(64))
    with pytest.raises(UsageError, match="Hadamard"):
        export_hf(tmp_path / "out", tiny_config, lively_params(tiny_config), format=Hadamard(32))
    assert Hadamard(**Hadamard(64, 9).to_dict()) == Hadamard(64, 9)
