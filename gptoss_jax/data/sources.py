"""Conversations from local files: JSONL, Parquet, and directories written by `datasets.save_to_disk`. Nothing is fetched, nothing is cached.

JSONL and Parquet are read here and not by `datasets`, which turns a wrong type into a feature called Json, or a missing field into null, without
a word, and which names no line. Every bad row is found in one pass; the message shows the first ones and counts the rest.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gptoss_jax.data.messages import BadRow, check_row
from gptoss_jax.errors import CorruptError, UsageError

SHOWN_PROBLEMS = 20


class Loaded(NamedTuple):
    """Good rows in file order, and what was wrong with the others (`file:line: reason`)."""

    rows: list[dict[str, Any]]
    problems: list[str]


def load_rows(path: str | Path, *, split: str | None = None, skip_bad_rows: bool = False) -> Loaded:
    """All conversations of a `.jsonl` or `.parquet` file or of a saved `datasets` directory (of its `split`, if it has several).

    CorruptError names every bad row (the first 20 in full), unless `skip_bad_rows`; it also stands for files that cannot be read at all.
    UsageError: no such file, unknown suffix, unknown split, no rows.
    """
    path = Path(path)
    if not path.exists():
        raise UsageError(f"no such file or directory: {path}")
    if path.is_dir():
        raw = _read_saved_dataset(path, split)
    elif split is not None:
        raise UsageError(f"{path} is a single file: it has no split {split!r}")
    elif path.suffix in (".jsonl", ".ndjson"):
        raw = _read_jsonl(path)
    elif path.suffix == ".parquet":
        raw = _read_parquet(path)
    else:
        raise UsageError(f"{path}: cannot tell what this is; give a .jsonl or .parquet file, or a directory saved by datasets")
    rows, problems = [], []
    for where, row in raw:
        try:
            if isinstance(row, BadRow):
                raise row
            rows.append(check_row(row))
        except BadRow as bad:
            problems.append(f"{where}: {bad}")
    if problems and not skip_bad_rows:
        raise CorruptError(_summary(path, len(rows), problems))
    if not rows:
        raise UsageError(f"{path} has no rows" if not problems else _summary(path, 0, problems))
    return Loaded(rows, problems)


def _summary(path: Path, num_good: int, problems: list[str]) -> str:
    shown = "".join(f"\n  {problem}" for problem in problems[:SHOWN_PROBLEMS])
    more = f"\n  ... and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
    return f"{len(problems)} of {num_good + len(problems)} rows of {path} cannot be used:{shown}{more}"


def _no_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        keys = [key for key, _ in pairs]
        raise BadRow(f'the key "{next(key for key in keys if keys.count(key) > 1)}" stands twice in one object')
    return out


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """(file:line, row or BadRow). Blank lines are skipped; a byte order mark and CRLF are accepted."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.strip():
                continue
            yield f"{path}:{number}", _parse(line)


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode(), object_pairs_hook=_no_duplicate_keys)
    except BadRow as bad:
        return bad
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        return BadRow(f"not JSON: {error.msg} at column {error.colno}")
    except (RecursionError, ValueError) as error:
        return BadRow(f"not usable JSON: {error}")


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in table.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise CorruptError(f"{path} is no readable Parquet file: {str(error).splitlines()[0]}") from error


def _read_saved_dataset(path: Path, split: str | None) -> Iterator[tuple[str, Any]]:
    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise UsageError(f"{path} is no directory saved by datasets (neither state.json nor dataset_dict.json is in it)")
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets raises what json, pyarrow and the file system raise
        raise CorruptError(f"{path} cannot be read as a saved data set: {str(error).splitlines()[0]}") from error
    if isinstance(loaded, datasets.DatasetDict):
        if split is None and len(loaded) == 1:
            split = next(iter(loaded))
        if split not in loaded:
            raise UsageError(f"{path} has the splits {', '.join(loaded)}: choose one" + (f", there is no {split!r}" if split else ""))
        loaded = loaded[split]
    elif split is not None:
        raise UsageError(f"{path} is one data set without splits: it has no {split!r}")
    for number, row in enumerate(loaded, 1):
        yield f"{path}: row {number}", row
