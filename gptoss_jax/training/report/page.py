"""The report of runs: report.html (one file with everything inside), report.md with plots/ beside it, and metrics.csv."""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptoss_jax.training.recipe.results import write_atomic
from gptoss_jax.training.recipe.table import Table
from gptoss_jax.training.report.blocks import Block, Cells, Figure, Folded, Heading, Text, to_html, to_text
from gptoss_jax.training.report.runs import Run, write_csv

HTML, MARKDOWN, CSV, PLOTS = "report.html", "report.md", "metrics.csv", "plots"
LATE = 20  # training loss and speed at the end: over the last 1/20 of the steps
FAILURES, LONGEST = 3, 800  # shown per task; characters of an answer
MOST_SKIPPED = 20


def write_report(runs: Sequence[Run], out: Path, more: Sequence[Block] = ()) -> tuple[Table, list[str]]:
    """Writes the three files and the plots; returns the table of final values and the lines for the terminal.

    Args:
      more: blocks that go after the figures.
    """
    out.mkdir(parents=True, exist_ok=True)
    table = final_values(runs)
    figures, remarks = _figures(runs, out / PLOTS)
    blocks: list[Block] = [Cells(table), *map(Text, remarks), *figures, *more, *_failures(runs), *_samples(runs)]
    blocks += [*_settings(runs), *_environments(runs), *_about(runs)]
    title = runs[0].name if len(runs) == 1 else "Runs " + ", ".join(run.name for run in runs)
    write_atomic(out / HTML, to_html(title, blocks))
    write_atomic(out / MARKDOWN, to_text(title, blocks, out))
    write_csv(runs, out / CSV)
    return table, [f"report: {out / HTML}, {out / MARKDOWN}, {out / CSV}", *remarks]


# ---- final values -----------------------------------------------------------------------------------------------------------------
def final_values(runs: Sequence[Run]) -> Table:
    """A line per number, a column per run; numbers that no run has are left out."""
    lines: dict[str, Callable[[Run], str]] = {
        "steps": lambda run: f"{_last_step(run)} of {run.config.get('steps') or '?'}",
        "weights of the experts": lambda run: run.config.get("quant.format") or "not quantized",
        "training loss, last 5 %": lambda run: _number(_late(run.curve("loss")), ".4f"),
        "held-out loss at the start": lambda run: _number(next(iter(run.curve("eval_loss")), None), ".4f"),
        "held-out loss at the end": lambda run: _number(_end(run.curve("eval_loss")), ".4f"),
        "lowest held-out loss": lambda run: _lowest(run.curve("eval_loss")),
        "divergence from the teacher, last 5 %": lambda run: _number(_late(run.curve("kl")), ".4f"),
        "norm of the gradient, median": lambda run: _number(_median(run.curve("grad_norm")), ".3g"),
        "tokens": lambda run: f"{sum(record.get('tokens', 0) for record in run.metrics):,}",
        "tokens/s, median": lambda run: _number(_median(run.curve("tok_per_s")), ",.0f"),
        "busiest expert at the end, times the mean": lambda run: _number(_end(run.curve("router/load_max")), ".2f"),
        "routed rows dropped": lambda run: str(sum(record["router/dropped"] for record in run.metrics if "router/dropped" in record) or ""),
        "steps left out (not finite)": lambda run: str(len(run.skipped) or ""),
    }
    for task in dict.fromkeys(task for run in runs for task in run.tasks):
        lines[f"{task}, % passed"] = lambda run, task=task: _rate(run.curve(f"task/{task}"))
    rows = [[title, *map(value, runs)] for title, value in lines.items()]
    return Table(["", *(run.name for run in runs)], [row for row in rows if any(row[1:])], "")


def _number(value: Any, digits: str) -> str:
    """Of a number or the value of a point."""
    value = value[1] if isinstance(value, tuple) else value
    return "" if value is None else format(value, digits)


def _last_step(run: Run) -> int:
    return max((record["step"] for record in run.metrics), default=0)


def _end(points: Sequence[tuple[int, float]]) -> float | None:
    return points[-1][1] if points else None


