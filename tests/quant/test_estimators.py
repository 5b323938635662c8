"""Every estimator against its written formula in float64 over all cells, borders and clipped values, and against public numbers where there are."""

import dataclasses
import json
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gptoss_jax.formats import Mxfp4, Nvfp4
from gptoss_jax.quant import (
    Estimator,
    Gather,
    QuantPolicy,
    cells_of,
    default_policy,
    estimator_from_dict,
    estimator_names,
    estimator_to_dict,
    fake_quant,
    fake_quant_with_codes,
    get_estimator,
    make_expert_quant,
    register_estimator,
)  # fmt: skip
from gptoss_jax.quant.cells import place
from gptoss_jax.quant.estimators.zoo import soft_slope, soft_value
from tests import golden
from tests.formats.inputs import BF16
from tests.oracles import fp4

GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def lattice() -> np.ndarray:
    """[16, 96] float32: every multiple of 1/64 up to 7.98 and every grid point and midpoint, of both signs, beside maxima of many scales."""
    values = np.concatenate([np.arange(0, 511) / 64, -np.arange(0, 511) / 64]).astype(np.float32)
    x = np.zeros((16, 96), np.float32)
    x.reshape(-1, 16)[:, 1:] = np.resize(values, (96, 15))
    x.reshape(-1, 16)[:, 0] = np.resize(np.float32([6, -7.98, 5.5, 7.25, -6, 4, 7]), 96)
    return x * np.exp2(np.arange(16, dtype=np.float32) % 5 - 6)[:, None]


def oracle_cells(x: np.ndarray, fmt):
    """(y, q, a, lower, upper) in float64, blocked, from the independent encoder."""
    if fmt.name == "mxfp4":
        codes, scale_bytes = fp4.mxfp4_encode(x, fmt.scale_rule)
        scale = np.exp2(scale_bytes.astype(np.float64) - 127)
        w, size = fp4.mxfp4_decode(codes, scale_bytes), 32
    else:
        codes, scale_bytes, g = fp4.nvfp4_encode(x)
        ones = np.full_like(codes, 2)  # the code of 1
        scale = fp4.nvfp4_decode(ones, scale_bytes, g)[..., ::16]
        w, size = fp4.nvfp4_decode(codes, scale_bytes, g), 16
    y = x.reshape(*x.shape[:-1], -1, size).astype(np.float64) / scale[..., None]
    q = w.reshape(y.shape) / scale[..., None]
    a = np.abs(y)
    index = np.minimum(np.searchsorted(GRID, a, side="right") - 1, 6)
    return y, q, a, GRID[index], GRID[index + 1]


def formula(name: str, y, q, a, lower, upper, g) -> np.ndarray:
    """dL/dx with the default hyperparameters, as the literature writes it."""
    inside, width = a <= 6, upper - lower
    if name == "ste":
        return g
    if name == "ste_clip":
        return g * inside
    if name == "ste_scale":
        out, (batch, blocks) = g.copy(), y.shape[:2]
        for b in range(batch):
            for c in range(blocks):
                i = int(np.argmax(a[b, c]))
                out[b, c, i] += np.sign(y[b, c, i]) / 6 * sum(g[b, c, j] * (q[b, c, j] - y[b, c, j] * inside[b, c, j]) for j in range(y.shape[-1]))
        return out
    if name == "dge":
        with np.errstate(divide="ignore"):
            return inside * g * np.minimum(np.abs(2 * (a - lower) / width - 1) ** (1 / 5 - 1) / 5, 3)
    if name == "ewgs":
        return g * (1 + 0.2 * np.sign(g) * (y - q))
    if name == "trust":
        return g * (np.abs(y - q) <= 0.5)
    if name == "soft_round":
        T, t = 0.5, (lower + upper) / 2
        return inside * g * width / (2 * T) / np.cosh((a - t) / T) ** 2 / np.tanh(width / (2 * T))
    raise AssertionError(f"write down the formula of {name}")


BUILT_IN = ("ste", "ste_clip", "ste_scale", "dge", "ewgs", "trust", "soft_round")


@cache
def gradients(fmt):
    """(x, g, forward value, dL/dx by estimator) on the lattice, all from one compiled program."""
    x = lattice()
    g = np.random.default_rng(61).standard_normal(x.shape).astype(np.float32)
    pulled = {name: (lambda x, name=name: fake_quant(x, fmt, name)) for name in BUILT_IN}
    made = jax.jit(lambda x, g: {name: (w, pull(g)[0]) for name, (w, pull) in ((name, jax.vjp(f, x)) for name, f in pulled.items())})(x, g)
    return x, g, {name: w for name, (w, _) in made.items()}, {name: grad for name, (_, grad) in made.items()}


