"""Figures of runs: a curve of every metric, pass rates, and the load of experts; one colour per run.

Where there are more than `SMOOTH_FROM` steps, each value is drawn thin and on top the running mean over 1/25 of them, at least 5.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gptoss_jax.figures import COLORS, Picture, heat_maps, log_if_wide, plain, save, style
from gptoss_jax.training.report.runs import Run, running_mean

SMOOTH_FROM, SMOOTH_SHARE, SMOOTH_LEAST = 40, 25, 5
# key of metrics.jsonl -> title, unit, drawn with a running mean
CURVES = {
    "loss": ("Loss", "nats per trained token", True),
    "lr": ("Learning rate", "", False),
    "grad_norm": ("Norm of the gradient, before clipping", "", True),
    "tok_per_s": ("Throughput", "tokens/s", True),
    "kl": ("Divergence from the teacher", "nats per trained token", True),
    "aux_loss": ("Load-balancing loss", "", True),
    "router/load_max": ("Load of the busiest expert of any layer", "times the mean", True),
    "router/entropy": ("Entropy of the router, lowest of any layer", "of log E", True),
}


def draw(runs: Sequence[Run], folder: Path) -> list[Picture]:
    """All figures that the runs have numbers for, as PNG with the numbers as CSV beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for key, (title, unit, smooth) in CURVES.items():
        if any(run.curve(key) for run in runs):
            more = "eval_loss" if key == "loss" else None
            made.append((title, curves(runs, key, unit, smooth, more, folder / f"{key.removeprefix('router/')}.png")))
    tasks = list(dict.fromkeys(task for run in runs for task in run.tasks))
    if tasks:
        made.append(("Pass rates", pass_rates(runs, tasks, folder / "pass_rates.png")))
    if any(run.router for run in runs):
        made.append(("Load of every expert at the last evaluation", load([run for run in runs if run.router], folder / "load.png")))
    return made


def curves(runs: Sequence[Run], key: str, unit: str, smooth: bool, held_out: str | None, file: Path) -> Path:
    """One metric of all runs over steps; `held_out`, if given, as markers joined by dashes in the same colour."""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axis, rows = figure.subplots(), []
    for number, run in enumerate(runs):
        color, points = COLORS[number % 8], run.curve(key)
        name = run.name if len(runs) > 1 else "training"
        if smooth and len(points) > SMOOTH_FROM:
            axis.plot(*zip(*points), color=color, linewidth=0.6, alpha=0.35)
            axis.plot(*zip(*running_mean(points, max(SMOOTH_LEAST, len(points) // SMOOTH_SHARE))), label=name, **_line(number))
        elif points:
            axis.plot(*zip(*points), label=name, **_line(number))
        rows += [(run.name, key, *point) for point in points]
        if held_out and (points := run.curve(held_out)):
            label = "held out" if len(runs) == 1 else f"{run.name}, held out"
            color = color if len(runs) > 1 else COLORS[1]
            axis.plot(*zip(*points), "--", color=color, marker=style(number)["marker"], markersize=4, linewidth=1, label=label)
            rows += [(run.name, held_out, *point) for point in points]
    if key != "lr":
        log_if_wide(axis, [row[3] for row in rows], "y")
    _finish(axis, unit, legend=len(runs) > 1 or held_out is not None)
    return save(figure, file, ("run", "metric", "step", "value"), rows)


def pass_rates(runs: Sequence[Run], tasks: Sequence[str], file: Path) -> Path:
    """A panel per task, at most three beside each other."""
    across = min(3, len(tasks))
    down = -(-len(tasks) // across)
    figure = Figure(figsize=(2.6 * across + 1.2, 2.4 * down + 0.4), layout="constrained")
    axes, rows = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).flat, []
    for axis, task in zip(axes, tasks):
        for number, run in enumerate(runs):
            if points := run.curve(f"task/{task}"):
                steps, rates = zip(*points)
                axis.plot(steps, [100 * rate for rate in rates], label=run.name, markersize=4, linewidth=1.3, **style(number))
                rows += [(task, run.name, *point) for point in points]
        axis.set_title(task, fontsize=9, loc="left")
        axis.set_ylim(-3, 103)
        _finish(axis, "%", legend=len(runs) > 1 and axis is axes[0])
    for axis in list(axes)[len(tasks) :]:
        axis.set_visible(False)
    return save(figure, file, ("task", "run", "step", "rate"), rows)


def load(runs: Sequence[Run], file: Path) -> Path:
    """A heat map per run, layers down and experts across: assignments over their mean in the layer. 1 is even, 0 an idle expert."""
    maps, rows = {}, []
    for run in runs:
        record = run.router[-1]
        assignments_LE = np.asarray(record["assignments"], np.float64)
        mean_L1 = assignments_LE.mean(axis=1, keepdims=True)
        load_LE = np.divide(assignments_LE, mean_L1, out=np.full_like(assignments_LE, np.nan), where=mean_L1 > 0)
        maps[f"{run.name}, step {record['step']}"] = load_LE, [f"layer {layer}" for layer in range(len(load_LE))]
        rows += [(run.name, record["step"], layer, expert, value) for (layer, expert), value in np.ndenumerate(load_LE)]
    return save(heat_maps(maps, "expert", "load / mean", low=0), file, ("run", "step", "layer", "expert", "load"), rows)


def _line(number: int) -> dict[str, Any]:
    look = style(number)
    return {"color": look["color"], "linestyle": look["linestyle"], "linewidth": 1.5}


def _finish(axis: Any, unit: str, legend: bool) -> None:
    axis.set_xlabel("step", fontsize=8)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylabel(unit, fontsize=8)
    plain(axis)
    if legend and axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7, frameon=False)
