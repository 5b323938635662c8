"""Exports in OpenAI's original layout hold the same model: byte for byte after renaming, and by the arithmetic of OpenAI's reference."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gptoss_jax.checkpoint import export, export_hf, load_params, open_checkpoint, verify_dir
from gptoss_jax.errors import UsageError
from gptoss_jax.formats import Mxfp4
from tests.checkpoint import builders
from tests.checkpoint.test_export import as_deployed, in_bf16
from tests.checkpoint.test_load import assert_equal
from tests.checkpoint.test_transformers_training import ATOL, our_logits, tokens_of
from tests.oracles.openai_reference import Reference
from tests.support.params import lively_params


@pytest.fixture(scope="module")
def config(tiny_config):
    """With a trained length at which YaRN's correction range lies within the rotary dims, as the reference asserts."""
    return dataclasses.replace(tiny_config, rope=dataclasses.replace(tiny_config.rope, original_max_position_embeddings=4096))


@pytest.fixture(scope="module")
def openai_masters(config):
    return lively_params(config, seed=7)


@pytest.fixture(scope="module")
def exported(openai_masters, config, tmp_path_factory):
    root = tmp_path_factory.mktemp("openai")
    write = lambda name, **options: export_hf(root / name, config, openai_masters, **options)
    return {
        "mxfp4": write("mxfp4", format=Mxfp4(), layout="openai", max_shard_bytes=120_000),
        "bf16": write("bf16", format="bf16", layout="openai"),
        "hf": write("hf", format=Mxfp4()),
    }


@pytest.mark.parametrize("kind", ["mxfp4", "bf16"])
def test_what_is_written_is_read_again(kind, exported, openai_masters, config):
    expected = as_deployed(openai_masters, Mxfp4()) if kind == "mxfp4" else {name: in_bf16(value) for name, value in openai_masters.items()}
    found, params = load_params(exported[kind], jnp.float32)
    # OpenAI's config does not say up to which length the model goes: it follows from the factor
    assert found == dataclasses.replace(config, max_position_embeddings=4 * 4096)
    assert_equal(params, expected)
    assert open_checkpoint(exported[kind]).layout.naming == "openai" and verify_dir(exported[kind], against=openai_masters).ok


@pytest.mark.parametrize("kind", ["mxfp4", "bf16"])
def test_openais_reference_computes_our_logits(kind, exported, config):
    (tokens,) = tokens_of(config)[:1]
    np.testing.assert_allclose(our_logits(exported[kind], tokens[None])[0], Reference(exported[kind]).logits(tokens), atol=ATOL, rtol=0)


def test_the_bytes_are_those_of_the_hugging_face_layout(exported):
    """Renamed, and q, k and v put together, by a table that is not the library's."""
    expected = builders.openai_tensors(load_file(exported["hf"] / "model.safetensors"))
    files = sorted(exported["mxfp4"].glob("*.safetensors"))
    found = {key: tensor for file in files for key, tensor in load_file(file).items()}
    assert len(files) > 3 and found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) and found[key].dtype == expected[key].dtype for key in expected)


def test_the_files_beside_the_tensors(exported, config):
    dtypes = json.loads((exported["mxfp4"] / "dtypes.json").read_text())
    assert {dtypes[f"block.1.mlp.mlp1_weight.{part}"] for part in ("blocks", "scales")} == {"FP4", "UE8"}
    assert set(dtypes.values()) == {"BF16", "FP4", "UE8"} and len(dtypes) == 15 * 3 + 3
    assert set(json.loads((exported["bf16"] / "dtypes.json").read_text()).values()) == {"BF16"}
    assert "gpt_oss.generate" in (exported["mxfp4"] / "README.md").read_text()


def test_groups_of_rows_make_the_same_files(exported, openai_masters, config, tmp_path, monkeypatch):
    """Also of the fused tensor, whose q, k and v come one after the other."""
    monkeypatch.setattr(export, "GROUP_BYTES", 64 * 96 * 4)
    again = export_hf(tmp_path / "out", config, openai_masters, format=Mxfp4(), layout="openai", max_shard_bytes=120_000)
    for file in exported["mxfp4"].glob("*.safetensors"):
        assert file.read_bytes() == (again / file.name).read_bytes()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(rms_norm_eps=1e-6), "rms_norm_eps is 1e-5, not 1e-06"),
        (dict(layer_types=("full_attention", "sliding_attention", "full_attention")), "alternate"),
        (dict(rope="truncated"), "truncated"),
    ],
)
def test_a_model_that_openais_config_cannot_describe_is_refused(change, reason, openai_masters, config, tmp_path):
    if "rope" in change:
        change = dict(rope=dataclasses.replace(config.rope, truncate=True))
    with pytest.raises(UsageError, match=reason):
        export_hf(tmp_path / "out", dataclasses.replace(config, **change), openai_masters, format=Mxfp4(), layout="openai")
    assert list(tmp_path.iterdir()) == []
