"""Tasks with exact answers and their pass rates."""

from gptoss_jax.evaluation.greedy import answer, greedy_decode
from gptoss_jax.evaluation.pass_rate import EvaluationSet, PassRate, Prediction, Scores, make_evaluation_set, pass_rate, score
from gptoss_jax.evaluation.tasks import pretraining_rows, sft_rows, task_rows, write_jsonl

__all__ = [
    "EvaluationSet", "PassRate", "Prediction", "Scores", "answer", "greedy_decode", "make_evaluation_set", "pass_rate", "pretraining_rows", "score",
    "sft_rows", "task_rows", "write_jsonl",
]  # fmt: skip
