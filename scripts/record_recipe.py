#!/usr/bin/env python
"""Keeps the result of a finished recipe: writes gptoss_jax/nano/recorded.json, which `demo` prints, and prints the README's table.

    python scripts/record_recipe.py runs/nano-recipe --commit $(git rev-parse --short HEAD)
"""

import argparse
import datetime
import json
from pathlib import Path

from gptoss_jax.checkpoint.source import NANO
from gptoss_jax.training.recipe.results import read_results
from gptoss_jax.training.recipe.table import make_table, to_markdown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--commit", required=True, help="commit of the code that ran")
    args = parser.parse_args()
    results = read_results(args.run)
    command = "gptoss-jax recipe configs/nano_recipe.yaml"
    record = {"date": datetime.date.today().isoformat(), "commit": args.commit, "command": command, **results.model_dump(mode="json")}
    (NANO / "recorded.json").write_text(json.dumps(record, indent=1) + "\n")
    print(to_markdown(make_table(results)), end="")


if __name__ == "__main__":
    main()
