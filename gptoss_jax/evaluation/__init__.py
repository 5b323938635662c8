"""What a model can do: tasks and scorers, pass rates with intervals, generation, comparison of two models."""

from gptoss_jax.evaluation.greedy import answer, greedy_decode
from gptoss_jax.evaluation.pass_rate import EvaluationSet, PassRate, Prediction, Scores, make_evaluation_set, pass_rate, score
from gptoss_jax.evaluation.results import TaskResult
from gptoss_jax.evaluation.scorers import Verdict
from gptoss_jax.evaluation.subjects import LocalSubject, run_task
from gptoss_jax.evaluation.task import Task, built_in_tasks, load_task
from gptoss_jax.evaluation.tasks import pretraining_rows, sft_rows, task_rows, write_jsonl

__all__ = [
    "EvaluationSet", "LocalSubject", "PassRate", "Prediction", "Scores", "Task", "TaskResult", "Verdict", "answer", "built_in_tasks", "greedy_decode",
    "load_task", "make_evaluation_set", "pass_rate", "pretraining_rows", "run_task", "score", "sft_rows", "task_rows", "write_jsonl",
]  # fmt: skip
