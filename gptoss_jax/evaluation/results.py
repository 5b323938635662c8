"""What came out of a task: which rows passed, why the others failed, and the pass rate with its interval."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_jax.evaluation.pass_rate import PassRate, interval


@dataclass(frozen=True)
class TaskResult:
    """Rows of a task with the verdict on each.

    Attributes:
      passed: bool [n]; None for a task that only measures the loss.
      answers: what the model wrote, all channels; where a forward pass over the reference decided, the answer up to its first wrong token.
      reasons: why a row failed, "" where it passed.
      loss: float64 [n], sum of the cross-entropy over the `num_trained` [n] tokens of the reference, in nats; None for generated answers.
      cluster: column whose values group rows that are not independent.
    """

    name: str
    rows: list[dict[str, Any]]
    passed: np.ndarray | None
    answers: list[str]
    reasons: list[str]
    loss: np.ndarray | None = None
    num_trained: np.ndarray | None = None
    cluster: str | None = None

    def pass_rate(self) -> PassRate:
        """With a 95 % interval that knows about clusters. ValueError for a task that only measures the loss."""
        if self.passed is None:
            raise ValueError(f"task {self.name} measures the loss alone")
        clusters = [row.get(self.cluster, i) if self.cluster else i for i, row in enumerate(self.rows)]
        return PassRate(int(self.passed.sum()), len(self.rows), *interval(self.passed, clusters))

    def mean_loss(self) -> float | None:
        """Nats per trained token; None where answers were generated."""
        return None if self.loss is None else float(self.loss.sum() / self.num_trained.sum())

    def perplexity(self) -> float | None:
        loss = self.mean_loss()
        return None if loss is None else math.exp(min(loss, 700.0))

    def where(self, **labels: Any) -> "TaskResult":
        """The rows with these labels: `where(language="German")`."""
        keep = [i for i, row in enumerate(self.rows) if all(row.get(key) == value for key, value in labels.items())]
        return self._at(keep)

    def _at(self, keep: Sequence[int]) -> "TaskResult":
        pick = lambda values: None if values is None else values[keep]
        rows, answers, reasons = ([values[i] for i in keep] for values in (self.rows, self.answers, self.reasons))
        return TaskResult(self.name, rows, pick(self.passed), answers, reasons, pick(self.loss), pick(self.num_trained), self.cluster)

    def samples(self) -> list[dict[str, Any]]:
        """Every row as plain values: prompt, reference, answer, verdict, reason, and the other columns of the row under "row"."""
        return [self._sample(i) for i in range(len(self.rows))]

    def failures(self, limit: int | None = None) -> list[dict[str, Any]]:
        """The failing samples, the first `limit` of them."""
        failing = [] if self.passed is None else np.flatnonzero(~self.passed)[:limit]
        return [self._sample(int(i)) for i in failing]

    def _sample(self, i: int) -> dict[str, Any]:
        messages = self.rows[i]["messages"]
        answered = messages[-1]["role"] == "assistant"
        return {
            "task": self.name,
            "prompt": messages[:-1] if answered else messages,
            "reference": messages[-1] if answered else None,
            "answer": self.answers[i],
            "passed": None if self.passed is None else bool(self.passed[i]),
            "reason": self.reasons[i],
            "row": {key: value for key, value in self.rows[i].items() if key != "messages"},
        }

    def write_failures(self, path: str | Path) -> int:
        """All failing samples as JSONL; returns their number. Where none failed there is no file; an older one is removed."""
        failures = self.failures()
        Path(path).unlink(missing_ok=True)
        if failures:
            write_samples(failures, path)
        return len(failures)

    def to_dict(self) -> dict[str, Any]:
        """Numbers alone, for JSON."""
        out: dict[str, Any] = {"rows": len(self.rows)}
        if self.passed is not None:
            rate = self.pass_rate()
            out |= {"passed": rate.passed, "total": rate.total, "low": rate.low, "high": rate.high}
        if self.loss is not None:
            out |= {"loss": self.mean_loss(), "perplexity": self.perplexity(), "tokens": int(self.num_trained.sum())}
        return out


def overall_loss(results: Sequence[TaskResult]) -> tuple[float, int] | None:
    """(nats per token, tokens) over all tasks that have a loss; None where none has."""
    measured = [result for result in results if result.loss is not None]
    tokens = sum(int(result.num_trained.sum()) for result in measured)
    return (float(sum(result.loss.sum() for result in measured) / tokens), tokens) if measured else None


def write_samples(samples: Sequence[dict[str, Any]], path: str | Path) -> None:
    """One sample a line, UTF-8."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(sample, ensure_ascii=False, default=str) + "\n" for sample in samples), encoding="utf-8")
