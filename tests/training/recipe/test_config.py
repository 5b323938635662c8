"""Recipe files: what they may say, what variants make of them, and what is refused in one line."""

from pathlib import Path

import pytest

from gptoss_jax.errors import UsageError
from gptoss_jax.training.recipe.config import load_recipe, parse_recipe
from tests.training.recipe.support import STAGE, config

CONFIGS = Path(__file__).parents[3] / "configs"


def test_a_variant_is_the_recipe_with_its_settings_over(tmp_path):
    recipe = config(tmp_path, variants={"base": {}, "lr_5e-5": {"sft.optimizer.learning_rate": 5e-5, "qat.steps": 7, "data.row_length": 64}})
    assert recipe.of_variant("base").sft == recipe.sft
    changed = recipe.of_variant("lr_5e-5")
    assert (changed.sft.optimizer.learning_rate, changed.qat.steps, changed.stage("qat").data.row_length) == (5e-5, 7, 64)
    assert changed.qat.optimizer == recipe.qat.optimizer and not changed.variants


def test_what_a_stage_says_about_data_goes_before_the_recipes(tmp_path):
    recipe = config(tmp_path, qat={**STAGE, "data": {"row_length": 96}})
    assert (recipe.stage("sft").data.row_length, recipe.stage("qat").data.row_length) == (128, 96)
    assert recipe.stage("qat").data.train == "nano"


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"qat": {**STAGE, "compute_dtype": "bfloat16"}}, "same dtype"),
        ({"sft": {**STAGE, "model": "elsewhere"}}, "sft leaves model, output, data files, quant and distill to the recipe"),
        ({"sft": {**STAGE, "stepz": 3}}, "unknown key; did you mean 'sft.steps'"),
        ({"sft": {**STAGE, "optimizer": {"learning_rat": 1}}}, "did you mean 'sft.optimizer.learning_rate'"),
        ({"data": {}}, "data.train is not set"),
        ({"data": {"train": "x.jsonl"}}, "train_documents and data.train: nano belong together"),
        ({"rows": []}, "rows"),
        ({"rows": ["sfd"]}, "rows.0 = 'sfd'"),
        ({"tasks": [{"fil": "A"}]}, "did you mean 'tasks.0.file'"),
        ({"variants": {"a": {"seeds": [1]}}}, "'seeds' does not begin with sft, qat or data"),
        ({"variants": {"a": {"sft.optimiser.learning_rate": 1e-5}}}, "variants: a: sft.optimiser: unknown key"),
        ({"variants": {"../a": {}}}, "variants"),
        ({"qat": {"epochs": 1, "compute_dtype": "float32"}, "rows": ["direct"]}, "steps of both stages, or epochs of both"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_key(tmp_path, changes, message):
    with pytest.raises(UsageError, match=message) as refusal:
        config(tmp_path, **changes)
    assert len(str(refusal.value).splitlines()) == 1


RECIPES = [path for path in CONFIGS.glob("*.yaml") if "\ntasks:" in path.read_text() or "recipe" in path.name]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_that_comes_along_parses_and_has_nvidias_learning_rates(path):
    recipe = load_recipe(path)
    assert all(Path(entry.file).is_file() or entry.file in ("A", "B", "H", "Eng") for entry in recipe.tasks)
    if "nano" not in recipe.model:
        assert (recipe.sft.optimizer.learning_rate, recipe.qat.optimizer.learning_rate) == (2e-5, 1e-5)
        assert recipe.sft.batch.rows == 32 and recipe.stage("sft").data.row_length == 4096 and recipe.stage("qat").data.eval_fraction == 0.1


def test_overrides_go_over_the_file_and_task_files_are_found_beside_it(tmp_path):
    (tmp_path / "t.yaml").write_text("scorer: exact\ndata: x.jsonl\n")
    (tmp_path / "r.yaml").write_text(
        "output: o\ndata: {train: a.jsonl}\ntasks: [{file: t.yaml}, {file: A}]\nsft: {steps: 1}\nqat: {steps: 1}\n", encoding="utf-8"
    )
    recipe = load_recipe(tmp_path / "r.yaml", ["data.train=b.jsonl", "sft.optimizer.learning_rate=3e-5", "seeds=[4, 5]"], output="p")
    assert (recipe.data.train, recipe.sft.optimizer.learning_rate, recipe.seeds, recipe.output) == ("b.jsonl", 3e-5, (4, 5), "p")
    assert [entry.file for entry in recipe.tasks] == [str(tmp_path / "t.yaml"), "A"]
    with pytest.raises(UsageError, match=r"r\.yaml: sft\.learning_rate: unknown key"):
        load_recipe(tmp_path / "r.yaml", ["sft.learning_rate=1"])


def test_numbers_in_quotes_are_no_numbers():
    with pytest.raises(UsageError, match="train_documents = '5'"):
        parse_recipe({"output": "o", "train_documents": "5", "sft": STAGE, "qat": STAGE}, "r")
