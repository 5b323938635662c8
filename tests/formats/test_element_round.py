"""Element rounding other than to nearest even: against rational arithmetic, without bias, and the same however the program is run."""

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.formats import Mxfp4, Mxfp8, Nvfp4, get_format
from gptoss_jax.formats import bits as fb
from gptoss_jax.formats.element_round import STOCHASTIC, rounded_index
from gptoss_jax.formats.minifloat import E2M1, E4M3, E5M2, cell
from gptoss_jax.formats.noise import matrix_keys
from gptoss_jax.formats.scale_rules import scaled_bits
from tests.formats.inputs import BF16, bf16_beside_maxima, random_bits
from tests.oracles import fp4

KEY = jax.random.key(11)
UNBIASED = [Mxfp4(element_round="sr"), Nvfp4(element_round="sr", scale_round="up"), Nvfp4("exact", "sr", scale_round="up"), Mxfp8(element_round="sr"),
            get_format("mxfp6", element="e3m2", element_round="sr"), Mxfp4(element_round="dither")]  # fmt: skip


def spread_weights(rows=64, width=64) -> np.ndarray:
    """Gaussian, with elements far below their block's maximum."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((rows, width)) * np.where(rng.random((rows, width)) < 0.3, 2.0 ** -rng.integers(0, 40, (rows, width)), 1)
    return x.astype(np.float32)


@pytest.mark.parametrize("element", [E2M1, E4M3, E5M2])
def test_cell_is_the_position_between_neighbours_in_rational_arithmetic(element):
    grid = [Fraction(m) for m in element.magnitudes]
    rng = np.random.default_rng(2)
    values = np.concatenate([rng.random(300) * element.largest, np.ldexp(1 + rng.random(300), rng.integers(-50, 4, 300)), np.array(grid, float)])
    values = values.astype(np.float32)
    values = values[values < element.largest]
    index, position = (np.asarray(a) for a in cell(values.view(np.int32), element))
    for value, i, p in zip(values, index, position, strict=True):
        lower, upper = grid[i], grid[i + 1]
        exact = (Fraction(float(value)) - lower) / (upper - lower)
        assert 0 <= exact < 1 and int(p) == int(exact * 2**32)  # truncated; exact unless the value is far below the first cell
        assert int(p) == exact * 2**32 or exact < Fraction(1, 256)


@pytest.mark.parametrize("rule", ["rceil", "floor"])
def test_nearest_even_from_cells_is_the_codec_for_all_bf16(rule):
    """Two unrelated ways to the same code: additions on the bits of a block's grid, and positions in cells."""
    x = bf16_beside_maxima(32, mantissas=(0, 64, 96), spread=(0,)).reshape(-1, 32)[::5]
    fmt = Mxfp4(rule)
    codes = fp4.unpack(np.asarray(fmt.encode(x).packed))
    bits = fb.to_bits(jnp.asarray(x)).reshape(-1, 1, 32)
    scaled = scaled_bits(fb.magnitude(bits), jnp.asarray(fmt.encode(x).scales, jnp.int32)[..., None])
    index = np.asarray(rounded_index(scaled, E2M1, "rne", None)).reshape(x.shape)
    np.testing.assert_array_equal(index, codes & 7)


@pytest.mark.parametrize("fmt", [Mxfp4(element_round="away"), Mxfp4("floor", element_round="away"), Nvfp4(element_round="away")], ids=str)
def test_away_differs_from_nearest_even_in_ties_alone_and_there_by_one_code(fmt):
    rng = np.random.default_rng(3)
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    beside = np.concatenate([ties, ties * (1 + 2.0**-23), ties * (1 - 2.0**-24), rng.random(7) * 6])
    x = (rng.choice(beside, (256, 64)) * rng.choice([-1, 1], (256, 64))).astype(np.float32)
    x[:, ::16] = 6  # scale 1 in both formats: the matrix maximum is 6
    if fmt.name == "nvfp4":
        x[:, ::16] = 2688 / 448
        x[0, 0] = 2688  # global scale 1; block 0 of row 0 alone has another scale
    even = dataclasses.replace(fmt, element_round="rne")
    away, nearest = (fp4.unpack(np.asarray(f.encode(x).packed)).astype(int) for f in (fmt, even))
    scale = np.repeat(np.asarray(fmt.parts(fmt.encode(x)).scale)[..., 0], fmt.block_size, -1)
    y = np.abs(x.astype(np.float64)) / scale
    up = np.isin(y, [0.25, 1.25, 2.5, 5.0])
    assert up.sum() > 500
    np.testing.assert_array_equal(away, nearest + up)


