"""Rows of files, directories and hub data sets, one after another, each with the place where it stands. Memory: one line, or one piece of a table;
a `.json` file is read whole.

    .jsonl .ndjson     one object a line; a byte order mark, CRLF and blank lines are accepted
    .json              an array of objects, or an object with such an array under "data"
    .parquet           one row a row
    directory          written by `datasets.save_to_disk` (with or without splits), or shards of one of the kinds above, in order of their names
    owner/name         of the hub, through `datasets`: owner/name[:config][@split]

JSON and Parquet are read here and not by `datasets`, which turns a wrong type into a feature called Json, or a missing field into null, without
a word, and which names no line.
"""

import re
from pathlib import Path

from gptoss_jax.data.json_rows import Rows, read_array, read_lines
from gptoss_jax.data.table_rows import read_hub, read_parquet, read_saved
from gptoss_jax.errors import UsageError

READERS = {".jsonl": read_lines, ".ndjson": read_lines, ".json": read_array, ".parquet": read_parquet}
HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?(?:@(?P<split>[\w.-]+))?")
SPLIT_OF_FILE = re.compile(r"(train|validation|valid|val|dev|test|eval)(?![a-z])")


def read(path: str, split: str | None = None) -> Rows:
    """All rows of a file, a directory (of its `split`, if it has several) or a data set of the hub.

    UsageError: no such thing, unknown suffix, a split to choose. CorruptError: a file that cannot be read at all.
    """
    local = Path(path)
    if local.is_dir():
        saved = any((local / name).is_file() for name in ("state.json", "dataset_dict.json"))
        return read_saved(local, split) if saved else _read_shards(local, split)
    if not local.exists():
        hub = HUB_NAME.fullmatch(path)
        if hub is None or local.suffix in READERS or path.startswith("."):
            raise UsageError(f"no such file or directory: {path}")
        return read_hub(hub["name"], hub["config"], split or hub["split"])
    if local.suffix not in READERS:
        raise UsageError(f"{path}: cannot tell what this is; give a {', '.join(READERS)} file, a directory of them or one saved by datasets")
    if split is not None:
        raise UsageError(f"{path} is a single file: it has no split {split!r}")
    return _read_file(local)


def _read_file(path: Path) -> Rows:
    try:
        yield from READERS[path.suffix](path)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror or error})") from None


def _read_shards(path: Path, split: str | None) -> Rows:
    """Shards below a directory, hidden ones left out. `.json` counts where nothing else is there: beside other kinds it holds descriptions."""
    below = sorted(p for p in path.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.relative_to(path).parts))
    by_kind = {suffix: [p for p in below if p.suffix == suffix] for suffix in READERS}
    kinds = [suffix for suffix in (".jsonl", ".ndjson", ".parquet") if by_kind[suffix]] or [".json"]
    shards = by_kind[kinds[0]]
    if not shards:
        raise UsageError(f"{path} is no directory saved by datasets, and no {', '.join(READERS)} file is in it")
    if len(kinds) > 1:
        raise UsageError(f"{path} holds {' and '.join(kinds)} files: name one, so that no row is read twice")
    splits = [_split_of(shard.relative_to(path)) for shard in shards]
    names = sorted(set(filter(None, splits)))
    if split is not None and split not in names:
        raise UsageError(f"{path} has {'the splits ' + ', '.join(names) if names else 'no splits'}: there is no {split!r}")
    if split is None and len(names) > 1:
        raise UsageError(f"{path} has the splits {', '.join(names)}: choose one")
    for shard, name in zip(shards, splits):
        if split is None or name == split:
            yield from _read_file(shard)


def _split_of(shard: Path) -> str | None:
    """The split that a file name or a folder above it begins with: train-00000-of-00002.parquet, data/test/0.jsonl."""
    found = [match[1] for part in reversed(shard.parts) if (match := SPLIT_OF_FILE.match(part.lower()))]
    return found[0] if found else None
