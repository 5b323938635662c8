"""The processes of `gptoss-jax lab run`: one does the work itself, several are started anew, each on its share of the cores, and watched."""

import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gptoss_jax.errors import RunError, UsageError

WORKER = "GPTOSS_JAX_LAB_WORKER"  # set in processes that were started by another


def run_all(path: Path, overrides: tuple[str, ...], experiment, arms, out: Path, processes: int, limit: int | None) -> None:
    """Runs all tasks without a result.

    Raises:
      UsageError: the results there have other settings.
      RunError: a process failed, or left a task undone.
    """
    from gptoss_jax.lab import grid

    if processes < 1:
        raise UsageError(f"--processes must be at least 1, not {processes}")
    tasks = grid.tasks_of(experiment, arms, limit)
    if not is_worker():
        grid.prepare(experiment, tasks, out)
    missing = [task for task in tasks if not task.file(out).exists()]
    with _progress(quiet=is_worker()) as bar:
        row = bar.add_task(experiment.name, total=len(tasks), completed=len(tasks) - len(missing), doing="")
        if missing and processes > 1:
            _start(path, overrides, out, processes, limit, lambda: bar.update(row, completed=sum(task.file(out).exists() for task in tasks)))
        elif missing:
            _keep_compiled(out)
            grid.work(experiment, tasks, out, lambda text: bar.update(row, doing=text), lambda task: bar.advance(row))
    if not is_worker():
        grid.check_complete(tasks, out)


def _progress(quiet: bool) -> Progress:
    doing = TextColumn("{task.fields[doing]}", markup=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), doing)
    return Progress(*columns, console=Console(stderr=True), disable=quiet)


def _keep_compiled(out: Path) -> None:
    """Compiled programs outlive the process, beside the shared stages, unless the environment says where they do."""
    import jax

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str((out.parent / "compiled").absolute()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def _start(path: Path, overrides: tuple[str, ...], out: Path, processes: int, limit: int | None, tick) -> None:
    """Starts `processes` commands like this one and waits for them; ends the others when one fails."""
    command = [sys.executable, "-m", "gptoss_jax", "lab", "run", str(path), *overrides, "--out", str(out)]
    command += ["--limit", str(limit)] * (limit is not None)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    logs = out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    started = []
    try:
        for number in range(processes):
            environment = {**os.environ, WORKER: ",".join(map(str, cores[number % max(len(cores), 1) :: processes]))}
            with open(logs / f"process-{number}.txt", "w") as log:
                started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        while any(process.poll() is None for process in started) and not any(process.poll() for process in started):
            tick()
            time.sleep(0.5)
        tick()
        for number, process in enumerate(started):
            if process.poll():
                last = (logs / f"process-{number}.txt").read_text().strip().splitlines()[-1:]
                raise RunError(f"process {number} ended with code {process.returncode}: {last[0] if last else 'it said nothing'}")
    finally:
        for process in started:
            if process.poll() is None:
                process.terminate()
                process.wait()


def is_worker() -> bool:
    """Whether another process started this one for its share of the work."""
    return WORKER in os.environ


def take_share_of_cores() -> None:
    """In a worker, before JAX starts: its compute threads are as many as the cores it may run on."""
    cores = os.environ.get(WORKER)
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
