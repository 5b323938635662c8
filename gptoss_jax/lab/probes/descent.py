"""What the rounded model's loss does when the weights move along an estimator's gradient g. L(Q(.)) is the loss of the rounded weights.

`probe_descent`, two losses for every direction and step size:

    ratio    [L(Q(w - eps d)) - L(Q(w + eps d))] / (-2 eps g.d)     realised over predicted change; 1 where the gradient tells the truth
    step     eps over the root mean square of the expert weights; `step_absolute` is eps
    direction  "gradient": d = g scaled to mean square 1, so that few weights move far and most hardly; "sign": d = sign(g), all move alike, as in
               the first step of Adam with learning rate eps
    layer    None: all expert weights move together; otherwise those of one layer
    forward  "quantized" as above. The rows of estimator "gradient at w" have also "full", the loss without Q: plain finite differences, so a
             ratio other than 1 there comes from curvature, or from a token that changes experts, not from the format

`probe_smoothed`, against the gradient of the smoothed loss E_u[L(Q(w + s u))], u standard normal, which is a true gradient of a smooth function:

    g_s = E_u[(L(Q(w+su)) - L(Q(w-su))) u / 2s] = E_u[c u]

With 10^6 weights and more g_s itself is out of reach: an average over K draws has a noise of |g_s| sqrt(n/K). Its product with one given direction is
not: <g_s, g> = E[c <u, g>] has the standard error |g_s| |g| / sqrt(K). It falls further with a known vector h near g_s, here the gradient at Q(w):
<g_s, g> = <h, g> + E[(c - <h, u>) <u, g>], still without bias, with a standard error of about |g_s - h| |g| / sqrt(K).

    slope            <g_s, g>, `slope_error` its standard error from the spread of the draws
    ratio            <g_s, g> / |g|^2, `ratio_error` likewise: what a small step along g gains of the smoothed loss, over what g promises
    cosine_at_least  <g_s, g> / |g| sqrt(E c^2). c also holds what is not linear in u, so the cosine itself is at least this, up to the noise
    radius           s over the root mean square of the expert weights; `radius_absolute` is s

Draws are shared by all estimators. Estimates for single layers hold the noise of all the others; their errors say so. The loss jumps where a token
changes experts; the smaller the radius, the more such jumps weigh in c.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gptoss_jax.data.packing import Batch
from gptoss_jax.formats import Format
from gptoss_jax.lab.probes.gradients import Passes, named_quantizers
from gptoss_jax.lab.probes.objective import Experts, Objective, as_quantizer, combined, dot, places, rounded
from gptoss_jax.lab.probes.rows import Row, Scope, placed, scopes
from gptoss_jax.lab.quantizer import Quantizer
from gptoss_jax.model import GptOssConfig, Params
from gptoss_jax.quant import Estimator

AT_W = "gradient at w"  # label of the gradient of the unquantized model
STEPS = (0.002, 0.01, 0.05)
DIRECTIONS = ("gradient", "sign")


def probe_descent(
    config: GptOssConfig,
    params: Params,
    batch: Batch,
    fmt: Format | str | Quantizer,
    estimators: Sequence[str | Estimator | Quantizer] = ("ste",),
    *,
    steps: Sequence[float] = STEPS,
    directions: Sequence[str] = DIRECTIONS,
    per_layer: bool = False,
    seed: int = 0,
    dtype: Any = "float32",
    only: str = "*",
    report: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Realised-descent ratios of all estimators, directions and step sizes. Other arguments as in `probe_gradients`.

    Args:
      steps: eps over the root mean square of the expert weights.
      directions: "gradient", "sign", or both.
      per_layer: also move every layer alone.

    Raises:
      ValueError: another direction.
    """
    if unknown := [name for name in directions if name not in DIRECTIONS]:
        raise ValueError(f"unknown direction {unknown[0]!r}; known are {', '.join(DIRECTIONS)}")
    objective = Objective(config, params, dtype, only)
    experts, hard, rms = objective.experts, as_quantizer(fmt), _rms(objective.experts)
    layers = [None, *sorted({layer for _, _, layer, _ in places(config, experts)})] if per_layer else [None]
    forwards = {"quantized": lambda weights: rounded(hard, weights), "full": lambda weights: weights}
    rows = []
    for label, grads in _directions(Passes(objective, batch), fmt, estimators, seed).items():
        report(f"descent along {label}")
        for layer, direction in itertools.product(layers, directions):
            moved = grads if layer is None else _of_layer(config, grads, layer)
            along = moved if direction == "gradient" else {name: jnp.sign(value) for name, value in moved.items()}
            # eps d = factor * along; a gradient of zeros goes nowhere
            size = _rms(along) if direction == "gradient" else 1.0
            slope = _total(dot(grads, along))
            for forward, step in itertools.product(("full", "quantized") if label == AT_W else ("quantized",), steps):
                factor = step * rms / size if size else 0.0
                loss = {sign: float(objective.loss(forwards[forward](combined(experts, along, sign * factor)), batch)) for sign in (-1, 1)}
                row = {"step": step, "step_absolute": step * rms, "predicted": -2 * factor * slope, "realised": loss[-1] - loss[1]}
                row["ratio"] = row["realised"] / row["predicted"] if row["predicted"] else None
                labels = {"estimator": label, "forward": forward, "direction": direction}
                rows.append({"probe": "descent", **labels, **placed((layer, None, None)), **row})
    return rows