@pytest.mark.parametrize("fmt", [Mxfp4("floor"), Nvfp4()], ids=str)
@pytest.mark.parametrize("name", BUILT_IN)
def test_backward_is_the_written_formula_over_all_cells_borders_and_clipped_values(name, fmt):
    x, g, w, grad = gradients(fmt)
    w, grad = w[name], grad[name]
    y, q, a, lower, upper = oracle_cells(x, fmt)
    assert np.unique(lower).size == 7 and (fmt != Mxfp4("floor") or (a > 6).mean() > 0.05)
    expected = formula(name, y, q, a, lower, upper, g.astype(np.float64).reshape(y.shape)).reshape(x.shape)
    np.testing.assert_array_equal(w, fmt.decode(fmt.encode(x), jnp.float32))  # one forward pass for all
    is_border = (np.abs(np.abs(y - q) - 0.5) < 1e-6).reshape(x.shape) & (name == "trust") & (fmt.name == "nvfp4")  # y is a rounded quotient there
    np.testing.assert_allclose(np.where(is_border, 0, grad), np.where(is_border, 0, expected), rtol=2e-5, atol=2e-6)


def test_default_hyperparameters_are_those_of_the_sources():
    assert estimator_names()[: len(BUILT_IN)] == BUILT_IN
    assert [estimator_to_dict(get_estimator(name)) for name in ("dge", "ewgs", "trust", "soft_round")] == [
        {"name": "dge", "k": 5.0, "c": 3.0}, {"name": "ewgs", "delta": 0.2}, {"name": "trust", "T": 0.5}, {"name": "soft_round", "T": 0.5},
    ]  # fmt: skip
    x, g = lattice(), np.ones((16, 96), np.float32)
    slope = lambda estimator: np.asarray(jax.vjp(lambda x: fake_quant(x, "mxfp4", estimator), x)[1](g)[0])
    assert slope(get_estimator("dge", c=2)).max() == 2 and slope("dge").max() == 3
    assert (slope(get_estimator("trust", T=0.25)) == 0).mean() > 0.2 and (slope(get_estimator("ewgs", delta=0)) == 1).all()


def test_dge_gives_the_numbers_of_its_authors():
    """The expected values of the test of Azure/MS-AMP's CUDA operator, in bfloat16."""
    x = np.linspace(-6, 6, 20).astype(np.float32).astype(BF16).astype(np.float32)
    expected = np.array([0.2002, 0.4375, 0.6055, 0.2168, 1.8359, 0.2695, 0.3027, 0.2695, 0.2402, 0.5781])
    cells = place(jnp.asarray(x), jnp.asarray(x), jnp.ones(1, jnp.float32), tuple(GRID))
    slope = get_estimator("dge").backward(cells, jnp.ones(20, jnp.float32))
    np.testing.assert_allclose(slope, [*expected, *expected[::-1]], rtol=2.0**-7)


@pytest.mark.parametrize("case", ["normal_bf16", "heavy_f32", "outlier_bf16"])
def test_clip_mask_is_that_of_model_optimizer(case):
    """Two of its backward passes: a cast with scale 1/300 (product and gradient carry that 300, in the dtype of the input), and an NVFP4 quantizer
    calibrated to half of each block's maximum."""
    vectors, x = golden.load("gradients"), golden.load("inputs")[case]
    upstream = vectors[f"{case}/upstream"]

    def masked(x, scale, grad):
        x, grad = (np.asarray(a, np.float32) for a in (x, grad))
        return np.asarray(get_estimator("ste_clip").backward(place(x, x, jnp.asarray(scale), tuple(GRID)), jnp.asarray(grad)))

    cast = masked(x * x.dtype.type(300), np.ones(1, np.float32), upstream * x.dtype.type(300)).astype(x.dtype)
    np.testing.assert_array_equal(cast, vectors[f"{case}/fp4_cast_ste/grad_x"])
    blocks = x.astype(np.float32).reshape(*x.shape[:-1], -1, 16)
    calibrated = masked(blocks, np.abs(blocks).max(-1, keepdims=True) / 12, upstream.reshape(blocks.shape)).reshape(x.shape)
    np.testing.assert_array_equal(calibrated, vectors[f"{case}/nvfp4_static_clip_half_amax/grad_x"].astype(np.float32))
    assert 0 < (cast == 0).mean() < 1 and 0 < (calibrated == 0).mean() < 1


# ---- the soft staircase ---------------------------------------------------------------------------------------------------------


