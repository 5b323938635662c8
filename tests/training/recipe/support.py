"""Small recipes on the model that comes along."""

import json
from pathlib import Path

from gptoss_jax.training.recipe.config import RecipeConfig, parse_recipe
from gptoss_jax.training.recipe.results import Column, Measured, Results

STAGE = {"steps": 2, "batch": {"rows": 4}, "optimizer": {"learning_rate": 1e-4}, "compute_dtype": "float32"}
LANGUAGE = {"English": "one", "German": "eins", "French": "un"}


def config(folder: Path, **changes) -> RecipeConfig:
    """Two steps per stage on 200 nano conversations, twenty rows of the tasks A and H."""
    raw = {
        "output": str(folder / "run"), "data": {"train": "nano", "row_length": 128}, "train_documents": 200, "evaluation": "dev",
        "tasks": [{"file": "A", "limit": 20}, {"file": "H", "limit": 20}], "rows": ["original", "sft", "sft_ptq", "qat_mxfp4"],
        "sft": STAGE, "qat": STAGE,
    }  # fmt: skip
    return parse_recipe({**raw, **changes}, "test")


def measured(row="sft", seed=0, variant="", loss=0.5, kl=None, **passed) -> Measured:
    """`A=90` is 90 of 100."""
    rates = {task: (count, 100, max(0, count - 5) / 100, min(100, count + 5) / 100) for task, count in passed.items()}
    return Measured(row=row, seed=seed, variant=variant, pass_rates=rates, loss=loss, steps_trained=2, kl=kl)


def results(*entries: Measured, **columns) -> Results:
    """`A="multilingual"` is a task with NVIDIA's task beside it."""
    return Results(tasks={task: Column(title=f"task {task}", nvidia=nvidia) for task, nvidia in columns.items()}, results=entries)


def write_rows(file: Path, rows: list) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
