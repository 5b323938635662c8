"""How many answers of a task a model gets exactly right, from one forward pass per batch.

The reference answer is unique, so greedy decoding reproduces it if and only if, with the reference as input, the argmax at every trained position
is the next reference token: the first wrong argmax is where greedy decoding leaves the reference. No generation is needed.

Interval: Wilson's 95 % score interval. Rows that share a verb-object pair are not independent; for them the number of rows is replaced by the
effective number  n_eff = p (1 - p) / v,  v the variance of the rate over clusters (ratio estimator,  G/(G-1) * sum_g (x_g - p n_g)^2 / n^2),
at most n. Where all or none pass, v says nothing and n_eff is the number of clusters. A closed formula, so no random draws, and it stays
honest at 0 % and 100 %, where a bootstrap gives an interval of width zero.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gptoss_jax.checkpoint.hashes import to_host
from gptoss_jax.data.batches import one_pass
from gptoss_jax.data.harmony import encode_conversations
from gptoss_jax.data.packing import Batch, Packed, pack

Z95 = 1.959963984540054


class Prediction(NamedTuple):
    """What a model says about a batch: its most probable next token and the cross-entropy of the target, at every position."""

    tokens_BT: Any  # int32
    loss_BT: Any  # float32, nats; read where loss_weights_BT > 0


Predict = Callable[[Batch], Prediction]


class PassRate(NamedTuple):
    """`passed` of `total` rows with a 95 % interval of the rate."""

    passed: int
    total: int
    low: float
    high: float

    @property
    def rate(self) -> float:
        return self.passed / self.total

    def __str__(self) -> str:
        return f"{self.rate:.1%} [{self.low:.1%}, {self.high:.1%}]"


class EvaluationSet(NamedTuple):
    """Rows of a task, packed into batches of one shape."""

    rows: list[dict[str, Any]]
    packed: Packed
    batch_size: int

    def batches(self) -> Iterator[Batch]:
        return one_pass(self.packed.rows, self.batch_size)


class Scores(NamedTuple):
    """Result per row. `rows[i]` passed if `passed[i]`; `loss[i]` is the sum over its `num_trained[i]` trained tokens.

    `produced[i]` is what greedy decoding writes, up to its first departure from the reference `expected[i]` (int32, trained tokens alone).
    """

    rows: list[dict[str, Any]]
    passed: np.ndarray  # bool [n]
    loss: np.ndarray  # float64 [n]
    num_trained: np.ndarray  # int64 [n]
    produced: list[np.ndarray]
    expected: list[np.ndarray]

    def select(self, **labels: str) -> "Scores":
        """The rows with these labels: `select(task="A", language="German")`."""
        keep = [i for i, row in enumerate(self.rows) if all(row.get(key) == value for key, value in labels.items())]
        return self._at(keep)

    def without(self, **labels: str) -> "Scores":
        """The rows that differ in one of these labels: `without(language="English")`."""
        keep = [i for i, row in enumerate(self.rows) if any(row.get(key) != value for key, value in labels.items())]
        return self._at(keep)

    def _at(self, keep: list[int]) -> "Scores":
        rows, produced, expected = ([values[i] for i in keep] for values in (self.rows, self.produced, self.expected))
        return Scores(rows, self.passed[keep], self.loss[keep], self.num_trained[keep], produced, expected)

    def pass_rate(self) -> PassRate:
        """Clustered over "pair" where the rows have one."""
        clusters = [row.get("pair", i) for i, row in enumerate(self.rows)]
        low, high = interval(self.passed, clusters)
        return PassRate(int(self.passed.sum()), len(self.rows), low, high)

    def mean_loss(self) -> float:
        """Cross-entropy in nats per trained token."""
        return float(self.loss.sum() / self.num_trained.sum())

    def failures(self, limit: int = 10) -> list[dict[str, Any]]:
        return [row for row, passed in zip(self.rows, self.passed) if not passed][:limit]


def wilson(rate: float, n: float) -> tuple[float, float]:
    """Wilson's score interval of a rate seen in `n` independent trials; `n` need not be whole."""
    center = (rate + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(rate * (1 - rate) / n + Z95**2 / (4 * n * n))
    return max(0.0, center - half), min(1.0, center + half)


def interval(passed: np.ndarray, clusters: Sequence[Any]) -> tuple[float, float]:
    """95 % interval of the pass rate, with the effective number of rows given in the essay above."""
    n, rate = len(passed), float(np.mean(passed))
    names, index = np.unique(np.array([str(c) for c in clusters]), return_inverse=True)
    num_clusters = len(names)
    if num_clusters == n:
        return wilson(rate, n)
    if num_clusters == 1 or rate in (0.0, 1.0):
        return wilson(rate, num_clusters)
    excess = np.bincount(index, weights=passed - rate)
    variance = num_clusters / (num_clusters - 1) * float((excess**2).sum()) / n**2
    return wilson(rate, min(n, rate * (1 - rate) / variance) if variance else n)


def make_evaluation_set(
    rows: Sequence[dict[str, Any]], tokenizer: Any, row_length: int, batch_size: int, *, system: str | None = None
) -> EvaluationSet:
    """Encode and pack the rows; the passing criterion is on the tokens that the assistant produces. UsageError where a row is too long."""
    documents = encode_conversations(rows, tokenizer, system=system)
    return EvaluationSet(list(rows), pack(documents, row_length), batch_size)


def score(predict: Predict, evaluation_set: EvaluationSet, report: Callable[[int], None] | None = None) -> Scores:
    """Runs all batches through `predict` and gathers the result of each row; `report` hears about how many rows are done."""
    packed = evaluation_set.packed
    tokens, loss = [], []
    for number, batch in enumerate(evaluation_set.batches(), 1):
        prediction = predict(batch)
        tokens.append(to_host(prediction.tokens_BT))
        loss.append(np.where(batch.loss_weights_BT > 0, to_host(prediction.loss_BT), 0.0))
        if report:
            report(min(len(evaluation_set.rows), number * evaluation_set.batch_size * len(evaluation_set.rows) // len(packed.rows.tokens_BT)))
    tokens_NT, loss_NT = np.concatenate(tokens), np.concatenate(loss)
    passed, losses, produced, expected = [], [], [], []
    for r, s, n in zip(packed.row_of, packed.start_of, packed.length_of):
        span = (r, slice(s, s + n))
        trained = packed.rows.loss_weights_BT[span] > 0
        found, targets = tokens_NT[span][trained], packed.rows.targets_BT[span][trained]
        wrong = np.flatnonzero(found != targets)
        passed.append(not len(wrong))
        losses.append(loss_NT[span].sum(dtype=np.float64))
        produced.append(found[: wrong[0] + 1] if len(wrong) else found)
        expected.append(targets)
    trained = np.array([len(targets) for targets in expected])
    return Scores(evaluation_set.rows, np.array(passed), np.array(losses), trained, produced, expected)


def pass_rate(predict: Predict, evaluation_set: EvaluationSet) -> PassRate:
    """The pass rate alone."""
    return score(predict, evaluation_set).pass_rate()