def test_soft_slope_is_the_derivative_of_the_soft_value():
    y = jnp.linspace(-6.7, 6.7, 401)
    at = lambda y: place(y, y, jnp.ones(1), tuple(GRID))
    both = jax.jit(lambda y, T: (soft_slope(at(y), T), jax.grad(lambda y: soft_value(at(y), T).sum())(y)))
    for temperature in (0.05, 0.5, 3.0):
        np.testing.assert_allclose(*both(y, temperature), rtol=1e-3, atol=1e-5)


def test_soft_value_goes_from_the_identity_to_the_hard_staircase():
    x = lattice()
    cells = jax.jit(lambda x: cells_of(x, Mxfp4()))(x)
    np.testing.assert_allclose(soft_value(cells, 300.0), cells.y, atol=2e-4)
    is_tie = np.asarray(cells.magnitude == cells.middle)
    hard = np.where(is_tie, np.sign(cells.y) * cells.middle, cells.q)
    np.testing.assert_allclose(soft_value(cells, 1e-4), hard, atol=1e-6)


# ---- in programs ----------------------------------------------------------------------------------------------------------------


def test_nothing_is_nan_where_blocks_are_zero_or_tiny():
    x = np.zeros((4, 64), np.float32)
    x[1], x[2, :32], x[3, 0] = 2.0**-127, 3e-39, 2.0**-120
    all_of_them = lambda x: sum(fake_quant(x, fmt, name) for name in BUILT_IN for fmt in ("mxfp4", "nvfp4"))
    assert np.isfinite(jax.jit(lambda x: jax.vjp(all_of_them, x)[1](jnp.ones_like(x))[0])(x)).all()


def test_under_scan_and_remat_as_in_the_model():
    """The gradient of each layer is the estimator applied to the gradient of its quantized weight."""
    rng = np.random.default_rng(62)
    x, weights = jnp.asarray(rng.standard_normal((5, 64)), jnp.float32), jnp.asarray(rng.standard_normal((3, 64, 64)), jnp.float32)
    dge = get_estimator("dge", k=3)

    def loss(weights, quantize):
        layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ quantize(w).T / 8), None))
        return (jax.lax.scan(layer, x, weights)[0] ** 2).sum()

    grads = jax.jit(jax.grad(lambda w: loss(w, lambda w: fake_quant(w, "mxfp4", dge))))(weights)
    quantized = fake_quant(weights, "mxfp4")
    to_master = jax.vjp(lambda w: fake_quant(w, "mxfp4", dge), weights)[1]
    expected = to_master(jax.grad(lambda w: loss(w, lambda w: w))(quantized))[0]
    np.testing.assert_allclose(grads, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("name", ["ewgs", "ste_scale"])
def test_backward_sees_the_shard_and_the_sum_over_devices(fmt, name):
    """Inside shard_map: codes are gathered, gradients summed over devices, then the estimator works on the shard; equal to one device."""
    rng = np.random.default_rng(63)
    x = rng.standard_normal((8, 4, 64)).astype(np.float32)
    upstream = rng.integers(-8, 9, (4, 8, 4, 64)).astype(np.float32)  # small integers: sums are exact in any order
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(x, upstream):
        return jax.grad(lambda x: (fake_quant_with_codes(x, fmt, name, gather=Gather(("fsdp",)))[0] * upstream[0]).sum())(x)

    sharded = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P("fsdp"), P("fsdp")), out_specs=P("fsdp"), check_vma=False))
    expected = jax.jit(lambda x, g: jax.vjp(lambda x: fake_quant(x, fmt, name), x)[1](g)[0])(x, upstream.sum(0))
    np.testing.assert_allclose(sharded(x, upstream), expected, rtol=1e-5, atol=1e-6)  # quotients of two programs differ in the last place


