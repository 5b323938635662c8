"""NVFP4 as other programs store it: the same weights in every layout, judged by the code of ModelOpt and compressed-tensors themselves."""

import importlib.util
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors import safe_open

from gptoss_jax.checkpoint import export, export_hf, load_params, open_checkpoint, verify_dir
from gptoss_jax.errors import CorruptError, UsageError
from gptoss_jax.formats import Mxfp4, Nvfp4
from tests.checkpoint.test_export import as_deployed
from tests.checkpoint.test_load import assert_equal
from tests.support.params import lively_params

SHARED = Nvfp4(per_expert=False)
CASES = {
    "own, shared": ("own", SHARED),
    "modelopt": ("modelopt", SHARED),
    "modelopt, ModelOpt's arithmetic": ("modelopt", Nvfp4("exact", per_expert=False)),
    "modelopt, a constant": ("modelopt", Nvfp4(tensor_amax=8.0)),
    "modelopt, cast": ("modelopt", Nvfp4(mxfp4_rule="rceil", per_expert=False)),
    "compressed-tensors": ("compressed-tensors", Nvfp4()),
    "compressed-tensors, cast": ("compressed-tensors", Nvfp4(mxfp4_rule="rceil")),
}
PIECES = [("blocks.0", 0, 0), ("blocks.1", 0, 1), ("tail.0", None, 2)]


@pytest.fixture(scope="session")
def nvfp4_masters(tiny_config):
    return lively_params(tiny_config, seed=5)


@pytest.fixture(scope="session")
def nvfp4_dirs(nvfp4_masters, tiny_config, tmp_path_factory):
    root = tmp_path_factory.mktemp("nvfp4")
    return {
        name: export_hf(root / name, tiny_config, nvfp4_masters, format=fmt, layout=layout, max_shard_bytes=150_000)
        for name, (layout, fmt) in CASES.items()
    }


def stored(directory):
    """All tensors by the safetensors library."""
    out = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            out |= {key: opened.get_tensor(key) for key in opened.keys()}
    return out


def ours(directory):
    """Decoded expert matrices by layer and projection, float32 [E, out, in]."""
    params = load_params(directory, jnp.float32)[1]
    out = {}
    for part, slot, layer in PIECES:
        for projection in ("gate_up_proj", "down_proj"):
            values = np.asarray(params[f"{part}.mlp.experts.{projection}"])
            out[layer, projection] = values if slot is None else values[slot]
    return out


@pytest.mark.parametrize("case", CASES)
def test_every_layout_loads_to_the_encoded_masters(case, nvfp4_dirs, nvfp4_masters):
    fmt = CASES[case][1]
    assert_equal(load_params(nvfp4_dirs[case], jnp.float32)[1], as_deployed(nvfp4_masters, fmt))
    assert verify_dir(nvfp4_dirs[case], against=nvfp4_masters).ok
    assert len(list(nvfp4_dirs[case].glob("*.safetensors"))) > 2
    if fmt.mxfp4_rule:
        assert_equal(load_params(nvfp4_dirs[case], jnp.float32)[1], as_deployed(nvfp4_masters, Mxfp4()))


def test_a_layout_changes_names_and_not_codes(nvfp4_dirs):
    """The hashes of codes are those of the same model in the own layout."""
    hashes = lambda case: json.loads((nvfp4_dirs[case] / "gptoss_jax_export.json").read_text())["xxh3_128"]
    assert hashes("own, shared")["codes"] == hashes("modelopt")["codes"]
    assert hashes("own, shared")["tensors"] == hashes("modelopt")["tensors"]
    assert hashes("compressed-tensors")["codes"] != hashes("modelopt")["codes"]


@pytest.mark.parametrize("case", ["own, shared", "modelopt", "modelopt, cast", "compressed-tensors"])
def test_groups_of_experts_make_the_same_files(case, nvfp4_dirs, nvfp4_masters, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "GROUP_BYTES", 3 * 128 * 96 * 4)
    layout, fmt = CASES[case]
    again = export_hf(tmp_path / "out", tiny_config, nvfp4_masters, format=fmt, layout=layout, max_shard_bytes=150_000)
    for file in nvfp4_dirs[case].glob("*.safetensors"):
        assert file.read_bytes() == (again / file.name).read_bytes()


