"""Formats as values."""

import json

import jax
import numpy as np
import pytest

from gptoss_jax.formats import Format, Mxfp4, Mxfp6, Mxfp8, Nvfp4, format_from_dict, get_format, mxfp4, nvfp4

ALL = [
    Mxfp4(), Mxfp4("floor"), Mxfp4("mse"), Mxfp4(compat="modelopt"), Mxfp4(element_round="sr"), Mxfp4(element_round="dither", seed=3),
    Mxfp4(block=64), Nvfp4(mxfp4_rule="even"), Nvfp4(), Nvfp4("exact"), Nvfp4(four_six="mae", scale_round="up"), Nvfp4(tensor_amax=1.5),
    Nvfp4(tensor_amax="given", per_expert=False), Mxfp8(), Mxfp8("e5m2", "floor"), Mxfp6(), Mxfp6("e3m2", element_round="away"),
]  # fmt: skip


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_dict_round_trip_through_json(fmt):
    assert isinstance(fmt, Format)
    again = format_from_dict(json.loads(json.dumps(fmt.to_dict())))
    assert again == fmt and hash(again) == hash(fmt)
    assert len(set(ALL)) == len(ALL)
    options = {key: value for key, value in fmt.to_dict().items() if key != "name"}
    assert get_format(fmt.name, **options) == fmt and eval(repr(fmt), {type(fmt).__name__: type(fmt)}) == fmt


def test_formats_of_the_first_files_are_recorded_as_there():
    """A manifest or checkpoint that names no newer option reads and is written as before there were any."""
    assert Mxfp4().to_dict() == {"name": "mxfp4", "scale_rule": "rceil", "compat": None}
    assert Nvfp4("exact").to_dict() == {"name": "nvfp4", "global_scale": "exact"}
    assert Mxfp4(element_round="sr", seed=3).to_dict() == {**Mxfp4().to_dict(), "element_round": "sr", "seed": 3}


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
    assert get_format("mxfp4", scale_rule="even", element_round="sr") == Mxfp4("even", element_round="sr")
    with pytest.raises(ValueError, match="'mxpf4'.*nearest is 'mxfp4'"):
        get_format("mxpf4")
    with pytest.raises(ValueError, match=r"\['four_six'\] for format 'mxfp4'"):
        get_format("mxfp4", four_six="mse")
    with pytest.raises(TypeError, match="scale_rule.*go with the name"):
        get_format(Mxfp4(), scale_rule="even")
    with pytest.raises(TypeError, match="None"):
        get_format(None)


def test_bad_options_are_refused_at_construction():
    with pytest.raises(ValueError, match="'ceil'"):
        Mxfp4("ceil")
    with pytest.raises(ValueError, match="'floor'"):
        Mxfp4("floor", compat="modelopt")
    with pytest.raises(ValueError, match="'static'"):
        Nvfp4("static")
    with pytest.raises(ValueError, match=r"\['rule'\].*block, compat, element_round, scale_rule, seed"):
        format_from_dict({"name": "mxfp4", "rule": "even"})
    for wrong, message in (
        (lambda: Mxfp4(compat="modelopt", element_round="away"), "ties toward zero"),
        (lambda: Mxfp4(block=48), "block size 48"),
        (lambda: Mxfp4(seed=1), "stochastic"),
        (lambda: Mxfp8("e2m3"), "mxfp8 has elements e4m3 or e5m2"),
        (lambda: Mxfp6(scale_rule="even"), "'even'.*rceil, floor"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    with pytest.raises(ValueError, match="needs a name"):
        format_from_dict({"scale_rule": "even"})


def test_codes_are_pytrees():
    q = mxfp4.encode(np.ones((3, 2, 32), np.float32))
    assert [leaf.shape for leaf in jax.tree.leaves(q)] == [(3, 2, 16), (3, 2, 1)]
    assert jax.tree.map(lambda leaf: leaf[1], q).packed.shape == (2, 16)


@pytest.mark.parametrize(
    ("fmt", "reason"),
    [
        (Mxfp4("even"), None),
        (Mxfp4(element_round="away"), None),
        (Mxfp4(element_round="sr", seed=0), None),
        (Nvfp4(four_six="mse", scale_round="up", tensor_amax=2.0), None),
        (Mxfp4(element_round="sr"), "seed"),
        (Nvfp4(element_round="dither"), "seed"),
        (Mxfp4(block=16), "blocks of 32, not 16"),
        (Nvfp4(block=32), "blocks of 16, not 32"),
        (Nvfp4(tensor_amax="given"), "no file records"),
        (Mxfp8(), "MXFP8"),
    ],
    ids=str,
)
def test_what_files_cannot_hold_says_why(fmt, reason):
    assert fmt.exportable == (reason is None)
    assert fmt.export_problem is None if reason is None else reason in fmt.export_problem


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_parts_are_on_the_grid_and_multiply_to_the_decoded_value(fmt):
    """Bit for bit, in float32, signs of zero included; the scale of a block that is not finite is NaN."""
    x = np.random.default_rng(32).standard_normal((2, 4, 128)).astype(np.float32)
    x[0, 0, :3] = 0.0, -0.0, np.inf
    key = jax.random.key(1) if fmt.stochastic else None
    q = fmt.encode(x, key, amax=np.float32(3)) if getattr(fmt, "tensor_amax", None) == "given" else fmt.encode(x, key)
    elements, scale = (np.asarray(part) for part in fmt.parts(q))
    assert elements.shape == (2, 4, 128 // fmt.block_size, fmt.block_size) and scale.shape == (2, 4, 128 // fmt.block_size, 1)
    assert elements.dtype == scale.dtype == np.float32
    assert set(np.abs(elements).reshape(-1).tolist()) <= set(fmt.magnitudes) and list(fmt.magnitudes) == sorted(set(fmt.magnitudes))
    product, w = (elements * scale).reshape(x.shape), np.asarray(fmt.decode(q, np.float32))
    is_nan = np.isnan(w)
    np.testing.assert_array_equal(np.isnan(product), is_nan)
    assert is_nan.sum() == (32 if getattr(fmt, "mxfp4_rule", None) else fmt.block_size)  # a cast block of MXFP4 is two of NVFP4
    np.testing.assert_array_equal(product[~is_nan].view(np.uint32), w[~is_nan].view(np.uint32))
