"""Every demand of a client, broken once in an otherwise good export, is reported under its own title; nothing else is."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gptoss_jax.checkpoint import export_hf, load_params, verify_dir
from gptoss_jax.errors import UsageError
from gptoss_jax.formats import Mxfp4
from tests.checkpoint import builders
from tests.checkpoint.test_load import set_tensor, with_byte

INDEX = "model.safetensors.index.json"
MANIFEST = "gptoss_jax_export.json"
EXPERTS = "model.layers.1.mlp.experts."


@pytest.fixture(scope="session")
def good_export(mxfp4_dir, tmp_path_factory):
    """Three shards with tokenizer files, exported from the random MXFP4 checkpoint."""
    root = tmp_path_factory.mktemp("good")
    source = shutil.copytree(mxfp4_dir, root / "source")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        (source / name).write_text("{}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    config, params = load_params(source)
    return export_hf(root / "export", config, params, format=Mxfp4(), source_dir=source, max_shard_bytes=160_000)


@pytest.fixture
def directory(good_export, tmp_path):
    return shutil.copytree(good_export, tmp_path / "export")


def shard_of(directory, key):
    return directory / json.loads((directory / INDEX).read_text())["weight_map"][key]


def edit_json(name, change):
    def apply(directory):
        value = json.loads((directory / name).read_text())
        change(value)
        (directory / name).write_text(json.dumps(value))

    return apply


def edit_config(**values):
    def change(config):
        config.update(values)
        for key in [key for key, value in values.items() if value is KeyError]:
            del config[key]

    return edit_json("config.json", change)


def edit_tensor(key, make, metadata=None):
    """Rewrites one shard with a changed tensor, and the total size of the index."""

    def apply(directory):
        path = shard_of(directory, key)
        before = load_file(path)
        after = set_tensor(key, make)(before)
        save_file(after, path, {"format": "pt"} if metadata is None else metadata)
        size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors.values())
        edit_json(INDEX, lambda index: index["metadata"].update(total_size=index["metadata"]["total_size"] + size(after) - size(before)))(directory)
        if key not in after:
            edit_json(INDEX, lambda index: index["weight_map"].pop(key))(directory)

    return apply


def move_scales(directory):
    """Scales of one projection to the first shard: legal for transformers, silently wrong in llama.cpp."""
    key = EXPERTS + "down_proj_scales"
    path, first = shard_of(directory, key), shard_of(directory, "model.embed_tokens.weight")
    tensors = load_file(path)
    save_file({**load_file(first), key: tensors.pop(key)}, first, {"format": "pt"})
    save_file(tensors, path, {"format": "pt"})
    edit_json(INDEX, lambda index: index["weight_map"].update({key: first.name}))(directory)


def rename_shard(directory):
    old = shard_of(directory, "lm_head.weight")
    old.rename(directory / "last.safetensors")
    update = {key: "last.safetensors" for key, file in json.loads((directory / INDEX).read_text())["weight_map"].items() if file == old.name}
    edit_json(INDEX, lambda index: index["weight_map"].update(update))(directory)


def flip_bit(directory):
    path = shard_of(directory, EXPERTS + "gate_up_proj_blocks")
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def drop_metadata(directory):
    path = shard_of(directory, "lm_head.weight")
    save_file(load_file(path), path)


FAULTS = {  # fault: (how, title of the check, words of the message)
    "missing tensor": (edit_tensor(EXPERTS + "down_proj_bias", lambda t: None), "1 tensors", "missing 'model.layers.1.mlp.experts.down_proj_bias'"),
    "misshapen tensor": (edit_tensor("model.norm.weight", lambda t: t[:5].clone()), "1 tensors", "has shape [5], expected [96]"),
    "flattened blocks": (edit_tensor(EXPERTS + "down_proj_blocks", lambda t: t.flatten(2)), "1 tensors", "expected [8, 96, 2, 16]"),
    "E8M0 scales": (edit_tensor(EXPERTS + "down_proj_scales", lambda t: t.view(torch.float8_e8m0fnu)), "2 stored", "has dtype F8_E8M0"),
    "float32 norm": (edit_tensor("model.norm.weight", lambda t: t.float()), "2 stored", "'model.norm.weight' in"),
    "scale byte 254": (edit_tensor(EXPERTS + "gate_up_proj_scales", with_byte(254)), "4 scales", "holds scale byte 254"),
    "NaN": (edit_tensor("lm_head.weight", lambda t: t * float("nan")), "4 scales", "'lm_head.weight' holds a NaN"),
    "scales elsewhere": (move_scales, "5 codes", "'model.layers.1.mlp.experts.down_proj' is spread over"),
    "stale shard": (lambda d: shutil.copy(shard_of(d, "lm_head.weight"), d / "model-00009-of-00009.safetensors"), "6 index", "stale"),
    "shard name": (rename_shard, "6 index", "last.safetensors is not named"),
    "no total size": (edit_json(INDEX, lambda index: index["metadata"].pop("total_size")), "6 index", "total_size"),
    "missing shard": (lambda d: shard_of(d, "lm_head.weight").unlink(), "0 readable", "is missing"),
    "index incomplete": (edit_json(INDEX, lambda index: index["weight_map"].pop("lm_head.weight")), "0 readable", "'lm_head.weight' of"),
    "no metadata": (drop_metadata, "7 file", "lacks the metadata"),
    "architecture": (edit_config(architectures=["LlamaForCausalLM"]), "8 config", "architectures"),
    "not quantized": (edit_config(quantization_config=KeyError), "0 readable", "quant_method None"),
    "excluded modules": (edit_config(quantization_config={"quant_method": "mxfp4"}), "8 config", "modules_to_not_convert"),
    "no truncate": (edit_json("config.json", lambda c: c["rope_scaling"].pop("truncate")), "8 config", "truncate"),
    "no layer types": (edit_config(layer_types=KeyError), "8 config", "layer_types"),
    "no pad id": (edit_config(pad_token_id=KeyError), "8 config", "pad_token_id"),
    "float32 said": (edit_config(dtype="float32"), "8 config", "dtype is 'float32'"),
    "ModelOpt's config": (lambda d: (d / "hf_quant_config.json").write_text("{}"), "8 config", "hf_quant_config.json is present"),
    "flipped bit": (flip_bit, "11 hashes", "bytes of 'model.layers."),
    "changed template": (lambda d: (d / "chat_template.jinja").write_text("x"), "11 hashes", "bytes of 'chat_template.jinja' differ"),
    "lost tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "11 hashes", "'tokenizer.json': expected, but not in the files"),
    "truncate turned on": (edit_json("config.json", lambda c: c["rope_scaling"].update(truncate=True)), "11 hashes", "'config.json' differ"),
    "manifest damaged": (lambda d: (d / MANIFEST).write_text("{"), "11 hashes", "not valid JSON"),
    "manifest emptied": (lambda d: (d / MANIFEST).write_text("{}"), "11 hashes", "xxh3_128"),
}  # fmt: skip


def test_a_good_export_conforms(good_export, mxfp4_dir):
    report = verify_dir(good_export, against=mxfp4_dir)
    assert report.ok and [check.status for check in report.checks] == ["ok"] * 12, str(report)
    assert len(list(good_export.glob("*.safetensors"))) == 4


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_reported_under_its_title(fault, directory):
    break_it, title, words = FAULTS[fault]
    if not title.startswith("11"):
        (directory / MANIFEST).unlink()  # its hashes would report every fault once more
    break_it(directory)
    report = verify_dir(directory)
    failed = [check.title for check in report.checks if check.problems]
    assert not report.ok and len(failed) == 1 and failed[0].startswith(title), str(report)
    assert any(words in failure for failure in report.failures), report.failures
    assert words in str(report) and "FAIL" in str(report)


def test_hashes_see_every_fault_of_bytes(directory):
    """A flipped bit passes all conformance checks; only hashes can tell."""
    flip_bit(directory)
    assert [check.title[:2] for check in verify_dir(directory).checks if check.problems] == ["11"]


def test_comparison_names_the_tensor_and_counts_values(directory, mxfp4_dir):
    (directory / MANIFEST).unlink()
    edit_tensor("model.layers.0.self_attn.sinks", lambda t: torch.where(torch.arange(6) == 4, t + 1, t))(directory)
    edit_tensor(EXPERTS + "gate_up_proj_blocks", lambda t: t ^ (torch.arange(t.numel()).reshape(t.shape) == 777).to(torch.uint8) * 8)(directory)
    failures = verify_dir(directory, against=mxfp4_dir).failures
    assert any("'model.layers.0.self_attn.sinks': 1 of 6 values differ, by up to 1" in failure for failure in failures)
    assert any("'model.layers.1.mlp.experts.gate_up_proj': 1 of 98304 values differ" in failure for failure in failures)
    assert sum("values differ" in failure for failure in failures) == 2


def test_exchanged_experts_are_seen(directory, mxfp4_dir):
    """Same multiset of bytes, wrong order: the fault of a converter that pairs scales with other blocks."""
    (directory / MANIFEST).unlink()
    for part in ("blocks", "scales"):
        edit_tensor(f"{EXPERTS}down_proj_{part}", lambda t: t.flip(0).contiguous())(directory)
    assert verify_dir(directory).ok
    failures = verify_dir(directory, against=mxfp4_dir).failures
    assert len(failures) == 1 and "'model.layers.1.mlp.experts.down_proj'" in failures[0]


def test_comparison_reads_every_layout(good_export, tensors, tmp_path):
    bf16 = builders.write(tmp_path / "bf16", builders.bf16_tensors(tensors), builders.CONFIG)
    openai = builders.write(tmp_path / "openai", builders.openai_tensors(tensors), builders.OPENAI_CONFIG)
    for origin in (bf16, openai):
        assert verify_dir(good_export, against=origin).ok
    for directory in (bf16, openai):
        assert verify_dir(directory, against=good_export).failures == [
            f"10 weights as expected: {name} is not that of {good_export}"
            for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
        ]
    assert [check.status for check in verify_dir(openai).checks if check.title[0] in "789"] == ["-", "-", "-"]


def test_models_of_other_shape_are_not_compared(good_export, tensors, tmp_path):
    other = builders.write(tmp_path, tensors, {**builders.CONFIG, "quantization_config": builders.QUANTIZATION, "sliding_window": 8})
    (failure,) = verify_dir(good_export, against=other).failures
    assert "the models differ" in failure


def test_places_that_hold_no_model(tmp_path, good_export):
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UsageError):
            verify_dir(place)
        with pytest.raises(UsageError):
            verify_dir(good_export, against=place)


def test_zero_blocks_may_have_any_legal_scale(directory):
    (directory / MANIFEST).unlink()
    for byte in (0, 252):
        edit_tensor(EXPERTS + "down_proj_blocks", torch.zeros_like)(directory)
        edit_tensor(EXPERTS + "down_proj_scales", lambda t, byte=byte: torch.full_like(t, byte))(directory)
        assert verify_dir(directory).ok
        assert np.all(np.asarray(load_params(directory)[1]["blocks.1.mlp.experts.down_proj"]) == 0)
