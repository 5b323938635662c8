"""The recipe end to end on the model that comes along: every row from exported files, nothing done twice, any data set."""

import json
from pathlib import Path

import pytest

from gptoss_jax.checkpoint import open_checkpoint, verify_dir
from gptoss_jax.checkpoint.source import NANO
from gptoss_jax.errors import UsageError
from gptoss_jax.training.recipe.config import load_recipe
from gptoss_jax.training.recipe.results import RESULTS, read_results
from gptoss_jax.training.recipe.rows import DEMO_ROWS
from gptoss_jax.training.recipe.run import Recipe
from tests.training.recipe.support import LANGUAGE, config, write_rows

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.mark.slow
def test_recipe_measures_exported_files_and_resumes(tmp_path):
    said = []
    settings = dict(rows=DEMO_ROWS)
    found = Recipe(config(tmp_path, **settings), say=said.append).run()
    assert [m.row for m in found.results] == list(DEMO_ROWS)
    assert sum("exported codes equal the trained ones (8 expert matrices)" in line for line in said) == 2
    exports = tmp_path / "run" / "seed-0" / "export"
    assert {p.name: open_checkpoint(p).layout.experts for p in exports.iterdir()} == {
        "sft": "bf16", "sft_ptq": "mxfp4", "qat_mxfp4": "mxfp4", "qat_nvfp4": "nvfp4",
    }  # fmt: skip
    assert all(verify_dir(p).ok for p in exports.iterdir())
    assert [m.steps_trained for m in found.results] == [0, 2, 2, 4, 4]
    again = []
    assert Recipe(config(tmp_path, **settings), say=again.append).run() == found and not again
    assert read_results(tmp_path / "run") == found

    (tmp_path / "run" / RESULTS).unlink()  # an interruption before the first row was written: what was trained and exported is used
    assert Recipe(config(tmp_path, **settings), say=again.append).run() == found
    assert len(again) == len(DEMO_ROWS) and not any("learning rate" in line for line in again)

    with pytest.raises(UsageError, match=r"holds a recipe with other settings \(train_documents: 200 -> 300\): choose another output"):
        Recipe(config(tmp_path, train_documents=300, **settings)).run()


@pytest.mark.slow
def test_variants_share_the_stages_that_they_do_not_change(tmp_path):
    said = []
    variants = {"fast": {}, "slow": {"qat.optimizer.learning_rate": 1e-6}}
    rows = ["original", "sft", "qat_mxfp4"]
    found = Recipe(config(tmp_path, variants=variants, rows=rows), say=said.append).run()
    trained = [line.split(": ")[0] for line in said if "learning rate" in line]
    assert trained == ["[seed 0] fast, sft", "[seed 0] fast, qat_mxfp4", "[seed 0] slow, qat_mxfp4"]
    assert [(m.row, m.variant) for m in found.results] == [
        ("original", ""), ("sft", "fast"), ("qat_mxfp4", "fast"), ("qat_mxfp4", "slow"),
    ]  # fmt: skip
    assert [found.label(m) for m in found.results][1:3] == ["SFT BF16", "SFT + QAT MXFP4, fast"]
    assert found.results[-1].loss != found.results[-2].loss
    said.clear()
    more = Recipe(config(tmp_path, variants={**variants, "slower": {"qat.optimizer.learning_rate": 1e-7}}, rows=rows), say=said.append).run()
    assert more.results[:4] == found.results and [line for line in said if "learning rate" in line] == [
        "[seed 0] slower, qat_mxfp4: 2 steps, learning rate 1e-07"
    ]


def multilingual_rows(count: int) -> list[dict]:
    """Invented, with the columns of Multilingual-Thinking."""
    rows = []
    for i in range(count):
        language = list(LANGUAGE)[i % len(LANGUAGE)]
        turns = {"user": f"Spell out {i}.", "analysis": LANGUAGE[language], "final": "It is a number.", "developer": "Be brief."}
        messages = [
            {"role": "system", "content": f"reasoning language: {language}\n\n{turns['developer']}", "thinking": None},
            {"role": "user", "content": turns["user"], "thinking": None},
            {"role": "assistant", "content": turns["final"], "thinking": turns["analysis"]},
        ]
        rows.append({"reasoning_language": language, **turns, "messages": messages})
    return rows


def falsereject_rows(count: int) -> list[dict]:
    """Invented, with the columns of FalseReject's training split."""
    row = {"category": 3, "category_text": "invented", "instruct_response": "Sure: use kill.", "cot_response": "<think>Harmless.</think>Use kill."}
    return [{"prompt": f"How do I kill process {i}?", **row} for i in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,rows,tasks,devices", [("multilingual_20b", multilingual_rows, 2, 1), ("falsereject_20b", falsereject_rows, 1, 2)],
    ids=["multilingual", "falsereject_on_two_devices"],
)  # fmt: skip
def test_the_20b_recipes_run_through_on_rows_of_their_schema(tmp_path, name, rows, tasks, devices):
    """All stages with nano in place of 20b: a tenth held out and asked, four rows with NVIDIA's numbers, failing samples kept."""
    if name == "multilingual_20b":
        pytest.importorskip("py3langid", reason="the language check needs the extra `eval`")
    data = write_rows(tmp_path / "rows.jsonl", rows(40))
    files = [f"data.train={data}", "model=nano", "data.row_length=256", "data.system_date=null"]
    small = ["steps=2", "epochs=null", "batch={rows: 4, accumulation: 1}", f"mesh={{fsdp: {devices}}}", "compute_dtype=float32", "eval_every=null"]
    recipe = load_recipe(
        CONFIGS / f"{name}.yaml",
        [*files, *(f"{stage}.{text}" for stage in ("sft", "qat") for text in small)],
        output=tmp_path / "run",
    )
    entries = tuple(entry.model_copy(update={"max_new_tokens": 24, "limit": 3}) for entry in recipe.tasks)
    said = []
    found = Recipe(recipe.model_copy(update={"tasks": entries}), say=said.append).run()
    assert [m.row for m in found.results] == ["original", "sft", "sft_ptq", "qat_mxfp4"] and len(found.tasks) == tasks
    assert all(total == 3 for m in found.results for _, total, _, _ in m.pass_rates.values())
    assert len({m.loss for m in found.results}) == 4 and found.results[1].loss < found.results[0].loss
    place = tmp_path / "run" / "seed-42"
    for m in found.results:
        for task, (passed, total, *_) in m.pass_rates.items():
            file = place / "failures" / m.row / f"{task}.jsonl"
            samples = file.read_text().splitlines() if file.exists() else []
            assert len(samples) == total - passed and all(json.loads(sample)["reason"] for sample in samples)
    metrics = [json.loads(line) for line in (place / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert "eval_loss" in metrics[0], "training evaluates on the held-out tenth too"


def test_a_recipe_without_held_out_data_for_its_tasks_is_refused(tmp_path):
    (tmp_path / "t.yaml").write_text("scorer: not_refused\n")
    with pytest.raises(UsageError, match="task 't' has no data of its own, and the recipe neither data.eval nor data.eval_fraction"):
        Recipe(config(tmp_path, tasks=[{"file": str(tmp_path / "t.yaml")}]))


def test_the_model_that_comes_along_conforms_and_lies_on_the_grid():
    assert verify_dir(NANO).ok
    assert verify_dir(NANO, against=NANO).ok
