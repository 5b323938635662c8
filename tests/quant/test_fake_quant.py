"""fake_quant: the value is decode(encode(x)), the gradient passes straight through, in any program a foreign model may put it in."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gptoss_jax.formats import Mxfp4, Nvfp4, mxfp4
from gptoss_jax.quant import Ste, fake_quant, fake_quant_with_codes, get_estimator
from tests import golden
from tests.formats.inputs import BF16, random_bits

FORMATS = [Mxfp4("rceil"), Mxfp4("mse"), Mxfp4(compat="modelopt"), Nvfp4("pow2"), Nvfp4("exact")]


def raw(a) -> bytes:
    return np.asarray(a).tobytes()


def weights(shape, dtype=np.float32, seed=41) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32).astype(dtype)


@pytest.mark.parametrize(
    ("fmt", "dtype", "out"),
    [(fmt, np.float32, jnp.bfloat16) for fmt in FORMATS]
    + [(fmt, *dtypes) for fmt in (Mxfp4(), Nvfp4()) for dtypes in ((np.float32, jnp.float32), (BF16, jnp.bfloat16))],
    ids=str,
)
def test_value_is_decode_of_encode_bit_for_bit(fmt, dtype, out):
    x = np.concatenate([weights((64, 64), dtype), random_bits((16, 64), seed=42, dtype=dtype)])
    q = fmt.encode(x)
    w, codes = jax.jit(lambda x: fake_quant_with_codes(x, fmt, dtype=out))(x)
    assert w.dtype == out and raw(w) == raw(fmt.decode(q, out))
    assert [raw(a) for a in codes] == [raw(a) for a in q]


def test_format_and_estimator_by_name():
    x = weights((4, 64), BF16)
    w = fake_quant(x, "mxfp4")
    assert w.dtype == x.dtype and raw(w) == raw(fake_quant(x, Mxfp4("rceil"), Ste())) == raw(mxfp4.decode(mxfp4.encode(x, "rceil")))
    assert raw(fake_quant(x, "nvfp4", "ste")) == raw(fake_quant(x, Nvfp4("pow2")))
    with pytest.raises(ValueError, match="'stee'.*'ste'"):
        fake_quant(x, "mxfp4", "stee")
    with pytest.raises(TypeError, match="estimator"):
        get_estimator(None)
    with pytest.raises(TypeError, match="float64"):
        fake_quant(np.zeros((4, 32)), "mxfp4")
    with pytest.raises(TypeError, match="int32"):
        jax.jit(lambda x: fake_quant(x, "mxfp4"))(np.zeros((4, 32), np.int32))
    with pytest.raises(ValueError, match="block size 32"):
        fake_quant(x, "mxfp4", axis=0)


def test_blocks_run_along_the_axis():
    """An [in, out] kernel (Flax) quantized along `in` is the transpose of the [out, in] weight quantized along its last dim."""
    x = weights((3, 64, 32))
    for fmt in (Mxfp4(), Nvfp4()):
        w, codes = fake_quant_with_codes(x, fmt, axis=-2)
        np.testing.assert_array_equal(w, np.asarray(fake_quant(x.swapaxes(1, 2), fmt)).swapaxes(1, 2))
        assert codes.packed.shape == (3, 32, 32)
        assert (np.asarray(w) != np.asarray(fake_quant(x, fmt))).any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("out", [jnp.float32, jnp.bfloat16])
def test_gradient_is_the_incoming_one_in_the_dtype_of_the_input(dtype, out):
    x = weights((4, 64), dtype)
    upstream = jnp.asarray(weights((4, 64), seed=43)).astype(out)
    for fmt in ("mxfp4", "nvfp4"):
        w, pull = jax.vjp(lambda x, fmt=fmt: fake_quant(x, fmt, dtype=out), x)
        (grad,) = pull(upstream)
        assert w.dtype == out and grad.dtype == dtype
        assert raw(grad) == raw(upstream.astype(dtype))


def test_straight_through_keeps_no_residual():
    x = jnp.asarray(weights((4, 64)))
    _, pull = jax.vjp(lambda x: fake_quant(x, "nvfp4", dtype=jnp.bfloat16), x)
    assert sum(leaf.size for leaf in jax.tree.leaves(pull)) == 0
    # and the compiled gradient of a linear function of w contains no quantization
    text = jax.jit(jax.grad(lambda x: fake_quant(x, "mxfp4").sum())).lower(x).compile().as_text()
    assert "reduce" not in text and "s32" not in text


def test_codes_carry_no_gradient():
    def loss(x):
        w, codes = fake_quant_with_codes(x, "nvfp4")
        return w.sum() + 1e3 * codes.global_scale.sum() + codes.scales.astype(jnp.float32).sum()

    np.testing.assert_array_equal(jax.grad(loss)(weights((4, 64))), np.ones((4, 64), np.float32))


@pytest.mark.parametrize("case", ["normal_bf16", "heavy_f32", "outlier_bf16"])
@pytest.mark.parametrize(("job", "fmt"), [("mxfp4_dynamic", Mxfp4("rceil")), ("nvfp4_static_pass", Nvfp4("pow2"))])
def test_value_and_gradient_of_nvidias_fake_quantizer(case, job, fmt):
    vectors = golden.load("gradients")
    w, pull = jax.vjp(lambda x: fake_quant(x, fmt), golden.load("inputs")[case])
    (grad,) = pull(vectors[f"{case}/upstream"])
    np.testing.assert_array_equal(grad, vectors[f"{case}/{job}/grad_x"])
    if fmt.name == "mxfp4":  # the NVFP4 job uses a calibrated maximum in place of the block's own
        np.testing.assert_array_equal(w, vectors[f"{case}/{job}/y"])


def test_a_stochastic_format_draws_by_its_key_and_the_gradient_knows_what_it_drew():
    """ewgs needs the distance to the grid point that was drawn, not to the nearest."""
    fmt, x, upstream = Mxfp4(element_round="sr"), weights((4, 64)), weights((4, 64), seed=45)
    (w, first), (again, _), (_, other) = (
        jax.vjp(lambda x, key=key: fake_quant(x, fmt, "ewgs", key=jax.random.key(key)), x) for key in (1, 1, 2)
    )  # fmt: skip
    assert raw(w) == raw(again) == raw(fmt.decode(fmt.encode(x, jax.random.key(1)), jnp.float32)) != raw(fake_quant(x, "mxfp4"))
    scale = np.repeat(np.asarray(fmt.parts(fmt.encode(x, jax.random.key(1))).scale[..., 0]), 32, axis=-1)
    (grad,), (different,) = first(upstream), other(upstream)
    np.testing.assert_allclose(grad, upstream * (1 + 0.2 * np.sign(upstream) * (x - w) / scale), rtol=1e-5)
    assert (np.asarray(grad) != different).any()
    with pytest.raises(TypeError, match="needs a key"):
        fake_quant(x, fmt)
    with pytest.raises(TypeError, match="needs no key"):
        fake_quant(x, "mxfp4", key=jax.random.key(1))


# ---- in a foreign model -----------------------------------------------------------------------------------------------------


class QuantDense(nn.Module):
    """A Flax Linen layer that trains through MXFP4, blocks along the contraction dim of its [in, out] kernel."""

    features: int
    fmt: str = "mxfp4"

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(1.0), (x.shape[-1], self.features))
        return jnp.tanh(x @ fake_quant(kernel, self.fmt, axis=0))


class Stack(nn.Module):
    """Layers under scan and remat, as Linen lifts them."""

    depth: int = 3
    fmt: str = "mxfp4"

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(nn.remat(_Step), variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth)
        return layers(x.shape[-1], self.fmt)(x, None)[0]


class _Step(nn.Module):
    features: int
    fmt: str

    @nn.compact
    def __call__(self, x, _):
        return QuantDense(self.features, self.fmt)(x), None


def test_in_flax_linen_under_jit_scan_remat_and_vmap():
    fmt = "mxfp4"
    x = jnp.asarray(weights((5, 32)))
    model = Stack(fmt=fmt)
    params = model.init(jax.random.key(0), x)
    kernels = jax.tree.leaves(params)[0]
    assert kernels.shape == (3, 32, 32)

    def plain(kernels, x):
        """The same in plain JAX: quantized weights as data, gradients passed by hand."""
        for kernel in kernels:
            x = jnp.tanh(x @ kernel)
        return (x**2).sum()

    def loss(params, x):
        return (model.apply(params, x) ** 2).sum()

    value, grads = jax.jit(jax.value_and_grad(loss))(params, x)
    quantized = jnp.stack([fake_quant(kernel, fmt, axis=0) for kernel in kernels])
    expected, expected_grads = jax.value_and_grad(plain)(quantized, x)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    # float32 through three layers: errors are those of the sums, so relative to the largest gradient (9.9), not to each
    np.testing.assert_allclose(jax.tree.leaves(grads)[0], expected_grads, rtol=0, atol=1e-5 * np.abs(expected_grads).max())

    batched = jax.jit(jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0)))(params, jnp.stack([x, 2 * x]))
    np.testing.assert_allclose(batched[0][0], expected, rtol=1e-5)


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
def test_in_plain_jax_under_shard_map(fmt):
    """One expert per device: value and gradient equal those of the whole."""
    x, y = weights((8, 4, 64)), weights((8, 4, 64), seed=44)
    mesh = jax.make_mesh((8,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(x, y):
        return jax.value_and_grad(lambda x: (fake_quant(x, fmt) ** 2 * y).sum())(x)

    def mapped(x, y):
        value, grad = local(x, y)
        return value[None], grad

    values, grad = jax.jit(jax.shard_map(mapped, mesh=mesh, in_specs=P("expert"), out_specs=P("expert")))(x, y)
    w = np.asarray(fake_quant(x, fmt))
    np.testing.assert_allclose(values, (w**2 * y).sum((1, 2)), rtol=1e-5)
    np.testing.assert_array_equal(grad, 2 * w * y)
