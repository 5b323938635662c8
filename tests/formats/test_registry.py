"""Formats as values."""

import json

import jax
import numpy as np
import pytest

from gptoss_jax.formats import Format, Mxfp4, Nvfp4, format_from_dict, get_format, mxfp4, nvfp4

ALL = [Mxfp4(), Mxfp4("floor"), Mxfp4("mse"), Mxfp4(compat="modelopt"), Nvfp4(), Nvfp4("exact")]


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_dict_round_trip_through_json(fmt):
    assert isinstance(fmt, Format)
    again = format_from_dict(json.loads(json.dumps(fmt.to_dict())))
    assert again == fmt and hash(again) == hash(fmt)
    assert len(set(ALL)) == len(ALL)


def test_format_object_calls_the_codec_with_its_options():
    x = np.random.default_rng(31).standard_normal((4, 64)).astype(np.float32)
    for fmt, q in {
        Mxfp4("even"): mxfp4.encode(x, "even"),
        Mxfp4(compat="modelopt"): mxfp4.encode(x, compat="modelopt"),
        Nvfp4("exact"): nvfp4.encode(x, "exact"),
    }.items():
        assert [np.asarray(a).tobytes() for a in fmt.encode(x)] == [np.asarray(a).tobytes() for a in q]
    assert (Mxfp4().block_size, Nvfp4().block_size) == (32, 16)


def test_get_format():
    assert get_format("mxfp4") == Mxfp4("rceil") and get_format("nvfp4") == Nvfp4("pow2")
    assert get_format(Mxfp4("mse")) == Mxfp4("mse")
    with pytest.raises(ValueError, match="'mxfp8'.*nearest is 'mxfp4'"):
        get_format("mxfp8")
    with pytest.raises(TypeError, match="None"):
        get_format(None)


def test_bad_options_are_refused_at_construction():
    with pytest.raises(ValueError, match="'ceil'"):
        Mxfp4("ceil")
    with pytest.raises(ValueError, match="'floor'"):
        Mxfp4("floor", compat="modelopt")
    with pytest.raises(ValueError, match="'static'"):
        Nvfp4("static")
    with pytest.raises(ValueError, match=r"\['rule'\].*compat, scale_rule"):
        format_from_dict({"name": "mxfp4", "rule": "even"})
    with pytest.raises(ValueError, match="needs a name"):
        format_from_dict({"scale_rule": "even"})


def test_codes_are_pytrees():
    q = mxfp4.encode(np.ones((3, 2, 32), np.float32))
    assert [leaf.shape for leaf in jax.tree.leaves(q)] == [(3, 2, 16), (3, 2, 1)]
    assert jax.tree.map(lambda leaf: leaf[1], q).packed.shape == (2, 16)
