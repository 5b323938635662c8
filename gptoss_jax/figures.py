"""What all plots have in common: colours, axes, heat maps, and the plotted numbers as CSV beside every picture.

Colours are those of Okabe and Ito; markers and dashes tell the same, so that everything can be read in grey. matplotlib is the extra `plots`, and
importing this module without it raises ModuleNotFoundError.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg", force=False)
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
MARKERS, DASHES = "osD^vPX*", ("-", "--", "-.", ":")
Picture = tuple[str, Path]  # title and PNG


def style(number: int) -> dict[str, Any]:
    """Colour, marker and dashes of curve `number`; 8 x 4 differ."""
    return {"color": COLORS[number % 8], "marker": MARKERS[number % 8], "linestyle": DASHES[(number + number // 8) % 4]}


def save(figure: Figure, file: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Path:
    """Writes the figure and, under the same name, its numbers as CSV; returns the picture."""
    figure.savefig(file, dpi=140, metadata={"Software": None})
    with open(file.with_suffix(".csv"), "w", encoding="utf-8", newline="") as out:
        csv.writer(out, lineterminator="\n").writerows([columns, *rows])
    return file


def plain(axis: Any) -> None:
    """No frame but the axes, small type, a light grid."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    axis.grid(color="0.92", linewidth=0.6)
    axis.set_axisbelow(True)


def log_if_wide(axis: Any, values: Sequence[float], which: str) -> None:
    """A logarithmic axis where positive values spread over more than a factor of 10."""
    if values and min(values) > 0 and max(values) > 10 * min(values):
        (axis.set_xscale if which == "x" else axis.set_yscale)("log")


def heat_maps(maps: Mapping[str, tuple[np.ndarray, Sequence[str]]], across: str, unit: str, low: float | None = None) -> Figure:
    """A heat map for each title, one below the other, in one scale of colours. Grey: no number.

    Args:
      maps: title -> values [down, across], NaN where there is none, and the names of the rows.
      across: what the columns are, which are numbered from 0.
      unit: of the values.
      low: lower end of the scale; default the lowest value.
    """
    figure = Figure(figsize=(7.5, 0.6 + sum(0.9 + 0.24 * len(names) for _, names in maps.values())), layout="constrained")
    axes = figure.subplots(len(maps), 1, squeeze=False)[:, 0]
    known = np.concatenate([values[np.isfinite(values)] for values, _ in maps.values()])
    ends = (known.min() if low is None else low, known.max()) if known.size else (0, 1)
    for axis, (title, (values, names)) in zip(axes, maps.items()):
        axis.set_facecolor("0.85")
        image = axis.imshow(values, aspect="auto", cmap="cividis", vmin=ends[0], vmax=ends[1], interpolation="nearest")
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.tick_params(labelsize=7)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel(across, fontsize=8)
        axis.set_title(title, fontsize=9, loc="left")
        bar = figure.colorbar(image, ax=axis)
        bar.set_label(unit, fontsize=8)
        bar.ax.tick_params(labelsize=7)
    return figure
