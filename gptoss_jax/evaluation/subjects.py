"""Who answers: a model on this machine. (A served one is `gptoss_jax.evaluation.endpoint`.) And a task put to one of them."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property, lru_cache
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.checkpoint.models import Model
from gptoss_jax.data.harmony import Encoded, System, encode_conversations, load_tokenizer
from gptoss_jax.data.packing import pack
from gptoss_jax.errors import UsageError
from gptoss_jax.evaluation.answers import Answer, parse_answer
from gptoss_jax.evaluation.generate import Generator, stop_ids
from gptoss_jax.evaluation.pass_rate import EvaluationSet, Scores, score
from gptoss_jax.evaluation.predict import make_predict
from gptoss_jax.evaluation.questions import encode_questions, question_of
from gptoss_jax.evaluation.results import TaskResult
from gptoss_jax.evaluation.scorers import Loss
from gptoss_jax.evaluation.task import Task
from gptoss_jax.quant import default_policy, make_expert_quant

ROW_UNIT = 128  # rows of reference answers are as long as the longest conversation, rounded up to this
BATCH_TOKENS = 2048  # of one forward pass over reference answers
Report = Callable[[int], None]  # called with the number of rows done


class Subject(Protocol):
    """Something that answers questions (rows without their reference, `question_of`), greedily. `score` is there where probabilities of every token
    can be had."""

    def answer(
        self, questions: Sequence[Mapping[str, Any]], *, system: System | str | None = None, max_new_tokens: int = 512, report: Report | None = None
    ) -> list[Answer]: ...


# one object for equal settings, so that subjects of equal shape share compiled programs
_expert_quant = lru_cache(make_expert_quant)


class LocalSubject:
    """A loaded model.

    Args:
      numerics: "trained": a QAT checkpoint through its quantization, everything else as stored; "bf16" (or any "as stored"): never quantized;
        "mxfp4" or "nvfp4": the experts through that format, as if quantized after training, by the codec that export uses.
    """

    def __init__(self, model: Model, tokenizer: Any = None, dtype: Any = jnp.float32, *, numerics: str = "trained"):
        self.model, self.dtype, self.numerics = model, jnp.dtype(dtype), numerics
        self.tokenizer = tokenizer or load_tokenizer(model.directory)
        policy = model.policy if numerics == "trained" else None if numerics == "bf16" else default_policy(numerics)
        self.expert_quant = _expert_quant(policy, self.dtype)
        self.predict = make_predict(model.config, self.dtype, self.expert_quant)(model.params)
        self._answers: dict[str, Answer] = {}  # two tasks may ask the same

    def with_model(self, model: Model) -> "LocalSubject":
        """Another model under the same settings."""
        return LocalSubject(model, self.tokenizer, self.dtype, numerics=self.numerics)

    def precision(self):
        """The precision of matrix products that its dtype means."""
        # products of float32 are TF32 on a GPU unless asked otherwise
        return jax.default_matmul_precision("highest") if self.dtype == jnp.float32 else nullcontext()

    def evaluation_set(self, rows: Sequence[dict[str, Any]], system: System | str | None = None) -> EvaluationSet:
        """The rows' references, packed into batches of one shape."""
        return self.pack(encode_conversations(rows, self.tokenizer, system=system), list(rows))

    def pack(self, documents: Sequence[Encoded], rows: list[dict[str, Any]] | None = None) -> EvaluationSet:
        """Documents in rows just long enough for the longest, in batches of `BATCH_TOKENS`."""
        longest = max((len(document.ids) for document in documents), default=1)
        row_length = -(-longest // ROW_UNIT) * ROW_UNIT
        return EvaluationSet(rows or [{}] * len(documents), pack(documents, row_length), max(1, BATCH_TOKENS // row_length))

    def score(self, rows: Sequence[dict[str, Any]], *, system: System | str | None = None, report: Report | None = None) -> Scores:
        """Loss and greedy verdict of every row's reference by one forward pass."""
        with self.precision():
            return score(self.predict, self.evaluation_set(rows, system), report)

    def answer(self, questions, *, system=None, max_new_tokens=512, report=None) -> list[Answer]:
        """Greedy answers. What was answered before is not generated again."""
        keys = [json.dumps([q["messages"], q.get("tools"), q.get("reasoning_effort"), repr(system), max_new_tokens]) for q in questions]
        new = {key: question for key, question in zip(keys, questions) if key not in self._answers}
        prompts = encode_questions(list(new.values()), self.tokenizer, system)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        names = list(new)
        for start in range(0, len(order), self.generator.batch_size):
            part = order[start : start + self.generator.batch_size]
            tokens = self.generator.generate([prompts[i] for i in part], max_new_tokens, stop_ids(self.tokenizer))
            self._answers |= {names[i]: parse_answer(row, self.tokenizer) for i, row in zip(part, tokens)}
            if report:
                report(len(questions) - len(order) + start + len(part))
        return [self._answers[key] for key in keys]

    @cached_property
    def generator(self) -> Generator:
        """Compute weights are made here, at the first answer."""
        return Generator(self.model.config, self.model.params, self.dtype, expert_quant=self.expert_quant)


def run_task(task: Task, subject: Subject, rows: list[dict[str, Any]] | None = None, report: Report | None = None) -> TaskResult:
    """Puts a task to a subject.

    Args:
      rows: instead of those of the task's data; its `where` and `limit` still hold.

    Raises:
      UsageError: no rows; a scorer that this subject cannot serve.
      RunError: a scorer failed on a row.
    """
    rows = task.rows() if rows is None else task.select(rows)
    if getattr(task.scorer, "teacher_forced", False) and hasattr(subject, "score"):
        for row in rows:
            if row["messages"][-1]["role"] != "assistant":
                raise UsageError(f"task {task.name}: the row {row['messages'][-1]['content'][:60]!r} has no reference answer")
        return _from_scores(task, subject.score(rows, system=task.system, report=report), subject.tokenizer)
    answers = subject.answer([question_of(row) for row in rows], system=task.system, max_new_tokens=task.max_new_tokens, report=report)
    verdicts = [task.scorer(row, answer) for row, answer in zip(rows, answers)]
    passed = np.array([verdict.passed for verdict in verdicts], bool)
    reasons = ["" if verdict.passed else verdict.reason for verdict in verdicts]
    return TaskResult(task.name, rows, passed, [answer.raw for answer in answers], reasons, cluster=task.cluster)


def _from_scores(task: Task, scores: Scores, tokenizer: Any) -> TaskResult:
    if isinstance(task.scorer, Loss):
        nothing = [""] * len(scores.rows)
        return TaskResult(task.name, scores.rows, None, nothing, nothing, scores.loss, scores.num_trained, task.cluster)
    answers = [tokenizer.decode(tokens) for tokens in scores.produced]
    reasons = [""] * len(answers)
    for i in np.flatnonzero(~scores.passed):
        last = len(scores.produced[i]) - 1
        found, expected = (tokenizer.decode([tokens[last]]) for tokens in (scores.produced[i], scores.expected[i]))
        reasons[i] = f"token {last + 1} is {found!r} instead of {expected!r}"
    return TaskResult(task.name, scores.rows, scores.passed, answers, reasons, scores.loss, scores.num_trained, task.cluster)
