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

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptoss_jax.data.messages import BadRow
from gptoss_jax.errors import CorruptError, UsageError

# (file:line or file: row N, the row or the reason why there is none)
Rows = Iterator[tuple[str, Any]]
MAX_LINE_BYTES = 64 << 20
HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?(?:@(?P<split>[\w.-]+))?")
SPLIT_OF_FILE = re.compile(r"(train|validation|valid|val|dev|test|eval)(?![a-z])")


def read(path: str, split: str | None = None) -> Rows:
    """All rows of a file, a directory (of its `split`, if it has several) or a data set of the hub.

    UsageError: no such thing, unknown suffix, a split to choose. CorruptError: a file that cannot be read at all.
    """
    local = Path(path)
    if local.is_dir():
        saved = any((local / name).is_file() for name in ("state.json", "dataset_dict.json"))
        return _read_saved(local, split) if saved else _read_shards(local, split)
    if not local.exists():
        hub = HUB_NAME.fullmatch(path)
        if hub is None or local.suffix in READERS or path.startswith("."):
            raise UsageError(f"no such file or directory: {path}")
        return _read_hub(hub["name"], hub["config"], split or hub["split"])
    if local.suffix not in READERS:
        raise UsageError(f"{path}: cannot tell what this is; give a {', '.join(READERS)} file, a directory of them or one saved by datasets")
    if split is not None:
        raise UsageError(f"{path} is a single file: it has no split {split!r}")
    return READERS[local.suffix](local)


# ---- JSON -----------------------------------------------------------------------------------------------------------------------
def _no_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        keys = [key for key, _ in pairs]
        raise BadRow(f'the key "{next(key for key in keys if keys.count(key) > 1)}" stands twice in one object')
    return out


_DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicate_keys)


def _read_lines(path: Path) -> Rows:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            where = f"{path}:{number}"
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                    pass
                yield where, BadRow(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
                continue
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield where, _parse(line)


def _parse(line: bytes) -> Any:
    try:
        return _DECODER.decode(line.decode())
    except BadRow as bad:
        return bad
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        return BadRow(f"not JSON: {error.msg} at column {error.colno}")
    except (RecursionError, ValueError) as error:
        return BadRow(f"not usable JSON: {error}")


def _read_array(path: Path) -> Rows:
    """Element after element, so that each has its line; after one that is no JSON nothing can be read any more."""
    try:
        text = path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError as error:
        raise CorruptError(f"{path}: not UTF-8 at byte {error.start}") from None
    try:
        at = _array_start(text)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f'{path}: neither an array of rows nor an object with one under "data" ({error})') from None
    line, counted = 1, 0
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        where = f"{path}:{line}"
        try:
            try:
                row, end = _DECODER.raw_decode(text, at)
            except BadRow as bad:
                row, end = bad, json.JSONDecoder().raw_decode(text, at)[1]
            yield where, row
            at = _blanks(text, end)
            if text[at : at + 1] == ",":
                at = _blanks(text, at + 1)
            elif text[at : at + 1] != "]":
                raise json.JSONDecodeError("expected a comma or the end of the array", text, at)
        except json.JSONDecodeError as error:
            yield f"{path}:{error.lineno}", BadRow(f"not JSON: {error.msg} at column {error.colno}; what follows is not read")
            return
        except (RecursionError, ValueError) as error:
            yield where, BadRow(f"not usable JSON: {error}; what follows is not read")
            return


def _blanks(text: str, at: int) -> int:
    return re.compile(r"[ \t\r\n]*").match(text, at).end()


def _array_start(text: str) -> int:
    """Where the first element (or the closing bracket) of the array of rows stands."""
    at = _blanks(text, 0)
    if text[at : at + 1] == "{":
        at = _blanks(text, at + 1)
        while True:
            key, at = _DECODER.raw_decode(text, at)
            at = _blanks(text, _blanks(text, at) + 1)  # over the colon
            if key == "data":
                break
            _, at = _DECODER.raw_decode(text, at)
            at = _blanks(text, _blanks(text, at) + 1)  # over the comma
    if text[at : at + 1] != "[":
        raise ValueError("it begins with " + (repr(text[at : at + 1]) if text[at:] else "nothing"))
    return _blanks(text, at + 1)


# ---- tables ---------------------------------------------------------------------------------------------------------------------
def _read_parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise CorruptError(f"{path} is no readable Parquet file: {str(error).splitlines()[0]}") from error


READERS = {".jsonl": _read_lines, ".ndjson": _read_lines, ".json": _read_array, ".parquet": _read_parquet}


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
            yield from READERS[shard.suffix](shard)


def _split_of(shard: Path) -> str | None:
    """The split that a file name or a folder above it begins with: train-00000-of-00002.parquet, data/test/0.jsonl."""
    found = [match[1] for part in reversed(shard.parts) if (match := SPLIT_OF_FILE.match(part.lower()))]
    return found[0] if found else None


def _read_saved(path: Path, split: str | None) -> Rows:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets raises what json, pyarrow and the file system raise
        raise CorruptError(f"{path} cannot be read as a saved data set: {_first_line(error)}") from error
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


def _read_hub(name: str, config: str | None, split: str | None) -> Rows:
    """Downloaded by `datasets` into its cache, the first time. Its retries, some 25 s without a network, are left to end in one line of ours."""
    import datasets
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()
    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # whatever huggingface_hub, httpx and datasets raise
        raise UsageError(_no_hub(name, error)) from error
    if isinstance(loaded, datasets.DatasetDict):
        if len(loaded) > 1:
            raise UsageError(f"{name} has the splits {', '.join(loaded)}: choose one, as {name}@{next(iter(loaded))}")
        loaded = next(iter(loaded.values()))
    for number, row in enumerate(loaded, 1):
        yield f"{name}: row {number}", row


def _no_hub(name: str, error: Exception) -> str:
    offline = next((key for key in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if os.environ.get(key, "0").upper() in ("1", "TRUE", "YES", "ON")), None)
    reason = f"{offline} is set and it is not in the cache" if offline else _first_line(error)
    return (
        f"{name}: no such file or directory, and it cannot be had from the hub ({reason}); on a machine with network: "
        f"hf download {name} --repo-type dataset --local-dir DIR, then give DIR"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
