"""Exports rounded stochastically: reproducible from what they record, whatever the cut; formats that no file can hold are refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.checkpoint import compare, export, export_hf, load_params, open_checkpoint, verify_dir
from gptoss_jax.checkpoint.hf_config import MANIFEST
from gptoss_jax.errors import UsageError
from gptoss_jax.formats import Mxfp4, Mxfp8, Nvfp4, format_from_dict
from gptoss_jax.formats.noise import matrix_keys
from gptoss_jax.sharding import make_mesh, param_shardings
from tests.checkpoint.test_load import assert_equal
from tests.support.params import lively_params

FORMATS = [Mxfp4(element_round="sr", seed=3), Nvfp4(element_round="dither", seed=3)]


@pytest.fixture(scope="module")
def masters(tiny_config):
    """float32 weights that lie on no grid."""
    return lively_params(tiny_config)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_the_manifest_reproduces_every_weight(fmt, masters, tiny_config, tmp_path):
    out = export_hf(tmp_path / "out", tiny_config, masters, format=fmt)
    recorded = format_from_dict(json.loads((out / MANIFEST).read_text())["format"])
    assert recorded == fmt
    _, params = load_params(out, jnp.float32)
    for layer, name in enumerate(("blocks.0", "blocks.1", "tail.0")):
        stacked = masters[f"{name}.mlp.experts.down_proj"]
        keys = matrix_keys(recorded.seed, f"model.layers.{layer}.mlp.experts.down_proj", range(8))
        expected = recorded.decode(recorded.encode(stacked.reshape(-1, *stacked.shape[-3:])[0], keys), jnp.float32)
        np.testing.assert_array_equal(np.asarray(params[f"{name}.mlp.experts.down_proj"]).reshape(expected.shape), expected)
    assert verify_dir(out, against=masters).ok


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_every_cut_of_the_model_writes_the_same_bytes(fmt, masters, tiny_config, tmp_path, monkeypatch):
    one = export_hf(tmp_path / "one", tiny_config, masters, format=fmt)
    sharded = jax.device_put(dict(masters), param_shardings(tiny_config, make_mesh(data=1, fsdp=2, expert=2, tensor=2)))
    eight = export_hf(tmp_path / "eight", tiny_config, sharded, format=fmt)
    monkeypatch.setattr(export, "GROUP_BYTES", 3 * 128 * 96 * 4)  # three experts at a time
    monkeypatch.setattr(compare, "PIECE_BYTES", 3 * 128 * 96 * 2)
    groups = export_hf(tmp_path / "groups", tiny_config, {name: np.asarray(p) for name, p in masters.items()}, format=fmt)
    for other in (eight, groups):
        for name in ("model.safetensors", MANIFEST):
            assert (one / name).read_bytes() == (other / name).read_bytes()
    assert verify_dir(groups, against=masters).ok


def test_seed_and_rounding_make_the_difference(masters, tiny_config, tmp_path):
    """Another seed is another model, and a manifest that names another seed, or none, does not verify."""
    fmt = Mxfp4(element_round="sr", seed=3)
    out = export_hf(tmp_path / "out", tiny_config, masters, format=fmt)
    manifest = json.loads((out / MANIFEST).read_text())
    for change, message in (({"seed": 4}, "values differ"), ({"element_round": "dither"}, "values differ"), ({"seed": None}, "needs a seed")):
        (out / MANIFEST).write_text(json.dumps({**manifest, "format": {**manifest["format"], **change}}))
        report = verify_dir(out, against=masters)
        assert any(message in failure for failure in report.failures), change
    nearest = export_hf(tmp_path / "nearest", tiny_config, masters, format=Mxfp4())
    theirs, ours = (open_checkpoint(path).store.array("model.layers.0.mlp.experts.down_proj_blocks") for path in (nearest, out))
    assert 0.2 < (theirs != ours).mean() < 0.8  # bytes with one of two elements on the other side
    scales = [open_checkpoint(path).store.array("model.layers.0.mlp.experts.down_proj_scales") for path in (nearest, out)]
    np.testing.assert_array_equal(*scales)


def test_a_baked_bf16_export_is_rounded_alike(masters, tiny_config, tmp_path):
    fmt = FORMATS[0]
    codes = export_hf(tmp_path / "codes", tiny_config, masters, format=fmt)
    baked = export_hf(tmp_path / "baked", tiny_config, masters, format="bf16", bake=fmt)
    assert_equal(load_params(baked, jnp.float32)[1], {name: np.asarray(p) for name, p in load_params(codes, jnp.float32)[1].items()})
    assert verify_dir(baked, against=masters).ok


def test_what_no_file_can_hold_is_refused_with_the_reason(masters, tiny_config, tmp_path):
    for fmt, reason in (
        (Mxfp4(element_round="sr"), "needs a seed"),
        (Mxfp4(block=16), "blocks of 32"),
        (Nvfp4(tensor_amax="given"), "no file records"),
        (Mxfp8(), "MXFP8"),
    ):
        for arguments in (dict(format=fmt), dict(format="bf16", bake=fmt)):
            with pytest.raises(UsageError, match=f"cannot be exported: .*{reason}"):
                export_hf(tmp_path / "out", tiny_config, masters, **arguments)
    assert list(tmp_path.iterdir()) == []
