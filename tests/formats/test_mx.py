"""MXFP8 and MXFP6 against ml_dtypes and rational arithmetic: every bfloat16 value, every scale byte, every code."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gptoss_jax.formats import mx
from tests.formats.inputs import BF16, bf16_beside_maxima, random_bits
from tests.oracles import fp4

TYPES = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "e2m3": ml_dtypes.float6_e2m3fn, "e3m2": ml_dtypes.float6_e3m2fn}
encode = jax.jit(mx.encode, static_argnums=1)
decode = jax.jit(mx.decode, static_argnums=(1, 2))


def oracle(x: np.ndarray, element: str, rule: str) -> tuple[np.ndarray, np.ndarray]:
    """(elements with the sign in bit 7, scale bytes), float64 throughout. ml_dtypes rounds to nearest even; what exceeds its type it makes NaN or
    infinity, so it is clipped before."""
    with np.errstate(invalid="ignore"):
        blocks = x.astype(np.float64).reshape(*x.shape[:-1], -1, 32)
    finite = np.isfinite(blocks).all(-1, keepdims=True)
    a = np.abs(np.where(finite, blocks, 0))
    largest = float(ml_dtypes.finfo(TYPES[element]).max)
    amax = a.max(-1, keepdims=True)
    mantissa, exp = np.frexp(np.where(amax > 0, amax, 1))
    emax = np.frexp(largest)[1]
    s = exp - emax + (mantissa > np.frexp(largest)[0] if rule == "rceil" else 0)
    s = np.where(amax > 0, np.clip(s, -127, 127), -127)
    y = np.minimum(np.ldexp(a, -s), largest)
    index = y.astype(np.float32).astype(TYPES[element]).view(np.uint8)  # quotients by powers of two that round in float32 are far below the grid
    codes = np.where(finite, index, 0).astype(np.uint8) | (np.signbit(blocks).astype(np.uint8) << 7)
    return codes.reshape(x.shape), np.where(finite, s + 127, 255)[..., 0].astype(np.uint8)


def assert_matches_oracle(x, element, rule):
    q = jax.tree.map(np.asarray, encode(x, mx.Options(element, rule)))
    codes, scales = oracle(x, element, rule)
    np.testing.assert_array_equal(q.scales, scales)
    np.testing.assert_array_equal(q.elements, codes)


@pytest.fixture(scope="module")
def every_bf16():
    # maxima on both sides of 1.75 and 1.875, the mantissas of the largest magnitudes
    return bf16_beside_maxima(32, mantissas=(0, 96, 97, 112, 113)).reshape(-1, 32)[::2]


@pytest.mark.parametrize("element", TYPES)
def test_encode_matches_ml_dtypes_for_all_bf16(element, every_bf16):
    for rule in mx.SCALE_RULES:
        assert_matches_oracle(every_bf16, element, rule)


@pytest.mark.parametrize("element", TYPES)
def test_encode_matches_ml_dtypes_on_random_bits_and_between_neighbours(element):
    for rule in mx.SCALE_RULES:
        assert_matches_oracle(random_bits((64, 256), seed=1), element, rule)
        grid = np.arange(128, dtype=np.uint8)
        grid = grid[: len(mx.ELEMENTS[element].magnitudes)].view(TYPES[element]).astype(np.float32)
        ties = (grid[1:] + grid[:-1]) / 2
        beside = np.concatenate([ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(1e9)), grid])
        beside = np.resize(beside, (-(-len(beside) // 31), 31))
        x = np.concatenate([np.full((len(beside), 1), grid[-1]), beside], 1).astype(np.float32)
        for exp in (-130, -20, 0, 60):
            with np.errstate(under="ignore"):
                assert_matches_oracle(np.ldexp(x, exp), element, rule)


@pytest.mark.parametrize("element", TYPES)
def test_decode_is_exact_in_float32_for_every_scale_byte_and_code(element):
    count = len(mx.ELEMENTS[element].magnitudes)
    codes = np.resize(np.concatenate([np.arange(count), 128 + np.arange(count)]).astype(np.uint8), 256)
    elements, scales = np.tile(codes, (256, 1)), np.repeat(np.arange(256, dtype=np.uint8)[:, None], 8, 1)
    values = (codes & 0x7F).view(TYPES[element]).astype(np.float64) * np.where(codes & 0x80, -1, 1)
    with np.errstate(over="ignore"):
        expected = np.ldexp(values, np.arange(256)[:, None] - 127).astype(np.float32)
    finite = np.isfinite(expected) & (np.arange(256) < 255)[:, None]
    got = np.asarray(decode(mx.Codes(elements, scales), mx.Options(element), jnp.float32))
    np.testing.assert_array_equal(got[finite].view(np.uint32), expected[finite].view(np.uint32))
    assert (expected[finite].astype(np.float64) == np.ldexp(values, np.arange(256)[:, None] - 127)[finite]).all()
    assert np.isnan(got[255]).all() and np.isinf(got[:255][~finite[:255]]).all()
    normal = finite & (np.abs(expected) >= 2.0**-126)
    in_bf16 = np.asarray(decode(mx.Codes(elements, scales), mx.Options(element), jnp.bfloat16)).astype(np.float32)
    np.testing.assert_array_equal(in_bf16[normal], expected[normal])


@pytest.mark.parametrize("element", TYPES)
def test_magnitudes_are_those_of_ml_dtypes(element):
    grid = np.arange(len(mx.ELEMENTS[element].magnitudes), dtype=np.uint8).view(TYPES[element]).astype(np.float64)
    assert mx.ELEMENTS[element].magnitudes == tuple(grid.tolist()) and grid[-1] == float(ml_dtypes.finfo(TYPES[element]).max)


def test_rceil_never_clips_and_floor_does():
    x = np.random.default_rng(2).standard_normal((256, 256)).astype(np.float32)
    for element, kind in TYPES.items():
        largest = float(ml_dtypes.finfo(kind).max)
        for rule in mx.SCALE_RULES:
            scale = np.repeat(np.ldexp(1.0, np.asarray(encode(x, mx.Options(element, rule)).scales).astype(int) - 127), 32, -1)
            clipped = (np.abs(x) / scale > largest).mean()
            assert clipped == 0 if rule == "rceil" else clipped > 1e-3


def test_nonfinite_blocks_decode_to_nan_and_no_others():
    x = np.ones((3, 96), np.float32)
    x[[0, 1, 2], [33, 40, 50]] = np.nan, np.inf, -np.inf
    q = encode(x, mx.Options())
    assert (np.asarray(q.scales)[:, 1] == 255).all()
    w = np.asarray(decode(q, mx.Options(), jnp.float32)).reshape(3, 3, 32)
    assert np.isnan(w[:, 1]).all() and (w[:, ::2] == 1).all()
    assert not np.asarray(decode(encode(np.zeros((2, 32), BF16), mx.Options()), mx.Options(), jnp.float32)).any()


def test_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="'e4m4'.*e4m3, e5m2"):
        mx.encode(np.zeros(32, np.float32), mx.Options("e4m4"))
    with pytest.raises(ValueError, match=r"\(4, 48\).*32"):
        mx.encode(np.zeros((4, 48), np.float32))
    with pytest.raises(TypeError, match="float64"):
        mx.encode(np.zeros(32))
    with pytest.raises(ValueError, match="32 bytes per scale"):
        mx.decode(mx.Codes(np.zeros(32, np.uint8), np.zeros(2, np.uint8)))
    with pytest.raises(TypeError, match="int8"):
        mx.decode(mx.Codes(np.zeros(32, np.int8), np.zeros(1, np.uint8)))
    assert fp4.E4M3 == mx.E4M3.magnitudes  # the oracle of block scales and the element table agree
