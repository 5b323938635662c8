"""What is exported is what was given, transformers reads the same, and a failed export leaves nothing behind."""

import json
import os
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gptoss_jax.checkpoint import code_hashes, export, export_hf, load_params, open_checkpoint, verify_dir
from gptoss_jax.checkpoint.safetensors_io import SafetensorsFile
from gptoss_jax.errors import CorruptError, RunError, UsageError
from gptoss_jax.formats import Mxfp4, Nvfp4
from gptoss_jax.sharding import make_mesh, param_shardings
from tests.checkpoint import builders
from tests.checkpoint.test_load import assert_equal
from tests.support.params import lively_params

MATRICES = [f"{part}.mlp.experts.{name}" for part in ("blocks.0", "blocks.1", "tail.0") for name in ("gate_up_proj", "down_proj")]


@pytest.fixture(scope="session")
def masters(tiny_config):
    """float32 weights that lie on no grid."""
    return lively_params(tiny_config)


def in_bf16(value):
    return np.asarray(value).astype(ml_dtypes.bfloat16).astype(np.float32)


def as_deployed(params, fmt):
    """What the exported model must compute with: expert matrices through the format, all else rounded to bfloat16 by numpy."""
    through = lambda x: np.asarray(fmt.decode(fmt.encode(x), jnp.float32))
    return {name: through(value) if name in MATRICES else in_bf16(value) for name, value in params.items()}


FORMATS = {"mxfp4": Mxfp4(), "mxfp4 floor": Mxfp4("floor"), "nvfp4": Nvfp4()}


@pytest.mark.parametrize("name", FORMATS)
def test_loading_gives_the_encoded_masters(name, masters, tiny_config, tmp_path):
    fmt = FORMATS[name]
    export_hf(tmp_path / "out", tiny_config, masters, format=fmt, max_shard_bytes=100_000)
    config, params = load_params(tmp_path / "out", jnp.float32)
    assert config == tiny_config
    assert_equal(params, as_deployed(masters, fmt))
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 3
    assert verify_dir(tmp_path / "out", against=masters).ok


def test_rounding_the_masters_first_exports_another_model(masters, tiny_config, tmp_path):
    """The mistake that the export of masters avoids: BF16 rounding moves values across rounding borders of the 4-bit grid."""
    export_hf(tmp_path / "out", tiny_config, {name: value.astype(jnp.bfloat16) for name, value in masters.items()}, format=Mxfp4())
    report = verify_dir(tmp_path / "out", against=masters)
    assert len(report.failures) == 6 and all("proj" in failure for failure in report.failures)


def test_bf16_export_is_transposed_and_rounded(masters, tiny_config, tmp_path):
    export_hf(tmp_path / "out", tiny_config, masters, format="bf16")
    assert_equal(load_params(tmp_path / "out", jnp.float32)[1], {name: in_bf16(value) for name, value in masters.items()})
    stored = load_file(tmp_path / "out" / "model.safetensors")["model.layers.2.mlp.experts.gate_up_proj"]
    assert np.array_equal(stored.float().numpy(), in_bf16(masters["tail.0.mlp.experts.gate_up_proj"]).swapaxes(1, 2))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("fmt", [Mxfp4(), Nvfp4()])
def test_baked_bf16_export_holds_the_decoded_values(fmt, masters, tiny_config, tmp_path):
    export_hf(tmp_path / "out", tiny_config, masters, format="bf16", bake=fmt)
    assert_equal(load_params(tmp_path / "out", jnp.float32)[1], as_deployed(masters, fmt))
    assert verify_dir(tmp_path / "out", against=masters).ok


def test_round_trip_keeps_every_value_and_every_canonical_byte(mxfp4_dir, tmp_path):
    """Load MXFP4, export MXFP4. A block whose largest code is 6 or 7 (values 4 and 6) must come back byte for byte."""
    config, params = load_params(mxfp4_dir, jnp.bfloat16)
    export_hf(tmp_path / "out", config, params, format=Mxfp4(), source_dir=mxfp4_dir)
    assert verify_dir(tmp_path / "out", against=mxfp4_dir).ok
    assert_equal(load_params(tmp_path / "out", jnp.float32)[1], {name: np.asarray(v, np.float32) for name, v in params.items()})
    before, after = SafetensorsFile(mxfp4_dir / "model.safetensors"), SafetensorsFile(tmp_path / "out" / "model.safetensors")
    assert before.tensors.keys() == after.tensors.keys()
    canonical_blocks = 0
    for key in before.tensors:
        old, new = before.array(key), after.array(key)
        if key.endswith("_blocks"):
            canonical = np.maximum(old & 7, (old >> 4) & 7).max(-1) >= 6
            scales = key.replace("_blocks", "_scales")
            assert np.array_equal(old[canonical], new[canonical]) and np.array_equal(before.array(scales)[canonical], after.array(scales)[canonical])
            canonical_blocks += canonical.sum()
        elif not key.endswith("_scales"):
            assert old.tobytes() == new.tobytes(), key
    assert canonical_blocks > 5000


