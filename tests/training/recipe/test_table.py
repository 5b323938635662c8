"""Cells, Markdown, picture and report of a recipe, from results alone."""

import json
import sys

import pytest

from gptoss_jax.checkpoint.source import NANO
from gptoss_jax.errors import CorruptError, UsageError
from gptoss_jax.training.recipe.report import write_report
from gptoss_jax.training.recipe.results import RESULTS, Results, Spread, loss_spread, pass_spread, read_results
from gptoss_jax.training.recipe.table import cell, make_table, to_markdown
from tests.training.recipe.support import measured, results


def test_a_cell_says_whether_its_spread_is_of_seeds_or_of_one_seed():
    assert cell(Spread(82.44, 80.0, 85.8, True), 1) == "82.4 (80.0-85.8)"
    assert cell(Spread(80.0, 76.3, 83.3, False), 1) == "80.0 [76.3-83.3]"
    assert cell(Spread(100.0, 99.99, 100.0, True), 1) == "100.0", "a spread that the digits do not show is left out"
    assert cell(None, 1) == ""


def test_mean_and_range_over_seeds_and_interval_of_a_single_one():
    two = [measured(seed=0, A=90, loss=0.1), measured(seed=1, A=70, loss=0.3)]
    assert pass_spread(two, "A") == Spread(80.0, 70.0, 90.0, True)
    assert pass_spread(two[:1], "A") == Spread(90.0, 85.0, 95.0, False)
    assert loss_spread(two).low == 0.1 and loss_spread(two).mean == pytest.approx(0.2)


def test_markdown_has_a_line_per_row_and_variant_with_nvidias_numbers_beside():
    found = results(
        measured("original", A=20, B=0), measured("sft", 0, "slow", A=99, B=98), measured("sft", 0, "fast", A=70, B=98),
        measured("qat_nvfp4", A=100, B=100, kl=0.25), A="multilingual", B="over_refusal",
    )  # fmt: skip
    lines = to_markdown(make_table(found)).splitlines()
    assert lines[0] == "|  | task A | task B | validation loss | KL to original | NVIDIA 20b |"
    assert lines[2] == "| original MXFP4 | 20.0 [15.0-25.0] | 0.0 [0.0-5.0] | 0.5000 |  | 16 / 30 |"
    assert lines[3].startswith("| SFT BF16, slow |") and lines[4].startswith("| SFT BF16, fast |")
    assert lines[5].endswith("| 0.5000 | 0.2500 |  |")
    assert "NVIDIA" not in to_markdown(make_table(results(measured(A=1), A=None)))


def test_the_recorded_table_of_nano_is_the_one_of_the_readme():
    record = json.loads((NANO / "recorded.json").read_text())
    table = to_markdown(make_table(Results.model_validate({key: record[key] for key in ("tasks", "results")})))
    assert "| SFT + PTQ MXFP4 | 82.4 (80.0-85.8) | 100.0 | 100.0 | 100.0 | 0.0236 (0.0156-0.0369) | 89 / 59 |" in table
    readme = (NANO.parent.parent / "README.md").read_text()
    assert all(line in readme for line in table.splitlines()[2:])


def test_report_is_made_again_from_results_json(tmp_path):
    found = results(measured("original", A=20), measured("sft", 0, A=90), measured("sft", 1, A=95), A="multilingual")
    (tmp_path / RESULTS).write_text(found.model_dump_json())
    (tmp_path / "seed-0" / "failures" / "sft").mkdir(parents=True)
    (tmp_path / "seed-0" / "failures" / "sft" / "A.jsonl").write_text("{}\n{}\n")
    again, remarks = write_report(tmp_path)
    assert again == found
    report = (tmp_path / "report.md").read_text()
    assert (tmp_path / "table.md").read_text().strip() in report and "seed-0/failures/sft/A.jsonl): 2" in report
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary[1]["pass_rates"]["A"] == {"mean": 92.5, "low": 90.0, "high": 95.0} and summary[1]["seeds"] == [0, 1]
    assert (tmp_path / "table.png").exists() != bool(remarks)


def test_the_picture_is_drawn_for_every_kind_of_column(tmp_path):
    pytest.importorskip("matplotlib", reason="the picture needs the extra `plots`")
    from gptoss_jax.training.recipe.plot import plot_results

    found = results(measured("original", A=20, kl=0.0), measured("sft", 0, A=90, kl=0.1), measured("sft", 1, A=95, kl=0.2), A="multilingual")
    assert plot_results(found, tmp_path / "t.png") and (tmp_path / "t.png").read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_the_report_says_so_and_the_rest_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / RESULTS).write_text(results(measured(A=90), A=None).model_dump_json())
    _, remarks = write_report(tmp_path)
    assert len(remarks) == 1 and "gptoss_jax[plots]" in remarks[0]
    assert {path.name for path in tmp_path.iterdir()} == {RESULTS, "table.md", "summary.json", "report.md"}


def test_results_that_cannot_be_read_are_refused_in_one_line(tmp_path):
    with pytest.raises(UsageError, match=r"no results\.json"):
        read_results(tmp_path)
    (tmp_path / RESULTS).write_text('{"tasks": {}, "results": [{"row": "sft"}]}')
    with pytest.raises(CorruptError, match=r"results\.json: results\.0\.seed"):
        read_results(tmp_path)


def test_a_loss_that_is_not_finite_survives_the_file(tmp_path):
    (tmp_path / RESULTS).write_text(results(measured(A=1, loss=float("nan")), A=None).model_dump_json())
    assert read_results(tmp_path).results[0].loss != read_results(tmp_path).results[0].loss
