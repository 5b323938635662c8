"""Rows of tables, each with its number: Parquet files, directories written by `datasets.save_to_disk`, data sets of the hub."""

import os
from pathlib import Path
from typing import Any

from gptoss_jax.data.json_rows import Rows
from gptoss_jax.data.messages import BadRow
from gptoss_jax.errors import CorruptError, UsageError


def read_parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for row in _rows_of(batch):
                number += 1
                yield f"{path}: row {number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CorruptError(f"{path} is no readable Parquet file: {_first_line(error)}") from error


def _rows_of(batch: Any) -> list[Any]:
    """The rows of a piece of a table; one whose text is no UTF-8 (Parquet does not check) is bad, the others are not."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [BadRow(f"not UTF-8 at byte {error.start} of a text")]
        return [row for i in range(batch.num_rows) for row in _rows_of(batch.slice(i, 1))]


def read_saved(path: Path, split: str | None) -> Rows:
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
    yield from _numbered(loaded, str(path))


def _numbered(loaded: Any, name: str) -> Rows:
    """Rows of a `datasets.Dataset`."""
    try:
        for number, row in enumerate(loaded, 1):
            yield f"{name}: row {number}", row
    except Exception as error:  # as above; a file is only read when its rows are
        raise CorruptError(f"{name}: a row cannot be read: {_first_line(error)}") from error


def read_hub(name: str, config: str | None, split: str | None) -> Rows:
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
    yield from _numbered(loaded, name)


def _no_hub(name: str, error: Exception) -> str:
    offline = next((key for key in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if os.environ.get(key, "0").upper() in ("1", "TRUE", "YES", "ON")), None)
    reason = f"{offline} is set and it is not in the cache" if offline else _first_line(error)
    return (
        f"{name}: no such file or directory, and it cannot be had from the hub ({reason}); on a machine with network: "
        f"hf download {name} --repo-type dataset --local-dir DIR, then give DIR"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
