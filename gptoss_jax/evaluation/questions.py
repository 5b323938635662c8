"""Rows of a task from a file: conversations in every layout that training knows, or prompts alone, also as CSV; and their prompts as tokens.

A CSV file has a header line; it is how XSTest comes (columns id, prompt, type, label, focus, note). Where no layout of a conversation fits (see
`gptoss_jax.data.columns`), the column "prompt", or the one that is named, becomes the user's message. Every other column travels with the row, so
that `where` and scorers can use it.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_jax.data.columns import to_conversation
from gptoss_jax.data.files import read
from gptoss_jax.data.harmony import HarmonyEncoder, System, render
from gptoss_jax.data.messages import BadRow, check_row
from gptoss_jax.data.sources import Source, refuse_bad
from gptoss_jax.errors import CorruptError, UsageError

Row = dict[str, Any]


def read_questions(path: str | Path, prompt: str | None = None, columns: Mapping[str, str] | None = None) -> list[Row]:
    """Rows {"messages": [...], other columns}; the last message need not be an answer.

    Args:
      path: CSV, or whatever `gptoss_jax.data.files.read` reads.
      prompt: column of the user's text, where the rows are no conversations.
      columns: names of the columns of a conversation by role, as in `gptoss_jax.data.columns`.

    Raises:
      UsageError: no such file, no rows.
      CorruptError: rows that cannot be used, by line.
    """
    rows, problems = [], []
    for where, raw in _read_csv(Path(path)) if str(path).lower().endswith(".csv") else read(str(path)):
        try:
            if isinstance(raw, BadRow):
                raise raw
            rows.append(_to_row(raw, prompt, columns))
        except BadRow as bad:
            problems.append(f"{where}: {bad}")
    refuse_bad(Source(str(path)), len(rows), problems, False)
    return rows


def _to_row(raw: Any, prompt: str | None, columns: Mapping[str, str] | None) -> Row:
    if prompt is None:
        try:
            return check_row({**raw, **to_conversation(raw, columns)[1]} if isinstance(raw, dict) else raw, prompt=True)
        except BadRow as bad:
            if columns is not None or not isinstance(raw, dict) or "completion" in raw or "messages" in raw:
                raise
            if "prompt" not in raw:
                raise BadRow(f"{bad}; prompts alone: prompt: COLUMN") from None
    column = prompt or "prompt"
    if not isinstance(raw, dict) or column not in raw:
        raise BadRow(f'no column "{column}"' + (f"; there are {', '.join(raw)}" if isinstance(raw, dict) else ""))
    return check_row({**raw, "messages": [{"role": "user", "content": raw[column]}]}, prompt=True)


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        raise UsageError(f"no such file: {path}")
    # a byte order mark is what spreadsheets put in front
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                whole = None not in row and None not in row.values()
                cells = f"not as many cells as the header has columns ({len(reader.fieldnames)})"
                yield f"{path}:{reader.line_num}", row if whole else BadRow(cells)
        except csv.Error as error:
            raise CorruptError(f"{path}:{reader.line_num}: no readable CSV: {error}") from None
        except UnicodeDecodeError as error:
            raise CorruptError(f"{path}: not UTF-8 at byte {error.start}") from None


def question_of(row: Mapping[str, Any]) -> Row:
    """The row without its reference answer, the last message if that is the assistant's."""
    messages = row["messages"]
    return {**row, "messages": messages[:-1] if messages[-1]["role"] == "assistant" else messages}


def encode_questions(questions: Sequence[Mapping[str, Any]], tokenizer: Any, system: System | str | None = None) -> list[np.ndarray]:
    """int32 ids of each prompt, up to the `<|start|>assistant` that asks for the answer."""
    rendered = [
        render(q["messages"], tools=q.get("tools"), reasoning_effort=q.get("reasoning_effort"), system=system, prompt=True) for q in questions
    ]
    return [prompt.ids for prompt in HarmonyEncoder(tokenizer).encode(rendered)]
