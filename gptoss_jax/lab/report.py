"""The report of an experiment, made from its results at any time: report.md, report.html (one file with everything inside), table.csv, plots/.

Rates and losses are means over seeds with the 95 % interval of `statistics.py`. Where the experiment names a reference, each arm is compared with its
reference seed by seed: losses as their ratio (mean of the logarithms, so that halving and doubling weigh the same), rates as a difference in points.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from gptoss_jax.lab.experiment import Experiment, NamedArm, reference_of
from gptoss_jax.lab.grid import results_of
from gptoss_jax.lab.statistics import Estimate, estimate, paired
from gptoss_jax.training.recipe.results import write_atomic
from gptoss_jax.training.recipe.table import Table, to_markdown
from gptoss_jax.web_page import document, picture
from gptoss_jax.web_page import table as html_table

MARKDOWN, HTML, CSV, PLOTS = "report.md", "report.html", "table.csv", "plots"
LATE = 0.25  # share of the steps, the last ones, over which flips are averaged
Result = dict[str, Any]
Measure = Callable[[Result], float | None]


@dataclass(frozen=True)
class Line:
    """An arm with its results by seed, and those of its reference."""

    arm: NamedArm
    results: dict[int, Result]
    reference: dict[int, Result]

    @property
    def is_reference(self) -> bool:
        return self.reference is self.results

    def of(self, measure: Measure) -> Estimate | None:
        """None where a seed lacks it."""
        values = [measure(result) for result in self.results.values()]
        return None if None in values else estimate(values)

    def against(self, measure: Measure) -> Estimate | None:
        """The paired difference to the reference; None without one, or for the reference itself."""
        if self.is_reference or not self.reference:
            return None
        ours, theirs = ({seed: measure(result) for seed, result in results.items()} for results in (self.results, self.reference))
        return None if None in [*ours.values(), *theirs.values()] else paired(ours, theirs)


def lines_of(experiment: Experiment, arms: Sequence[NamedArm], results: Sequence[Result]) -> list[Line]:
    """Arms that have results, in their order."""
    by_arm: dict[str, dict[int, Result]] = {}
    for result in results:
        by_arm.setdefault(result["arm"], {})[result["seed"]] = result
    lines = []
    for arm in arms:
        if arm.name in by_arm:
            reference = reference_of(experiment, arms, arm)
            lines.append(Line(arm, by_arm[arm.name], by_arm.get(reference.name, {}) if reference else {}))
    return lines


# ---- measures ---------------------------------------------------------------------------------------------------------------------
def rate(task: str) -> Measure:
    """Pass rate in %."""
    return lambda result: 100 * result["measured"]["pass"][task][0] / result["measured"]["pass"][task][1]


def loss(result: Result) -> float:
    """Held-out loss, nats per trained token. Infinite where training diverged."""
    value = result["measured"]["loss"]
    return value if math.isfinite(value) else math.inf


def log_loss(result: Result) -> float | None:
    return math.log(loss(result)) if math.isfinite(loss(result)) else None


def rounding(name: str) -> Measure:
    return lambda result: result["measured"]["rounding"].get(name)


def late(name: str) -> Measure:
    """Mean of a recorded number over the last quarter of the steps."""

    def measure(result):
        values = result["history"].get(name)
        if not values:
            return None
        last = values[-max(1, int(LATE * len(values))) :]
        return math.fsum(last) / len(last)

    return measure


def tasks_of(lines: Sequence[Line]) -> list[str]:
    first = next(iter(lines[0].results.values()))
    return list(first["measured"]["pass"])


# ---- table ------------------------------------------------------------------------------------------------------------------------
def make_table(experiment: Experiment, lines: Sequence[Line]) -> Table:
    columns: list[tuple[str, Callable[[Line], str]]] = [("arm", lambda line: line.arm.name)]
    spread = {task: {value for line in lines for value in map(rate(task), line.results.values())} for task in tasks_of(lines)}
    differing = [task for task, values in spread.items() if len(values) > 1]
    columns += [(f"{task}, %", lambda line, task=task: _plus_minus(line.of(rate(task)), 1)) for task in differing]
    columns.append(("loss", lambda line: _plus_minus(line.of(loss), 4)))
    if any(line.reference for line in lines):
        columns.append(("loss / reference", _ratio))
        moving = [task for task in differing if max(spread[task]) - min(spread[task]) > 1]
        columns += [(f"{task} - reference", lambda line, task=task: _signed(line.against(rate(task)))) for task in moving]
    for title, measure, digits, scale in (
        ("kept, %", rounding("kept"), 0, 100),
        ("pull-back", rounding("pull_back"), 2, 1),
        ("values changed, %", rounding("changed"), 1, 100),
        ("scales changed, %", rounding("scales_changed"), 1, 100),
        ("late flips per million and step", late("flip_rate"), 0, 1e6),
    ):
        if any(line.of(measure) is not None for line in lines):
            columns.append((title, lambda line, measure=measure, digits=digits, scale=scale: _mean(line.of(measure), digits, scale)))
    seeds = len({seed for line in lines for seed in line.results})
    legend = (
        f"{seeds} seed{'s' * (seeds > 1)}; ±: half of the 95 % interval of the mean (Student's t over seeds). Loss: nats per trained token of the "
        f"held-out conversations, set `{experiment.evaluation.set}`. kept: share of the training of the experts that deployment leaves in place; "
        "pull-back: cosine between what rounding does and minus what training did; values and scales changed: weights of the experts, and blocks, "
        "whose deployed value or scale differs from the base's."
    )
    legend += "".join(f" {task}: {values.pop():.1f} % everywhere." for task, values in spread.items() if len(values) == 1)
    if experiment.reference is not None:
        name = experiment.reference if isinstance(experiment.reference, str) else ", ".join(experiment.reference.values())
        legend += f" Reference: {name}; [a-b]: 95 % interval of the ratio."
    return Table([title for title, _ in columns], [[make(line) for _, make in columns] for line in lines], legend)


def _plus_minus(value: Estimate | None, digits: int) -> str:
    if value is None:
        return ""
    return f"{value.mean:.{digits}f}" + (f" ±{value.half:.{digits}f}" if value.half is not None else "")


def _mean(value: Estimate | None, digits: int, scale: float) -> str:
    return "" if value is None else f"{scale * value.mean:.{digits}f}"


def _signed(value: Estimate | None) -> str:
    return "" if value is None else f"{value.mean:+.1f}" + (f" ±{value.half:.1f}" if value.half is not None else "")


def _ratio(line: Line) -> str:
    if line.is_reference:
        return "1 (reference)"
    value = line.against(log_loss)
    if value is None:
        return ""
    return f"{math.exp(value.mean):.3g}" + (f" [{math.exp(value.low):.3g}-{math.exp(value.high):.3g}]" if value.half is not None else "")


# ---- files ------------------------------------------------------------------------------------------------------------------------
def write_report(experiment: Experiment, arms: Sequence[NamedArm], out: Path) -> list[str]:
    """Writes everything; returns the lines for the terminal.

    Raises:
      UsageError: no results. CorruptError: a damaged one.
    """
    results = results_of(experiment, list(arms), out)
    lines = lines_of(experiment, arms, results)
    table = make_table(experiment, lines)
    write_atomic(out / CSV, _csv([table.header, *table.rows]))
    pictures, remarks = _draw(experiment, lines, out / PLOTS)
    missing = len(arms) * len(experiment.seeds) - len(results)
    facts = _facts(experiment, results, missing)
    markdown = [f"# {experiment.name}", experiment.question, *([f"Expected: {experiment.expected}"] if experiment.expected else []), facts]
    markdown += [to_markdown(table).rstrip(), table.legend] + [f"![{title}]({PLOTS}/{file.name})" for title, file in pictures]
    write_atomic(out / MARKDOWN, "\n\n".join(markdown) + "\n")
    write_atomic(out / HTML, _html(experiment, table, facts, pictures))
    return [to_markdown(table), table.legend, facts, f"report: {out / MARKDOWN}, {out / HTML}", *remarks]


def _facts(experiment: Experiment, results: Sequence[Result], missing: int) -> str:
    minutes = sum(result["seconds"]["arm"] for result in results) / 60
    versions = results[0]["versions"]
    cores = f"{versions['cores']} core{'s' * (versions['cores'] > 1)}"
    text = f"{len(results)} results, {minutes:.0f} minutes of one process with {cores}, jax {versions['jax']}."
    common = ", ".join(f"{key}: {json.dumps(value)}" for key, value in experiment.arm.items())
    text += f" Settings of all arms over the defaults: {common}." if common else ""
    return text + (f" {missing} of {missing + len(results)} results are missing." if missing else "")


def _draw(experiment: Experiment, lines: Sequence[Line], folder: Path) -> tuple[list[tuple[str, Path]], list[str]]:
    """(title, file) of every plot, and remarks."""
    try:
        from gptoss_jax.lab import plots
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        return [], ["no plots: matplotlib is not installed (pip install 'gptoss_jax[plots]')"]
    folder.mkdir(parents=True, exist_ok=True)
    return plots.of_experiment(experiment, lines, folder), []


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _html(experiment: Experiment, table: Table, facts: str, pictures: Sequence[tuple[str, Path]]) -> str:
    body = [f"<h1>{escape(experiment.name)}</h1><p>{escape(experiment.question)}</p>"]
    body += [f"<p>Expected: {escape(experiment.expected)}</p>"] if experiment.expected else []
    body += [html_table(table.header, table.rows), f"<p>{escape(table.legend)}</p><p>{escape(facts)}</p>"]
    body += [f"<h2>{escape(title)}</h2>{picture(title, file)}" for title, file in pictures]
    return document(experiment.name, body, "body { max-width: 90em }")
