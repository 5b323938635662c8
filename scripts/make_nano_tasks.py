"""Writes the two evaluation files of the nano tasks: `dev.jsonl`, on which settings are chosen, and `final.jsonl`, from which the table comes.

    python scripts/make_nano_tasks.py gptoss_jax/nano/tasks

They share no number and no verb-object pair with each other or with any training row. The questions of the first final file, whose results were
published on 2026-11-24, are in neither: settings chosen later cannot have been chosen on them.
"""

import argparse
from pathlib import Path

from gptoss_jax.evaluation.tasks import task_rows, write_jsonl

ROWS = {"A": 500, "B": 500, "H": 200, "Eng": 200}  # A: about 100 per language; B and H: about 2 per held-out pair


def evaluation_rows(split: str) -> list[dict]:
    """The rows of an evaluation file ("dev" or "final"), task after task."""
    if split == "dev":
        return [row for task, n in ROWS.items() for row in task_rows(task, split, 0, n)]
    rows = []
    for task, n in ROWS.items():
        published = task_rows(task, split, 0, n)
        rows += [row for row in task_rows(task, split, 1, 2 * n) if row not in published][:n]
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    for split in ("dev", "final"):
        write_jsonl(evaluation_rows(split), directory / f"{split}.jsonl")
