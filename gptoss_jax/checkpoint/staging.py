"""A directory that appears under its name complete or not at all."""

import errno
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gptoss_jax.errors import RunError, UsageError

MARGIN_BYTES = 16 << 20  # tokenizer, config, index


@contextmanager
def staged_directory(target: Path, need_bytes: int) -> Iterator[Path]:
    """Yields a hidden sibling of `target` to fill; on success it is synced and renamed to `target`, on any failure it is removed.

    What a killed process left behind is removed by the next export to the same target.

    Raises:
      UsageError: `target` exists and is not an empty directory.
      RunError: no room for `need_bytes`, or the file system refuses.
    """
    target = Path(os.path.abspath(target))
    refuse_used(target)
    created = [parent for parent in target.parents if not parent.exists()]
    staging = target.parent / f".{target.name}.export-{socket.gethostname()}-{os.getpid()}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        free = shutil.disk_usage(target.parent).free
        if free < need_bytes + MARGIN_BYTES:
            raise RunError(f"{target}: needs {(need_bytes + MARGIN_BYTES) / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")
        staging.mkdir()
        yield staging
        for path in staging.iterdir():
            _sync(path)
        _sync(staging)
        os.rename(staging, target)
        _sync(target.parent)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in created:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        if isinstance(error, OSError):
            what = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
            raise RunError(f"{target}: cannot be written ({what})") from None
        raise


def refuse_used(target: Path) -> None:
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise UsageError(f"{target}: exists and is not an empty directory")


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _remove_leftovers(target: Path) -> None:
    """Staging directories of dead processes of this machine."""
    prefix = f".{target.name}.export-{socket.gethostname()}-"
    for path in target.parent.glob(f".{target.name}.export-*"):
        pid = path.name.removeprefix(prefix)
        if path.name.startswith(prefix) and pid.isdigit() and not _is_alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # an earlier process had our number: nobody else uses it now
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
