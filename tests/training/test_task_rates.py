"""Tasks are measured during training on the present parameters, under the numerics of training, and their samples are kept."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.checkpoint.models import load_model
from gptoss_jax.data import load_tokenizer
from gptoss_jax.errors import UsageError
from gptoss_jax.evaluation import LocalSubject, load_task, run_task
from gptoss_jax.formats import Nvfp4
from gptoss_jax.quant import default_policy
from gptoss_jax.training.config import parse
from gptoss_jax.training.console import format_line
from gptoss_jax.training.loop import Trainer
from gptoss_jax.training.run_dir import read_metrics
from gptoss_jax.training.stage import run_stage
from gptoss_jax.training.task_rates import TaskRates


@pytest.fixture
def files(tmp_path):
    data = load_task("A").data
    (tmp_path / "a.yaml").write_text(f"data: {data}\nwhere: {{task: A}}\nlimit: 40\n")
    (tmp_path / "held_out.yaml").write_text(f"data: {data}\nwhere: {{task: Eng}}\nlimit: 5\nscorer: loss\n")
    return [str(tmp_path / name) for name in ("a.yaml", "held_out.yaml")]


def test_rates_are_those_of_the_quantized_parameters_and_samples_are_kept(files, tmp_path):
    model = load_model("nano", jnp.float32)
    params = {name: value * (1.3 if "down_proj" in name else 1.0) for name, value in model.params.items()}
    policy, tokenizer = default_policy(Nvfp4()), load_tokenizer(model.directory)
    rates = TaskRates(files, model.config, policy, tokenizer, "float32", tmp_path)
    found = rates(7, params)
    expected = run_task(load_task(files[0]), LocalSubject(dataclasses.replace(model, params=params), tokenizer, numerics="nvfp4"))
    assert found["task/a"] == expected.pass_rate().rate and set(found) == {"task/a", "task/held_out/loss"}
    samples = [json.loads(line) for line in (tmp_path / "samples" / "step-00000007" / "a.jsonl").read_text().splitlines()]
    assert [sample["passed"] for sample in samples] == expected.passed.tolist() and samples[0]["reference"]["content"]
    assert format_line({"step": 7, **found}, 9) == f"step 7/9 | a {found['task/a']:.1%}"


def test_two_tasks_of_one_name_are_refused(files, tmp_path):
    with pytest.raises(UsageError, match="eval_tasks: two tasks are called 'a'"):
        TaskRates([files[0]] * 2, None, None, None, "float32", tmp_path)


def test_a_stage_measures_the_tasks_of_its_config_before_the_first_step(files, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "fit", lambda self: self._evaluate_into({"step": 0}))
    train = parse({
        "model": "nano", "output": str(tmp_path / "out"), "data": {"train": str(load_task("A").data), "row_length": 128}, "batch": {"rows": 4},
        "compute_dtype": "float32", "eval_tasks": files,
    })  # fmt: skip
    run_stage(train)
    (record,) = read_metrics(tmp_path / "out")
    assert record["step"] == 0 and 0 < record["task/a"] < 1 and record["task/held_out/loss"] < 0.01
    with pytest.raises(UsageError, match="no task 'nowhere.yaml'"):
        run_stage(train.model_copy(update={"eval_tasks": ("nowhere.yaml",), "output": str(tmp_path / "other")}))
    assert np.isfinite(record["task/a"])
