"""NVFP4 with power-of-two global scales against an independent oracle, and what makes those scales worth having."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.formats import minifloat, nvfp4, nvfp4_scales
from tests.formats.inputs import BF16, bf16_beside_maxima, f32_at_thresholds, random_bits
from tests.oracles import fp4

encode = jax.jit(nvfp4.encode, static_argnames="global_scale")
decode = jax.jit(nvfp4.decode, static_argnames="dtype")


def encode_bytes(x: np.ndarray, global_scale: str = "pow2"):
    """(codes, scale bytes, global scales) as numpy."""
    q = jax.tree.map(np.asarray, encode(x, global_scale=global_scale))
    assert q.scales.dtype == ml_dtypes.float8_e4m3fn and q.global_scale.dtype == np.float32
    return fp4.unpack(q.packed), q.scales.view(np.uint8), q.global_scale


def assert_matches_oracle(x: np.ndarray):
    codes, scales, g = encode_bytes(x)
    expected_codes, expected_scales, expected_g = fp4.nvfp4_encode(x)
    np.testing.assert_array_equal(g, expected_g)
    np.testing.assert_array_equal(scales, expected_scales)
    np.testing.assert_array_equal(codes, expected_codes)


@pytest.mark.parametrize("spread", [0, 9, 17])
def test_encode_matches_oracle_for_all_bf16_beside_maxima_0_to_8_binades_above(spread):
    """spread: binades between the blocks' maxima and the matrix's maximum; 9 and 17 reach the E4M3 subnormals and below."""
    # 1.3125 = 1 + 42/128 is the global scale's threshold
    x = bf16_beside_maxima(16, mantissas=(0, 42, 43, 65, 127) if spread == 0 else (42, 43, 65), spread=(spread,))
    if spread == 0:
        assert len(np.unique(x.view(np.uint16))) == 2**16 - 2 * 128
    assert_matches_oracle(x)


def test_global_scale_matches_oracle_at_every_threshold_and_1_ulp_beside_in_float32():
    x = np.zeros((254 * 2 * 3, 1, 16), np.float32)
    maxima = np.concatenate([np.ldexp(np.float32(m), np.arange(-126, 128)) for m in (1.0, 1.3125)])
    x[:, 0, :] = f32_at_thresholds(maxima, np.zeros((len(maxima), 0), np.float32), 16)
    assert_matches_oracle(x)


@pytest.mark.parametrize("g_exp", [-115, -60, -8, 0, 7, 116])
def test_block_scales_and_elements_match_oracle_at_every_midpoint_and_1_ulp_beside(g_exp):
    """Block maxima at 6g times each midpoint of neighbouring E4M3 values; in each block elements at the E2M1 midpoints of its scale."""
    g = 2.0**g_exp
    grid = np.asarray(fp4.E4M3)
    midpoints = np.concatenate([(grid[1:-1] + grid[2:]) / 2, grid[1:]])  # above the lower bound 2**-9
    maxima = (6 * g * midpoints).astype(np.float32)
    scale = np.concatenate([grid[2:], grid[1:]])
    elements = (scale[:, None] * g * np.array([0.25, 0.75, 1.25, 3.5])).astype(np.float32)
    blocks = f32_at_thresholds(maxima, elements, 16)
    top = np.zeros((1, 16), np.float32)
    top[0, 0] = 2688 * g  # pins the global scale
    x = np.concatenate([blocks, top])
    x[np.abs(x) > 2688 * g] = 0  # 1 ulp above the pin
    assert encode_bytes(x)[2] == g
    assert_matches_oracle(x)


@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_encode_matches_oracle_on_random_bits(dtype):
    assert_matches_oracle(random_bits((8, 64, 64), seed=11, dtype=dtype))
    rng = np.random.default_rng(12)
    bits = rng.integers(0, 2**27, (256, 8, 32), np.uint32) + np.linspace(0, 2**31 - 2**28, 256).astype(np.uint32)[:, None, None]
    assert_matches_oracle(bits.view(np.float32) if dtype == np.float32 else (bits >> 16).astype(np.uint16).view(BF16))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=32, max_size=32), st.integers(-20, 0))
def test_both_oracles_and_encode_agree_in_rational_arithmetic(values, exponent):
    x = np.array(values, np.float32).reshape(2, 16)
    with np.errstate(under="ignore"):
        x[1] = np.ldexp(x[0, ::-1], exponent)
    g = fp4.nvfp4_global_scale(np.abs(x).max())
    blocks = [fp4.nvfp4_block(row, g) for row in x]
    expected = [codes for _, codes in blocks], [[byte] for byte, _ in blocks], float(g)
    for got in (encode_bytes(x), fp4.nvfp4_encode(x)):
        assert (got[0].tolist(), got[1].tolist(), float(got[2])) == expected


def test_decode_matches_oracle_for_every_scale_byte_code_and_global_scale():
    codes = np.tile(np.arange(16, dtype=np.uint8), (233, 0x80, 1))
    scales = np.tile(np.arange(0x80, dtype=np.uint8)[:, None], (233, 1, 1))
    g = np.ldexp(np.float32(1), np.arange(-115, 118))
    q = nvfp4.Codes(codes[..., 0::2] | codes[..., 1::2] << 4, scales.view(ml_dtypes.float8_e4m3fn), g)
    with np.errstate(over="ignore"):
        expected = fp4.nvfp4_decode(codes, scales, g)
        for dtype, unsigned in ((np.float32, np.uint32), (BF16, np.uint16)):
            got = np.asarray(decode(q, dtype=np.dtype(dtype)))
            want = expected.astype(dtype)
            exact = np.isfinite(want)  # every finite value is held exactly by the dtype, and produced exactly
            np.testing.assert_array_equal(want[exact].astype(np.float64), expected[exact])
            np.testing.assert_array_equal(got[exact].view(unsigned), want[exact].view(unsigned))
            np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
            np.testing.assert_array_equal(np.isinf(got), np.isinf(want))
    assert np.isnan(expected[:, 0x7F]).all() and not np.isnan(expected[:, :0x7F]).any()


def test_e4m3_agrees_with_ml_dtypes():
    every = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(minifloat.e4m3_value(every)), every.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    a = np.abs(np.random.default_rng(13).standard_cauchy(20000)).astype(np.float32)
    a = np.concatenate([a * 10, a * 2.0**-8]).clip(0, 448)
    got = np.asarray(minifloat.e4m3_byte(a.view(np.int32)))
    np.testing.assert_array_equal(got, a.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))


def test_integer_quotients_are_the_ieee_quotients():
    a = np.abs(random_bits((4096,), seed=19)) * np.float32(2.0**-60)
    b = np.ldexp(np.abs(np.random.default_rng(20).standard_normal(4096)) + 1, np.random.default_rng(21).integers(-60, 40, 4096)).astype(np.float32)
    a[::2] = b[::2] * np.float32(2.5)  # ties and their neighbours
    a[::6] = np.nextafter(a[::6], np.float32(0))
    with np.errstate(all="ignore"):
        expected = a / b
    normal = np.isfinite(expected) & (expected >= 2.0**-126)
    got = np.asarray(jax.jit(nvfp4_scales.quotient_bits)(a.view(np.int32), b.view(np.int32)))
    np.testing.assert_array_equal(got[normal].view(np.float32), expected[normal])
    assert normal.mean() > 0.6 and (got[(expected < 2.0**-126) & (a > 0)] <= 0x800000).all()


def test_value_is_the_same_in_any_order_of_the_products_and_exact_in_bf16():
    x = np.random.default_rng(14).standard_normal((4, 32, 64)).astype(np.float32) * np.float32(0.02)
    q = encode(x)
    e2m1 = np.asarray(minifloat.e2m1_value(fp4.unpack(np.asarray(q.packed)))).astype(BF16)
    scale = np.repeat(np.asarray(q.scales), 16, axis=-1).astype(BF16)
    g = np.asarray(q.global_scale).astype(BF16)[:, None, None]
    w = np.asarray(decode(q, dtype=jnp.bfloat16))
    np.testing.assert_array_equal((e2m1 * scale) * g, w)
    np.testing.assert_array_equal(e2m1 * (scale * g), w)
    np.testing.assert_array_equal((e2m1 * g) * scale, w)
    np.testing.assert_array_equal(w.astype(np.float32), np.asarray(decode(q, dtype=jnp.float32)))


def test_one_global_scale_per_matrix():
    x = np.random.default_rng(15).standard_normal((3, 2, 8, 32)) * 2.0 ** np.arange(-3, 3).reshape(3, 2, 1, 1)
    x = x.astype(np.float32)
    q = nvfp4.encode(x)
    assert q.packed.shape == (3, 2, 8, 16) and q.scales.shape == (3, 2, 8, 2) and q.global_scale.shape == (3, 2)
    for i, j in np.ndindex(3, 2):
        alone = nvfp4.encode(x[i, j])
        assert alone.global_scale.shape == ()
        for part, whole in zip(alone, q, strict=True):
            np.testing.assert_array_equal(part, whole[i, j])
    assert nvfp4.encode(x[0, 0, 0]).global_scale.shape == ()


def test_zero_matrix_and_zero_block():
    q = nvfp4.encode(np.zeros((2, 16), np.float32))
    assert float(q.global_scale) == 1.0 and np.asarray(q.scales).view(np.uint8).tolist() == [[1], [1]] and not np.asarray(q.packed).any()
    x = np.zeros((2, 16), np.float32)
    x[1] = -0.0
    x[0, 0] = 5
    codes, _, _ = encode_bytes(x)
    assert codes[0].tolist() == [7] + [0] * 15 and (codes[1] == 8).all()


@pytest.mark.parametrize("global_scale", nvfp4.GLOBAL_SCALES)
def test_a_nonfinite_value_turns_its_block_and_no_other_to_nan(global_scale):
    for bad in (np.nan, np.inf, -np.inf):
        x = np.random.default_rng(16).standard_normal((4, 48)).astype(np.float32)
        x[2] = 0
        clean = encode_bytes(x, global_scale)
        x[2, 20] = bad
        codes, scales, _ = encode_bytes(x, global_scale)
        assert scales[2, 1] == 0x7F and (codes[2, 16:32] & 7 == 0).all()
        w = np.asarray(decode(encode(x, global_scale=global_scale), dtype=jnp.float32)).reshape(4, 3, 16)
        assert np.isnan(w[2, 1]).all() and np.isnan(w).sum() == 16
        others = [0, 1, 3]  # the global scale is that of the finite elements
        np.testing.assert_array_equal(codes[others], clean[0][others])
        np.testing.assert_array_equal(scales[others], clean[1][others])
    assert encode_bytes(np.full((4, 48), np.nan, np.float32), global_scale)[2] == 1.0


def test_requantizing_decoded_values_changes_none_of_them():
    x = np.random.default_rng(17).standard_t(3, (16, 64, 64)).astype(np.float32)
    for dtype in (jnp.float32, jnp.bfloat16):
        w = np.asarray(decode(encode(x), dtype=dtype))
        np.testing.assert_array_equal(np.asarray(decode(encode(w), dtype=dtype)), w)


def test_signal_to_noise_of_gaussian_weights():
    """20.44 dB was measured by an unrelated implementation with the exact global scale; the power of two costs nothing."""
    x = (np.random.default_rng(18).standard_normal((512, 1024)) * 0.02).astype(BF16)
    signal = x.astype(np.float64)
    for global_scale in nvfp4.GLOBAL_SCALES:
        w = np.asarray(decode(encode(x, global_scale=global_scale), dtype=jnp.float32))
        assert 10 * np.log10((signal**2).sum() / ((w - signal) ** 2).sum()) == pytest.approx(20.44, abs=0.02), global_scale


def test_refuses_what_it_cannot_encode():
    with pytest.raises(TypeError, match="float16"):
        nvfp4.encode(np.zeros(16, np.float16))
    with pytest.raises(TypeError, match="float64"):
        nvfp4.encode(np.zeros(16))
    with pytest.raises(ValueError, match=r"\(4, 24\).*16"):
        nvfp4.encode(np.zeros((4, 24), np.float32))
    with pytest.raises(ValueError, match=r"'amax'.*pow2, exact"):
        nvfp4.encode(np.zeros(16, np.float32), global_scale="amax")
    q = nvfp4.encode(np.zeros((2, 4, 32), np.float32))
    with pytest.raises(ValueError, match="one global scale per matrix"):
        nvfp4.decode(q._replace(global_scale=jnp.float32(1)))
    with pytest.raises(TypeError, match="float8_e4m3fn, not uint8"):
        nvfp4.decode(q._replace(scales=np.zeros((2, 4, 2), np.uint8)))
