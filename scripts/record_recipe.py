#!/usr/bin/env python
"""Keeps the result of a finished recipe: writes gptoss_jax/nano/recorded.json, which `demo` prints, and prints the README's table.

    python scripts/record_recipe.py runs/nano-recipe --commit $(git rev-parse --short HEAD)
"""

import argparse
import datetime
import json
import statistics
from pathlib import Path

from gptoss_jax.checkpoint.source import NANO
from gptoss_jax.training.recipe import ROWS, Measured

TASKS = ("A", "B", "H", "Eng")


def cell(values: list[float], digits: int) -> str:
    """Mean, and the range over seeds where they differ."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if min(values) == max(values) else f"{mean} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--commit", required=True, help="commit of the code that ran")
    args = parser.parse_args()
    results = json.loads((args.run / "results.json").read_text())
    command = "gptoss-jax recipe configs/nano_recipe.yaml"
    record = {"date": datetime.date.today().isoformat(), "commit": args.commit, "command": command, "results": results}
    (NANO / "recorded.json").write_text(json.dumps(record, indent=1) + "\n")

    measured = [Measured.model_validate(entry) for entry in results]
    print("| | A: language asked for | B: answered | H: refused | English kept | validation loss | NVIDIA 20b |\n|---|---|---|---|---|---|---|")
    for name in dict.fromkeys(m.row for m in measured):
        seeds = [m for m in measured if m.row == name]
        cells = [cell([100 * m.rate(task) for m in seeds], 1) for task in TASKS] + [cell([m.loss for m in seeds], 4), ROWS[name].nvidia]
        print(f"| {ROWS[name].label} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
