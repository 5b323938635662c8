"""Reports and plots say what the results say: intervals, paired differences, tables, and the numbers beside every picture."""

import csv
import math
import re

import numpy as np
import pytest

from gptoss_jax.errors import UsageError
from gptoss_jax.lab.experiment import load_experiment
from gptoss_jax.lab.grid import Task
from gptoss_jax.lab.probes.rows import write_rows
from gptoss_jax.lab.report import late, lines_of, make_table, write_report
from gptoss_jax.lab.statistics import estimate, paired

pytest.importorskip("matplotlib", reason="plots need matplotlib")
TEXT = """
name: two
question: Is <b> better than a & by how much?
seeds: [0, 1, 2]
grid: {format: [mxfp4, nvfp4]}
arms: {plain: {steps: 0}}
reference: {format: mxfp4}
"""
LOSSES = {"mxfp4": (0.1, 0.2, 0.4), "nvfp4": (0.05, 0.1, 0.2), "plain": (1e-4, 2e-4, 3e-4)}
PASSED = {"mxfp4": (50, 60, 70), "nvfp4": (60, 70, 80), "plain": (100, 100, 100)}


@pytest.fixture
def experiment(tmp_path):
    """An experiment with results of every arm, made up."""
    (tmp_path / "two.yaml").write_text(TEXT)
    found, arms = load_experiment(tmp_path / "two.yaml")
    results = []
    for arm in arms:
        for seed in found.seeds:
            steps = arm.settings.steps and 8
            flips = [0.08] * 6 + [0.02, 0.04]
            result = {
                "arm": arm.name, "levels": dict(arm.levels), "seed": seed, "definition": {},
                "measured": {
                    "pass": {"A": [PASSED[arm.name][seed], 100], "H": [10, 10]}, "loss": LOSSES[arm.name][seed], "task_loss": {},
                    "rounding": {"changed": 0.05, "error_ratio": 1.5, "pull_back": 0.5, "kept": 0.25},
                },
                "history": {"loss": [0.1] * 8, "lr": [1e-4] * 8, "flip_rate": flips} if steps else {},
                "curve": [[0, 0.5], [8, 0.1 + seed]] if steps else [], "sft": {"history": {"loss": [0.5] * 3}, "curve": []},
                "seconds": {"arm": 60.0, "training": 50.0}, "versions": {"jax": "9.9", "cores": 2},
            }  # fmt: skip
            results.append(result)
    return found, arms, results


