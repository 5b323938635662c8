"""How far the gradients of estimators are from reference gradients: direction, size, bias and variance, for every layer and expert.

Samples are batches b = 1..B, and for a format that rounds at random also seeds s = 1..S. With g_b the gradient of an estimator on batch b (its mean
over the seeds), r_b a reference on the same batch, m and r their means over the batches, d_b = g_b - r_b:

    cosine            <m, r> / |m| |r|
    norm_ratio        |m| / |r|
    bias2             |E d|^2 / |r|^2, estimated without the share of the noise: (|sum d_b|^2 - sum |d_b|^2) / B (B-1); may come out a little below 0.
                      With one batch: over its seeds alone. With one sample: |d|^2 / |r|^2, noise included
    variance_batches  tr Var(g_b) / |r|^2 between batches, the share of the seeds taken off; None for one batch
    variance_seeds    tr Var / |r|^2 between seeds of one batch; None for one seed
    reference_norm    |r|
    loss, reference_loss   mean loss of the weights that the gradient was taken at; in the rows of the whole model

References: "full", the gradient at the stored weights w in a forward pass without quantization; "quantized", the gradient at the rounded weights w_q,
which is what the straight-through estimator uses.

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
from gptoss_jax.formats import Format
from gptoss_jax.lab.probes.objective import (
    Experts,
    Objective,
    Quantize,
    as_quantize,
    combined,
    dot,
    label_of,
    pulled_back,
    rounded,
    same,
)
from gptoss_jax.lab.probes.rows import Row, placed, scopes
from gptoss_jax.model import GptOssConfig, Params
from gptoss_jax.quant import Estimator

REFERENCES = ("full", "quantized")
Sums = dict[str, np.ndarray]


def named_quantizers(fmt: Format | str | Quantize, estimators: Sequence[str | Estimator | Quantize]) -> dict[str, Quantize]:
    """Label -> quantizer with that estimator's gradient. An entry that is no estimator is taken for a differentiable quantizer of its own.

    Raises:
      ValueError: unknown name; two with one label.
    """
    found = {}
    for entry in estimators:
        own = callable(entry) and not isinstance(entry, str | Estimator)
        quantize = entry if own else as_quantize(fmt, entry)
        if label_of(quantize) in found:
            raise ValueError(f"two estimators are called {label_of(quantize)!r}")
        found[label_of(quantize)] = quantize
    return found


def estimator_gradients(
    objective: Objective, batch: Batch, quantizers: Mapping[str, Quantize], key: Array | None = None
) -> dict[str, tuple[float, Experts]]:
    """Label -> (loss of its compute weights, gradient of the stored weights). One pass through the model for each distinct set of compute weights."""
    experts, found = objective.experts, {}
    known: list[tuple[Experts, float, Experts]] = []
    for label, quantize in quantizers.items():
        weights = rounded(quantize, experts, key)
        at = next((entry for entry in known if same(entry[0], weights)), None)
        if at is None:
            loss, grads = objective.gradient(weights, batch)
            at = (weights, float(loss), grads)
            known.append(at)
        found[label] = at[1], pulled_back(quantize, experts, key, at[2])
    return found


def probe_gradients(
    config: GptOssConfig,
    params: Params,
    batches: Sequence[Batch],
    fmt: Format | str | Quantize,
    estimators: Sequence[str | Estimator | Quantize] = ("ste",),
    *,
    references: Sequence[str] = REFERENCES,
    seeds: int = 1,
    key: Array | None = None,
    dtype: Any = "float32",
    only: str = "*",
    report: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Rows for every estimator and reference: whole model, every layer, every expert of every projection. Columns: see the head of this file.

    Args:
      params: master weights.
      batches: of equal weight; two or more for bias and variance.
      fmt: a format, its name, or a differentiable quantizer.
      estimators: names or objects.
      seeds: roundings of every batch, for a stochastic format.
      key: of a stochastic format; every batch and seed gets its own.
      only: pattern of the expert projections that are looked at; the others stay as they are.

    Raises:
      ValueError: unknown estimator or reference, no batch.
    """
    if unknown := [name for name in references if name not in REFERENCES]:
        raise ValueError(f"unknown reference {unknown[0]!r}; known are {', '.join(REFERENCES)}")
    if not batches or seeds < 1:
        raise ValueError(f"{len(batches)} batches and {seeds} seeds: at least one of each is needed")
    objective, quantizers = Objective(config, params, dtype, only), named_quantizers(fmt, estimators)
    hard = "\0quantized"  # no estimator has this label
    samples = {label: _Samples(seeds) for label in quantizers}
    samples |= {(label, reference): _Samples(seeds) for label in quantizers for reference in references}
    referred = {reference: _Samples(1) for reference in references}
    for number, batch in enumerate(batches, 1):
        report(f"gradients of batch {number} of {len(batches)}")
        keys = [None] * seeds if key is None else jax.random.split(jax.random.fold_in(key, number), seeds)
        drawn = [estimator_gradients(objective, batch, {hard: as_quantize(fmt), **quantizers}, k) for k in keys]
        at = {}
        if "full" in references:
            at["full"] = objective.gradient(objective.experts, batch)
        if "quantized" in references:
            at["quantized"] = sum(d[hard][0] for d in drawn) / seeds, _mean([d[hard][1] for d in drawn])
        for reference, (loss, grads) in at.items():
            referred[reference].add([grads], [float(loss)])
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
