"""MXFP4 codes become NVFP4 codes of exactly the same values, as far down as E4M3 reaches, and not a block further."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.formats import Mxfp4, Nvfp4, format_from_dict, mxfp4, nvfp4
from gptoss_jax.formats.nvfp4_cast import SPAN, from_mxfp4

E, OUT, BLOCKS = 3, 4, 5


def codes(low, high, seed=0):
    """Random codes, and scale bytes from `low` to `high`, both of which occur in every expert; one block of zeros with an absurd scale."""
    rng = np.random.default_rng(seed)
    packed = rng.integers(0, 256, (E, OUT, BLOCKS * 16)).astype(np.uint8)
    scales = rng.integers(low, high + 1, (E, OUT, BLOCKS)).astype(np.uint8)
    scales[:, 0, :2] = low, high
    packed[1, 2, 16:32] = 0x80  # zeros and negative zeros
    scales[1, 2, 1] = 252
    return mxfp4.Codes(packed, scales)


@pytest.mark.parametrize("per_expert", [True, False])
@pytest.mark.parametrize("top", [3 + SPAN, 120, 251])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_value_is_equal_over_the_whole_span(top, per_expert, dtype):
    q = codes(top - SPAN, top)
    cast = from_mxfp4(q, per_expert)
    assert np.array_equal(cast.packed, q.packed)
    theirs, ours = (np.asarray(x, np.float32) for x in (mxfp4.decode(q, dtype), nvfp4.decode(cast, dtype)))
    assert np.array_equal(theirs, ours)
    assert (len(set(np.asarray(cast.global_scale).tolist())) == 1) or per_expert


def test_experts_have_their_own_span_and_share_one_without_per_expert():
    q = codes(100, 100)
    q.scales[0], q.scales[2] = 60, 140
    assert np.isfinite(nvfp4.decode(from_mxfp4(q), jnp.float32)).all()
    shared = np.asarray(nvfp4.decode(from_mxfp4(q, per_expert=False), jnp.float32))
    assert np.isnan(shared[0]).all() and np.isfinite(shared[2]).all()


def test_a_block_below_the_span_is_marked_and_no_other():
    q = codes(100, 100 + SPAN)
    q.scales[2, 3, 4] = 99
    cast = np.asarray(nvfp4.decode(from_mxfp4(q), jnp.float32))
    assert np.isnan(cast[2, 3, 128:]).all() and np.isnan(cast).sum() == 32
    q.scales[2, 3, 4] = 255
    assert np.isnan(np.asarray(nvfp4.decode(from_mxfp4(q), jnp.float32))).sum() == 32


@pytest.mark.parametrize("rule", ["rceil", "floor", "even", "mse"])
def test_the_format_holds_what_mxfp4_holds(rule):
    x = np.random.default_rng(1).normal(size=(E, OUT, 160)).astype(np.float32)
    expected = np.asarray(Mxfp4(rule).decode(Mxfp4(rule).encode(x), jnp.float32))
    fmt = Nvfp4(mxfp4_rule=rule)
    assert format_from_dict(fmt.to_dict()) == fmt and fmt.exportable
    assert np.array_equal(fmt.decode(fmt.encode(x), jnp.float32), expected)
    values, q = fmt.encode_decode(x, jnp.float32)
    assert np.array_equal(values, expected) and np.array_equal(q.packed, Mxfp4(rule).encode(x).packed)
    ordinary = np.asarray(Nvfp4().decode(Nvfp4().encode(expected), jnp.float32))
    assert 0.1 < np.mean(ordinary != expected) < 0.9  # why there is a cast


@pytest.mark.parametrize("rule", ["rceil", "floor", "even"])
def test_parts_of_a_stack_with_its_maximum_are_encoded_as_in_the_whole(rule):


    x = np.random.default_rng(2).normal(size=(E, OUT, 160)).astype(np.float32) * np.float32([[[1]], [[30]], [[0]]])
    fmt = Nvfp4(mxfp4_rule=rule, per_expert=False)
    whole, given = fmt.encode(x), dataclasses.replace(fmt, tensor_amax="given")
    for expert in range(E):
        part = given.encode(x[expert : expert + 1], amax=float(np.abs(x).max()))
        assert all(np.array_equal(np.asarray(a).view(np.uint8), np.asarray(b[expert : expert + 1]).view(np.uint8)) for a, b in zip(part, whole))


def test_what_is_no_cast_is_refused():
    for options in (dict(mxfp4_rule="up"), dict(mxfp4_rule="rceil", four_six="mse"), dict(mxfp4_rule="rceil", tensor_amax=1.0),
                    dict(mxfp4_rule="rceil", global_scale="exact"), dict(mxfp4_rule="mse", per_expert=False)):  # fmt: skip
        with pytest.raises(ValueError, match="mxfp4_rule|scale rule"):
            Nvfp4(**options)
