"""Plots of an experiment, each a PNG with the plotted numbers as CSV beside it."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from gptoss_jax.figures import COLORS, Picture, log_if_wide, plain, save, style
from gptoss_jax.lab.experiment import Experiment
from gptoss_jax.lab.report import Line, Result, log_loss, loss, rate, tasks_of

MOST_CURVES = 12  # in one plot


def of_experiment(experiment: Experiment, lines: Sequence[Line], folder: Path) -> list[Picture]:
    """All plots that the results have numbers for."""
    made = [("Pass rates and held-out loss", outcomes(lines, folder / "outcomes.png"))]
    if any(line.against(log_loss) for line in lines):
        made.append(("Held-out loss over that of the reference, seed by seed", ratios(lines, folder / "ratios.png")))
    if any(result["curve"] for line in lines for result in line.results.values()):
        made.append(("Held-out loss of the deployed weights during training", curves(lines, folder / "curves.png")))
    if any("flip_rate" in result["history"] for line in lines for result in line.results.values()):
        made.append(("Share of weights whose rounded value a step changes", flips(lines, folder / "flips.png")))
    return made


def outcomes(lines: Sequence[Line], file: Path) -> Path:
    """One panel per task and one for the loss: the mean, its 95 % interval, and every seed."""
    tasks = tasks_of(lines)
    panels = [(task, "pass rate, %", rate(task)) for task in tasks] + [("loss", "nats per token", loss)]
    figure = Figure(figsize=(2.6 + 1.9 * len(panels), 1.1 + 0.28 * len(lines)), layout="constrained")
    axes, rows = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], []
    for axis, (title, unit, measure) in zip(axes, panels):
        for y, line in enumerate(lines):
            found = line.of(measure)
            seeds = [measure(result) for result in line.results.values()]
            if found.half is not None:
                axis.hlines(y, found.low, found.high, color=COLORS[5], linewidth=3)
            axis.plot(seeds, [y] * len(seeds), "o", mfc="none", mec="0.35", markersize=4, markeredgewidth=0.8)
            axis.plot(found.mean, y, "o", color=COLORS[0], markersize=5)
            rows += [(title, line.arm.name, seed, value, found.mean, found.half) for seed, value in zip(line.results, seeds)]
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_xlabel(unit, fontsize=8)
        plain(axis)
    for axis in axes[:-1]:
        axis.set_xlim(max(-3, axis.get_xlim()[0]), min(103, axis.get_xlim()[1]))
    log_if_wide(axes[-1], [value for title, _, _, value, _, _ in rows if title == "loss"], "x")
    axes[0].set_yticks(range(len(lines)), [line.arm.name for line in lines], fontsize=8)
    axes[0].set_ylim(len(lines) - 0.4, -0.6)
    return save(figure, file, ("panel", "arm", "seed", "value", "mean", "half of the 95 % interval"), rows)


def ratios(lines: Sequence[Line], file: Path) -> Path:
    """Loss over the loss of the reference with the same seed, on a logarithmic axis: left of 1 is better than the reference."""
    compared = [(line, found) for line in lines if (found := line.against(log_loss)) is not None]
    figure = Figure(figsize=(6.5, 1.2 + 0.28 * len(compared)), layout="constrained")
    axis, rows = figure.subplots(), []
    for y, (line, found) in enumerate(compared):
        seeds = {seed: math.exp(log_loss(r) - log_loss(line.reference[seed])) for seed, r in line.results.items() if seed in line.reference}
        low, mean, high = (math.exp(value) for value in (found.low, found.mean, found.high))
        if found.half is not None:
            axis.hlines(y, low, high, color=COLORS[5], linewidth=3)
        axis.plot(list(seeds.values()), [y] * len(seeds), "o", mfc="none", mec="0.35", markersize=4, markeredgewidth=0.8)
        axis.plot(mean, y, "o", color=COLORS[0], markersize=5)
        rows += [(line.arm.name, seed, value, mean, low, high) for seed, value in seeds.items()]
    axis.axvline(1, color="0.2", linewidth=1)
    axis.set_xscale("log")
    # an interval over few seeds may reach far beyond what was seen
    seen = [row[2] for row in rows] + [1.0]
    axis.set_xlim(min(seen) / 1.6, max(seen) * 1.6)
    axis.set_yticks(range(len(compared)), [line.arm.name for line, _ in compared], fontsize=8)
    axis.set_ylim(len(compared) - 0.4, -0.6)
    axis.set_xlabel("loss / loss of the reference", fontsize=8)
    plain(axis)
    return save(figure, file, ("arm", "seed", "ratio", "geometric mean", "low", "high"), rows)


def curves(lines: Sequence[Line], file: Path) -> Path:
    """Held-out loss of what would be deployed after each step, mean over seeds; the SFT before it, unrounded, in grey."""
    rows, shown = [], [line for line in lines if any(result["curve"] for result in line.results.values())]
    figure = Figure(figsize=(8.5, 4.2), layout="constrained")
    axis = figure.subplots()
    sft = {tuple(points): None for line in shown if (points := _mean_curve([r["sft"]["curve"] for r in line.results.values()], 0))}
    for number, points in enumerate(sft):
        axis.plot(*zip(*points), color="0.6", linewidth=3, label="_" * (number > 0) + "SFT, unrounded")
        rows += [("SFT, unrounded", *point) for point in points]
    for number, line in enumerate(shown[:MOST_CURVES]):
        results = list(line.results.values())
        points = _mean_curve([result["curve"] for result in results], len(results[0]["sft"]["history"].get("loss", ())))
        axis.plot(*zip(*points), label=line.arm.name, markersize=4, linewidth=1.4, **style(number))
        rows += [(line.arm.name, *point) for point in points]
    log_if_wide(axis, [row[2] for row in rows], "y")
    axis.set_xlabel("optimizer steps from the base", fontsize=8)
    axis.set_ylabel("held-out loss, nats per token", fontsize=8)
    plain(axis)
    _legend(axis, len(shown))
    return save(figure, file, ("arm", "step", "mean loss"), rows)


def _mean_curve(seeds: Sequence[Sequence[Sequence[float]]], first: int) -> list[tuple[int, float]]:
    """(step, mean over seeds), counted from `first`."""
    points: dict[int, list[float]] = {}
    for step, value in (point for curve in seeds for point in curve):
        points.setdefault(first + step, []).append(value)
    return [(step, sum(values) / len(values)) for step, values in points.items()]


def _legend(axis: Any, count: int) -> None:
    title = f"the first {MOST_CURVES} of {count} arms" if count > MOST_CURVES else None
    axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), title=title, title_fontsize=7)


def flips(lines: Sequence[Line], file: Path) -> Path:
    """Flip rate by step, mean over seeds, and above it the learning rate."""
    rows, shown = [], [line for line in lines if "flip_rate" in next(iter(line.results.values()))["history"]]
    figure = Figure(figsize=(8.5, 5.2), layout="constrained")
    rates, axis = figure.subplots(2, 1, sharex=True, height_ratios=(1, 3))
    for number, line in enumerate(shown[:MOST_CURVES]):
        histories = [result["history"] for result in line.results.values()]
        flip = _mean_of(histories, "flip_rate")
        look = {**style(number), "marker": ""}
        axis.plot(range(len(flip)), [100 * value for value in flip], label=line.arm.name, linewidth=1.4, **look)
        rates.plot(range(len(flip)), _mean_of(histories, "lr"), linewidth=1.2, **look)
        rows += [(line.arm.name, step, value, lr) for step, (value, lr) in enumerate(zip(flip, _mean_of(histories, "lr")))]
    axis.set_ylabel("weights flipped, % per step", fontsize=8)
    axis.set_xlabel("step of the further training", fontsize=8)
    rates.set_ylabel("learning rate", fontsize=8)
    log_if_wide(axis, [100 * row[2] for row in rows if row[2] > 0], "y")
    plain(axis)
    plain(rates)
    _legend(axis, len(shown))
    return save(figure, file, ("arm", "step", "flip rate", "learning rate"), rows)


def _mean_of(histories: Sequence[Result], name: str) -> list[float]:
    return [sum(values) / len(values) for values in zip(*(history[name] for history in histories))]
