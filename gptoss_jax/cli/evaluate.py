"""`gptoss-jax eval`: pass rates and loss of any checkpoint, or of a served model."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

Numerics = Literal["trained", "bf16", "mxfp4", "nvfp4"]


def evaluate(
    checkpoint: Annotated[str, tyro.conf.Positional],
    task: tuple[str, ...] = (),
    data: str | None = None,
    split: Literal["dev", "final"] = "dev",
    as_: Annotated[Numerics, tyro.conf.arg(name="as")] = "trained",
    dtype: Literal["float32", "bfloat16"] = "float32",
    endpoint: str | None = None,
    model: str | None = None,
    timeout: float = 300.0,
    limit: int | None = None,
    failures: int = 3,
    failures_out: Path | None = None,
    out: Path | None = None,
) -> None:
    """Pass rates of tasks with 95 % intervals, and the loss per trained token where answers have a reference.

    A task is a YAML file: data, scorer, limits (see gptoss_jax/evaluation/task.py). Scorers: exact, contains, regex, number, language, refused,
    not_refused, loss, or a Python function of yours. Default are the nano model's tasks A, B, H and Eng.

    Args:
        checkpoint: HF directory, OpenAI's original layout, training checkpoint, hub id, or "nano". With --endpoint only its tokenizer is used.
        task: task files, or names of tasks that come along.
        data: conversations instead: exact match and loss; a column "task" groups them.
        split: which data of a task that has several; settings are chosen on dev.
        as: numerics of the experts. "trained": a QAT checkpoint through its quantization, others as stored; "bf16": never quantized;
            "mxfp4", "nvfp4": as if quantized after training.
        dtype: of weights and activations.
        endpoint: URL of an OpenAI-compatible server that is asked instead; key from the environment variable GPTOSS_JAX_API_KEY.
        model: its name there, if several are served.
        timeout: seconds to wait for one answer of it.
        limit: at most so many rows of each task.
        failures: failing samples to show per task.
        failures_out: directory for all failing samples, TASK.jsonl.
        out: also write the result as JSON.
    """
    from gptoss_jax.errors import UsageError
    from gptoss_jax.evaluation import run_task
    from gptoss_jax.evaluation.results import overall_loss

    if data is not None and task:
        raise UsageError("give --task or --data, not both")
    tasks = conversation_tasks(data) if data is not None else load_tasks(task, split)
    if limit is not None:
        tasks = [replace_limit(one, limit) for one in tasks]
    questions = {one.name: one.rows() for one in tasks}  # before the model: what is wrong with them is said at once
    subject = served_subject(checkpoint, endpoint, model, timeout) if endpoint else local_subject(checkpoint, as_, dtype)
    results = []
    with progress_bar() as bar:
        for one in tasks:
            rows = questions[one.name]
            with bar(one.name, len(rows)) as report:
                results.append(run_task(one.asked_all(), subject, rows, report))
    print_results(results, failures)
    loss = overall_loss(results)
    if loss is not None:
        print(f"loss over all {loss[1]} trained tokens: {loss[0]:.4f}")
    if failures_out is not None:
        for result in results:
            result.write_failures(failures_out / f"{result.name}.jsonl")
    if out is not None:
        record = {"checkpoint": checkpoint, "endpoint": endpoint, "as": as_, "dtype": dtype}
        record |= {"tasks": {result.name: result.to_dict() for result in results}, "loss": loss and loss[0]}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n")


def load_tasks(names: Sequence[str], split: str) -> list[Any]:
    """Tasks by file or name; all that come along, if none is named. UsageError where two have one name."""
    from gptoss_jax.errors import UsageError
    from gptoss_jax.evaluation import built_in_tasks, load_task

    tasks = [load_task(name, split) for name in names or built_in_tasks()]
    seen = [task.name for task in tasks]
    if len(set(seen)) < len(seen):
        raise UsageError(f"two tasks are called {next(name for name in seen if seen.count(name) > 1)!r}")
    return tasks


def conversation_tasks(data: str) -> list[Any]:
    """Exact match on a file of conversations: one task per value of its column "task", or one for all."""
    from gptoss_jax.evaluation import Task
    from gptoss_jax.evaluation.questions import read_questions

    names = dict.fromkeys(row.get("task") for row in read_questions(data))
    cluster = "pair"  # rows that share it are not independent; a file without it has none
    if None in names:
        return [Task("all", data=data, cluster=cluster)]
    return [Task(str(name), data=data, where={"task": name}, cluster=cluster) for name in names]


def replace_limit(task: Any, limit: int) -> Any:
    """The task with at most `limit` rows."""
    import dataclasses

    from gptoss_jax.errors import UsageError

    if limit < 1:
        raise UsageError(f"--limit {limit} must be at least 1")
    return dataclasses.replace(task, limit=limit if task.limit is None else min(limit, task.limit))


def local_subject(checkpoint: str, numerics: str, dtype: str) -> Any:
    """The model of a checkpoint, loaded."""
    import jax.numpy as jnp

    from gptoss_jax.checkpoint.models import load_model
    from gptoss_jax.evaluation import LocalSubject

    return LocalSubject(load_model(checkpoint, jnp.dtype(dtype), apart=True), dtype=jnp.dtype(dtype), numerics=numerics)


def served_subject(checkpoint: str, url: str, model: str | None, timeout: float) -> Any:
    """The model that a server has, with the tokenizer of a checkpoint."""
    from gptoss_jax.checkpoint.models import look_at
    from gptoss_jax.data import load_tokenizer
    from gptoss_jax.evaluation.endpoint import Endpoint

    endpoint = Endpoint(url, load_tokenizer(look_at(checkpoint)[1]), model=model, timeout=timeout)
    print(endpoint.describe())
    return endpoint


@contextmanager
def progress_bar() -> Iterator[Callable]:
    """`bar(name, total)` gives a context whose value is called with the number of rows done. Shown on a terminal only, on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:

        @contextmanager
        def bar(name: str, total: int):
            number = progress.add_task(name, total=total)
            yield lambda done: progress.update(number, completed=done)
            progress.remove_task(number)

        yield bar


def print_results(results: Sequence[Any], failures: int) -> None:
    """A line per task; under the table the first failing samples of each."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(pad_edge=False)
    for column in ("task", "pass rate [95 %]", "passed", "loss", "perplexity"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for result in results:
        rate = None if result.passed is None else result.pass_rate()
        passed = "" if rate is None else f"{rate.passed} of {rate.total}"
        loss = result.mean_loss()
        numbers = ("", "") if loss is None else (f"{loss:.4f}", f"{result.perplexity():.4g}")
        table.add_row(escape(result.name), "" if rate is None else str(rate).replace("[", "\\["), passed, *numbers)
    console.print(table)
    for result in results:
        for sample in result.failures(failures):
            prompt = sample["prompt"][-1]["content"]
            console.print(f"{result.name} failed: {prompt!r}: {sample['reason']}\n    {sample['answer']!r}", markup=False, soft_wrap=True)