def test_transformers_loads_the_export_with_nothing_missing(masters, tiny_config, tmp_path):
    from transformers import AutoModelForCausalLM, Mxfp4Config

    export_hf(tmp_path / "mxfp4", tiny_config, masters, format=Mxfp4(), max_shard_bytes=100_000)
    export_hf(tmp_path / "baked", tiny_config, masters, format="bf16", bake=Mxfp4())
    options = dict(output_loading_info=True, attn_implementation="eager", dtype=torch.float32)
    mxfp4, info = AutoModelForCausalLM.from_pretrained(tmp_path / "mxfp4", quantization_config=Mxfp4Config(dequantize=True), **options)
    assert len(info) == 4 and not any(info.values()), info
    baked, info = AutoModelForCausalLM.from_pretrained(tmp_path / "baked", **options)
    assert len(info) == 4 and not any(info.values()), info
    theirs, others = mxfp4.state_dict(), baked.state_dict()
    deployed = as_deployed(masters, Mxfp4())
    assert len(theirs) == len(others) == 3 * 17 + 3
    from tests.support.torch_model import to_hf

    for key, value in to_hf(deployed, tiny_config).items():
        assert torch.equal(theirs[key], value) and torch.equal(others[key], value), key
    assert mxfp4.config.rope_parameters["truncate"] is False and mxfp4.config.pad_token_id is None


# ---- what is exported where -------------------------------------------------------------------------------------------------


def test_sharded_parameters_export_the_same_bytes(masters, tiny_config, tmp_path):
    mesh = make_mesh(data=1, fsdp=2, expert=2, tensor=2)
    sharded = jax.device_put(dict(masters), param_shardings(tiny_config, mesh))
    for name, fmt in (("mxfp4", Mxfp4()), ("nvfp4", Nvfp4())):
        export_hf(tmp_path / name / "one", tiny_config, masters, format=fmt)
        export_hf(tmp_path / name / "eight", tiny_config, sharded, format=fmt)
        one, eight = ((tmp_path / name / kind / "model.safetensors").read_bytes() for kind in ("one", "eight"))
        assert one == eight


def test_code_hashes_are_those_of_the_files(masters, tiny_config, tmp_path):
    """Hashes of codes computed by one jitted program over the stacked masters, as training does, against the bytes of the files."""
    for fmt in (Mxfp4(), Nvfp4()):
        codes = jax.jit(lambda params, fmt=fmt: {name: fmt.encode(params[name]) for name in MATRICES})(masters)
        hashes = code_hashes(tiny_config, codes)
        assert sorted(hashes) == sorted(f"model.layers.{i}.mlp.experts.{name}" for i in range(3) for name in ("gate_up_proj", "down_proj"))
        out = export_hf(tmp_path / fmt.name, tiny_config, masters, format=fmt, max_shard_bytes=100_000)
        assert verify_dir(out, against=hashes).ok
    other = code_hashes(tiny_config, {name: Mxfp4("floor").encode(masters[name]) for name in MATRICES})
    report = verify_dir(tmp_path / "mxfp4", against=other)
    assert len(report.failures) == 6
    del hashes["model.layers.1.mlp.experts.down_proj"]
    assert ["not expected" in failure for failure in verify_dir(tmp_path / "nvfp4", against=hashes).failures] == [True]


