"""The table as a picture: one panel per task, one line per row, a dot for the mean, hollow dots for the seeds, a line for their range or interval.

Dots and not bars, because the differences of interest lie within the last percent of 100 and a bar says that zero matters. Colours are those of
Okabe and Ito, which stay apart for every common kind of colour blindness, and shape tells the same as colour. matplotlib is the extra `plots`.
"""

from pathlib import Path
from typing import Any

from gptoss_jax.training.recipe.results import Results, kl_spread, loss_spread, pass_spread
from gptoss_jax.training.recipe.rows import NVIDIA_20B

OURS, NVIDIA, SPREAD = "#0072B2", "#D55E00", "#56B4E9"
INCH_PER_LINE, INCH_PER_PANEL, INCH_OF_LABELS = 0.38, 2.1, 2.4


def plot_results(results: Results, file: str | Path) -> bool:
    """Writes a PNG; False, and nothing written, where matplotlib is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return False
    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    lines = results.lines
    panels = [(column.title, "pass rate, %", lambda seeds, task=task: pass_spread(seeds, task)) for task, column in results.tasks.items()]
    panels.append(("validation loss", "nats per token", loss_spread))
    if any(measured.kl is not None for measured in results.results):
        panels.append(("KL to original", "nats per token", kl_spread))
    size = (INCH_OF_LABELS + INCH_PER_PANEL * len(panels), 1.4 + INCH_PER_LINE * len(lines))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, unit, spread) in zip(axes, panels):
        axis.set_title(title, fontsize=9, loc="left", wrap=True)
        axis.set_xlabel(unit, fontsize=8)
        means = _draw_lines(axis, lines, spread)
        if unit == "nats per token" and min(means) > 0 and max(means) > 30 * min(means):
            axis.set_xscale("log")
    for axis, (task, column) in zip(axes, results.tasks.items()):
        axis.set_xlim(-3, 103)
        _draw_seeds(axis, lines, task)
        if column.nvidia:
            found = [(y, NVIDIA_20B[column.nvidia][seeds[0].row]) for y, seeds in enumerate(lines) if seeds[0].row in NVIDIA_20B[column.nvidia]]
            axis.plot([rate for _, rate in found], [y + 0.28 for y, _ in found], "D", color=NVIDIA, markersize=4, label="NVIDIA, gpt-oss-20b")
    axes[0].set_yticks(range(len(lines)), [results.label(seeds[0]) for seeds in lines], fontsize=8)
    axes[0].set_ylim(len(lines) - 0.4, -0.6)  # the first row on top
    labels: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            labels.setdefault(label, handle)
    figure.legend(labels.values(), labels.keys(), loc="outside lower left", ncols=len(labels), fontsize=8, frameon=False)
    figure.savefig(file, dpi=150, metadata={"Software": None})
    return True


def _draw_lines(axis: Any, lines: list, spread: Any) -> list[float]:
    """Mean and extremes of every line; returns the means."""
    found = [(y, value) for y, seeds in enumerate(lines) if (value := spread(seeds)) is not None]
    means = [value.mean for _, value in found]
    for of_seeds, label in ((True, "range over seeds"), (False, "95 % interval")):
        some = [(y, value) for y, value in found if value.of_seeds == of_seeds and value.low < value.high]
        if some:
            axis.hlines([y for y, _ in some], [v.low for _, v in some], [v.high for _, v in some], color=SPREAD, linewidth=3, label=label)
    axis.plot(means, [y for y, _ in found], "o", color=OURS, markersize=6, label="this recipe, mean")
    axis.grid(axis="y", color="0.9", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8, left=False)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    return means


def _draw_seeds(axis: Any, lines: list, task: str) -> None:
    points = [(100 * measured.rate(task), y) for y, seeds in enumerate(lines) if len(seeds) > 1 for measured in seeds]
    if points:
        axis.plot(*zip(*points), "o", mfc="none", mec=OURS, markersize=3.5, markeredgewidth=0.8, label="one seed")