@pytest.mark.parametrize("fmt", UNBIASED, ids=str)
def test_mean_over_keys_is_the_value(fmt):
    """4096 keys. The mean of each element lies within 5 standard errors of it (chance of a false alarm over 512 elements: 3e-4; keys are fixed)."""
    x = spread_weights(8)
    keys = jnp.asarray(matrix_keys(4, "mean", range(4096)))
    w = np.asarray(jax.jit(jax.vmap(lambda key: fmt.encode_decode(x, jnp.float32, key)[0]))(keys)).astype(np.float64)
    grid = np.array(fmt.magnitudes)
    scale = np.repeat(np.asarray(fmt.parts(fmt.encode(x, KEY)).scale, np.float64)[..., 0], fmt.block_size, -1)
    y = np.abs(x.astype(np.float64)) / scale
    assert y.max() <= grid[-1] * (1 + 2.0**-23)  # nothing is clipped
    lower = np.minimum(np.searchsorted(grid, y, side="right") - 1, len(grid) - 2)
    p = np.clip((y - grid[lower]) / (grid[lower + 1] - grid[lower]), 0, 1)
    step = (grid[lower + 1] - grid[lower]) * scale
    bound = 5 * step * np.sqrt(np.maximum(p * (1 - p), 1e-12) / len(keys)) + 2.0**-20 * step
    rare = p * len(keys) < 25  # too few to be normal: count instead
    assert (np.abs(w.mean(0) - x)[~rare] <= bound[~rare]).all()
    counts = (np.abs(w) > (grid[lower] * scale * (1 + 1e-6))[None]).sum(0)
    expected = (p * len(keys))[rare]
    assert (counts[rare] <= 25 + 5 * 5).all() and abs(counts[rare].sum() - expected.sum()) <= 5 * np.sqrt(expected.sum()) + 5
    assert ((np.abs(w) >= grid[lower] * scale * (1 - 1e-6)) & (np.abs(w) <= grid[lower + 1] * scale * (1 + 1e-6))).all()  # one of the two neighbours
    assert (np.signbit(w) == np.signbit(x)).all()


@pytest.mark.parametrize("fmt", UNBIASED, ids=str)
def test_values_on_the_grid_stay_and_zero_stays_zero(fmt):
    x = spread_weights()
    w = np.asarray(fmt.decode(fmt.encode(x, KEY), jnp.float32))
    if fmt.name != "nvfp4":  # there a requantized block may get another scale
        np.testing.assert_array_equal(fmt.decode(fmt.encode(w, jax.random.key(12)), jnp.float32), w)
    tiny = np.zeros((2, 64), np.float32)
    tiny[0, :2] = 2.0**-149, -0.0  # the scale byte is 0 where all else is zero
    assert not np.asarray(fmt.decode(fmt.encode(np.zeros((4096, 64), np.float32), KEY), jnp.float32)).any()
    assert (np.asarray(fmt.decode(fmt.encode(tiny, KEY), jnp.float32))[1] == 0).all()


def test_clipped_elements_go_to_the_largest_magnitude_under_every_key():
    x = np.full((1, 32), 7.9, np.float32)
    w = Mxfp4("floor", element_round="sr")
    assert all((np.asarray(w.decode(w.encode(x, jax.random.key(i)), jnp.float32)) == 6).all() for i in range(8))


def test_dithered_rows_of_like_elements_keep_their_sum():
    """2048 elements at 0.6 of the step from 4 to 6: dithered, the sum is off by less than 4 steps, where independent rounding scatters by 22."""
    x = np.full((32, 2048), 5.2, np.float32)
    off = {}
    for mode in STOCHASTIC:
        fmt = Mxfp4(element_round=mode)
        off[mode] = np.abs(np.asarray(fmt.decode(fmt.encode(x, KEY), jnp.float32), np.float64).sum(-1) - 5.2 * 2048).max() / 2
    assert off["dither"] < 4 < 20 < off["sr"]


@pytest.mark.parametrize("fmt", [Mxfp4(element_round="sr"), Nvfp4(element_round="dither", four_six="mse")], ids=str)
def test_the_same_key_gives_the_same_codes_in_every_program_and_on_every_cut(fmt):
    x = np.concatenate([spread_weights(64, 128), random_bits((64, 128), seed=6)]).reshape(8, 16, 128)
    keys = jnp.asarray(matrix_keys(9, "cut", range(8)))
    raw = lambda tree: [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]
    encode = jax.jit(fmt.encode)
    expected = raw(encode(x, keys))
    assert raw(jax.jit(lambda x, key: fmt.encode_decode(x, jnp.bfloat16, key)[1])(x, keys)) == expected
    assert raw(jax.jit(jax.vmap(fmt.encode))(x, keys)) == expected
    halves = [encode(x[part], keys[part]) for part in (slice(0, 3), slice(3, 8))]
    assert raw(jax.tree.map(lambda *parts: np.concatenate([np.asarray(p) for p in parts]), *halves)) == expected
    mesh = jax.make_mesh((4, 2), ("expert", "rows"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    cut = jax.device_put(x, NamedSharding(mesh, P("expert", "rows")))
    assert raw(encode(cut, keys)) == expected
    one = jax.random.key(3)
    assert raw(encode(jax.device_put(x, NamedSharding(mesh, P("expert", None, "rows"))), one)) == raw(encode(x, one)) != expected
    assert raw(jax.jit(jax.shard_map(fmt.encode, mesh=mesh, in_specs=P("expert"), out_specs=P("expert")))(x, keys)) == expected


def test_a_key_is_needed_exactly_where_rounding_is_stochastic():
    x = np.ones((2, 32), np.float32)
    for make in (lambda mode: Mxfp4(element_round=mode), lambda mode: Nvfp4(element_round=mode), lambda mode: Mxfp8(element_round=mode)):
        for mode in ("rne", "away", "sr", "dither"):
            fmt = make(mode)
            assert fmt.stochastic == (mode in ("sr", "dither"))
            with pytest.raises(TypeError, match=f"{mode}.*needs {'a key' if fmt.stochastic else 'no key'}"):
                fmt.encode(x, None if fmt.stochastic else KEY)
            with pytest.raises(TypeError, match="key"):
                fmt.encode_decode(x, jnp.float32, None if fmt.stochastic else KEY)


def test_bfloat16_and_its_float32_round_alike():
    x = spread_weights().astype(BF16)
    fmt = Mxfp4(element_round="sr")
    np.testing.assert_array_equal(fmt.encode(x, KEY).packed, fmt.encode(x.astype(np.float32), KEY).packed)
