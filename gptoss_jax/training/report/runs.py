"""A run as its directory tells it, finished, interrupted or still going on."""

import csv
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gptoss_jax.checkpoint import orbax_store
from gptoss_jax.errors import CorruptError, UsageError
from gptoss_jax.training.config import flat
from gptoss_jax.training.run_dir import CONFIG, ENVIRONMENT, METRICS, ROUTER
from gptoss_jax.training.task_rates import SAMPLES
from gptoss_jax.training.yaml_config import read_yaml

# numbers that are lists over layers, and which of them a curve shows
OF_LAYERS: dict[str, Callable] = {"router/load_max": max, "router/load_cv": max, "router/entropy": min}
Point = tuple[int, float]


@dataclass(frozen=True)
class Run:
    """metrics and router: lines of the files. config and environment: dotted keys of the resolved settings and of the last start, {} where the run
    did not write them."""

    name: str
    path: Path
    metrics: list[dict[str, Any]]
    router: list[dict[str, Any]]
    config: dict[str, Any]
    environment: dict[str, Any]

    def curve(self, key: str) -> list[Point]:
        """(step, number) where it was measured and finite; of numbers by layer the worst."""
        points = []
        for record in self.metrics:
            value = record.get(key)
            if isinstance(value, list):
                value = OF_LAYERS[key]([x for x in value if x is not None], default=None)
            if value is not None:
                points.append((record["step"], value))
        return points

    @property
    def tasks(self) -> list[str]:
        """Names whose pass rate was measured."""
        return list(dict.fromkeys(key[5:] for record in self.metrics for key in record if key.startswith("task/") and key.count("/") == 1))

    @property
    def skipped(self) -> list[dict[str, Any]]:
        """Records of steps whose update was left out because it was not finite."""
        return [record for record in self.metrics if record.get("skipped")]

    @property
    def checkpoints(self) -> list[int]:
        folder = self.path / orbax_store.CHECKPOINTS
        return orbax_store.list_steps(folder) if folder.is_dir() else []

    @cached_property
    def samples(self) -> dict[str, list[dict[str, Any]]]:
        """Task -> its samples at the last step that has some."""
        steps = sorted((self.path / SAMPLES).glob("step-*"))
        return {file.stem: _lines(file) for file in sorted(steps[-1].glob("*.jsonl"))} if steps else {}


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs at these paths, and those below a path that is none itself (as the directory of a recipe), each under a name of its own.

    Raises:
      UsageError: no run there. CorruptError: a file of it is damaged.
    """
    found: list[Path] = []
    for path in paths:
        below = [path / METRICS] if (path / METRICS).is_file() else sorted([*path.glob(f"*/{METRICS}"), *path.glob(f"*/*/{METRICS}")])
        if not below:
            raise UsageError(f"{path}: no run there: neither it nor a directory in it holds {METRICS}")
        found += [file.parent for file in below if file.parent not in found]
    whole = [path.resolve() for path in found]
    names = [path.name for path in whole]
    if len(set(names)) < len(names):
        common = os.path.commonpath([path.parent for path in whole])
        names = [path.relative_to(common).as_posix() for path in whole]
    return [_read(name, path) for name, path in zip(names, found)]


def _read(name: str, path: Path) -> Run:
    router, config, environment = path / ROUTER, path / CONFIG, path / ENVIRONMENT
    return Run(
        name,
        path,
        _lines(path / METRICS),
        _lines(router) if router.is_file() else [],
        dict(flat(read_yaml(config))) if config.is_file() else {},
        _last_start(environment) if environment.is_file() else {},
    )


def _last_start(file: Path) -> dict[str, Any]:
    try:
        return dict(flat(json.loads(file.read_text(encoding="utf-8"))[-1]))
    except (ValueError, LookupError) as error:
        raise CorruptError(f"{file}: {error}") from None


def _lines(file: Path) -> list[dict[str, Any]]:
    """Its objects; a last line that is only half there belongs to a run that goes on or was ended."""
    records, text = [], file.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number == len(lines) and not text.endswith("\n"):
                break
            raise CorruptError(f"{file}:{number}: {error}") from None
    return records


def write_csv(runs: Sequence[Run], file: Path) -> None:
    """All metrics as one table, a line per run and step; numbers by layer have a column for each."""
    rows = []
    for run in runs:
        for record in run.metrics:
            wide = {"run": run.name}
            for key, value in record.items():
                if isinstance(value, list):
                    wide |= {f"{key}/{i}": x for i, x in enumerate(value)} if key in OF_LAYERS else {key: " ".join(map(str, value))}
                else:
                    wide |= flat({key: value})
            rows.append(wide)
    with open(file, "w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def running_mean(points: Sequence[Point], width: int) -> list[Point]:
    """Means of `width` points in a row, at the step of the last of them."""
    values = [value for _, value in points]
    return [(points[i - 1][0], math.fsum(values[i - width : i]) / width) for i in range(width, len(points) + 1)]