def _late(points: Sequence[tuple[int, float]]) -> float | None:
    values = [value for _, value in points[-max(1, len(points) // LATE) :]]
    return math.fsum(values) / len(values) if values else None


def _median(points: Sequence[tuple[int, float]]) -> float | None:
    return statistics.median(value for _, value in points) if points else None


def _lowest(points: Sequence[tuple[int, float]]) -> str:
    if not points:
        return ""
    step, value = min(points, key=lambda point: point[1])
    return f"{value:.4f} (step {step})"


def _rate(points: Sequence[tuple[int, float]]) -> str:
    if not points:
        return ""
    first, last = points[0][1], points[-1][1]
    return f"{100 * first:.1f} -> {100 * last:.1f}" if len(points) > 1 else f"{100 * last:.1f}"


# ---- parts ------------------------------------------------------------------------------------------------------------------------
def _figures(runs: Sequence[Run], folder: Path) -> tuple[list[Block], list[str]]:
    """Figures, and a remark where they cannot be drawn."""
    try:
        from gptoss_jax.training.report.plots import draw
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        return [], ["No figures: matplotlib is not installed (pip install 'gptoss_jax[plots]')."]
    return [Heading("Curves"), *(Figure(title, file) for title, file in draw(runs, folder))], []


def _failures(runs: Sequence[Run]) -> list[Block]:
    """Steps whose update was left out."""
    blocks: list[Block] = []
    for run in (run for run in runs if run.skipped):
        steps = ", ".join(f"{record['step']} (batch {_plain(record.get('batch'))})" for record in run.skipped[:MOST_SKIPPED])
        rest = f" and {len(run.skipped) - MOST_SKIPPED} more" if len(run.skipped) > MOST_SKIPPED else ""
        blocks.append(Text(f"{run.name}: loss or gradients were not finite, so nothing was updated, at step {steps}{rest}.", warning=True))
    return [Heading("Steps left out"), *blocks] if blocks else []


def _samples(runs: Sequence[Run]) -> list[Block]:
    """Of every task the first failures, and one answer that passed."""
    blocks: list[Block] = []
    for run in runs:
        for task, samples in run.samples.items():
            failed = [sample for sample in samples if sample["passed"] is False]
            shown = failed[:FAILURES] + [sample for sample in samples if sample["passed"] is not False][:1]
            prefix = f"{run.name}, " if len(runs) > 1 else ""
            blocks.append(Text(f"{prefix}{task}: {len(failed)} of {len(samples)} failed at the last evaluation."))
            blocks += [Folded(_sample_title(sample), _sample_text(sample)) for sample in shown]
    return [Heading("Samples"), *blocks] if blocks else []


def _sample_title(sample: Mapping[str, Any]) -> str:
    verdict = {True: "passed", False: "failed", None: "sample"}[sample["passed"]]
    return verdict + (f": {sample['reason']}" if sample["reason"] else "")


def _sample_text(sample: Mapping[str, Any]) -> str:
    said = [f"[{message['role']}] {_short(message.get('content') or '')}" for message in sample["prompt"]]
    return "\n".join([*said, f"[answer] {_short(sample['answer'])}"])


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text) - LONGEST:,} characters more)"


def _settings(runs: Sequence[Run]) -> list[Block]:
    """All settings of one run; what differs between several."""
    if len(runs) == 1:
        rows = [[key, _plain(value)] for key, value in runs[0].config.items()]
        return [Heading("Settings"), Cells(Table(["setting", "value"], rows, ""), numbers=False)] if rows else []
    rows = _differing([run.config for run in runs])
    names = [run.name for run in runs]
    return [Heading("Settings that differ"), Cells(Table(["setting", *names], rows, "Settings that are not listed are equal."), numbers=False)]


def _environments(runs: Sequence[Run]) -> list[Block]:
    """Of the last start of every run; of several runs what differs."""
    if not any(run.environment for run in runs):
        return []
    if len(runs) == 1:
        rows = [[key, _plain(value)] for key, value in runs[0].environment.items()]
        return [Heading("Environment"), Cells(Table(["", runs[0].name], rows, ""), numbers=False)]
    rows = _differing([run.environment for run in runs])
    return [Heading("Environments that differ"), Cells(Table(["", *(run.name for run in runs)], rows, ""), numbers=False)]


def _differing(columns: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = [[key, *(_plain(column.get(key)) for column in columns)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _about(runs: Sequence[Run]) -> list[Block]:
    lines = [f"{run.path}: checkpoints at steps {', '.join(map(str, run.checkpoints)) or 'none'}" for run in runs]
    return [Heading("Where"), *map(Text, lines), Text(f"All numbers: {CSV}; those of the figures lie beside them in {PLOTS}/.")]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)
