"""`lab run` as a person runs it: two processes, nano, then plots and report; and the one line for what cannot be run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import CACHE

ROOT = Path(__file__).parents[2]
TEXT = """
name: whole
question: Does it run?
seeds: [0, 1]
data: {documents: 200}
evaluation: {set: dev, rows: {A: 20, B: 20}, curve_every: 1}
arm: {steps: 2, sft: {steps: 2}}
arms:
  longer: {}
  longer, rounded: {export: mxfp4}
  QAT: {format: mxfp4, tools: [tracker]}
  base: {start: base, steps: 0, format: mxfp4}
reference: longer
"""


def lab(*arguments, folder):
    cache = {"JAX_COMPILATION_CACHE_DIR": str(CACHE), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **cache}
    return subprocess.run([sys.executable, "-m", "gptoss_jax", "lab", *arguments], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_two_processes_share_the_arms_and_leave_a_report(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    (tmp_path / "whole.yaml").write_text(TEXT)
    done = lab("run", "whole.yaml", "--processes", "2", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "runs" / "lab" / "whole"
    results = {(r["arm"], r["seed"]): r for r in (json.loads(file.read_text()) for file in out.rglob("seed-*.json"))}
    assert len(results) == 8 and "8 results" in done.stdout and (out / "report.html").stat().st_size > 10_000
    assert len(list((out.parent / "stages").glob("*.safetensors"))) == 2 + 2  # SFT, and what two exports share
    for seed in (0, 1):
        longer, rounded, qat = (results[name, seed] for name in ("longer", "longer, rounded", "QAT"))
        assert longer["history"]["loss"] == rounded["history"]["loss"] and longer["measured"]["loss"] != rounded["measured"]["loss"]
        assert [step for step, _ in rounded["curve"]] == [0, 1, 2] and all(a != b for a, b in zip(longer["curve"], rounded["curve"]))
        assert longer["sft"]["history"]["loss"] == qat["sft"]["history"]["loss"]
        assert len(qat["history"]["flip_rate"]) == 2 and [step for step, _ in qat["curve"]] == [0, 1, 2]
        assert results["base", seed]["measured"]["pass"]["A"] == [4, 20], "the base spells English alone, one language of five"
        assert set(results["base", seed]["measured"]["rounding"].values()) == {0.0}, "it lies on its grid"
    again = lab("plot", "whole.yaml", folder=tmp_path)
    assert again.returncode == 0 and "| QAT |" in again.stdout
    changed = lab("run", "whole.yaml", "arm.steps=3", folder=tmp_path)
    assert changed.returncode == 2 and "was made with other settings (arm.steps: 2 -> 3)" in changed.stderr and "Traceback" not in changed.stderr


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["run", "no.yaml"], "no.yaml: cannot be read"),
        (["run", "e9_unknown"], "e9_unknown: cannot be read"),
        (["plot", "e1_recipe"], "no results of e1-recipe"),
        (["run", "whole.yaml", "seed=[1]"], "seed: unknown key; did you mean 'seeds'?"),
        (["run", "whole.yaml", "--processes", "0"], "--processes must be at least 1, not 0"),
        (["plot", "whole.yaml"], "no results of whole: run `gptoss-jax lab run` first"),
        (["plot", "."], "no rows of a probe"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    from gptoss_jax.cli import main

    (tmp_path / "whole.yaml").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    assert main(["lab", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
