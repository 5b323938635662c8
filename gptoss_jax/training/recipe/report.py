"""The report of a recipe, made from its `results.json` at any time: `table.md`, `summary.json`, `table.png` and `report.md` beside it."""

import json
from pathlib import Path
from typing import Any

from gptoss_jax.training.recipe.gate import GATE
from gptoss_jax.training.recipe.plot import plot_results
from gptoss_jax.training.recipe.results import Results, kl_spread, loss_spread, pass_spread, read_results, write_atomic
from gptoss_jax.training.recipe.table import make_table, to_markdown

TABLE, SUMMARY, PICTURE, REPORT = "table.md", "summary.json", "table.png", "report.md"


def write_report(directory: str | Path) -> tuple[Results, list[str]]:
    """Writes the four files; returns what was measured and remarks for the terminal.

    Raises:
      UsageError, CorruptError: no readable `results.json` in `directory`.
    """
    directory = Path(directory)
    results, remarks = read_results(directory), []
    table = make_table(results)
    write_atomic(directory / TABLE, to_markdown(table))
    write_atomic(directory / SUMMARY, json.dumps(summary(results), indent=1) + "\n")
    plotted = plot_results(results, directory / PICTURE)
    if not plotted:
        remarks.append(f"{PICTURE} was not drawn: matplotlib is not installed (pip install 'gptoss_jax[plots]')")
    seeds = len({measured.seed for measured in results.results})
    parts = [f"# Recipe {directory.resolve().name}", f"{seeds} seed{'s' * (seeds > 1)}.", to_markdown(table).rstrip(), table.legend]
    if plotted:
        parts.append(f"![pass rates and loss per row]({PICTURE})")
    parts += _gate_part(directory) + _failures_part(directory)
    write_atomic(directory / REPORT, "\n\n".join(parts) + "\n")
    return results, remarks


def summary(results: Results) -> list[dict[str, Any]]:
    """One record per line of the table: mean, lowest and highest of every number, rates in %."""
    plain = lambda spread: None if spread is None else {"mean": spread.mean, "low": spread.low, "high": spread.high}
    return [
        {
            "row": seeds[0].row, "variant": seeds[0].variant, "label": results.label(seeds[0]), "seeds": [measured.seed for measured in seeds],
            "spread": "range over seeds" if len(seeds) > 1 else "95 % interval",
            "pass_rates": {task: plain(pass_spread(seeds, task)) for task in results.tasks},
            "loss": plain(loss_spread(seeds)), "kl": plain(kl_spread(seeds)), "steps_trained": seeds[0].steps_trained,
        }
        for seeds in results.lines
    ]  # fmt: skip


def _gate_part(directory: Path) -> list[str]:
    file = directory / GATE
    if not file.is_file():
        return []
    lines = []
    for verdict in json.loads(file.read_text(encoding="utf-8")):
        lines.append(f"- {verdict['export']}: {'passed' if verdict['passed'] else 'REJECTED'}")
        lines += [f"    - {'ok' if finding['ok'] else 'FAILED'}: {finding['text']}" for finding in verdict["findings"]]
    return ["## Gate", "\n".join(lines)]


def _failures_part(directory: Path) -> list[str]:
    files = sorted(directory.rglob("failures/*/*.jsonl"))
    if not files:
        return []
    counts = {file.relative_to(directory): len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    return ["## Failing samples", "\n".join(f"- [{name}]({name}): {count}" for name, count in counts.items())]
