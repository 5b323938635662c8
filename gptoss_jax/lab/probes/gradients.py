"""How far the gradients of estimators are from reference gradients: direction, size, bias and variance, for every layer and expert.

Samples are batches b = 1..B, and where rounding is random also seeds s = 1..S. With g_b the gradient of an estimator on batch b (its mean
over the seeds), r_b a reference on the same batch, m and r their means over the batches, d_b = g_b - r_b:

    cosine            <m, r> / |m| |r|
    norm_ratio        |m| / |r|
    bias2             |E d|^2 / |r|^2, estimated without the share of the noise: (|sum d_b|^2 - sum |d_b|^2) / B (B-1); may come out a little below 0.
                      With one batch: over its seeds alone. With one sample: |d|^2 / |r|^2, noise included
    variance_batches  tr Var(g_b) / |r|^2 between batches, the share of the seeds taken off; None for one batch
    variance_seeds    tr Var / |r|^2 between seeds of one batch; None for one seed
    reference_norm    |r|
    loss, reference_loss   mean loss of the weights that the gradient was taken at; in the rows of the whole model

References: "full", the gradient at the stored weights w in a forward pass without quantization; "quantized", the gradient at the deployed weights
(rounded to nearest), which is what the straight-through estimator uses.

Estimators with the same forward weights share one forward and one backward pass: dL/dw_q is computed once, and each estimator's rule is applied to
it. Memory: about (4 + 4 * estimators + references) times the expert weights in float32; for large models look at one projection with `only`.

    L stacked layers  E experts
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from gptoss_jax.data.packing import Batch
from gptoss_jax.errors import UsageError
from gptoss_jax.formats import Format
from gptoss_jax.lab.probes.objective import (
    Experts,
    Objective,
    as_quantizer,
    combined,
    computed,
    dot,
    label_of,
    pulled_back,
    rounded,
    same,
)
from gptoss_jax.lab.probes.rows import Row, placed, scopes
from gptoss_jax.lab.quantizer import Quantizer
from gptoss_jax.model import GptOssConfig, Params
from gptoss_jax.quant import Estimator

REFERENCES = ("full", "quantized")
Sums = dict[str, np.ndarray]


class Passes:
    """Loss and gradient at sets of expert weights on one batch, each distinct set once."""

    def __init__(self, objective: Objective, batch: Batch, known: Sequence[tuple[Experts, float, Experts]] = ()):
        self.objective, self.batch, self.known = objective, batch, list(known)

    def at(self, weights: Experts) -> tuple[float, Experts]:
        """(loss, gradient of these weights)."""
        found = next((entry for entry in self.known if same(entry[0], weights)), None)
        if found is None:
            loss, grads = self.objective.gradient(weights, self.batch)
            found = (weights, float(loss), grads)
            self.known.append(found)
        return found[1:]

    def estimated(self, quantizers: Mapping[str, Quantizer], key: Array) -> dict[str, tuple[float, Experts]]:
        """Label -> (loss of the weights computed with, gradient of the stored weights)."""
        made = {}
        for label, quantizer in quantizers.items():
            loss, grads = self.at(computed(quantizer, self.objective.experts, key))
            made[label] = loss, pulled_back(quantizer, self.objective.experts, key, grads)
        return made


def named_quantizers(fmt: Format | str | Quantizer, estimators: Sequence[str | Estimator | Quantizer]) -> dict[str, Quantizer]:
    """Label -> quantizer: the format with each estimator. An entry that is a quantizer stands for itself.

    Raises:
      ValueError: unknown name.
      UsageError: two with one label; estimators, but no format.
    """
    found = {}
    for entry in estimators:
        own = isinstance(entry, Quantizer)
        if not own and isinstance(fmt, Quantizer):
            raise UsageError(f"{entry} is an estimator of a format, but a quantizer is given: give quantizers, with their gradients")
        quantizer = entry if own else as_quantizer(fmt, entry)
        if label_of(quantizer) in found:
            raise UsageError(f"two estimators are called {label_of(quantizer)!r}")
        found[label_of(quantizer)] = quantizer
    return found


def probe_gradients(
    config: GptOssConfig,
    params: Params,
    batches: Sequence[Batch],
    fmt: Format | str | Quantizer,
    estimators: Sequence[str | Estimator | Quantizer] = ("ste",),
    *,
    references: Sequence[str] = REFERENCES,
    seeds: int = 1,
    seed: int = 0,
    dtype: Any = "float32",
    only: str = "*",
    report: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Rows for every estimator and reference: whole model, every layer, every expert of every projection. Columns: see the head of this file.

    Args:
      params: master weights.
      batches: of equal weight; two or more for bias and variance.
      fmt: a format, its name, or a quantizer, whose deployed weights are the reference "quantized".
      estimators: names or objects; quantizers too.
      seeds: draws for every batch, where rounding or the quantizer is random.
      seed: of their keys.
      only: pattern of the expert projections that are looked at; the others stay as they are.

    Raises:
      ValueError: unknown estimator or reference, no batch.
    """
    if unknown := [name for name in references if name not in REFERENCES]:
        raise ValueError(f"unknown reference {unknown[0]!r}; known are {', '.join(REFERENCES)}")
    if not batches or seeds < 1:
        raise ValueError(f"{len(batches)} batches and {seeds} seeds: at least one of each is needed")
    objective, quantizers = Objective(config, params, dtype, only), named_quantizers(fmt, estimators)
    at_reference = {"full": objective.experts, "quantized": rounded(as_quantizer(fmt), objective.experts)}
    samples = {label: _Samples(seeds) for label in quantizers}
    samples |= {(label, reference): _Samples(seeds) for label in quantizers for reference in references}
    referred = {reference: _Samples(1) for reference in references}
    for number, batch in enumerate(batches, 1):
        report(f"gradients of batch {number} of {len(batches)}")
        passes = Passes(objective, batch)
        at = {reference: passes.at(at_reference[reference]) for reference in references}
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), number), seeds)
        drawn = [Passes(objective, batch, passes.known).estimated(quantizers, key) for key in keys]
        for reference, (loss, grads) in at.items():
            referred[reference].add([grads], [loss])
        for label in quantizers:
            grads, losses = [d[label][1] for d in drawn], [d[label][0] for d in drawn]
            samples[label].add(grads, losses)
            for reference, (_, reference_grads) in at.items():
                samples[label, reference].add([combined(g, reference_grads, -1) for g in grads], losses)
    rows = []
    for label in quantizers:
        for reference in references:
            rows += _rows(config, samples[label], samples[label, reference], referred[reference], {"estimator": label, "reference": reference})
    return rows


