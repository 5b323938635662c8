"""The recipe end to end on the model that comes with the package: every row from exported files, and nothing done twice."""

import json

import pytest

from gptoss_jax.checkpoint import open_checkpoint, verify_dir
from gptoss_jax.checkpoint.source import NANO
from gptoss_jax.errors import UsageError
from gptoss_jax.training.recipe import DEMO_ROWS, Recipe, RecipeConfig

STAGE = {"steps": 2, "data": {"row_length": 128}, "batch": {"rows": 4}, "optimizer": {"learning_rate": 1e-4}, "compute_dtype": "float32"}


def config(tmp_path, **changes) -> RecipeConfig:
    raw = {"output": str(tmp_path / "run"), "train_documents": 200, "evaluation": "dev", "rows": DEMO_ROWS, "sft": STAGE, "qat": STAGE}
    return RecipeConfig.model_validate({**raw, **changes})


@pytest.mark.slow
def test_recipe_measures_exported_files_and_resumes(tmp_path):
    said = []
    measured = Recipe(config(tmp_path), say=said.append).run()
    assert [m.row for m in measured] == list(DEMO_ROWS)
    assert sum("exported codes equal the trained ones (8 expert matrices)" in line for line in said) == 2
    exports = tmp_path / "run" / "seed-0" / "export"
    assert {p.name: open_checkpoint(p).layout.experts for p in exports.iterdir()} == {
        "sft": "bf16", "sft_ptq": "mxfp4", "qat_mxfp4": "mxfp4", "qat_nvfp4": "nvfp4",
    }  # fmt: skip
    assert all(verify_dir(p).ok for p in exports.iterdir())
    assert [m.steps_trained for m in measured] == [0, 2, 2, 4, 4]
    again = []
    assert Recipe(config(tmp_path), say=again.append).run() == measured and not again
    assert len(json.loads((tmp_path / "run" / "results.json").read_text())) == 5


def test_recipe_settings_that_would_compare_unlike_things_are_refused(tmp_path):
    with pytest.raises(UsageError, match="same dtype"):
        Recipe(config(tmp_path, qat={**STAGE, "compute_dtype": "bfloat16"}))
    with pytest.raises(UsageError, match="sft sets steps"):
        Recipe(config(tmp_path, sft={**STAGE, "model": "elsewhere"}))


def test_the_model_that_comes_along_conforms_and_lies_on_the_grid():
    assert verify_dir(NANO).ok
    assert verify_dir(NANO, against=NANO).ok
