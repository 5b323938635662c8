"""A source of conversations: where it is, which of it, how its columns are named, how much of it an epoch has. Every bad row is found in one pass;
the message shows the first ones and counts the rest.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from gptoss_jax.data.columns import Response, check_columns, to_conversation
from gptoss_jax.data.files import read
from gptoss_jax.data.messages import BadRow, check_row
from gptoss_jax.errors import CorruptError, UsageError

SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class Source:
    """One entry of a list of data sets. The constructor raises ValueError for values that mean nothing."""

    # file, directory, or hub name owner/name[:config][@split] (data/files.py)
    path: str
    # share of its conversations in an epoch: 2 repeats each, 0.5 takes half of them
    weight: float = 1.0
    split: str | None = None
    # names of columns by role, where the layout is none of data/columns.py
    columns: Mapping[str, str] | None = None
    # only the first rows
    limit: int | None = None
    # which answer of a data set with instruct_response and cot_response
    response: Response = "instruct"

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  (a config refuses unknown keys)

    def __post_init__(self):
        if not 0 < self.weight <= 1000:
            raise ValueError(f"weight = {self.weight} is not above 0 and at most 1000")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit = {self.limit} is not at least 1")
        if self.columns is not None:
            check_columns(self.columns)

    def __str__(self) -> str:
        return self.path + (f"@{self.split}" if self.split else "")


class Conversation(NamedTuple):
    """A row that was read: where it stands, which layout its columns have, and itself with checked messages; or why it is none."""

    where: str  # file:line, or file: row N
    layout: str | None
    row: dict[str, Any] | None
    problem: str | None = None
    number: int = 0  # of the row in its source


class Loaded(NamedTuple):
    """Good rows in file order, and what was wrong with the others (`file:line: reason`)."""

    rows: list[dict[str, Any]]
    problems: list[str]


def conversations(source: Source, wanted: Callable[[int, Any], bool] = lambda number, raw: True) -> Iterator[Conversation]:
    """The rows of a source that are `wanted`, one after another; nothing is kept. UsageError and CorruptError as `files.read`."""
    for number, (where, raw) in enumerate(islice(read(source.path, source.split), source.limit)):
        if not wanted(number, raw):
            continue
        layout = None
        try:
            if isinstance(raw, BadRow):
                raise raw
            layout, row = to_conversation(raw, source.columns, source.response)
            yield Conversation(where, layout, check_row(row), None, number)
        except BadRow as bad:
            yield Conversation(where, layout, None, f"{where}: {bad}", number)


def load_rows(source: str | Path | Source, *, split: str | None = None, skip_bad_rows: bool = False) -> Loaded:
    """All conversations of a source as a list, for sets that fit into memory as text (evaluation).

    CorruptError names every bad row (the first 20 in full), unless `skip_bad_rows`; it also stands for files that cannot be read at all.
    UsageError: no such file, unknown suffix, unknown split, no rows.
    """
    source = source if isinstance(source, Source) else Source(str(source), split=split)
    rows, problems = [], []
    for conversation in conversations(source):
        if conversation.problem is None:
            rows.append(conversation.row)
        else:
            problems.append(conversation.problem)
    refuse_bad(source, len(rows), problems, skip_bad_rows)
    return Loaded(rows, problems)


def refuse_bad(source: Source, num_good: int, problems: list[str], skip_bad_rows: bool) -> None:
    """CorruptError for bad rows (unless skipped), UsageError where nothing is left."""
    if problems and not skip_bad_rows:
        raise CorruptError(summary(source, num_good, problems))
    if not num_good:
        raise UsageError(summary(source, 0, problems) if problems else f"{source} has no rows")


def summary(source: Source, num_good: int, problems: list[str]) -> str:
    shown = "".join(f"\n  {problem}" for problem in problems[:SHOWN_PROBLEMS])
    more = f"\n  ... and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
    return f"{len(problems)} of {num_good + len(problems)} rows of {source} cannot be used:{shown}{more}"
