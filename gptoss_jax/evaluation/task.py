"""A task: prompts, what is asked of the answers, and how they are made; one small YAML file each.

    name: over_refusal                    # default: the name of the file
    data: xstest_prompts.csv              # relative to this file; or one file per split: {dev: dev.jsonl, final: final.jsonl}
    prompt: question                      # column of the user's text, where rows are prompts alone (default "prompt")
    columns: {user: q, assistant: a}      # where rows are conversations in columns of other names than usual
    where: {label: safe}                  # only rows with this value (or one of a list of values) in a column
    limit: 200                            # at most so many rows: the first ones, or with `seed` a random choice
    scorer: not_refused                   # a name, a name with options {name: regex, pattern: ...}, or {function: my_scorers.py:check}
    max_new_tokens: 512                   # of an answer
    cluster: pair                         # rows with one value in this column are not independent; widens the interval
    system_date: 2025-08-28               # with the release's system message of this date; default none
    reasoning_effort: medium              # low, medium or high, part of that message

The last assistant message of a conversation is its reference answer; everything before it is the prompt. Rows without one suit scorers that need
none. Tasks that come along are taken by name: A, B, H, Eng (nano's).
"""

import dataclasses
import datetime
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import gptoss_jax
from gptoss_jax.data.columns import check_columns
from gptoss_jax.data.harmony import System
from gptoss_jax.errors import UsageError
from gptoss_jax.evaluation.questions import read_questions
from gptoss_jax.evaluation.scorer_spec import make_scorer, nearest
from gptoss_jax.evaluation.scorers import EXACT, Scorer
from gptoss_jax.strict_yaml import read_mapping

BUILT_IN = Path(gptoss_jax.__file__).parent / "nano" / "tasks"
PositiveInt = Annotated[int, Field(gt=0)]


@dataclass(frozen=True)
class Task:
    """What is measured. `data` may be None where the rows are handed over by the caller (a recipe's held-out part)."""

    name: str
    scorer: Scorer = EXACT
    data: Path | str | None = None
    prompt: str | None = None
    columns: Mapping[str, str] | None = None
    where: Mapping[str, Any] = field(default_factory=dict)
    limit: int | None = None
    seed: int | None = None
    max_new_tokens: int = 512
    cluster: str | None = None
    system: System | str | None = None

    def rows(self) -> list[dict[str, Any]]:
        """The rows of its data that it asks about.

        Raises:
          UsageError: it has no data, a column is missing, or no row is left.
          CorruptError: the data cannot be read.
        """
        if self.data is None:
            raise UsageError(f"task {self.name}: it names no data, and no rows were given")
        return self.select(read_questions(self.data, self.prompt, self.columns))

    def asked_all(self) -> "Task":
        """The same without `where` and `limit`: for rows that were selected already."""
        return dataclasses.replace(self, where={}, limit=None)

    def select(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows among these that it asks about: `where`, then `limit`. UsageError when none is left."""
        for column, wanted in self.where.items():
            values = wanted if isinstance(wanted, list) else [wanted]
            found = {str(row[column]) for row in rows if column in row}
            if not found:
                columns = sorted({key for row in rows[:100] for key in row} - {"messages"})
                raise UsageError(f"task {self.name}: where: no row has a column {column!r}; {nearest(column, columns)}")
            rows = [row for row in rows if row.get(column) in values or str(row.get(column)) in map(str, values)]
            if not rows:
                raise UsageError(f"task {self.name}: where: no row has {column} = {wanted!r}; {nearest(str(wanted), sorted(found))}")
        if self.limit is None or self.limit >= len(rows):
            return rows
        chosen = range(self.limit) if self.seed is None else sorted(random.Random(self.seed).sample(range(len(rows)), self.limit))
        return [rows[i] for i in chosen]


class _TaskFile(BaseModel):
    """The keys of a task file."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str | None = None
    data: str | dict[str, str] | None = None
    prompt: str | None = None
    columns: dict[str, str] | None = None
    where: dict[str, str | int | float | bool | list[str | int | float | bool]] = {}
    limit: PositiveInt | None = None
    seed: Annotated[int, Field(ge=0)] | None = None
    scorer: str | dict[str, Any] = "exact"
    max_new_tokens: PositiveInt = 512
    cluster: str | None = None
    system_date: datetime.date | None = None
    reasoning_effort: Literal["low", "medium", "high"] = "medium"


def built_in_tasks() -> list[str]:
    """Names of the tasks that come along."""
    return sorted((path.stem for path in BUILT_IN.glob("*.yaml")), key=["A", "B", "H", "Eng"].index)


def load_task(path: str | Path, split: str = "dev") -> Task:
    """The task of a file, or one that comes along by its name. `split` chooses among several data files.

    Raises:
      UsageError: unreadable, or a key or value that means nothing, in one line with file, line and nearest name.
    """
    path = BUILT_IN / f"{path}.yaml" if str(path) in built_in_tasks() else Path(path)
    if not path.is_file():
        raise UsageError(f"no task {str(path)!r}: give a YAML file, or one of {', '.join(built_in_tasks())}")
    values, lines = read_mapping(path)

    def at(*keys: str) -> str:
        return f"{path}:{lines[keys]}" if keys in lines else str(path)

    try:
        raw = _TaskFile.model_validate_json(json.dumps(values), strict=True)  # strict: "3" is no number
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            raise UsageError(f"{at(key)}: unknown key {key!r}; {nearest(key, list(_TaskFile.model_fields))}") from None
        raise UsageError(f"{at(key)}: {key} = {first['input']!r}: {first['msg']}") from None
    data = raw.data
    if isinstance(data, dict):
        if split not in data:
            raise UsageError(f"{at('data')}: no data for split {split!r}; there is {', '.join(data)}")
        data = data[split]
    try:
        if raw.columns is not None:
            check_columns(raw.columns)
    except ValueError as error:
        raise UsageError(f"{at('columns')}: {error}") from None
    try:
        scorer = make_scorer(raw.scorer, path.parent)
    except UsageError as error:
        raise UsageError(f"{at('scorer')}: {error}") from None
    return Task(
        name=raw.name or path.stem,
        scorer=scorer,
        data=_locate(data, path.parent, at("data")) if data else None,
        prompt=raw.prompt,
        columns=raw.columns,
        where=raw.where,
        limit=raw.limit,
        seed=raw.seed,
        max_new_tokens=raw.max_new_tokens,
        cluster=raw.cluster,
        system=System(raw.system_date, raw.reasoning_effort) if raw.system_date else None,
    )


def _locate(data: str, folder: Path, where: str) -> Path | str:
    """The file or directory beside the task file; the name of a hub data set ("owner/name") stays as it is."""
    if (folder / data).exists():
        return folder / data
    if data.count("/") == 1 and not Path(data).suffix:
        return data
    raise UsageError(f"{where}: no such data: {folder / data}")
