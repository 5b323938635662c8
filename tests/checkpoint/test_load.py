"""Every layout gives the same parameters, bit for bit those of transformers' own dequantization, however they are sharded."""

import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.checkpoint import load, load_params, open_checkpoint
from gptoss_jax.checkpoint.load import load_share
from gptoss_jax.checkpoint.safetensors_io import SafetensorsFile
from gptoss_jax.checkpoint.source import NANO
from gptoss_jax.errors import CorruptError, UsageError
from gptoss_jax.formats import mxfp4
from gptoss_jax.model import abstract_params, logical_axes
from tests.checkpoint import builders
from tests.checkpoint.builders import CONFIG, OPENAI_CONFIG, QUANTIZATION

MXFP4_CONFIG = {**CONFIG, "quantization_config": QUANTIZATION}
NEW_ROPE = {k: v for k, v in MXFP4_CONFIG.items() if k not in ("rope_scaling", "rope_theta")} | {
    "rope_parameters": {**CONFIG["rope_scaling"], "rope_theta": 150000.0}
}


def assert_equal(params, expected):
    assert params.keys() == expected.keys()
    for name, value in expected.items():
        found = np.asarray(params[name]).astype(np.float32)
        assert found.shape == value.shape and np.array_equal(found, value), name


def in_openai_bf16(tensors):
    """OpenAI's layout with BF16 experts as [E, out, in]."""
    out = builders.openai_tensors(tensors)
    for key, value in builders.bf16_tensors(tensors).items():
        for ours, theirs in (("gate_up_proj", "mlp1_weight"), ("down_proj", "mlp2_weight")):
            if key.endswith(f"experts.{ours}"):
                new = f"block.{key.split('.')[2]}.mlp.{theirs}"
                del out[new + ".blocks"], out[new + ".scales"]
                out[new] = value.transpose(1, 2).contiguous()
    return out


LAYOUTS = {
    "hf mxfp4": (lambda t: t, MXFP4_CONFIG),
    "hf mxfp4, new rope": (lambda t: t, NEW_ROPE),
    "hf bf16": (builders.bf16_tensors, CONFIG),
    "hf float32": (lambda t: builders.bf16_tensors(t, torch.float32), CONFIG),
    "openai mxfp4": (builders.openai_tensors, OPENAI_CONFIG),
    "openai bf16": (in_openai_bf16, OPENAI_CONFIG),
}


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_transformers_values(layout, shards, tensors, expected, tmp_path, mxfp4_dir):
    convert, raw = LAYOUTS[layout]
    config, params = load_params(builders.write(tmp_path / "m", convert(tensors), raw, shards), jnp.float32)
    assert config == open_checkpoint(mxfp4_dir).config
    assert_equal(params, expected)


def test_bfloat16_holds_the_same_values(mxfp4_dir, expected):
    _, params = load_params(mxfp4_dir)
    assert all(value.dtype == jnp.bfloat16 for value in params.values())
    assert_equal(params, expected)


def test_openai_shards_need_no_index(tensors, expected, tmp_path):
    directory = builders.write(tmp_path, builders.openai_tensors(tensors), OPENAI_CONFIG, shards=3, pattern="model--{:05d}-of-{:05d}.safetensors")
    (directory / "model.safetensors.index.json").unlink()
    assert_equal(load_params(directory, jnp.float32)[1], expected)


def test_every_code_at_every_legal_scale(tensors, tmp_path):
    """Subnormal results included: scale bytes 0 to 252, all 16 codes, in both dtypes."""
    tensors = dict(tensors)
    key = "model.layers.1.mlp.experts.gate_up_proj"
    scales = torch.arange(builders.E * 2 * builders.F * 3).reshape(builders.E, 2 * builders.F, 3) % 253
    codes = torch.arange(16, dtype=torch.uint8)
    tensors[key + "_blocks"] = (codes | (codes.flip(0) << 4)).expand(*scales.shape, 16).contiguous()
    tensors[key + "_scales"] = scales.to(torch.uint8)
    directory = builders.write(tmp_path, tensors, MXFP4_CONFIG)
    # the format's own definition in float64; float32 and bfloat16 hold every such value exactly
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    block = np.stack([values, values[::-1]], axis=1).reshape(-1)
    wanted = (2.0 ** (scales.numpy() - 127.0))[..., None] * block
    for dtype in (jnp.float32, jnp.bfloat16):
        found = np.asarray(load_params(directory, dtype)[1]["blocks.1.mlp.experts.gate_up_proj"][0]).astype(np.float64)
        assert np.array_equal(found, wanted.reshape(found.shape))


