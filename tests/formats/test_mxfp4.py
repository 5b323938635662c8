"""MXFP4 against an independent oracle: every bfloat16 value, every threshold, every byte."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.formats import mxfp4
from tests.formats.inputs import BF16, bf16_beside_maxima, f32_at_thresholds, random_bits
from tests.oracles import fp4

RULES = ("rceil", "floor", "even", "mse")
encode = jax.jit(mxfp4.encode, static_argnames=("scale_rule", "compat"))
decode = jax.jit(mxfp4.decode, static_argnames="dtype")


def assert_matches_oracle(x: np.ndarray, rule: str):
    q = jax.tree.map(np.asarray, encode(x, scale_rule=rule))
    codes, scales = fp4.mxfp4_encode(x, rule)
    np.testing.assert_array_equal(q.scales, scales)
    np.testing.assert_array_equal(fp4.unpack(q.packed), codes)


@pytest.fixture(scope="module")
def every_bf16():
    # maxima 1, 1.5 and its successor, 1.75 and its predecessor, and just under 2: both sides of every rule's threshold
    return bf16_beside_maxima(32, mantissas=(0, 64, 65, 95, 96, 127)).reshape(-1, 32)


@pytest.mark.parametrize("rule", RULES)
def test_encode_matches_oracle_for_all_bf16_beside_maxima_0_to_8_binades_above(rule, every_bf16):
    assert len(np.unique(every_bf16.view(np.uint16))) == 2**16 - 2 * 128  # all but the infinities and NaNs, which have their own test
    assert_matches_oracle(every_bf16, rule)


def test_modelopt_mode_matches_its_arithmetic_for_all_bf16_beside_maxima_0_to_8_binades_above(every_bf16):
    # random exponents too: quotients that are zero in float32, which it gives code 8
    for x in (every_bf16, random_bits((1024, 32), seed=6, dtype=BF16)):
        q = jax.tree.map(np.asarray, encode(x, compat="modelopt"))
        codes, scales = fp4.modelopt_mxfp4_encode(x)
        np.testing.assert_array_equal(q.scales[:, 0], scales)
        np.testing.assert_array_equal(fp4.unpack(q.packed), codes)


@pytest.mark.parametrize("ulps", [0, 1, -1, 40, -40])
def test_modelopt_mode_beside_float32_thresholds(ulps):
    """It agrees with the float32 log2 at 1.5 * 2**k, below, and well above; 1 ulp above, the log2 sees the difference for small |k| alone."""
    k = np.arange(-120, 127)
    amax = (np.ldexp(np.float32(1.5), k).view(np.int32) + np.int32(ulps)).view(np.float32)
    x = np.zeros((len(k), 32), np.float32)
    x[:, 0] = amax
    scales = np.asarray(encode(x, compat="modelopt").scales)[:, 0]
    np.testing.assert_array_equal(scales, k - 2 + 127 + (ulps > 0))
    differs = fp4.modelopt_mxfp4_encode(x)[1] != scales
    blind = (k < -2) | (k > 5)
    assert not differs[~blind].any() and (ulps == 1 or not differs.any())


@pytest.mark.parametrize("rule", RULES)
def test_encode_matches_oracle_at_every_threshold_and_1_ulp_beside_in_float32(rule):
    exponents = np.arange(-126, 128)
    maxima = np.concatenate([np.ldexp(np.float32(m), exponents) for m in (1.0, 1.25, 1.5, 1.75)])
    midpoints = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
    for shift in (-3, -2, -1):  # every exponent that a rule may give to the block
        scales = np.tile(np.ldexp(1.0, np.maximum(exponents + shift, -127)), 4)
        with np.errstate(over="ignore"):
            beside = (scales[:, None] * midpoints).astype(np.float32)
        beside[~np.isfinite(beside)] = 0
        assert_matches_oracle(f32_at_thresholds(maxima, beside, 32), rule)


@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize("rule", RULES)
def test_encode_matches_oracle_on_random_bits(rule, dtype):
    x = random_bits((64, 256), seed=1, dtype=dtype)
    assert_matches_oracle(x, rule)
    # blocks of one magnitude, subnormal ones among them
    bits = np.random.default_rng(2).integers(0, 2**27, (512, 32), np.uint32) + np.linspace(0, 2**31 - 2**28, 512).astype(np.uint32)[:, None]
    x = bits.view(np.float32)
    assert_matches_oracle(x if dtype == np.float32 else (bits >> 16).astype(np.uint16).view(BF16), rule)
    tiny = np.random.default_rng(3).integers(0, 2**23, (64, 32), np.uint32) >> np.arange(64, dtype=np.uint32)[:, None] // 3
    assert_matches_oracle(tiny.view(np.float32), rule)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=32, max_size=32),
    st.integers(-140, 0),
    st.sampled_from(RULES),
)
def test_both_oracles_and_encode_agree_in_rational_arithmetic(values, exponent, rule):
    x = np.array(values, np.float32)
    with np.errstate(under="ignore"):
        x = np.where(np.arange(32) % 3 == 0, x, np.ldexp(np.round(np.ldexp(x, -126)), exponent)).astype(np.float32)  # many small and equal ones
    byte, codes = fp4.mxfp4_block(x, rule)
    q = encode(x, scale_rule=rule)
    assert (int(q.scales[0]), fp4.unpack(np.asarray(q.packed)).tolist()) == (byte, codes)
    fast_codes, fast_scales = fp4.mxfp4_encode(x, rule)
    assert (int(fast_scales[0]), fast_codes.tolist()) == (byte, codes)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_decode_matches_oracle_for_every_scale_byte_and_code(dtype):
    codes = np.tile(np.arange(16, dtype=np.uint8), (256, 2))
    scales = np.arange(256, dtype=np.uint8)[:, None]
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    with np.errstate(over="ignore"):
        expected = fp4.mxfp4_decode(codes, scales).astype(np.dtype(dtype))  # numpy keeps subnormals, overflows to infinity
    got = np.asarray(decode(mxfp4.Codes(packed, scales), dtype=dtype))
    assert got.dtype == expected.dtype
    unsigned = np.uint32 if dtype == jnp.float32 else np.uint16
    is_nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(got), is_nan)
    np.testing.assert_array_equal(got.view(unsigned)[~is_nan], expected.view(unsigned)[~is_nan])  # bits: signs of zero too
    assert is_nan.all(axis=1).tolist() == [byte == 255 for byte in range(256)]
    assert np.isinf(got[253]).sum() == 8 and np.isinf(got[254]).sum() == 16 and not np.isinf(got[252]).any()


def test_decode_to_float16_is_a_conversion_of_float32():
    q = mxfp4.encode(np.linspace(-3, 3, 64, dtype=np.float32))
    np.testing.assert_array_equal(mxfp4.decode(q, jnp.float16), np.asarray(mxfp4.decode(q, jnp.float32)).astype(np.float16))


def test_even_element_is_in_the_low_nibble():
    x = np.zeros(32, np.float32)
    x[0], x[1], x[31] = 4.0, -1.0, 6.0
    q = mxfp4.encode(x)
    assert q.scales.tolist() == [127]
    assert q.packed.tolist() == [0xA6, *[0] * 14, 0x70]


def test_sign_of_zero_and_of_what_underflows_is_kept():
    x = np.array([0.0, -0.0, 6.0, 0.2, -0.2] + [-0.0] * 27, np.float32)
    q = mxfp4.encode(x)
    assert fp4.unpack(np.asarray(q.packed))[:6].tolist() == [0, 8, 7, 0, 8, 8]
    np.testing.assert_array_equal(np.signbit(mxfp4.decode(q, jnp.float32)), np.signbit(x))


def test_zero_block_has_scale_byte_0():
    q = mxfp4.encode(np.zeros((2, 32), np.float32))
    assert not np.asarray(q.packed).any() and not np.asarray(q.scales).any()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_every_nonfinite_value_turns_its_block_and_no_other_to_nan(rule, dtype):
    top = np.arange(256, dtype=np.uint16)
    nonfinite = ((top & 0x80) << 8 | 0x7F80 | top & 0x7F).astype(np.uint16).view(BF16)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        nonfinite = nonfinite.astype(dtype)
    x = np.ones((256, 3, 32), dtype)
    x[np.arange(256), 1, np.arange(256) % 32] = nonfinite
    assert_matches_oracle(x.reshape(256, 96), rule)
    q = encode(x.reshape(256, 96), scale_rule=rule)
    assert (np.asarray(q.scales)[:, 1] == 255).all() and (np.asarray(q.scales)[:, ::2] < 255).all()
    w = np.asarray(decode(q, dtype=jnp.float32)).reshape(256, 3, 32)
    assert np.isnan(w[:, 1]).all() and np.isfinite(w[:, ::2]).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rule", ["rceil", "floor", "even"])
def test_requantizing_decoded_values_changes_no_value_and_no_canonical_byte(rule, dtype):
    rng = np.random.default_rng(4)
    largest = np.arange(8, dtype=np.uint8)[:, None, None]
    scales = np.arange(253, dtype=np.uint8)[None, :, None]
    codes = rng.integers(0, 8, (8, 253, 32), np.uint8) % (largest + 1)
    codes[..., 5] = largest[..., 0]
    codes |= rng.integers(0, 2, codes.shape, np.uint8) << 3
    scales = np.broadcast_to(scales, (8, 253, 1)).copy()
    q = mxfp4.Codes(codes[..., 0::2] | codes[..., 1::2] << 4, scales)
    w = np.asarray(decode(q, dtype=dtype))
    again = encode(w, scale_rule=rule)
    np.testing.assert_array_equal(np.asarray(decode(again, dtype=dtype)), w)
    np.testing.assert_array_equal(np.asarray(again.packed)[6:], q.packed[6:])
    np.testing.assert_array_equal(np.asarray(again.scales)[6:], scales[6:])


def test_signal_to_noise_of_gaussian_weights():
    """Anchors measured on 2**21 weights by an unrelated implementation: a wrong rule or tie shows as a shift."""
    x = (np.random.default_rng(5).standard_normal((512, 1024)) * 0.02).astype(BF16)
    for rule, anchor in {"floor": 18.87, "rceil": 18.54, "even": 19.01, "mse": 19.06}.items():
        w = np.asarray(decode(encode(x, scale_rule=rule), dtype=jnp.float32))
        signal = x.astype(np.float64)
        db = 10 * np.log10((signal**2).sum() / ((w - signal) ** 2).sum())
        assert db == pytest.approx(anchor, abs=0.02), rule


def test_grid_rounding_agrees_with_ml_dtypes():
    """A third opinion on E2M1: the cast of ml_dtypes, scale 1 throughout."""
    x = np.linspace(-5, 5, 31 * 64, dtype=np.float32).reshape(64, 31)
    x = np.concatenate([np.full((64, 1), 6, np.float32), x], axis=1)
    q = encode(x, scale_rule="rceil")
    assert (np.asarray(q.scales) == 127).all()
    np.testing.assert_array_equal(fp4.unpack(np.asarray(q.packed)), x.astype(ml_dtypes.float4_e2m1fn).view(np.uint8))


def test_refuses_what_it_cannot_encode():
    with pytest.raises(TypeError, match="float16"):
        mxfp4.encode(np.zeros(32, np.float16))
    with pytest.raises(TypeError, match="float64"):
        mxfp4.encode(np.zeros(32))
    with pytest.raises(TypeError, match="int32"):
        mxfp4.encode(np.zeros(32, np.int32))
    with pytest.raises(ValueError, match=r"\(4, 48\).*32"):
        mxfp4.encode(np.zeros((4, 48), np.float32))
    with pytest.raises(ValueError, match="32"):
        mxfp4.encode(np.float32(1))
    with pytest.raises(ValueError, match=r"'ceil'.*rceil, floor, even, mse"):
        mxfp4.encode(np.zeros(32, np.float32), scale_rule="ceil")
    with pytest.raises(ValueError, match="nvidia"):
        mxfp4.encode(np.zeros(32, np.float32), compat="nvidia")
    with pytest.raises(ValueError, match="floor"):
        mxfp4.encode(np.zeros(32, np.float32), "floor", compat="modelopt")
    with pytest.raises(ValueError, match="16 bytes per scale"):
        mxfp4.decode(mxfp4.Codes(np.zeros((2, 16), np.uint8), np.zeros((2, 2), np.uint8)))
    with pytest.raises(TypeError, match="int8"):
        mxfp4.decode(mxfp4.Codes(np.zeros((2, 16), np.int8), np.zeros((2, 1), np.uint8)))
    with pytest.raises(TypeError, match="float8_e8m0fnu"):
        mxfp4.decode(mxfp4.Codes(np.zeros((2, 16), np.uint8), np.zeros((2, 1), ml_dtypes.float8_e8m0fnu)))
