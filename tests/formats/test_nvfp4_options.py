"""What NVFP4 can be told beside the kind of its global scale: four-over-six, scales rounded up, given maxima, one scale for a stack of matrices."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gptoss_jax.formats import Nvfp4, nvfp4
from tests import golden
from tests.formats.inputs import BF16
from tests.oracles import fp4

INPUTS, GOLDEN = golden.load("inputs"), golden.load("nvfp4")


@partial(jax.jit, static_argnums=0)
def encode(fmt, x, **more):
    return fmt.encode(x, **more)


def weights(shape=(4, 8, 64), seed=1) -> np.ndarray:
    return (np.random.default_rng(seed).standard_t(5, shape) * 0.02).astype(np.float32)


def error(fmt, x) -> np.ndarray:
    """Squared error by block, in float64."""
    w = np.asarray(fmt.decode(encode(fmt, x), jnp.float32), np.float64)
    return ((w - x.astype(np.float64)) ** 2).reshape(-1, 16).sum(-1)


# ---- four over six ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mse", "mae"])
def test_four_six_writes_the_bytes_of_fouroversix(kind):
    """In the exact mode, on all BF16 cases but those whose squares leave float32 there (`huge`, `tiny`). Left out: blocks for which it stores scale 0
    where this codec stores 2**-9, the smallest."""
    cases = sorted({key.split("/")[0] for key in GOLDEN if f"fouroversix_{kind}/" in key})
    assert len(cases) == 7
    for case in cases:
        x = INPUTS[case]
        q = jax.tree.map(np.asarray, encode(Nvfp4("exact", four_six=kind), golden.padded_blocks(x, 16)))
        codes, scales = fp4.unpack(q.packed).reshape(-1)[: x.size], q.scales.view(np.uint8).reshape(-1)[: x.size // 16]
        other_codes, other_scales = (GOLDEN[f"{case}/fouroversix_{kind}/{part}"] for part in ("blocks", "scales"))
        compared = other_scales.reshape(-1) != 0
        assert compared.mean() > (0.8 if case == "ties_bf16" else 0.999)
        np.testing.assert_array_equal(scales[compared], other_scales.reshape(-1)[compared], err_msg=case)
        values = [(c & 7) * np.where((c & 8) & ((c & 7) > 0), -1, 1) for c in (codes, fp4.unpack(other_codes).reshape(-1))]  # it writes +0 for -0
        np.testing.assert_array_equal(*(v.reshape(-1, 16)[compared] for v in values), err_msg=case)
        assert float(q.global_scale) == np.float32(GOLDEN[f"{case}/fouroversix_{kind}/amax"][0] / np.float32(1536))


@pytest.mark.parametrize("mode", nvfp4.GLOBAL_SCALES)
def test_every_block_has_the_better_of_both_scales(mode):
    """Against the two candidates computed apart, by giving a maximum that leads to the same global scale; equal errors keep amax/6."""
    x = weights((1, 32, 64))
    four_six = Nvfp4(mode, four_six="mse")
    q = jax.tree.map(np.asarray, encode(four_six, x))
    at_6 = Nvfp4(mode, tensor_amax=float(q.global_scale[0]) * 2688)
    assert np.asarray(encode(at_6, x).global_scale) == q.global_scale
    candidates = [error(at_6, x)]
    scale_6 = np.asarray(encode(at_6, x).scales)
    chosen = error(four_six, x)
    is_4 = (q.scales != scale_6).reshape(-1)
    assert 0.2 < is_4.mean() < 0.8
    # the other candidate: scale E4M3(amax / 4g), nearest elements, by the oracle
    blocks = x.astype(np.float64).reshape(-1, 16)
    target = np.abs(blocks).max(-1) / (4 * float(q.global_scale[0]))
    scale_4 = target.astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * float(q.global_scale[0])
    nearest = np.asarray(fp4.E2M1)[fp4._nearest_array(np.abs(blocks) / scale_4[:, None], fp4.E2M1)] * scale_4[:, None]
    candidates.append(((nearest - np.abs(blocks)) ** 2).sum(-1))
    np.testing.assert_allclose(chosen, np.minimum(*candidates), rtol=1e-5)


def test_signal_to_noise_of_four_six():
    """Anchors measured on 2**21 weights by an unrelated implementation."""
    rng = np.random.default_rng(18)
    for sample, plain, anchor in ((rng.standard_normal((512, 1024)), 20.44, 21.22), (rng.laplace(size=(512, 1024)), 20.65, 21.19)):
        x = (sample * 0.02).astype(BF16)
        for fmt, expected in ((Nvfp4(), plain), (Nvfp4(four_six="mse"), anchor)):
            assert 10 * np.log10((x.astype(np.float64) ** 2).sum() / error(fmt, x).sum()) == pytest.approx(expected, abs=0.03), fmt


# ---- scales -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", nvfp4.GLOBAL_SCALES)
def test_scales_rounded_up_are_the_smallest_that_clip_nothing(mode):
    x = np.concatenate([weights((1, 64, 64)), np.linspace(1, 448, 64 * 64, dtype=np.float32).reshape(1, 64, 64)])
    up, nearest = Nvfp4(mode, scale_round="up"), Nvfp4(mode)
    q = jax.tree.map(np.asarray, encode(up, x))
    amax = np.abs(x.astype(np.float64)).reshape(2, 64, 4, 16).max(-1)
    unit = 6 * q.global_scale.astype(np.float64)[:, None, None]
    slack = 1 if mode == "pow2" else 1 + 2.0**-22  # the exact global scale is rounded to float32, and the top block may lie an ulp above
    assert (q.scales.astype(np.float64) * unit * slack >= amax).all()
    below = (q.scales.view(np.uint8) - 1).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    assert (below * unit < amax * slack).all()
    clipped = np.asarray(encode(nearest, x).scales, np.float64) * unit < amax
    assert 0.3 < clipped.mean() < 0.7  # what it is for


def test_a_given_maximum_is_taken_for_the_matrix():
    x = weights()
    measured = nvfp4.tensor_amax(x)
    np.testing.assert_array_equal(measured, np.abs(x).max((1, 2)))
    given = Nvfp4(tensor_amax="given")
    raw = lambda q: [np.asarray(part).tobytes() for part in q]
    assert raw(given.encode(x, amax=measured)) == raw(Nvfp4().encode(x)) == raw(jax.vmap(lambda x, a: given.encode(x, amax=a))(x, measured))
    static = Nvfp4(tensor_amax=0.5)
    assert raw(static.encode(x)) == raw(given.encode(x, amax=0.5)) == raw(given.encode(x, amax=np.full(4, 0.5, np.float32)))
    assert set(np.asarray(static.encode(x).global_scale).tolist()) == {2.0**-12}  # the smallest power of two from 0.5/2688 on
    for fmt, amax in ((given, None), (Nvfp4(), measured), (static, measured)):
        with pytest.raises(TypeError, match="amax"):
            fmt.encode(x, amax=amax)


def test_what_exceeds_the_given_maximum_saturates():
    x = np.full((1, 16), 1.0, np.float32)
    x[0, 0] = 100.0
    w = Nvfp4(tensor_amax=1.0).decode(Nvfp4(tensor_amax=1.0).encode(x), jnp.float32)
    assert 1.0 <= float(w[0, 0]) == 6 * 448 * float(nvfp4.encode(x, options=nvfp4.Options(), amax=1.0).global_scale) < 1.5


def test_the_maximum_of_an_earlier_step_works_as_state_of_a_scan():
    steps = np.stack([weights(seed=s) * (1 + s / 8) for s in range(5)])
    fmt = Nvfp4(tensor_amax="given")

    def step(amax, x):
        w, q = fmt.encode_decode(x, jnp.float32, amax=amax)
        return nvfp4.tensor_amax(x), (w, q.global_scale)

    _, (w, scales) = jax.jit(partial(jax.lax.scan, step))(nvfp4.tensor_amax(steps[0]), steps)
    np.testing.assert_array_equal(scales[1:], [Nvfp4().encode(x).global_scale for x in steps[:-1]])
    np.testing.assert_array_equal(w[0], Nvfp4().decode(Nvfp4().encode(steps[0]), jnp.float32))


def test_one_scale_for_a_stack_of_matrices_is_that_of_their_common_maximum():
    x = weights((2, 3, 8, 64)) * np.float32(2.0) ** np.arange(6, dtype=np.float32).reshape(2, 3, 1, 1)
    fmt = Nvfp4(per_expert=False)
    q = fmt.encode(x)
    assert q.global_scale.shape == (2, 3)  # repeated, so that slices of the codes are codes
    common = np.repeat(np.abs(x).max((1, 2, 3)), 3).reshape(2, 3)
    np.testing.assert_array_equal(nvfp4.tensor_amax(x, per_expert=False), common)
    expected = Nvfp4(tensor_amax="given").encode(x, amax=common)
    assert [np.asarray(part).tobytes() for part in q] == [np.asarray(part).tobytes() for part in expected]
    assert np.asarray(fmt.encode(x[0, 0]).global_scale) == np.asarray(Nvfp4().encode(x[0, 0]).global_scale)


def test_other_block_sizes():
    x = weights((2, 4, 128))
    for block in (32, 64):
        fmt = Nvfp4(block=block)
        q = fmt.encode(x)
        assert q.scales.shape == (2, 4, 128 // block) and fmt.block_size == block
        np.testing.assert_array_equal(np.prod([np.asarray(p) for p in fmt.parts(q)[:1]], 0).shape, (2, 4, 128 // block, block))
        assert error(fmt, x).sum() > error(Nvfp4(), x).sum()
        with pytest.raises(ValueError, match="8 bytes per scale"):
            Nvfp4().decode(q)


def test_bad_options_are_refused():
    for options, message in (
        ({"four_six": "max"}, "'max'.*mse"),
        ({"scale_round": "down"}, "'down'.*up"),
        ({"tensor_amax": "static"}, "'static'"),
        ({"tensor_amax": 0.0}, "positive"),
        ({"tensor_amax": True}, "True"),
        ({"block": 8}, "block size 8"),
        ({"element_round": "up"}, "'up'.*dither"),
        ({"seed": 3}, "stochastic"),
        ({"element_round": "sr", "seed": -1}, "-1"),
    ):
        with pytest.raises(ValueError, match=message):
            Nvfp4(**options)
    assert dataclasses.replace(Nvfp4(), four_six="mae") == Nvfp4(four_six="mae")