def mesh_shardings(config):
    """8 devices: experts over 2, input dims over 4: 24 of 96 elements a device, so slices begin inside blocks of 32."""
    mesh = jax.make_mesh((2, 4), ("expert", "input"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def spec(axes, shape):
        last = "input" if shape[-1] % 4 == 0 else None
        return P(*("expert" if axis == "expert" else None for axis in axes[:-1]), last)

    return {name: NamedSharding(mesh, spec(axes, abstract_params(config)[name].shape)) for name, axes in logical_axes(config).items()}


@pytest.mark.parametrize("layout", ["hf mxfp4", "openai bf16"])
def test_each_device_holds_its_slice(layout, tensors, expected, tmp_path):
    convert, raw = LAYOUTS[layout]
    source = open_checkpoint(builders.write(tmp_path, convert(tensors), raw))
    shardings = mesh_shardings(source.config)
    _, params = load_params(source, jnp.float32, shardings)
    assert_equal(params, expected)
    assert all(params[name].sharding == shardings[name] for name in params)
    matrix = params["blocks.0.mlp.experts.gate_up_proj"]
    assert matrix.addressable_shards[0].data.shape == (1, 4, 128, 24)


def cut_experts(config, mesh):
    axes_of = logical_axes(config).items()
    return {name: NamedSharding(mesh, P(*("expert" if axis == "expert" else None for axis in axes))) for name, axes in axes_of}


@pytest.fixture
def bytes_read(monkeypatch):
    """Bytes of every read of a file, in the order of the calls."""
    sizes = []
    original = SafetensorsFile.read

    def read(file, name, ranges):
        found = original(file, name, ranges)
        sizes.append(found.nbytes)
        return found

    monkeypatch.setattr(SafetensorsFile, "read", read)
    return sizes


def test_each_slice_is_read_once_however_many_devices_hold_it(tensors, tmp_path, bytes_read):
    source = open_checkpoint(builders.write(tmp_path, tensors, MXFP4_CONFIG))
    mesh = jax.make_mesh((2, 4), ("expert", "copy"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    shardings = cut_experts(source.config, mesh)
    load_params(source, jnp.float32, shardings)
    assert sum(bytes_read) == sum(info.nbytes for info in source.store.infos.values())


def test_a_process_reads_its_share_alone(tensors, expected, tmp_path, bytes_read):
    """One of four devices of an expert-parallel mesh: a fourth of the experts, and what every device holds."""
    source = open_checkpoint(builders.write(tmp_path, tensors, MXFP4_CONFIG))
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    shardings = cut_experts(source.config, mesh)
    ticks = []
    share = load_share(source, jnp.float32, shardings, jax.devices()[2], lambda *counts: ticks.append(counts))
    sizes = {key: info.nbytes // (4 if "experts" in key else 1) for key, info in source.store.infos.items()}
    assert sum(bytes_read) == sum(sizes.values())
    for name, value in share.items():
        index = shardings[name].devices_indices_map(expected[name].shape)[jax.devices()[2]]
        assert np.array_equal(np.asarray(value), expected[name][index]), name
    total = sum(value.nbytes for value in share.values())
    assert ticks[-1] == (total, total) and ticks == sorted(ticks)


def test_layers_may_be_sharded_too(tensors, tmp_path):
    """A stacked dim over devices: every device reads only its layers."""
    kinds = ["sliding_attention"] * 3
    source = open_checkpoint(builders.write(tmp_path, tensors, {**MXFP4_CONFIG, "layer_types": kinds}))
    mesh = jax.make_mesh((3,), ("layers",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:3])
    shardings = {name: NamedSharding(mesh, P("layers" if axes[0] == "layers" else None)) for name, axes in logical_axes(source.config).items()}
    _, sharded = load_params(source, jnp.float32, shardings)
    _, plain = load_params(source, jnp.float32)
    assert_equal(sharded, {name: np.asarray(value) for name, value in plain.items()})
    assert plain["blocks.0.self_attn.q_proj.bias"].shape == (3, 120)


@pytest.mark.parametrize("layout", ["hf mxfp4", "hf bf16"])
@pytest.mark.parametrize("sharded", [False, True])
def test_filling_on_the_device_equals_building_on_the_host(layout, sharded, tensors, expected, tmp_path, monkeypatch):
    """Large leaves are filled in groups by a donated update; here every leaf is made to count as large."""
    monkeypatch.setattr(load, "PIECE_BYTES", 30_000)
    convert, raw = LAYOUTS[layout]
    source = open_checkpoint(builders.write(tmp_path, convert(tensors), raw))
    assert_equal(load_params(source, jnp.float32, mesh_shardings(source.config) if sharded else None)[1], expected)


def test_host_memory_stays_below_one_layer(tmp_path, monkeypatch):
    """Peak of numpy's allocations while a model of 12 equal layers loads: below the size of one layer (device buffers are not numpy's)."""
    monkeypatch.setattr(load, "PIECE_BYTES", 1 << 18)
    monkeypatch.setattr(builders, "L", 12)
    monkeypatch.setattr(builders, "E", 32)
    config = {**MXFP4_CONFIG, "num_hidden_layers": 12, "num_local_experts": 32, "layer_types": ["sliding_attention", "full_attention"] * 6}
    source = open_checkpoint(builders.write(tmp_path, builders.mxfp4_tensors(), config, shards=3))
    layer_bytes = sum(np.prod(leaf.shape[1:]) * 4 for name, leaf in abstract_params(source.config).items() if name.startswith("blocks.0."))
    tracemalloc.start()
    try:
        _, params = load_params(source, jnp.float32)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    total = sum(value.nbytes for value in params.values())
    assert total > 11 * layer_bytes
    assert peak < layer_bytes, (peak, layer_bytes, total)


# ---- refusals ---------------------------------------------------------------------------------------------------------------

EXPERTS = "model.layers.0.mlp.experts."


def set_tensor(key, make):
    def apply(tensors):
        out = dict(tensors)
        value = make(out.get(key))
        out.pop(key, None)
        return out if value is None else {**out, key: value}

    return apply


def with_byte(value):
    def make(scales):
        scales = scales.clone()
        scales[3, 5, 1] = value
        return scales

    return make


BAD_TENSORS = {
    "missing": (set_tensor("model.layers.1.self_attn.sinks", lambda t: None), "missing 'model.layers.1.self_attn.sinks' [6]"),
    "extra": (set_tensor("model.layers.3.self_attn.sinks", lambda t: torch.zeros(6)), "extra 'model.layers.3.self_attn.sinks' [6]"),
    "misshapen": (set_tensor("model.norm.weight", lambda t: t[:95].clone()), "in model.safetensors has shape [95], expected [96]"),
    "transposed": (set_tensor("lm_head.weight", lambda t: t.T.contiguous()), "has shape [96, 160], expected [160, 96]"),
    "flattened blocks": (set_tensor(EXPERTS + "down_proj_blocks", lambda t: t.flatten(2)), "has shape [8, 96, 32], expected [8, 96, 2, 16]"),
    "half precision": (set_tensor("model.norm.weight", lambda t: t.half()), "has dtype F16, expected BF16 or F32"),
    "signed scales": (set_tensor(EXPERTS + "down_proj_scales", lambda t: t.view(torch.int8)), "has dtype I8, expected U8"),
    "E8M0 scales": (set_tensor(EXPERTS + "down_proj_scales", lambda t: t.view(torch.float8_e8m0fnu)), "has dtype F8_E8M0, expected U8"),
    "scale 253": (set_tensor(EXPERTS + "gate_up_proj_scales", with_byte(253)), "gate_up_proj_scales' holds scale byte 253"),
    "scale 255": (set_tensor(EXPERTS + "gate_up_proj_scales", with_byte(255)), "gate_up_proj_scales' holds scale byte 255"),
    "NaN": (set_tensor("model.layers.2.mlp.router.bias", lambda t: t * float("nan")), "'model.layers.2.mlp.router.bias' holds a NaN"),
    "infinity": (set_tensor("model.norm.weight", lambda t: t / 0), "'model.norm.weight' holds a NaN or infinite value"),
}


@pytest.mark.parametrize("fault", BAD_TENSORS)
def test_bad_tensors_are_refused_by_name(fault, tensors, tmp_path):
    change, message = BAD_TENSORS[fault]
    directory = builders.write(tmp_path, change(tensors), MXFP4_CONFIG)
    with pytest.raises(CorruptError) as error:
        load_params(directory)
    text = str(error.value)
    assert message in text and "\n" not in text and str(directory) in text
    assert "model.safetensors" in text or message.startswith("missing")


def test_all_problems_are_listed_at_once(tensors, tmp_path):
    broken = dict(tensors)
    del broken["model.norm.weight"], broken[EXPERTS + "down_proj_bias"]
    broken["model.layers.0.extra"] = torch.zeros(2)
    broken["lm_head.weight"] = torch.zeros(3, 4)
    with pytest.raises(CorruptError, match="4 tensors do not fit") as error:
        open_checkpoint(builders.write(tmp_path, broken, MXFP4_CONFIG))
    assert all(key in str(error.value) for key in ("model.norm.weight", "down_proj_bias", "layers.0.extra", "lm_head.weight"))


BAD_CONFIGS = {
    "other architecture": ({**MXFP4_CONFIG, "model_type": "llama"}, "model_type = 'llama'"),
    "unknown key": ({**MXFP4_CONFIG, "num_shared_experts": 1}, "num_shared_experts"),
    "unknown quantization": ({**CONFIG, "quantization_config": {"quant_method": "awq"}}, "quant_method 'awq' is not supported"),
    "quantization not said": (CONFIG, "quant_method None, but the tensors hold experts in MXFP4"),
    "list for a number": ({**MXFP4_CONFIG, "hidden_size": [96]}, "hidden_size"),
    "rope no object": ({**MXFP4_CONFIG, "rope_scaling": "yarn"}, "config.json"),
    "no rope": ({k: v for k, v in MXFP4_CONFIG.items() if k != "rope_scaling"}, "rope"),
}


@pytest.mark.parametrize("fault", BAD_CONFIGS)
def test_bad_configs_are_refused(fault, tensors, tmp_path):
    raw, message = BAD_CONFIGS[fault]
    with pytest.raises(CorruptError) as error:
        open_checkpoint(builders.write(tmp_path, tensors, raw))
    assert message in str(error.value) and "config.json" in str(error.value) and "\n" not in str(error.value)


def test_config_json_must_be_readable(tensors, tmp_path):
    directory = builders.write(tmp_path, tensors, MXFP4_CONFIG)
    for text in ("{", '{"model_type": "gpt_oss", "model_type": "gpt_oss"}', "[1]", "[" * 100_000):
        (directory / "config.json").write_text(text)
        with pytest.raises(CorruptError, match=r"config\.json"):
            open_checkpoint(directory)
    (directory / "config.json").unlink()
    with pytest.raises(UsageError, match=r"no config\.json"):
        open_checkpoint(directory)


def test_places_that_hold_no_checkpoint(tmp_path, mxfp4_dir):
    with pytest.raises(UsageError, match="no such directory"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="is a file"):
        open_checkpoint(mxfp4_dir / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(MXFP4_CONFIG))
    with pytest.raises(UsageError, match="no safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UsageError, match=r"pickled weights \(pytorch_model.bin\)"):
        open_checkpoint(tmp_path)


def test_hub_id_offline_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError) as error:
        open_checkpoint("openai/no-such-model-here")
    assert "\n" not in str(error.value) and "openai/no-such-model-here" in str(error.value)


def test_hub_id_records_the_revision(mxfp4_dir, tmp_path, monkeypatch):
    """A snapshot of the hub cache is a directory of links into `blobs`, named after its commit."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123abc"
    (tmp_path / "models--a--b" / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(mxfp4_dir.iterdir())):
        blob = tmp_path / "models--a--b" / "blobs" / str(number)
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(blob)
    asked = {}

    def download(repo, **kwargs):
        asked.update(repo=repo, **kwargs)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    source = open_checkpoint("a/b")
    assert source.revision == "0123abc" and asked["repo"] == "a/b"
    assert not any("bin" in pattern or "py" in pattern for pattern in asked["allow_patterns"])


def test_experts_of_an_mxfp4_checkpoint_can_stay_packed():
    """Their codes decode to the weights that are loaded otherwise; everything else is the same."""
    decoded = load_params(NANO, jnp.float32)[1]
    packed = load_params(NANO, jnp.float32, packed=True)[1]
    kept = {name for name, value in packed.items() if isinstance(value, mxfp4.Codes)}
    assert kept == {name for name in decoded if name.endswith(("gate_up_proj", "down_proj"))}
    for name, value in packed.items():
        np.testing.assert_array_equal(mxfp4.decode(value, jnp.float32) if name in kept else value, decoded[name])


def test_only_mxfp4_experts_on_one_device_can_stay_packed(tmp_path):
    with pytest.raises(UsageError, match="cannot be sharded"):
        load_params(NANO, jnp.float32, {}, packed=True)
    bf16 = builders.write(tmp_path, builders.bf16_tensors(builders.mxfp4_tensors()), CONFIG)
    with pytest.raises(UsageError, match="these are BF16"):
        load_params(bf16, jnp.float32, packed=True)