def test_names_shapes_and_dtypes_of_modelopt(nvfp4_dirs, tiny_config):
    tensors, experts = stored(nvfp4_dirs["modelopt"]), "model.layers.1.mlp.experts."
    seen = {key.removeprefix(experts): (str(t.dtype), tuple(t.shape)) for key, t in tensors.items() if key.startswith(experts)}
    assert seen == {
        "gate_up_proj": ("torch.uint8", (8, 48, 128)), "gate_up_proj_weight_scale": ("torch.float8_e4m3fn", (8, 6, 128)),
        "gate_up_proj_weight_scale_2": ("torch.float32", ()), "gate_up_proj_bias": ("torch.bfloat16", (8, 128)),
        "down_proj": ("torch.uint8", (8, 32, 96)), "down_proj_weight_scale": ("torch.float8_e4m3fn", (8, 4, 96)),
        "down_proj_weight_scale_2": ("torch.float32", ()), "down_proj_bias": ("torch.bfloat16", (8, 96)),
    }  # fmt: skip


def test_names_shapes_and_dtypes_of_compressed_tensors(nvfp4_dirs):
    tensors, expert = stored(nvfp4_dirs["compressed-tensors"]), "model.layers.2.mlp.experts.7."
    seen = {key.removeprefix(expert): (str(t.dtype), tuple(t.shape)) for key, t in tensors.items() if key.startswith(expert)}
    linear = lambda out, width: {
        "weight_packed": ("torch.uint8", (out, width // 2)), "weight_scale": ("torch.float8_e4m3fn", (out, width // 16)),
        "weight_global_scale": ("torch.float32", (1,)), "bias": ("torch.bfloat16", (out,)),
    }  # fmt: skip
    shapes = {"gate_proj": (64, 96), "up_proj": (64, 96), "down_proj": (96, 64)}
    assert seen == {f"{name}.{kind}": entry for name, shape in shapes.items() for kind, entry in linear(*shape).items()}


# ---- the packages' own arithmetic -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of modelopt's imports
@pytest.mark.parametrize("case", ["modelopt", "modelopt, ModelOpt's arithmetic", "modelopt, cast"])
def test_modelopt_decodes_what_we_decode(case, nvfp4_dirs, nvfp4_masters):
    """nvidia-modelopt 0.47.0. In its arithmetic also encoding gives the bytes that we store."""
    pytest.importorskip("modelopt", reason="judging ModelOpt's layout needs the package nvidia-modelopt")
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    tensors, decoded = stored(nvfp4_dirs[case]), ours(nvfp4_dirs[case])
    for (layer, projection), values in decoded.items():
        key = f"model.layers.{layer}.mlp.experts.{projection}"
        packed, scale = (tensors[key + part].swapaxes(1, 2).contiguous() for part in ("", "_weight_scale"))
        theirs = NVFP4QTensor(torch.Size(values.shape), torch.float32, packed)
        back = theirs.dequantize(torch.float32, scale=scale, double_scale=tensors[key + "_weight_scale_2"], block_sizes={-1: 16})
        assert np.array_equal(back.numpy(), values), key
    if "arithmetic" in case:
        masters = torch.tensor(np.asarray(nvfp4_masters["tail.0.mlp.experts.down_proj"]))
        again, scale, double_scale = NVFP4QTensor.quantize(masters, 16)
        assert double_scale == tensors["model.layers.2.mlp.experts.down_proj_weight_scale_2"]
        assert torch.equal(again._quantized_data.swapaxes(1, 2), tensors["model.layers.2.mlp.experts.down_proj"])
        assert torch.equal(scale.float().swapaxes(1, 2), tensors["model.layers.2.mlp.experts.down_proj_weight_scale"].float())


def test_modelopt_makes_of_our_quant_config_our_config(nvfp4_dirs):
    """config.json says the same as hf_quant_config.json, in the words that ModelOpt's converter finds for it."""
    spec = importlib.util.find_spec("modelopt")
    if spec is None:
        pytest.skip("judging ModelOpt's layout needs the package nvidia-modelopt")
    path = f"{spec.submodule_search_locations[0]}/torch/export/convert_hf_config.py"
    spec = importlib.util.spec_from_file_location("convert_hf_config", path)  # alone: the package imports for a minute
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    directory = nvfp4_dirs["modelopt"]
    expected = module.convert_hf_quant_config_format(json.loads((directory / "hf_quant_config.json").read_text()))
    assert json.loads((directory / "config.json").read_text())["quantization_config"] == expected


@pytest.mark.parametrize("case", ["compressed-tensors", "compressed-tensors, cast"])
def test_compressed_tensors_decompresses_what_we_decode(case, nvfp4_dirs):
    """compressed-tensors 0.20.0, with the scheme that it reads from our config.json."""
    pytest.importorskip("compressed_tensors", reason="judging this layout needs the package compressed-tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    raw = json.loads((nvfp4_dirs[case] / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(raw)
    assert config.format == "nvfp4-pack-quantized"
    (scheme,) = config.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(config.format)
    tensors, decoded = stored(nvfp4_dirs[case]), ours(nvfp4_dirs[case])
    for (layer, projection), values in decoded.items():
        linears = {"down_proj": values} if projection == "down_proj" else {"gate_proj": values[:, 0::2], "up_proj": values[:, 1::2]}
        for linear, expected in linears.items():
            for expert in range(8):
                module = f"model.layers.{layer}.mlp.experts.{expert}.{linear}."
                state = {key.removeprefix(module): t for key, t in tensors.items() if key.startswith(module) and not key.endswith("bias")}
                back = compressor.decompress(state, scheme)["weight"]
                assert np.array_equal(back.float().numpy(), expected[expert]), module


# ---- refusals ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fmt", "layout", "reason"),
    [
        (Nvfp4(), "modelopt", "one global scale per projection, .* one per expert"),
        (Nvfp4("exact"), "compressed-tensors", "reciprocal"),
        (Nvfp4(), "openai", "'openai' is none for experts in NVFP4; known are own, modelopt, compressed-tensors"),
        (Mxfp4(), "modelopt", "'modelopt' is none for experts in MXFP4; known are hf, openai"),
        ("bf16", "own", "'own' is none for experts in BF16"),
    ],
)
def test_a_layout_that_cannot_hold_the_format_is_refused_with_the_reason(fmt, layout, reason, nvfp4_masters, tiny_config, tmp_path):
    with pytest.raises(UsageError, match=reason):
        export_hf(tmp_path / "out", tiny_config, nvfp4_masters, format=fmt, layout=layout)
    assert list(tmp_path.iterdir()) == []


def test_a_block_that_the_cast_does_not_reach_is_refused_by_name(nvfp4_masters, tiny_config, tmp_path):
    name = "blocks.1.mlp.experts.down_proj"
    far = {**nvfp4_masters, name: nvfp4_masters[name].at[0, 3, 5, :32].multiply(2.0**-30)}
    with pytest.raises(CorruptError, match=r"layers\.1\.mlp\.experts\.down_proj.*NaN scale"):
        export_hf(tmp_path / "out", tiny_config, far, format=Nvfp4(mxfp4_rule="rceil"))


def test_config_and_tensors_must_name_the_same_layout(nvfp4_dirs, tmp_path):


    broken = shutil.copytree(nvfp4_dirs["modelopt"], tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "compressed-tensors"
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(CorruptError, match="the tensors hold experts in NVFP4 as modelopt stores them"):
        open_checkpoint(broken)
    bare = shutil.copytree(nvfp4_dirs["modelopt"], tmp_path / "bare")
    (bare / "hf_quant_config.json").unlink()
    assert any("hf_quant_config.json is missing" in failure for failure in verify_dir(bare).failures)