@pytest.mark.parametrize("name", ["ste", "dge", "ste_scale"])
def test_hessian_vector_products_equal_the_finite_difference_of_the_gradient(name):
    """Forward over reverse and reverse over reverse: J^T H J v, H the Hessian at the quantized weight, J the estimator's factors as constants."""
    rng = np.random.default_rng(64)
    x, v, a = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((4, 64), (4, 64), (64, 7)))
    smooth = lambda w: jnp.sum(jnp.tanh(w @ a / 8) ** 2)
    loss = lambda x, mode: smooth(fake_quant(x, Mxfp4("floor"), name, mode=mode))

    for mode in ("vjp", "jvp"):
        np.testing.assert_allclose(
            jax.grad(loss)(x, mode), jax.vjp(lambda x: fake_quant(x, Mxfp4("floor"), name), x)[1](jax.grad(smooth)(fake_quant(x, Mxfp4("floor"))))[0],
            rtol=1e-5, atol=1e-7,
        )  # fmt: skip
    forward_over_reverse = jax.jit(lambda x, v: jax.jvp(lambda x: jax.grad(loss)(x, "jvp"), (x,), (v,))[1])(x, v)
    reverse_over_reverse = jax.grad(lambda x: jnp.vdot(jax.grad(loss)(x, "vjp"), v))(x)

    w = fake_quant(x, Mxfp4("floor"))
    push = lambda t: jax.jvp(lambda x: fake_quant(x, Mxfp4("floor"), name, mode="jvp"), (x,), (t,))[1]
    pull = jax.vjp(lambda x: fake_quant(x, Mxfp4("floor"), name), x)[1]
    np.testing.assert_allclose(jnp.vdot(push(v), w), jnp.vdot(v, pull(w)[0]), rtol=1e-4)  # J and its transpose
    eps = 2.0**-6
    along = (jax.grad(smooth)(w + eps * push(v)) - jax.grad(smooth)(w - eps * push(v))) / (2 * eps)
    finite_difference = pull(along)[0]
    scale = float(jnp.abs(finite_difference).max())
    np.testing.assert_allclose(forward_over_reverse, finite_difference, rtol=0, atol=2e-3 * scale)
    np.testing.assert_allclose(reverse_over_reverse, forward_over_reverse, rtol=0, atol=1e-5 * scale)


def test_forward_mode_needs_a_linear_estimator():
    x = lattice()
    with pytest.raises(ValueError, match="'ewgs' is not linear"):
        fake_quant(x, "mxfp4", "ewgs", mode="jvp")
    with pytest.raises(ValueError, match="unknown mode 'fwd'"):
        fake_quant(x, "mxfp4", mode="fwd")


# ---- names, settings, records ---------------------------------------------------------------------------------------------------


@register_estimator
@dataclass(frozen=True)
class Half:
    """Half of the gradient."""

    factor: float = 0.5

    name: ClassVar[str] = "test_half"
    needs_input: ClassVar[bool] = False
    linear: ClassVar[bool] = True

    def backward(self, cells, grad):
        return self.factor * grad


def test_a_registered_estimator_works_by_name_everywhere():
    x = lattice()
    (grad,) = jax.vjp(lambda x: fake_quant(x, "mxfp4", "test_half"), x)[1](np.ones_like(x))
    assert (np.asarray(grad) == 0.5).all() and isinstance(get_estimator("test_half"), Estimator)
    policy = default_policy("nvfp4", get_estimator("test_half", factor=2))
    assert QuantPolicy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy
    quantize = make_expert_quant(policy, jnp.float32)
    (grad,) = jax.vjp(lambda x: quantize("down_proj", x)[0], x[None])[1](np.ones_like(x)[None])
    assert (np.asarray(grad) == 2).all()


def test_policies_without_an_estimator_are_straight_through():
    raw = default_policy("mxfp4").to_dict()
    assert raw["estimator"] == {"name": "ste"} and QuantPolicy.from_dict({"rules": raw["rules"]}) == default_policy("mxfp4", "ste")


@pytest.mark.parametrize("name", BUILT_IN)
def test_dict_round_trip(name):
    estimator = get_estimator(name)
    assert estimator_from_dict(json.loads(json.dumps(estimator_to_dict(estimator)))) == estimator and hash(estimator) == hash(get_estimator(name))


def test_bad_names_and_hyperparameters_are_named():
    for raw, message in (
        ({"name": "stee"}, "'stee'; nearest is 'ste'"),
        ({}, "unknown estimator None"),
        ({"name": "dge", "K": 3}, "no hyperparameter 'K'; it has k, c"),
        ({"name": "ste", "k": 3}, "it has none"),
        ({"name": "dge", "k": 0.5}, r"k must lie in \[1, 1000\], not 0.5"),
        ({"name": "ewgs", "delta": -1}, "delta must lie"),
        ({"name": "trust", "T": True}, "T must be a number"),
    ):
        with pytest.raises(ValueError, match=message):
            estimator_from_dict(raw)
    with pytest.raises(TypeError, match="has its hyperparameters already"):
        get_estimator(get_estimator("dge"), k=3)
    with pytest.raises(ValueError, match=r"name 'dge' is taken by gptoss_jax\.quant\.estimators\.zoo\.Dge"):
        register_estimator(dataclasses.make_dataclass("Other", [], bases=(Half,), namespace={"name": "dge"}, frozen=True))
    with pytest.raises(TypeError, match="must be a frozen dataclass"):
        register_estimator(type("Loose", (), dict(name="loose", needs_input=False, linear=True, backward=lambda self, cells, grad: grad)))
    with pytest.raises(TypeError, match="lacks needs_input, linear"):
        register_estimator(type("Short", (), dict(name="short", backward=lambda self, cells, grad: grad)))
