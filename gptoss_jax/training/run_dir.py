"""The directory of a run: config.yaml (resolved), environment.json, metrics.jsonl, router.jsonl, checkpoints/, samples/ (of eval_tasks), batches/ (of
steps that went wrong), report/ (of `gptoss-jax report`), and a lock against a second run.

metrics.jsonl has one object per step: step, loss, grad_norm, lr, tokens, trained_tokens, skipped, tok_per_s, router/... (see `router.py`), with a
teacher the cross_entropy and kl that the loss is mixed of, and eval_loss and task/NAME where they were measured (step 0: these alone). Non-finite
numbers are written as null with the key `nonfinite` naming them, because JSON has no NaN. router.jsonl has the routing of every layer to every expert
at each evaluation. environment.json lists the starts of the run (first, and after each --resume), see `environment.py`.

Of many processes the first alone locks and writes; for the others the same calls do nothing. All must see the same file system.
"""

import errno
import fcntl
import io
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np

from gptoss_jax.checkpoint.orbax_store import CHECKPOINTS, LOCK
from gptoss_jax.errors import RunError, UsageError
from gptoss_jax.sharding.distributed import is_first, on_first

CONFIG, ENVIRONMENT, METRICS, ROUTER, BATCHES = "config.yaml", "environment.json", "metrics.jsonl", "router.jsonl", "batches"
REPORT = "report"
MAX_KEPT_BATCHES = 20  # of 2.6 MB each with 32 rows of 4096 tokens


class RunDir:
    """An open run directory. Holds the lock until closed."""

    _lock: IO[str] | None = None

    def __init__(self, path: str | Path, *, resume: bool, overwrite: bool):
        """
        Raises:
          UsageError: not empty and neither `resume` nor `overwrite`; nothing to resume; not a run of ours to overwrite; in use.
          RunError: it cannot be created.
        """
        self.path, self._writes = Path(path), is_first()
        self._lines: dict[str, IO[str]] = {}  # open files by name
        on_first(lambda: self._open(resume, overwrite))

    def _open(self, resume: bool, overwrite: bool) -> None:
        entries = {p.name for p in self.path.iterdir()} - {LOCK} if self.path.is_dir() else set()
        if entries and not (resume or overwrite):
            raise UsageError(f"{self.path} is not empty; give --resume to go on or --overwrite to start anew")
        if overwrite and entries and CONFIG not in entries:
            raise UsageError(f"{self.path} is not empty and holds no {CONFIG}: not a run of gptoss_jax, so it is not overwritten")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / LOCK, "w")
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written ({error.strerror})") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UsageError(f"{self.path} is in use by another run") from None
        if overwrite and not resume:
            self._clear()

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    def _clear(self) -> None:
        """Removes what a run writes, nothing else."""
        for name in (CONFIG, ENVIRONMENT, METRICS, ROUTER):
            (self.path / name).unlink(missing_ok=True)
        for folder in (self.checkpoints, self.path / "samples", self.path / BATCHES, self.path / REPORT):
            shutil.rmtree(folder, ignore_errors=True)

    def write_config(self, text: str) -> None:
        if self._writes:
            with self._writing(CONFIG):
                _replace(self.path / CONFIG, text.encode())

    def keep_batch(self, step: int, batch: Mapping[str, Any]) -> str | None:
        """Writes the arrays of a batch to batches/STEP.npz, for inspection; of many processes each writes its rows. After 20 of them no more.

        Returns the name of the file within the run directory.
        """
        rows = f".process-{jax.process_index()}" if jax.process_count() > 1 else ""
        folder, name = self.path / BATCHES, f"{step}{rows}.npz"
        if not (folder / name).exists() and folder.is_dir() and len(list(folder.glob(f"*{rows}.npz"))) >= MAX_KEPT_BATCHES:
            return None
        with self._writing(f"{BATCHES}/{name}"):
            folder.mkdir(exist_ok=True)
            content = io.BytesIO()
            np.savez_compressed(content, **{key: np.asarray(value) for key, value in batch.items()})
            _replace(folder / name, content.getvalue())
        return f"{BATCHES}/{name}"

    def record_start(self, environment: dict[str, Any]) -> None:
        """Adds an entry to environment.json."""
        if not self._writes:
            return
        file = self.path / ENVIRONMENT
        earlier = (_parse(file.read_text(encoding="utf-8")) or []) if file.is_file() else []
        file.write_text(json.dumps([*earlier, environment], indent=1) + "\n", encoding="utf-8")

    def rewind_metrics(self, step: int) -> None:
        """Drops lines after `step`, so that a resumed run writes each step once. A half-written last line goes too."""
        for file in (self.path / METRICS, self.path / ROUTER):
            if self._writes and file.exists():
                with self._writing(file.name):
                    _rewind(file, step)

    def log(self, record: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl, readable by others at once."""
        bad = [key for key, value in record.items() if isinstance(value, float) and not math.isfinite(value)]
        self._append(METRICS, {**record, **dict.fromkeys(bad), "nonfinite": bad} if bad else record)

    def log_router(self, record: dict[str, Any]) -> None:
        """Appends a line to router.jsonl."""
        self._append(ROUTER, record)

    def _append(self, name: str, record: dict[str, Any]) -> None:
        if not self._writes:
            return
        with self._writing(name):
            if name not in self._lines:
                self._lines[name] = open(self.path / name, "a", encoding="utf-8")
            self._lines[name].write(json.dumps(record) + "\n")
            self._lines[name].flush()

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        """One line for what the file system refuses."""
        try:
            yield
        except OSError as error:
            what = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
            raise RunError(f"{self.path / name}: cannot be written ({what}); go on with --resume when that is mended") from None

    def __enter__(self) -> "RunDir":
        return self

    def __exit__(self, *_) -> None:
        for file in (*self._lines.values(), self._lock):
            if file is not None:
                with suppress(OSError):  # a line that a full disk refused is still in the buffer, and its error has been told
                    file.close()


def _rewind(file: Path, step: int) -> None:
    kept = [line for line in file.read_text(encoding="utf-8").splitlines() if (record := _parse(line)) and record["step"] <= step]
    _replace(file, "".join(line + "\n" for line in kept).encode())


def _replace(file: Path, content: bytes) -> None:
    """The old content or the new, also after a process that is killed here or a disk that is full."""
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, file)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _parse(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:
        return None


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(path) / METRICS).read_text(encoding="utf-8").splitlines()]
