"""Bits of rounding: from key and position alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.formats.noise import as_words, dither_bits, matrix_keys, mix, random_bits

KEY = np.array([3, 0x12345678], np.uint32)


def test_bits_are_the_hash_that_is_described():
    def scrambled(x):  # MurmurHash3's fmix32
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    assert mix(np.array([1, 2**31], np.uint32)).tolist() == [scrambled(1), scrambled(2**31)]
    for index in np.ndindex(2, 3, 4):
        row = scrambled((index[0] * 3 + index[1]) ^ int(KEY[0]))
        expected = scrambled((row + index[2] * 0x9E3779B9) % 2**32 ^ int(KEY[1]))
        assert int(random_bits(jnp.asarray(KEY), (2, 3, 4))[index]) == expected


def test_keys_of_leading_dims_make_any_slice_of_them_the_same():
    keys = matrix_keys(7, "a.down_proj", range(6))
    for bits in (random_bits, dither_bits):
        whole = np.asarray(bits(jnp.asarray(keys), (6, 4, 32)))
        np.testing.assert_array_equal(bits(jnp.asarray(matrix_keys(7, "a.down_proj", range(2, 5))), (3, 4, 32)), whole[2:5])
        for i in range(6):
            np.testing.assert_array_equal(bits(jnp.asarray(keys[i]), (4, 32)), whole[i])
    with pytest.raises(ValueError, match=r"\(6,\).*\(5, 32\)"):
        random_bits(jnp.asarray(keys), (5, 32))


def test_seed_name_and_index_each_give_other_keys():
    keys = [tuple(k) for seed in (0, 1) for name in ("a", "b") for k in matrix_keys(seed, name, range(64)).tolist()]
    assert len(set(keys)) == 256 and len({word for key in keys for word in key}) > 500


@pytest.mark.parametrize("bits", [random_bits, dither_bits])
def test_bits_are_uniform_over_positions_and_over_keys(bits):
    """256 bins, chi-squared within 5 standard deviations: bits of one key over a matrix, and of many keys at one position."""
    keys = jnp.asarray(matrix_keys(1, "x", range(65536)))
    for sample in (bits(keys[0], (256, 256)), jax.vmap(lambda key: bits(key, (4, 8))[2, 3])(keys)):
        counts = np.bincount(np.asarray(sample).reshape(-1) >> 24, minlength=256)
        assert ((counts - 256) ** 2 / 256).sum() < 255 + 5 * np.sqrt(2 * 255)


def test_dither_spreads_evenly_along_a_row_and_independent_bits_do_not():
    """Of 64 neighbours, those under p number 64p to within 2 (three-distance theorem); independent bits scatter by up to sqrt(64)/2 = 4."""
    keys = jnp.asarray(matrix_keys(2, "x", range(200)))
    spread = {}
    for bits in (random_bits, dither_bits):
        rows = np.asarray(jax.vmap(lambda key, bits=bits: bits(key, (64,)))(keys)) / 2**32
        spread[bits] = max(np.abs((rows < p).sum(-1) - 64 * p).max() for p in (0.1, 0.25, 0.5, 0.9))
    assert spread[dither_bits] <= 2 < 8 < spread[random_bits]


def test_keys_may_be_jax_keys_of_any_kind_or_words():
    key = jax.random.key(5)
    np.testing.assert_array_equal(as_words(key), jax.random.key_data(key))
    np.testing.assert_array_equal(as_words(KEY), KEY)
    assert as_words(jax.random.split(key, 3)).shape == (3, 2)
    assert as_words(jax.random.key(5, impl="rbg")).shape == (2,)
    for bad in (5, np.zeros(2, np.int32), np.zeros(3, np.uint32)):
        with pytest.raises(TypeError, match="a key is"):
            as_words(bad)
