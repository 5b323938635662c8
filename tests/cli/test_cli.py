"""The command line from outside: help, exit codes, one-line errors, and logits against transformers on a directory it has never seen."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gptoss_jax.checkpoint import export_hf
from gptoss_jax.cli import COMMANDS, main
from gptoss_jax.cli.host_memory import restart_with_huge_pages
from gptoss_jax.formats import Mxfp4
from gptoss_jax.model import GptOssConfig, RopeConfig
from tests.support.params import lively_params

ROOT = Path(__file__).parent.parent.parent


def run(*args, **kwargs):
    return subprocess.run([sys.executable, "-m", "gptoss_jax", *map(str, args)], capture_output=True, text=True, cwd=ROOT, **kwargs)


def test_commands_that_compute_start_again_with_large_pages_once(monkeypatch):
    calls = []
    monkeypatch.setattr("os.execve", lambda *call: calls.append(call))
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    restart_with_huge_pages(["eval", "out/"])
    (program, arguments, environment) = calls.pop()
    assert program == sys.executable and arguments[1:] == ["-m", "gptoss_jax", "eval", "out/"]
    assert environment["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1" and environment["PATH"] == os.environ["PATH"]
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    restart_with_huge_pages(["eval", "out/"])
    assert not calls, "a choice of the user's stays"


@pytest.mark.parametrize("args", [(), ("--help",)])
def test_overview_answers_at_once_and_imports_no_jax(args):
    start = time.process_time(), time.monotonic()
    done = run(*args)
    assert done.returncode == 0 and all(name in done.stdout for name in COMMANDS)
    print(f"{time.monotonic() - start[1]:.2f} s")
    probe = "import sys; from gptoss_jax.cli import main; main([]); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, cwd=ROOT).returncode == 0


def test_commands_are_the_published_ones():
    expected = "demo recipe sft qat import export verify logits eval compare generate chat env data diagnose plan lab ckpt"
    expected += " report init recipes completion"
    assert set(COMMANDS) == set(expected.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_that_explains_its_options(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and len(text.splitlines()) <= 80
    assert len(re.sub(r"[╭─╮│╰╯]", "", text).split()) > 25


@pytest.mark.parametrize(
    "args,code,message",
    [
        (["srt"], 2, "did you mean 'sft'"),
        (["sft", "--config", "no/such.yaml"], 2, "cannot be read"),
        (["sft", "optimizer.learning_rat=1"], 2, "did you mean 'optimizer.learning_rate'"),
        (["sft", "data.train=x", "output=y"], 2, "model is not set"),
        (["qat", "model=x"], 2, "no `quant`"),
        (["sft", "quant.format=mxfp4"], 2, "gptoss-jax qat"),
        (["recipe", "configs/sft_20b.yaml"], 2, "configs/sft_20b.yaml: batch: unknown key"),
        (["recipe", "seed=1"], 2, "unknown key; did you mean 'seeds'"),
        (["recipe", "--report", "no/such/dir"], 2, "no results.json"),
        (["diagnose", "no/such/dir"], 2, "no/such/dir"),
        (["diagnose", "nano"], 2, "give --base"),
        (["plan"], 2, "model is not set"),
        (["plan", "model=20b", "--device", "h20"], 2, "did you mean 'h200'"),
        (["plan", "model=20b", "--devices", "7"], 2, "no mesh of 7 devices"),
        (["plan", "model=20b", "mesh=fsdp"], 2, "mesh"),
        (["eval", "no/such/dir/at/all"], 2, "no/such/dir"),
        (["logits", "nano", "--tokens", "missing.npy", "--out", "l.npy"], 2, "missing.npy"),
        (["verify", "no/such/dir"], 2, "no/such/dir"),
    ],
)
def test_bad_usage_gets_one_line_and_its_exit_code(args, code, message, capsys):
    assert main(args) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1, captured.err


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_config_parses(path):
    from gptoss_jax.strict_yaml import read_mapping
    from gptoss_jax.training.recipe.config import load_recipe
    from gptoss_jax.training.recipe.run import Recipe
    from gptoss_jax.training.yaml_config import load_config

    if "qat" not in read_mapping(path)[0]:
        assert load_config(path).model
    elif load_recipe(path).model == "nano":
        assert Recipe(load_recipe(path, output="unused")).evaluation.columns
    else:
        assert load_recipe(path).tasks


def test_logits_of_an_unseen_directory_agree_with_transformers(tmp_path):
    """Dimensions and layer pattern of no other test; transformers reports nothing missing and gives the same logits."""
    import torch
    from transformers import AutoModelForCausalLM, Mxfp4Config

    config = GptOssConfig(
        vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=5, num_local_experts=5, num_experts_per_tok=2,
        num_attention_heads=4, num_key_value_heads=1, head_dim=24, sliding_window=9, max_position_embeddings=128,
        layer_types=tuple(f"{kind}_attention" for kind in ("full", "sliding", "sliding", "full", "sliding")),
        rope=RopeConfig(rope_theta=5000.0, factor=3.0, original_max_position_embeddings=32),
    )  # fmt: skip
    export_hf(tmp_path / "model", config, lively_params(config), format=Mxfp4(), max_shard_bytes=200_000)
    tokens = np.random.default_rng(5).integers(0, config.vocab_size, (2, 45))
    np.save(tmp_path / "t.npy", tokens)
    args = ["logits", str(tmp_path / "model"), "--tokens", str(tmp_path / "t.npy"), "--out", str(tmp_path / "l.npy"), "--dtype", "float32"]
    assert main(args) == 0
    options = dict(output_loading_info=True, dtype=torch.float32, attn_implementation="eager")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=Mxfp4Config(dequantize=True), **options)
    assert len(info) == 4 and not any(info.values()), info
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits.numpy()
    ours = np.load(tmp_path / "l.npy")
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


def test_import_export_verify_round_trip(mxfp4_dir, tmp_path, capsys):
    """import -> export -> verify by command; every value comes back, and a flipped bit in the file is found."""
    assert main(["import", str(mxfp4_dir), str(tmp_path / "run")]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--format", "mxfp4"]) == 0
    assert main(["verify", str(tmp_path / "out"), "--against", str(mxfp4_dir)]) == 0
    assert main(["import", str(mxfp4_dir), str(tmp_path / "run")]) == 2, "a used directory is refused"
    file = tmp_path / "out" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    assert main(["verify", str(tmp_path / "out"), "--against", str(mxfp4_dir)]) == 1


def test_export_with_seeded_stochastic_rounding(tiny_config, tmp_path, capsys):
    """The seed stands in the manifest, another seed is another model, and mistakes of usage are named."""
    export_hf(tmp_path / "model", tiny_config, lively_params(tiny_config), format="bf16")
    export = lambda name, *options: main(["export", str(tmp_path / "model"), str(tmp_path / name), *options])
    rounded = ("--format", "mxfp4", "--element-round", "sr", "--round-seed")
    assert export("out", *rounded, "3") == export("again", *rounded, "3") == export("other", *rounded, "4") == 0
    out, again, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again", "other"))
    assert out == again != other
    recorded = json.loads((tmp_path / "out" / "gptoss_jax_export.json").read_text())["format"]
    assert recorded == {"name": "mxfp4", "scale_rule": "rceil", "compat": None, "element_round": "sr", "seed": 3}
    assert main(["verify", str(tmp_path / "out"), "--against", str(tmp_path / "model")]) == 0
    for options, message in (
        (("--format", "mxfp4", "--element-round", "sr"), "needs a seed"),
        (("--format", "nvfp4", "--round-seed", "3"), "seed=3 is for stochastic rounding"),
        (("--format", "bf16", "--element-round", "sr"), "--element-round is for 4-bit formats"),
        (("--format", "nvfp4", "--scale-rule", "even"), "--scale-rule is for mxfp4"),
    ):
        capsys.readouterr()
        assert export("bad", *options) == 2 and message in capsys.readouterr().err


def test_export_in_other_layouts(mxfp4_dir, tmp_path, capsys):
    """An MXFP4 checkpoint becomes NVFP4 without a changed value, or OpenAI's layout; layouts that cannot hold a format are refused."""
    export = lambda name, *options: main(["export", str(mxfp4_dir), str(tmp_path / name), *options])
    nvfp4 = ("--format", "nvfp4", "--layout", "modelopt")
    assert export("cast", *nvfp4, "--cast-mxfp4", "--granularity", "tensor") == 0
    assert export("openai", "--format", "mxfp4", "--layout", "openai") == 0
    for name in ("cast", "openai"):
        assert main(["verify", str(tmp_path / name), "--against", str(mxfp4_dir)]) == 0
    for options, message in (
        (nvfp4, "--granularity tensor"),
        ((*nvfp4[:2], "--layout", "openai"), "known are own, modelopt, compressed-tensors"),
        (("--format", "mxfp4", "--cast-mxfp4"), "--cast-mxfp4 is for nvfp4, not mxfp4"),
        (("--format", "mxfp4", "--granularity", "tensor"), "--granularity is for nvfp4, not mxfp4"),
    ):
        capsys.readouterr()
        assert export("bad", *options) == 2 and message in capsys.readouterr().err
