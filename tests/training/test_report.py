"""The report says what the files of a run say, of one run and of several, with and without matplotlib; and what a start records."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
import yaml

import gptoss_jax
from gptoss_jax.checkpoint import orbax_store
from gptoss_jax.cli import main
from gptoss_jax.errors import CorruptError, UsageError
from gptoss_jax.model import init_params
from gptoss_jax.training import environment as module
from gptoss_jax.training.environment import environment
from gptoss_jax.training.report.page import final_values, write_report
from gptoss_jax.training.report.runs import read_runs, running_mean
from gptoss_jax.training.run_dir import RunDir
from tests.training.support import CONFIG, make_train

SAMPLE = {"task": "A", "prompt": [{"role": "user", "content": "2 < 3?"}], "reference": None, "row": {}}


def make_run(path, loss=2.0, steps=4, **settings):
    """A run directory as the loop writes it: held-out loss, routing of 2 layers, a task, and a step that was left out."""
    with RunDir(path, resume=False, overwrite=False) as run:
        run.write_config(yaml.safe_dump(make_train(steps=steps, **settings).to_dict()))
        run.record_start(environment())
        run.log({"step": 0, "eval_loss": loss + 1})
        for step in range(1, steps + 1):
            record = {"step": step, "loss": loss / step, "grad_norm": 0.5, "lr": 1e-3, "tokens": 100, "skipped": int(step == 2), "tok_per_s": 50.0}
            record |= {"router/load_max": [1.5, 1.0 + step], "router/entropy": [0.9, None], "router/dropped": 0}
            record |= {"batch": {"next_batch": 1}} if step == 2 else {}
            run.log(record | ({"eval_loss": loss / 4, "task/A": 0.25} if step == steps else {}))
        run.log_router({"step": steps, "tokens": 8, "assignments": [[8, 0, 4, 4], [4, 4, 4, 4]], "probability": [[0.25] * 4] * 2})
    folder = path / "samples" / f"step-{steps:08d}"
    folder.mkdir(parents=True)
    verdicts = {"answer": "</pre><b>No", "passed": False, "reason": "wrong & short"}, {"answer": "Yes", "passed": True, "reason": ""}
    samples = [SAMPLE | verdict for verdict in verdicts]
    (folder / "A.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path


def values(table):
    return {row[0]: row[1:] for row in table.rows}


def test_one_run_becomes_a_page_with_its_numbers_figures_and_samples(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    run = make_run(tmp_path / "sft")
    assert main(["report", str(run)]) == 0
    assert "report.html" in capsys.readouterr().out
    page, text = ((run / "report" / name).read_text() for name in ("report.html", "report.md"))
    for expected in ("Load of every expert", "wrong &amp; short", "&lt;/pre&gt;&lt;b&gt;No", "optimizer.learning_rate", "versions.jax", "2 (batch"):
        assert expected in page, expected
    assert page.count("data:image/png") == 8 and "<b>No" not in page and "http" not in page.split("<body>")[0]
    assert all((run / "report" / link.split(")")[0]).is_file() for link in text.split("](")[1:])
    with open(run / "report" / "plots" / "load.csv") as handle:
        loads = {(row["layer"], row["expert"]): float(row["load"]) for row in csv.DictReader(handle)}
    assert loads["0", "0"] == 2.0 and loads["0", "1"] == 0.0 and loads["1", "3"] == 1.0


def test_final_values_are_those_of_the_files(tmp_path):
    (run,) = read_runs([make_run(tmp_path / "sft")])
    found = values(final_values([run]))
    assert found["steps"] == ["4 of 4"] and found["tokens"] == ["400"] and found["A, % passed"] == ["25.0"]
    assert found["held-out loss at the start"] == ["3.0000"] and found["lowest held-out loss"] == ["0.5000 (step 4)"]
    assert found["training loss, last 5 %"] == ["0.5000"] and found["steps left out (not finite)"] == ["1"]
    assert found["busiest expert at the end, times the mean"] == ["5.00"], "the worst layer counts"
    assert run.curve("router/entropy")[0] == (1, 0.9), "a layer without a number is passed over"


def test_several_runs_are_compared_and_named_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "recipe" / "seed-0" / "sft")
    make_run(tmp_path / "recipe" / "seed-1" / "sft", loss=1.0, seed=7)
    runs = read_runs([tmp_path / "recipe"])
    assert [run.name for run in runs] == ["seed-0/sft", "seed-1/sft"]
    table, _ = write_report(runs, tmp_path / "out")
    assert values(table)["held-out loss at the end"] == ["0.5000", "0.2500"]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| seed | 0 | 7 |" in text and "| steps | 4 |" not in text.split("Settings that differ")[1]
    with open(tmp_path / "out" / "metrics.csv") as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 10 and rows[-1]["run"] == "seed-1/sft" and rows[-1]["router/load_max/1"] == "5.0" and rows[0]["loss"] == ""


def test_without_matplotlib_there_are_tables_and_a_remark(tmp_path, monkeypatch):
    run = make_run(tmp_path / "sft")
    for name in ("gptoss_jax.training.report.plots", "gptoss_jax.figures"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(run)]) == 0
    page = (run / "report" / "report.html").read_text()
    assert "matplotlib is not installed" in page and "lowest held-out loss" in page and "<img" not in page


def test_weights_of_the_last_checkpoint_are_rounded_to_the_format_of_the_run(tmp_path):
    run = make_run(tmp_path / "qat", quant={"format": "nvfp4"})
    meta = orbax_store.Meta(CONFIG.to_dict(), make_train().to_dict(), {}, None, None, {})
    orbax_store.save(run / "checkpoints", 4, init_params(CONFIG, jax.random.key(0)), meta)
    assert main(["report", str(run), "--weights", "--max-experts", "1"]) == 0
    text = (run / "report" / "report.md").read_text()
    assert "qat, nvfp4" in text and "| layer 1 |" in text and "checkpoints at steps 4" in text
    assert (run / "report" / "weights-qat.parquet").is_file()


def test_what_is_no_run_and_what_is_damaged_is_named(tmp_path):
    with pytest.raises(UsageError, match="no run there"):
        read_runs([tmp_path])
    run = make_run(tmp_path / "sft")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    assert read_runs([run])[0].metrics[-1]["step"] == 4, "a line that is being written is not there yet"
    with open(run / "metrics.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(CorruptError, match="metrics.jsonl:6"):
        read_runs([run])


def test_running_mean_is_of_the_steps_before():
    assert running_mean([(1, 1.0), (2, 3.0), (5, 5.0)], 2) == [(2, 2.0), (5, 4.0)]


def test_every_start_is_recorded_and_overwriting_removes_what_a_run_left(tmp_path):
    run = make_run(tmp_path / "sft")
    (run / "report").mkdir()
    with RunDir(run, resume=True, overwrite=False) as again:
        again.record_start(environment(from_step=4))
    first, second = json.loads((run / "environment.json").read_text())
    assert (first["from_step"], second["from_step"]) == (0, 4) and second["versions"]["jax"] == jax.__version__
    assert {"command", "started", "devices", "platform", "commit"} <= second.keys()
    with RunDir(run, resume=False, overwrite=True):
        assert {entry.name for entry in run.iterdir()} == {".lock"}


def test_commit_is_of_the_package_and_not_of_a_checkout_around_it(tmp_path, monkeypatch):
    someone = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    git = lambda *command: subprocess.run([*someone, *command], check=True, capture_output=True)
    package = tmp_path / "gptoss_jax"
    package.mkdir()
    (package / "__init__.py").write_text("")
    git("init")
    git("commit", "--allow-empty", "-m", "first")
    monkeypatch.setattr(module.gptoss_jax, "__file__", str(package / "__init__.py"))
    monkeypatch.setattr(module.importlib.metadata, "distribution", lambda name: SimpleNamespace(read_text=lambda file: None))
    assert module.commit() is None
    git("add", ".")
    git("commit", "-m", "second")
    found = module.commit()
    assert len(found) == 40
    (package / "__init__.py").write_text("changed")
    assert module.commit() == f"{found}-dirty"


@pytest.mark.parametrize("program", ["/usr/bin/gptoss-jax", f"{Path(gptoss_jax.__file__).parent}/__main__.py"])
def test_the_command_is_recorded_as_it_can_be_typed_again(program, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program, "sft", "data.train=my file.jsonl"])
    assert environment()["command"] == "gptoss-jax sft 'data.train=my file.jsonl'"
    monkeypatch.setattr(sys, "argv", ["mine.py"])
    assert environment()["command"] == "mine.py"
