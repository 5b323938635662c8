"""`gptoss-jax ckpt` on a run directory: what is there, what a checkpoint holds, what is damaged."""

import json

import jax
import pytest

from gptoss_jax.checkpoint import orbax_store
from gptoss_jax.cli import main
from gptoss_jax.model import init_params
from gptoss_jax.quant import default_policy
from tests.training.support import CONFIG, make_train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    params = init_params(CONFIG, jax.random.key(0))
    source = {"run": "sft", "step": 7, "base": {"path": "gpt-oss-20b", "revision": None}}
    for step, quant in ((4, None), (8, default_policy("mxfp4").to_dict())):
        meta = orbax_store.Meta(
            CONFIG.to_dict(), make_train().to_dict(), {"next_batch": step, "fingerprint": {}}, quant, {"layer": "hash"} if quant else None, source
        )
        orbax_store.save(root / "checkpoints", step, params, meta)
    records = [{"step": 4, "loss": 1.5}, {"step": 8, "loss": 0.25, "eval_loss": 0.5}]
    (root / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return root


def test_ls_has_a_line_for_every_step(run, capsys):
    assert main(["ckpt", "ls", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["step", "4", "8"]
    assert "1.5000" in lines[1] and "mxfp4" in lines[2] and lines[2].split()[-2:] == ["0.2500", "0.5000"]
    assert main(["ckpt", "ls", str(run), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["step"], first["quant"], first["loss"], first["eval_loss"]) == (4, None, 1.5, None)
    assert second["quant"] == "mxfp4" and second["bytes"] > 10_000


def test_show_says_what_a_checkpoint_is(run, capsys):
    assert main(["ckpt", "show", str(run)]) == 0
    text = capsys.readouterr().out
    expected = "step 8", "from step 7 of sft, from gpt-oss-20b", "codes of 1 expert matrices", "next batch: next_batch 8", "row_length", "mxfp4(scale"
    assert [part for part in expected if part not in text] == []
    assert main(["ckpt", "show", str(run / "checkpoints" / "4")]) == 0
    assert "not quantized: no code hashes" in capsys.readouterr().out
    assert main(["ckpt", "show", str(run), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["step"] == 8 and shown["params"]["embed_tokens.weight"] == {"shape": [48, 64], "dtype": "float32"}


def test_verify_finds_the_flipped_bit_and_goes_on(run, capsys):
    assert main(["ckpt", "verify", str(run)]) == 0
    assert capsys.readouterr().out == "step 4: whole\nstep 8: whole\n"
    file = next(file for file in (run / "checkpoints" / "4" / "arrays").rglob("*") if file.is_file() and file.stat().st_size > 1000)
    content = file.read_bytes()
    file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    try:
        assert main(["ckpt", "verify", str(run)]) == 4
        out, err = capsys.readouterr()
        assert out == "step 8: whole\n" and file.name in err and err.startswith("step 4: DAMAGED")
        assert main(["ckpt", "verify", str(run / "checkpoints" / "8")]) == 0
    finally:
        file.write_bytes(content)


@pytest.mark.parametrize("command", ["ls", "show", "verify"])
def test_a_directory_without_checkpoints_is_named(command, tmp_path, capsys):
    assert main(["ckpt", command, str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"gptoss-jax ckpt: {tmp_path}: no training checkpoint there\n"