def test_the_source_is_carried_along(masters, tiny_config, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    companions = {"tokenizer.json": b'{"a": 1}\n', "chat_template.jinja": b"{{ x }}\r\n", "generation_config.json": b'{"eos_token_id": [3, 4]}'}
    for name, content in {**companions, "README.md": b"no", "hf_quant_config.json": b"{}"}.items():
        (source / name).write_bytes(content)
    (source / "config.json").write_text(json.dumps(builders.CONFIG))
    out = export_hf(tmp_path / "out", tiny_config, masters, format=Mxfp4(), source_dir=source, token_ids={"bos_token_id": 5}, provenance={"step": 7})
    for name, content in companions.items():
        assert (out / name).read_bytes() == content
    assert b"no" != (out / "README.md").read_bytes()
    ours = ["README.md", "config.json", "gptoss_jax_export.json", "model.safetensors"]
    assert sorted(path.name for path in out.iterdir()) == sorted([*companions, *ours])
    written = json.loads((out / "config.json").read_text())
    assert written["quantization_config"] == builders.QUANTIZATION
    assert (written["eos_token_id"], written["pad_token_id"], written["bos_token_id"]) == (2, 1, 5)
    assert written["rope_scaling"]["truncate"] is False and written["rope_theta"] == 150000 and "rope_parameters" not in written
    manifest = json.loads((out / "gptoss_jax_export.json").read_text())
    assert manifest["format"] == Mxfp4().to_dict() and manifest["provenance"] == {"step": 7}


def test_nvfp4_is_marked_as_ours(masters, tiny_config, tmp_path):
    """No client demonstrably reads NVFP4 gpt-oss; the name of the method makes every one refuse it instead of guessing."""
    out = export_hf(tmp_path / "out", tiny_config, masters, format=Nvfp4())
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "gptoss_jax_nvfp4"
    stored = open_checkpoint(out).store
    assert stored.infos["model.layers.0.mlp.experts.down_proj_scales"].dtype == "F8_E4M3"
    assert stored.infos["model.layers.0.mlp.experts.down_proj_global_scale"].shape == (8,)


# ---- failures ---------------------------------------------------------------------------------------------------------------


def poisoned(params, name, value):
    return {**params, name: params[name].at[(0,) * params[name].ndim].set(value)}


UNWRITABLE = [
    (name, key, value, kind)
    for name, key in (
        ("blocks.1.mlp.experts.down_proj", "model.layers.1.mlp.experts.down_proj"),
        ("tail.0.self_attn.sinks", "model.layers.2.self_attn.sinks"),
        ("embed_tokens.weight", "model.embed_tokens.weight"),
    )
    for value in (np.nan, np.inf, 3.4e38)  # the last is finite in float32 and rounds to infinity in bfloat16
    for kind in ("mxfp4", "nvfp4", "bf16")
    if not (value == 3.4e38 and kind == "nvfp4" and "proj" in name)  # NVFP4 with its float32 global scale holds that
]


@pytest.mark.parametrize("name, key, value, kind", UNWRITABLE)
def test_values_that_the_file_cannot_hold_are_refused_by_name(name, key, value, kind, masters, tiny_config, tmp_path):
    with pytest.raises(CorruptError, match=key):
        export_hf(tmp_path / "a" / "out", tiny_config, poisoned(masters, name, value), format=kind)
    assert list(tmp_path.iterdir()) == []


def test_the_target_must_be_free(masters, tiny_config, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for target in ("full", "file"):
        with pytest.raises(UsageError, match="not an empty directory"):
            export_hf(tmp_path / target, tiny_config, masters, format=Mxfp4())
    assert (tmp_path / "full" / "x").read_text() == (tmp_path / "file").read_text() == "keep"
    (tmp_path / "empty").mkdir()
    export_hf(tmp_path / "empty", tiny_config, masters, format=Mxfp4())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full"]


def test_usage_mistakes(masters, tiny_config, tmp_path):
    cases = [
        (dict(format="int4"), "int4"),
        (dict(format=Mxfp4(), bake=Mxfp4()), "bake"),
        (dict(format="bf16", source_dir=tmp_path / "nowhere"), "no such directory"),
        (dict(format="bf16", token_ids={"eos": 1}), "'eos'"),
    ]
    for arguments, message in cases:
        with pytest.raises(UsageError, match=message):
            export_hf(tmp_path / "out", tiny_config, masters, **arguments)
    for change, message in ((lambda p: p.pop("norm.weight"), "missing norm.weight"), (lambda p: p.update(x=1), "unknown x")):
        params = dict(masters)
        change(params)
        with pytest.raises(UsageError, match=message):
            export_hf(tmp_path / "out", tiny_config, params, format="bf16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("bug")])
def test_nothing_is_left_when_writing_fails(error, masters, tiny_config, tmp_path, monkeypatch):
    write = export.SafetensorsWriter.write
    calls = []

    def failing(self, name, array, row):
        calls.append(name)
        if len(calls) == 30:
            raise error
        write(self, name, array, row)

    monkeypatch.setattr(export.SafetensorsWriter, "write", failing)
    expected = RunError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected, match="disk is full" if expected is RunError else None):
        export_hf(tmp_path / "deep" / "out", tiny_config, masters, format=Mxfp4(), max_shard_bytes=100_000)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_seen_before_writing(masters, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr("gptoss_jax.checkpoint.staging.MARGIN_BYTES", 10**18)
    with pytest.raises(RunError, match=r"needs .* GB, .* GB are free"):
        export_hf(tmp_path / "out", tiny_config, masters, format=Mxfp4())
    assert list(tmp_path.iterdir()) == []


def test_damage_while_writing_is_noticed_before_the_name_appears(masters, tiny_config, tmp_path, monkeypatch):
    write = export.SafetensorsWriter.write

    def flipping(self, name, array, row):
        if name.endswith("layers.1.mlp.experts.down_proj_blocks"):
            array = array ^ np.uint8(1)
        write(self, name, array, row)

    monkeypatch.setattr(export.SafetensorsWriter, "write", flipping)
    with pytest.raises(RunError, match=r"fails its verification.*layers\.1\.mlp\.experts\.down_proj"):
        export_hf(tmp_path / "out", tiny_config, masters, format=Mxfp4())
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_shows_no_directory_and_its_leftovers_go(masters, tiny_config, tmp_path):
    """SIGKILL in the middle of a staged directory: the target never appears, and the next export removes the orphan."""
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from gptoss_jax.checkpoint.staging import staged_directory\n"
        "with staged_directory(Path(sys.argv[1]), 10) as staging:\n"
        "    (staging / 'model.safetensors').write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], env={**os.environ, "JAX_PLATFORMS": "cpu"}, timeout=120)
    assert done.returncode == -9
    assert [path.name.startswith(".out.export-") for path in tmp_path.iterdir()] == [True]
    export_hf(tmp_path / "out", tiny_config, masters, format=Mxfp4())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["one device", "eight devices", "numpy"])
@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4", "bf16"])
def test_a_model_written_in_groups_is_that_written_whole(kind, fmt, masters, tiny_config, tmp_path, monkeypatch):
    """The host gets no more at a time than a group; groups cross the borders of shards."""
    params = dict(masters)
    if kind == "eight devices":
        params = jax.device_put(params, param_shardings(tiny_config, make_mesh(data=1, fsdp=2, expert=2, tensor=2)))
    elif kind == "numpy":
        params = {name: np.asarray(p) for name, p in params.items()}
    experts, ticks, write = [], [], export._write_group

    def counted(writer, hashes, piece, specs, group):
        experts.extend(len(array) for array in group.arrays.values() if piece.row.matrix)
        return write(writer, hashes, piece, specs, group)

    monkeypatch.setattr(export, "_write_group", counted)
    whole = export_hf(tmp_path / "whole", tiny_config, params, format=fmt)
    assert max(experts) == 8
    experts.clear()
    monkeypatch.setattr(export, "GROUP_BYTES", 3 * 128 * 96 * 4)  # of gate_up_proj three experts
    groups = export_hf(tmp_path / "groups", tiny_config, params, format=fmt, tick=lambda *counts: ticks.append(counts))
    assert {3, 2} < set(experts) and 8 not in experts
    for name in ("model.safetensors", "gptoss_jax_export.json"):
        assert (whole / name).read_bytes() == (groups / name).read_bytes()
    assert ticks[-1][0] == ticks[-1][1] == sum(info.nbytes for info in open_checkpoint(whole).store.infos.values())


def test_writing_goes_on_while_the_next_group_is_encoded(masters, tiny_config, tmp_path, monkeypatch):
    """Neither waits for the other: the first write ends only when two more groups have been encoded."""
    encoded, write, groups = threading.Semaphore(0), export._write_group, export._groups

    def counted(*args):
        for group in groups(*args):
            encoded.release()
            yield group

    def slow(*args):
        if not slow.waited:
            slow.waited = True
            assert all(encoded.acquire(timeout=20) for _ in range(3))
        return write(*args)

    slow.waited = False
    monkeypatch.setattr(export, "_groups", counted)
    monkeypatch.setattr(export, "_write_group", slow)
    export_hf(tmp_path / "out", tiny_config, masters, format=Mxfp4())