def rows_of(file):
    with open(file, encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def test_interval_is_students():
    found = estimate([1.0, 2.0, 4.0])
    # s = sqrt(7/3), t(0.975, 2) = 4.3027
    assert found.mean == pytest.approx(7 / 3) and found.half == pytest.approx(4.302653 * math.sqrt(7 / 3) / math.sqrt(3), rel=1e-5)
    assert estimate([5.0]) == (5.0, None, 1)
    draws = [estimate(values) for values in np.random.default_rng(0).normal(3, 2, (2000, 4))]
    assert abs(np.mean([found.low <= 3 <= found.high for found in draws]) - 0.95) < 0.02


def test_differences_are_taken_seed_by_seed():
    found = paired({0: 11.0, 1: 21.0, 2: 31.0, 9: 0.0}, {0: 10.0, 1: 20.0, 2: 30.0, 7: 5.0})
    assert found == (1.0, 0.0, 3) and paired({0: 1.0}, {1: 1.0}) is None


def test_table_has_means_intervals_and_paired_ratios(experiment):
    found, arms, results = experiment
    table = make_table(found, lines_of(found, arms, results))
    cells = {row[0]: dict(zip(table.header, row)) for row in table.rows}
    assert cells["mxfp4"]["A, %"] == "60.0 ±24.8" and cells["mxfp4"]["loss / reference"] == "1 (reference)"
    assert cells["nvfp4"]["loss / reference"] == "0.5 [0.5-0.5]" and cells["nvfp4"]["A - reference"] == "+10.0 ±0.0"
    assert cells["plain"]["loss"] == "0.0002 ±0.0002" and cells["plain"]["loss / reference"] == "0.000909 [0.000601-0.00137]"
    assert not any(title.startswith("H") for title in table.header) and "H: 100.0 % everywhere." in table.legend
    assert cells["nvfp4"]["late flips per million and step"] == "30000" and cells["plain"]["late flips per million and step"] == ""
    assert cells["nvfp4"]["kept, %"] == "25" and late("flip_rate")(results[0]) == pytest.approx(0.03)


def test_diverged_arm_is_shown_and_not_compared(experiment):
    found, arms, results = experiment
    results[3]["measured"]["loss"] = float("nan")
    table = make_table(found, lines_of(found, arms, results))
    assert next(row for row in table.rows if row[0] == "nvfp4")[2] == "inf ±nan" and "nan" not in table.rows[0][2]


def test_report_holds_everything_in_one_file_and_numbers_beside_pictures(experiment, tmp_path, monkeypatch):
    found, arms, results = experiment
    import gptoss_jax.lab.report as report

    monkeypatch.setattr(report, "results_of", lambda *_: results)
    printed = write_report(found, arms, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "Is &lt;b&gt; better than a &amp; by how much?" in page and not re.search(r'(?:src|href)="(?!data:)', page)
    assert page.count("data:image/png;base64,") == 4
    text = (tmp_path / "report.md").read_text()
    assert "| mxfp4 | 60.0 ±24.8 |" in text and "9 results, 9 minutes of one process with 2 cores, jax 9.9." in text and printed[0] in text + "\n"
    for name in ("outcomes", "ratios", "curves", "flips"):
        assert (tmp_path / "plots" / f"{name}.png").read_bytes()[:4] == b"\x89PNG" and f"(plots/{name}.png)" in text
    ratios = rows_of(tmp_path / "plots" / "ratios.csv")
    assert {row["arm"] for row in ratios} == {"nvfp4", "plain"}, "the reference itself is not drawn"
    assert [float(row["ratio"]) for row in ratios if row["arm"] == "nvfp4"] == pytest.approx([0.5] * 3)
    curve = [row for row in rows_of(tmp_path / "plots" / "curves.csv") if row["arm"] == "mxfp4"]
    assert [(int(row["step"]), float(row["mean loss"])) for row in curve] == [(3, 0.5), (11, pytest.approx(1.1))], "steps count from the base"
    assert len([row for row in rows_of(tmp_path / "plots" / "flips.csv") if row["arm"] == "nvfp4"]) == 8
    assert len(rows_of(tmp_path / "table.csv")) == 3


def test_file_of_a_result_has_a_readable_name_of_its_own(experiment, tmp_path):
    _, arms, _ = experiment
    names = [Task(arm, 0).file(tmp_path).parent.name for arm in arms]
    assert names == ["mxfp4", "nvfp4", "plain"]


def test_plots_of_probes_show_their_rows(tmp_path):
    from gptoss_jax.lab.probe_plots import of_probes

    place = {"layer": None, "projection": None, "expert": None}
    steps = [{"estimator": e, "forward": f, "direction": d, "step": s, "ratio": r, **place, "layer": layer} for e, f, d, s, r, layer in (
        ("ste", "quantized", "gradient", 0.01, 0.4, None), ("ste", "quantized", "gradient", 0.002, 0.9, None),
        ("ste", "quantized", "sign", 0.002, 0.7, None), ("ste", "quantized", "gradient", 0.002, 0.5, 1),
        ("gradient at w", "full", "gradient", 0.002, 1.0, None))]  # fmt: skip
    gradients = [{"estimator": e, "reference": r, "bias2": b, "variance_batches": 0.5, "variance_seeds": v, **place}
                 for e, r, b, v in (("ste", "full", 0.7, None), ("ste", "quantized", 0.0, None), ("dge", "full", 0.9, 0.25))]  # fmt: skip
    weights = [
        {"layer": layer, "projection": projection, "expert": expert, "sqnr_db": 18.0 + layer + expert if (layer, expert) != (0, 1) else None,
         "cell": [40] + [0] * 18 + [20] if projection == "gate_up_proj" else [10] * 20}
        for layer in (0, 1) for projection in ("gate_up_proj", "down_proj") for expert in (0, 1)
    ]  # fmt: skip
    for name in ("sft", "qat"):
        for probe, rows in (("descent", steps), ("gradients", gradients), ("weights", weights)):
            write_rows(rows, tmp_path / name / probe)
    made = of_probes([tmp_path / "sft"], tmp_path / "plots")
    assert [file.name for _, file in made] == ["descent.png", "bias_variance.png", "cells.png", "sqnr.png"]
    curve = [(row["direction"], row["step"], row["ratio"]) for row in rows_of(tmp_path / "plots" / "descent.csv") if row["curve"] == "ste"]
    assert curve == [("gradient", "0.002", "0.9"), ("gradient", "0.01", "0.4"), ("sign", "0.002", "0.7")], "one layer alone is not drawn"
    scatter = {(row["reference"], row["estimator"]): (row["bias2"], row["variance"]) for row in rows_of(tmp_path / "plots" / "bias_variance.csv")}
    assert scatter["full", "dge"] == ("0.9", "0.75") and scatter["quantized", "ste"] == ("0.0", "0.5")
    folded = [float(row["density"]) for row in rows_of(tmp_path / "plots" / "cells.csv") if row["weights"] == "gate_up_proj"]
    assert folded == pytest.approx([10.0] + [0.0] * 9), "all weights of both ends lie in the outermost of ten bins"
    assert len(rows_of(tmp_path / "plots" / "sqnr.csv")) == 6
    both = of_probes([tmp_path / "sft", tmp_path / "qat"], tmp_path / "both")
    assert len(both) == 4 and "qat, dge" in {row["estimator"] for row in rows_of(tmp_path / "both" / "bias_variance.csv")}
    with pytest.raises(UsageError, match="no rows of a probe"):
        of_probes([tmp_path / "nothing"], tmp_path / "none")
