"""Writes the two evaluation files of the nano tasks: `dev.jsonl`, on which settings are chosen, and `final.jsonl`, from which the table comes.

    python scripts/make_nano_tasks.py gptoss_jax/nano/tasks

They share no number and no verb-object pair with each other or with any training row.
"""

import argparse
from pathlib import Path

from gptoss_jax.evaluation.tasks import task_rows, write_jsonl

ROWS = {"A": 500, "B": 500, "H": 200, "Eng": 200}  # A: 100 per language; B and H: 2 per held-out pair


def evaluation_rows(split: str) -> list[dict]:
    """The rows of an evaluation file ("dev" or "final"), task after task."""
    return [row for task, n in ROWS.items() for row in task_rows(task, split, 0, n)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    for split in ("dev", "final"):
        write_jsonl(evaluation_rows(split), directory / f"{split}.jsonl")
