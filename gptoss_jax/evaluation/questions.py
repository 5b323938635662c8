"""Rows of a task from a file: conversations as training reads them, or prompts in a column of a table (CSV, JSONL, Parquet).

A CSV file has a header line; it is how XSTest comes (columns id, prompt, type, label, focus, note). Every other column travels with the row, so that
`where` and scorers can use it.
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptoss_jax.data.messages import BadRow
from gptoss_jax.data.sources import _read_jsonl, _read_parquet, load_rows
from gptoss_jax.errors import CorruptError, UsageError


def read_questions(path: str | Path, prompt: str | None = None) -> list[dict[str, Any]]:
    """Rows {"messages": [...], other columns}. With `prompt` (always for CSV) the messages are one user message: the text of that column.

    Raises:
      UsageError: no such file or column, or no rows.
      CorruptError: not readable as what its suffix says, with the line.
    """
    path = Path(path)
    if path.suffix.lower() != ".csv" and prompt is None:
        return load_rows(path).rows
    column = prompt or "prompt"
    rows = []
    for where, row in _read_csv(path) if path.suffix.lower() == ".csv" else _read_table(path):
        if column not in row:
            raise UsageError(f"{where}: no column {column!r}; there are {', '.join(map(str, row))}: name one with `prompt`")
        text = row[column]
        if not isinstance(text, str) or not text.strip():
            raise CorruptError(f"{where}: the prompt in column {column!r} is empty")
        rows.append({**row, "messages": [{"role": "user", "content": text}]})
    if not rows:
        raise UsageError(f"{path} has no rows")
    return rows


def _read_csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        raise UsageError(f"no such file: {path}")
    # a byte order mark is what spreadsheets put in front
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    raise CorruptError(f"{where}: not as many cells as the header has columns ({len(reader.fieldnames)})")
                yield where, row
        except csv.Error as error:
            raise CorruptError(f"{path}:{reader.line_num}: no readable CSV: {error}") from None
        except UnicodeDecodeError as error:
            raise CorruptError(f"{path}: not UTF-8 at byte {error.start}") from None


def _read_table(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.exists():
        raise UsageError(f"no such file: {path}")
    if path.suffix not in (".jsonl", ".ndjson", ".parquet"):
        raise UsageError(f"{path}: prompts come in a .csv, .jsonl or .parquet file")
    for where, row in (_read_parquet if path.suffix == ".parquet" else _read_jsonl)(path):
        if not isinstance(row, dict):
            raise CorruptError(f"{where}: {row if isinstance(row, BadRow) else 'the row is no object'}")
        yield where, row
