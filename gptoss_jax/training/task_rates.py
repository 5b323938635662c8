"""Pass rates of tasks during training: the present parameters under the numerics of training, at every evaluation.

All processes of a run answer together (the model is cut over their devices); the first writes.

metrics.jsonl gets `task/NAME` (the rate, 0..1), or `task/NAME/loss` for a task that measures the loss alone; every sample with its answer and verdict
is in samples/step-00000100/NAME.jsonl of the run directory.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from gptoss_jax.checkpoint.models import Model
from gptoss_jax.errors import UsageError
from gptoss_jax.evaluation import LocalSubject, load_task, run_task
from gptoss_jax.evaluation.results import write_samples
from gptoss_jax.model import GptOssConfig, Params
from gptoss_jax.quant import QuantPolicy
from gptoss_jax.sharding.distributed import is_first

SAMPLES = "samples"


class TaskRates:
    """`rates(step, params)` of the tasks in these files (or of that name). Rows are read at once: what is wrong with them is said before training.

    Raises:
      UsageError: a task or its data cannot be used, or two have one name.
    """

    def __init__(
        self, files: Sequence[str], config: GptOssConfig, policy: QuantPolicy | None, tokenizer: Any, dtype: Any, output: Path
    ):
        self.config, self.policy, self.tokenizer, self.dtype, self.output = config, policy, tokenizer, jnp.dtype(dtype), output
        self.tasks = [load_task(file) for file in files]
        names = [task.name for task in self.tasks]
        for name in names:
            if names.count(name) > 1:
                raise UsageError(f"config: eval_tasks: two tasks are called {name!r}")
        self.rows = [task.rows() for task in self.tasks]

    def __call__(self, step: int, params: Params) -> dict[str, float]:
        model = Model(self.config, dict(params), self.output, self.policy, None, {})
        subject = LocalSubject(model, self.tokenizer, self.dtype)
        record = {}
        for task, rows in zip(self.tasks, self.rows):
            result = run_task(task.asked_all(), subject, rows)
            if result.passed is None:
                record[f"task/{task.name}/loss"] = result.mean_loss()
            else:
                record[f"task/{task.name}"] = result.pass_rate().rate
            if is_first():
                write_samples(result.samples(), self.output / SAMPLES / f"step-{step:08d}" / f"{task.name}.jsonl")
        return record
