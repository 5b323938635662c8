"""What every row of a recipe is measured on: its tasks, the loss of held-out conversations, and the distance to the base on the guard set."""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptoss_jax.checkpoint.models import Model
from gptoss_jax.data import load_rows
from gptoss_jax.errors import UsageError
from gptoss_jax.evaluation import LocalSubject, Task, TaskResult, load_task, run_task
from gptoss_jax.evaluation.scorers import Loss
from gptoss_jax.training.held_out import held_out_rows
from gptoss_jax.training.recipe.config import RecipeConfig
from gptoss_jax.training.recipe.guard import Guard
from gptoss_jax.training.recipe.results import Column, Measured
from gptoss_jax.training.stage import data_pipeline


class Outcome(NamedTuple):
    """One model's results. `kl` is None without a guard."""

    tasks: dict[str, TaskResult]
    loss: float
    kl: float | None

    @property
    def pass_rates(self) -> dict[str, tuple[int, int, float, float]]:
        rates = {name: result.pass_rate() for name, result in self.tasks.items()}
        return {name: (rate.passed, rate.total, rate.low, rate.high) for name, rate in rates.items()}

    def write_failures(self, folder: Path) -> None:
        """`folder/TASK.jsonl` with every failing sample; no file where none failed."""
        for name, result in self.tasks.items():
            file = folder / f"{name}.jsonl"
            file.unlink(missing_ok=True)
            if result.failures(1):
                result.write_failures(file)


class Evaluation:
    """The tasks, held-out rows and guard of a recipe, read once.

    Args:
      load: path -> Model in the dtype and layout that evaluation wants.

    Raises:
      UsageError: a task or its data cannot be used, there is nothing to measure the loss on, or the gate names another task.
    """

    def __init__(self, config: RecipeConfig, tokenizer: Any, dtype: Any, load: Callable[[Any], Model]):
        self.config, self.tokenizer, self.dtype, self._load = config, tokenizer, dtype, load
        self.system = data_pipeline(config.data, tokenizer).system
        self.held_out = held_out_rows(config.data)
        self.tasks: dict[str, Task] = {}
        self.columns: dict[str, Column] = {}
        for entry in config.tasks:
            over = {key: value for key in ("limit", "max_new_tokens") if (value := getattr(entry, key)) is not None}
            task = replace(load_task(entry.file, config.evaluation), **over)
            if task.name in self.tasks:
                raise UsageError(f"recipe: two tasks are called {task.name!r}")
            if isinstance(task.scorer, Loss):
                raise UsageError(f"recipe: task {task.name!r} measures the loss alone, which has its column already: leave it out")
            self.tasks[task.name] = task
            self.columns[task.name] = Column(title=entry.title or task.name, nvidia=entry.nvidia)
        self.rows = {name: self._rows(task) for name, task in self.tasks.items()}
        unknown = config.gate.named_tasks() - self.tasks.keys() if config.gate else ()
        if unknown:
            raise UsageError(f"recipe: gate names the task {sorted(unknown)[0]!r}; there is {', '.join(self.tasks)}")

    def _rows(self, task: Task) -> list[dict[str, Any]]:
        if task.data is not None:
            return task.rows()
        if self.held_out is None:
            raise UsageError(f"recipe: task {task.name!r} has no data of its own, and the recipe neither data.eval nor data.eval_fraction")
        return task.select(self.held_out)

    def is_complete(self, measured: Measured) -> bool:
        """Whether an earlier measurement holds all that is asked for now."""
        needs_kl = self.config.gate is not None and self.config.gate.guard is not None
        return self.tasks.keys() <= measured.pass_rates.keys() and not (needs_kl and measured.kl is None)

    def measure(self, model: Model) -> Outcome:
        subject = LocalSubject(model, self.tokenizer, self.dtype)
        results = {}
        for name, task in self.tasks.items():
            # rows of the recipe's own data are asked as they are trained
            asked = replace(task, system=self.system) if task.data is None else task
            results[name] = run_task(replace(asked, where={}, limit=None), subject, self.rows[name])
        return Outcome(results, self._loss(subject, results), self.guard.mean_kl(model.params) if self.guard else None)

    def _loss(self, subject: LocalSubject, results: dict[str, TaskResult]) -> float:
        """Nats per trained token of the held-out rows; without such rows of the answers of all tasks."""
        if self.held_out is not None:
            return subject.score(self.held_out, system=self.system).mean_loss()
        parts = [result if result.loss is not None else subject.score(result.rows) for result in results.values()]
        return float(np.sum([part.loss.sum() for part in parts]) / np.sum([part.num_trained.sum() for part in parts]))

    @cached_property
    def guard(self) -> Guard | None:
        """The guard conversations with the base's opinion of them; the base is loaded for it and let go."""
        if self.config.gate is None or self.config.gate.guard is None:
            return None
        base = LocalSubject(self._load(self.config.model), self.tokenizer, self.dtype)
        return Guard(base, load_rows(self.config.gate.guard).rows, self.system)