def _mean(grads: Sequence[Experts]) -> Experts:
    total = grads[0]
    for more in grads[1:]:
        total = combined(total, more, 1)
    return {name: value / len(grads) for name, value in total.items()}


class _Samples:
    """Sums over samples of a vector, from which mean, variance between batches and variance between seeds follow."""

    def __init__(self, seeds: int):
        self.seeds, self.batches, self.loss = seeds, 0, 0.0
        self.total: Experts = {}  # sum over batches of the mean over seeds
        self.squares: Sums = {}  # sum over batches of |mean over seeds|^2
        self.within: Sums = {}  # sum over batches of the variance between seeds

    def add(self, drawn: Sequence[Experts], losses: Sequence[float]) -> None:
        """The seeds of one batch."""
        mean = _mean(drawn)
        self.total = combined(self.total, mean, 1) if self.batches else mean
        self.squares = _add(self.squares, dot(mean, mean))
        if self.seeds > 1:
            for one in drawn:
                off = combined(one, mean, -1)
                self.within = _add(self.within, dot(off, off), 1 / (self.seeds - 1))
        self.batches += 1
        self.loss += sum(losses) / len(losses)

    def sums(self, name: str) -> dict[str, Sums]:
        """Measures for `scopes`, beginning with `name`."""
        zeros = {key: np.zeros_like(value) for key, value in self.squares.items()}
        return {f"{name}_total2": dot(self.total, self.total), f"{name}_squares": self.squares, f"{name}_within": self.within or zeros}

    def variances(self, name: str, found: Mapping[str, float]) -> tuple[float | None, float | None]:
        """(between batches, between seeds) of one sample."""
        count, within = self.batches, found[f"{name}_within"] / self.batches
        between = None if count < 2 else (found[f"{name}_squares"] - found[f"{name}_total2"] / count) / (count - 1) - within / self.seeds
        return between, within if self.seeds > 1 else None

    def mean2(self, name: str, found: Mapping[str, float]) -> float:
        """|mean|^2 without the share of the noise, where there are two samples or more."""
        count, total2, squares = self.batches, found[f"{name}_total2"], found[f"{name}_squares"]
        if count > 1:
            return (total2 - squares) / (count * (count - 1))
        return total2 - found[f"{name}_within"] / self.seeds


def _add(sums: Sums, more: Mapping[str, Any], factor: float = 1.0) -> Sums:
    return {name: sums.get(name, 0.0) + factor * np.asarray(value, np.float64) for name, value in more.items()}


def _rows(config: GptOssConfig, of: _Samples, off: _Samples, ref: _Samples, labels: Row) -> list[Row]:
    """Rows of one estimator (`of`) against one reference (`ref`); `off` holds the differences."""
    sums = {**of.sums("of"), **off.sums("off"), **ref.sums("ref"), "product": dot(of.total, ref.total)}
    rows, count = [], of.batches
    for scope, found in scopes(config, sums):
        norm, reference = found["of_total2"] ** 0.5, found["ref_total2"] ** 0.5
        share = lambda value, r=reference: None if value is None or not r else value * count**2 / r**2
        between, within = of.variances("of", found)
        row = {
            "cosine": found["product"] / (norm * reference) if norm and reference else None,
            "norm_ratio": norm / reference if reference else None,
            "bias2": share(off.mean2("off", found)),
            "variance_batches": share(between),
            "variance_seeds": share(within),
            "reference_norm": reference / count,
            "batches": count,
            "seeds": of.seeds,
        }
        if scope == (None, None, None):
            row |= {"loss": of.loss / count, "reference_loss": ref.loss / count}
        rows.append({"probe": "gradients", **labels, **placed(scope), **row})
    return rows
