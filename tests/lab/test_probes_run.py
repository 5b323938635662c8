"""All probes of one model by command: files, tables, and refusals in one line."""

import json

import numpy as np
import pytest

from gptoss_jax.checkpoint.source import NANO
from gptoss_jax.cli import main
from gptoss_jax.data import load_tokenizer
from gptoss_jax.errors import UsageError
from gptoss_jax.lab import read_rows
from gptoss_jax.lab.probes.run import PROBES, ProbeSettings, load_batches

DEV = NANO / "tasks" / "dev.jsonl"
SMALL = ["--batches", "2", "--rows", "2", "--row-length", "64", "--draws", "2", "--steps", "0.01"]


def test_batches_hold_different_rows_and_the_same_for_a_seed():
    tokenizer = load_tokenizer(NANO)
    first, second = load_batches(DEV, tokenizer, 2, 3, 64)
    again = load_batches(DEV, tokenizer, 2, 3, 64)
    assert first.tokens_BT.shape == (3, 64) and all((a == b).all() for a, b in zip(first, again[0]))
    assert not (first.tokens_BT[:, None] == second.tokens_BT[None]).all(-1).any()
    assert not np.array_equal(first.tokens_BT, load_batches(DEV, tokenizer, 2, 3, 64, seed=1)[0].tokens_BT)
    with pytest.raises(UsageError, match="1000 batches of 9 rows need 9000"):
        load_batches(DEV, tokenizer, 1000, 9, 64)


@pytest.mark.slow
def test_command_writes_a_file_for_every_probe_and_prints_tables(tmp_path, capsys):
    out = tmp_path / "probe"
    assert main(["lab", "probe", "nano", "--format", "nvfp4", "--estimators", "ste,dge:k=3", "--out", str(out), *SMALL]) == 0
    text = capsys.readouterr().out
    assert "SQNR dB" in text and "dge(k=3)" in text and "gap to the fake-quantized model 0, 0 expert weights differ" in text and "layer 3" in text
    found = {name: read_rows(out / f"{name}.parquet") for name in PROBES}
    assert all(read_rows(out / f"{name}.jsonl") == rows for name, rows in found.items())
    assert {row["estimator"] for row in found["descent"]} == {"ste", "dge(k=3)", "gradient at w"}
    assert found["export"][0]["gap"] == 0 and found["routing"][0]["kl"] > 0
    record = json.loads((out / "probe.json").read_text())
    assert record["format"] == {"name": "nvfp4", "global_scale": "pow2"} and record["batches"] == 2 and record["estimators"] == ["ste", "dge(k=3)"]


def test_without_conversations_weights_alone_are_looked_at(capsys):
    assert main(["lab", "probe", str(NANO), "--format", "mxfp4:scale_rule=even", "--max-experts", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["weights"] and found["weights"][0]["sqnr_db"] is None, "the model comes in MXFP4: every rule keeps its values"
    assert main(["lab", "probe", str(NANO), "--max-experts", "1"]) == 0
    text = capsys.readouterr().out
    assert "exact" in text and "rounding changes nothing" in text and "No conversations" in text


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--format", "mxfp5"], "unknown format 'mxfp5'"),
        (["--format", "mxfp4:scale_rul=even"], "scale_rul"),
        (["--estimators", "ste,ste", "--probes", "gradients"], "two estimators"),
        (["--estimators", "dgee"], "unknown estimator 'dgee'"),
        (["--estimators", "dge:q=2"], "no hyperparameter 'q'"),
        (["--probes", "weight"], "unknown probe 'weight'"),
        (["--directions", "adam"], "unknown direction 'adam'"),
        (["--draws", "1"], "draws = 1"),
        (["--only", "*.up_proj", "--probes", "gradients"], "no expert projection has a name like"),
        (["--data", "no/such.jsonl", "--probes", "gradients"], "no/such.jsonl"),
    ],
)
def test_bad_usage_gets_one_line(arguments, message, capsys):
    assert main(["lab", "probe", "nano", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


def test_settings_are_checked():
    with pytest.raises(UsageError, match="rows = 0"):
        ProbeSettings(rows=0)
