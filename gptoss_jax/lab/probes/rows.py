"""Results of probes: flat dicts, one line of a table each, written as Parquet and as JSON lines.

Columns that place a row:

    layer, projection, expert   what it is about; None = all of them together
    estimator                   name of the gradient estimator, with hyperparameters that are not its defaults
    reference                   what it is compared with

The columns that a probe adds are listed at the head of its module. A number that does not exist (the SQNR of weights that rounding leaves alone, the
variance over one batch) is None. Histograms are lists.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_jax.lab.probes.objective import places
from gptoss_jax.model import GptOssConfig

Row = dict[str, Any]
Scope = tuple[int | None, str | None, int | None]


def write_rows(rows: Sequence[Row], path: str | Path) -> tuple[Path, Path]:
    """Writes `path` with the endings .parquet and .jsonl, whatever ending it has. Columns are those of all rows together; what a row lacks is null.

    Raises:
      ValueError: no rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not rows:
        raise ValueError(f"{path}: no rows to write")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    rows = [{name: plain(row.get(name)) for name in columns} for row in rows]
    parquet, lines = (Path(path).with_suffix(ending) for ending in (".parquet", ".jsonl"))
    parquet.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({name: pa.array([row[name] for row in rows]) for name in columns}), parquet)
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return parquet, lines


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a .parquet or .jsonl file."""
    if Path(path).suffix == ".jsonl":
        return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist()


def plain(value: Any) -> Any:
    """A value for JSON: numbers of Python, None for what is not finite."""
    if isinstance(value, np.ndarray | list | tuple):
        return [plain(item) for item in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def scopes(config: GptOssConfig, sums: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[Scope, dict[str, float]]]:
    """Adds up measures that are sums over weights: for all experts together, each layer, and each expert of each projection.

    Args:
      sums: measure -> parameter -> [*L, E].
    """
    sums = {measure: {name: np.asarray(value, np.float64) for name, value in leaves.items()} for measure, leaves in sums.items()}
    some = next(iter(sums.values()))
    total = {measure: sum(float(value.sum()) for value in leaves.values()) for measure, leaves in sums.items()}
    yield (None, None, None), total
    shapes = {name: np.empty((*value.shape, 0, 0)) for name, value in some.items()}
    parts: dict[int, list[tuple[str, int | None, str]]] = {}
    for name, slot, layer, projection in places(config, shapes):
        parts.setdefault(layer, []).append((name, slot, projection))
    pick = lambda leaves, name, slot: leaves[name] if slot is None else leaves[name][slot]
    for layer, found in parts.items():
        yield (layer, None, None), {m: sum(float(pick(leaves, name, slot).sum()) for name, slot, _ in found) for m, leaves in sums.items()}
        for name, slot, projection in found:
            for expert in range(pick(some, name, slot).shape[0]):
                yield (layer, projection, expert), {m: float(pick(leaves, name, slot)[expert]) for m, leaves in sums.items()}


def placed(scope: Scope) -> Row:
    """The columns that place a row."""
    return dict(zip(("layer", "projection", "expert"), scope))