def _of_layer(config: GptOssConfig, grads: Experts, layer: int) -> Experts:
    """The gradient of one layer, 0 elsewhere."""
    found = {name: jnp.zeros_like(value) for name, value in grads.items()}
    for name, slot, number, _ in places(config, grads):
        if number == layer:
            found[name] = grads[name] if slot is None else found[name].at[slot].set(grads[name][slot])
    return found


def probe_smoothed(
    config: GptOssConfig,
    params: Params,
    batch: Batch,
    fmt: Format | str | Quantizer,
    estimators: Sequence[str | Estimator | Quantizer] = ("ste",),
    *,
    radius: float = 0.1,
    draws: int = 32,
    seed: int = 0,
    dtype: Any = "float32",
    only: str = "*",
    report: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Products of all estimators' gradients with the gradient of the smoothed loss: whole model and every layer. Two losses a draw.

    Args:
      radius: s over the root mean square of the expert weights.
      draws, seed: of u.

    Raises:
      ValueError: fewer than two draws.
    """
    if draws < 2:
        raise ValueError(f"draws = {draws}: a standard error needs two")
    objective = Objective(config, params, dtype, only)
    experts, hard, rms = objective.experts, as_quantizer(fmt), _rms(objective.experts)
    passes = Passes(objective, batch)
    near = passes.at(rounded(hard, experts))[1]
    directions = _directions(passes, fmt, estimators, seed)
    known = {label: _per_layer(config, dot(near, grads)) for label, grads in directions.items()}
    slopes: dict[str, list[dict[Scope, float]]] = {label: [] for label in directions}
    changes = []
    for draw in range(draws):
        report(f"smoothed loss, draw {draw + 1} of {draws}")
        u = _normal(experts, jax.random.fold_in(jax.random.key(seed), draw))
        plus, minus = (objective.loss(rounded(hard, combined(experts, u, sign * radius * rms)), batch) for sign in (1, -1))
        change = (float(plus) - float(minus)) / (2 * radius * rms)
        rest = change - _total(dot(near, u))
        changes.append(change)
        for label, grads in directions.items():
            projected = _per_layer(config, dot(u, grads))
            slopes[label].append({scope: known[label][scope] + rest * value for scope, value in projected.items()})
    rows = []
    for label, grads in directions.items():
        for scope, norm2 in _per_layer(config, dot(grads, grads)).items():
            values = np.array([found[scope] for found in slopes[label]])
            slope, error = values.mean(), values.std(ddof=1) / draws**0.5
            row = {"radius": radius, "radius_absolute": radius * rms, "draws": draws, "slope": slope, "slope_error": error}
            row |= {"ratio": slope / norm2 if norm2 else None, "ratio_error": error / norm2 if norm2 else None}
            if scope == (None, None, None):  # c is the change along all directions at once
                most = (norm2 * np.mean(np.square(changes))) ** 0.5
                row["cosine_at_least"] = slope / most if most else None
            rows.append({"probe": "smoothed", "estimator": label, **placed(scope), **row})
    return rows


def _directions(passes: Passes, fmt: Format | str | Quantizer, estimators: Sequence[Any], seed: int) -> dict[str, Experts]:
    """The gradient of the unquantized model, then those of the estimators."""
    found = {AT_W: passes.at(passes.objective.experts), **passes.estimated(named_quantizers(fmt, estimators), jax.random.key(seed))}
    return {label: grads for label, (_, grads) in found.items()}


@jax.jit
def _normal(experts: Experts, key: Array) -> Experts:
    keys = jax.random.split(key, len(experts))
    return {name: jax.random.normal(k, experts[name].shape) for name, k in zip(sorted(experts), keys)}


def _total(products: Mapping[str, Any]) -> float:
    return sum(float(np.sum(np.asarray(value, np.float64))) for value in products.values())


def _rms(experts: Experts) -> float:
    """Root mean square of all weights together."""
    return (_total(dot(experts, experts)) / sum(value.size for value in experts.values())) ** 0.5


def _per_layer(config: GptOssConfig, products: Mapping[str, Any]) -> dict[Scope, float]:
    """Sums of the whole model and of each layer."""
    return {scope: found["it"] for scope, found in scopes(config, {"it": products}) if scope[1] is None}
