"""Plots of what `lab probe --out DIR` wrote, of one or several directories beside each other; PNGs with the plotted numbers as CSV.

    descent.png         rho(eps) of every estimator: realised over predicted change of the rounded loss along its own gradient, and along its signs
    bias_variance.png   bias against variance of the gradients of the experts, both over the squared norm of the reference
    cells.png           where the latent weights lie in their rounding cells, from the grid point (0) to the border (1/2)
    sqnr.png            signal over rounding noise by layer, projection and expert
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from gptoss_jax.errors import UsageError
from gptoss_jax.figures import Picture, heat_maps, plain, save, style
from gptoss_jax.lab.probes.rows import Row, read_rows

Found = dict[str, list[Row]]  # label of a directory -> rows


def of_probes(directories: Sequence[Path], folder: Path) -> list[Picture]:
    """All plots that the directories have rows for.

    Raises:
      UsageError: none of them holds rows of a probe.
    """
    folder.mkdir(parents=True, exist_ok=True)
    titles = {
        "descent": ("Realised over predicted change along each gradient", descent, "descent.png"),
        "gradients": ("Bias and variance of gradients", bias_variance, "bias_variance.png"),
        "weights": ("Latent weights in their cells", cells, "cells.png"),
    }
    made = []
    for probe, (title, draw, name) in titles.items():
        found = {directory.name: read_rows(directory / f"{probe}.jsonl") for directory in directories if (directory / f"{probe}.jsonl").is_file()}
        if found:
            made.append((title, draw(found, folder / name)))
        if found and probe == "weights":
            made.append(("SQNR by expert, dB", sqnr(found, folder / "sqnr.png")))
    if not made:
        raise UsageError(f"{directories[0]}: no rows of a probe: make them with `gptoss-jax lab probe MODEL --out DIR`")
    return made


def _labels(found: Found, *parts: str) -> str:
    """The directory is named where there are several."""
    return ", ".join(part for part in parts[len(found) == 1 :] if part)


def descent(found: Found, file: Path) -> Path:
    """Ratio over step size; 1 where the gradient tells the truth, below 0 where a step does harm. One panel per direction, all layers moving."""
    whole = [(label, row) for label, rows in found.items() for row in rows if row["layer"] is None and row["ratio"] is not None]
    directions = list(dict.fromkeys(row["direction"] for _, row in whole))
    curves = list(dict.fromkeys((label, row["estimator"], row["forward"]) for label, row in whole))
    titles = {"gradient": "along the gradient", "sign": "along its signs, as Adam's first step"}
    figure = Figure(figsize=(4 * len(directions) + 3, 4), layout="constrained")
    axes, points = figure.subplots(1, len(directions), squeeze=False, sharey=True)[0], []
    for axis, direction in zip(axes, directions):
        for number, curve in enumerate(curves):
            label, estimator, forward = curve
            line = sorted(
                (row["step"], row["ratio"]) for of, row in whole if (of, row["estimator"], row["forward"], row["direction"]) == (*curve, direction)
            )
            name = _labels(found, label, estimator, "without rounding" if forward == "full" else "")
            axis.plot(*zip(*line), label=name, markersize=4, linewidth=1.3, **style(number))
            points += [(direction, name, step, ratio) for step, ratio in line]
        axis.axhline(1, color="0.2", linewidth=0.8)
        axis.axhline(0, color="0.6", linewidth=0.8)
        steps = sorted({row["step"] for _, row in whole})
        axis.set_xscale("log")
        axis.set_xticks(steps, [f"{step:g}" for step in steps])
        axis.minorticks_off()
        axis.set_title(titles[direction], fontsize=9, loc="left")
        axis.set_xlabel("step over the root mean square of the weights", fontsize=8)
        plain(axis)
    axes[0].set_ylabel("realised / predicted change of the loss", fontsize=8)
    axes[-1].legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return save(figure, file, ("direction", "curve", "step", "ratio"), points)


def bias_variance(found: Found, file: Path) -> Path:
    """One panel per reference; rows of the whole model."""
    whole = [(label, row) for label, rows in found.items() for row in rows if row["layer"] is None and row["projection"] is None]
    references = list(dict.fromkeys(row["reference"] for _, row in whole))
    figure = Figure(figsize=(4 * len(references) + 1.6, 3.6), layout="constrained")
    axes, points = figure.subplots(1, len(references), squeeze=False)[0], []
    for axis, reference in zip(axes, references):
        for number, (label, row) in enumerate((label, row) for label, row in whole if row["reference"] == reference):
            variance = sum(row[name] or 0.0 for name in ("variance_batches", "variance_seeds"))
            name, look = _labels(found, label, row["estimator"]), style(number)
            axis.plot(row["bias2"], variance, look["marker"], color=look["color"], markersize=6, label=name)
            points.append((reference, name, row["bias2"], variance))
        axis.set_title(f"reference: gradient {'at w' if reference == 'full' else 'at the rounded weights'}", fontsize=9, loc="left")
        axis.set_xlabel("bias² / |reference|²", fontsize=8)
        axis.set_ylabel("variance / |reference|²", fontsize=8)
        plain(axis)
    axes[-1].legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return save(figure, file, ("reference", "estimator", "bias2", "variance"), points)


def cells(found: Found, file: Path) -> Path:
    """Share of weights by distance from the nearer end of the cell; the two halves of a cell are folded onto each other."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axis, points = figure.subplots(), []
    number = 0
    for label, rows in found.items():
        for projection in ("gate_up_proj", "down_proj"):
            counts = [np.asarray(row["cell"], float) for row in rows if row["projection"] == projection and row["expert"] is not None]
            if not counts:
                continue
            total = np.sum(counts, axis=0)
            folded = (total + total[::-1])[: len(total) // 2] / total.sum() * len(total) / 2
            edges = np.linspace(0, 0.5, len(folded) + 1)
            name, look = _labels(found, label, projection), style(number)
            axis.stairs(folded, edges, color=look["color"], linestyle=look["linestyle"], linewidth=1.6, label=name, baseline=None)
            points += [(name, left, right, value) for left, right, value in zip(edges, edges[1:], folded)]
            number += 1
    axis.axhline(1, color="0.6", linewidth=0.8)
    axis.set_xlim(0, 0.5)
    axis.set_xlabel("distance from the nearest grid point, share of the cell: 0 on the grid, 1/2 where rounding turns", fontsize=8)
    axis.set_ylabel("density (1: uniform)", fontsize=8)
    axis.set_ylim(bottom=0)
    plain(axis)
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return save(figure, file, ("weights", "from", "to", "density"), points)


def sqnr(found: Found, file: Path) -> Path:
    """A heat map per directory: experts across, layers and projections down. Grey: rounding changes nothing."""
    maps, points = {}, []
    for label, rows in found.items():
        places = _places(rows)
        experts = sorted({row["expert"] for row in rows if row["expert"] is not None})
        grid = np.full((len(places), len(experts)), np.nan)
        for row in rows:
            if row["expert"] is not None and row["sqnr_db"] is not None:
                grid[places.index((row["layer"], row["projection"])), experts.index(row["expert"])] = row["sqnr_db"]
                points.append((label, row["layer"], row["projection"], row["expert"], row["sqnr_db"]))
        maps[label] = grid, [f"{layer} {projection.removesuffix('_proj')}" for layer, projection in places]
    return save(heat_maps(maps, "expert", "SQNR, dB"), file, ("model", "layer", "projection", "expert", "SQNR dB"), points)


def _places(rows: Sequence[Row]) -> list[tuple[Any, str]]:
    return list(dict.fromkeys((row["layer"], row["projection"]) for row in rows if row["expert"] is not None))
