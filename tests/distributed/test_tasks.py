"""Tasks measured by two processes on a model that is cut over both: the rates of one process, samples written once."""

import json
import re

import jax.numpy as jnp
import pytest

from gptoss_jax.checkpoint.models import load_model
from gptoss_jax.data import load_tokenizer
from gptoss_jax.evaluation import load_task
from gptoss_jax.training.task_rates import TaskRates
from tests.distributed.support import Processes

pytestmark = pytest.mark.slow


def test_two_processes_measure_what_one_does(tmp_path):
    data = load_task("A").data
    kinds = {"forced": "exact", "generated": "contains\nmax_new_tokens: 12", "held_out": "loss"}
    files = [tmp_path / f"{name}.yaml" for name in kinds]
    for file, scorer in zip(files, kinds.values()):
        file.write_text(f"data: {data}\nwhere: {{task: Eng}}\nlimit: 6\nscorer: {scorer}\n")
    names = list(map(str, files))
    with Processes(2, ["-m", "tests.distributed.tasks_worker", str(tmp_path / "two"), *names]) as run:
        assert run.end() == 0, run.text
    model = load_model("nano", jnp.float32)
    expected = TaskRates(names, model.config, None, load_tokenizer(model.directory), "float32", tmp_path / "one")(3, model.params)
    for said in map(json.loads, re.findall("SAID (.*)", run.text)):
        assert said == pytest.approx(expected, abs=1e-5) and said.keys() == {"task/forced", "task/generated", "task/held_out/loss"}
    for name in kinds:
        one, two = (
            [json.loads(line) for line in (tmp_path / kind / "samples" / "step-00000003" / f"{name}.jsonl").read_text().splitlines()]
            for kind in ("one", "two")
        )
        assert [s["answer"] for s in one] == [s["answer"] for s in two] and len(one) == 6
