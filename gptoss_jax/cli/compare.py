"""`gptoss-jax compare`: how far two models are apart, or whether a served model is the trained one."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gptoss_jax.cli.evaluate import Numerics


def compare(
    a: Annotated[str, tyro.conf.Positional],
    b: Annotated[str | None, tyro.conf.Positional] = None,
    endpoint: str | None = None,
    model: str | None = None,
    timeout: float = 300.0,
    other: tuple[str, ...] = (),
    as_a: Numerics = "trained",
    as_b: Numerics = "trained",
    data: str | None = None,
    task: tuple[str, ...] = (),
    limit: int = 100,
    places: int = 256,
    top: int = 20,
    max_kl: float | None = None,
    min_top1: float | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    out: Path | None = None,
) -> int:
    """Two models on the same tokens: KL both ways, agreement on the next token, differences of log-probabilities, error layer by layer.

    With --endpoint: is the served model the checkpoint? The same prompts to both, pass rates side by side, next-token distributions compared, and a
    verdict (limits and their reasons: gptoss_jax/evaluation/served.py). Exit code 1 when the verdict is no.

    Args:
        a: any checkpoint, or "nano".
        b: another one, of any kind.
        endpoint: URL of an OpenAI-compatible server instead of B; key from the environment variable GPTOSS_JAX_API_KEY.
        model: its name there, if several are served.
        timeout: seconds to wait for one answer of it.
        other: checkpoints that must not be the served one (the base, say); it has to be nearer to A than to these.
        as-a: numerics of A's experts: as trained, never quantized (bf16), or as if quantized after training (mxfp4, nvfp4).
        as-b: numerics of B's experts.
        data: conversations to compare on; take some of the kind that was trained.
        task: task files or names instead; default the nano tasks. With --endpoint their pass rates are compared too.
        limit: rows of each task, or of the data.
        places: with --endpoint: tokens at which the server is asked.
        top: with --endpoint: log-probabilities to ask for; vLLM gives at most 20 unless told otherwise.
        max-kl: largest mean KL that passes; default 0.01 with --endpoint, no verdict without.
        min-top1: smallest agreement on the most probable token that passes; default 0.85 with --endpoint.
        dtype: of weights and activations.
        out: also write the result as JSON.
    """
    from gptoss_jax.errors import UsageError

    if (b is None) == (endpoint is None):
        raise UsageError("give a second checkpoint or --endpoint URL, one of them")
    if places < 1 or top < 1:
        raise UsageError("--places and --top must be at least 1")
    tasks = _tasks(data, task, limit)
    rows = [one.rows() for one in tasks]
    settings = {"a": a, "b": b, "endpoint": endpoint, "as_a": as_a, "as_b": as_b, "dtype": dtype, "data": data, "tasks": [t.name for t in tasks]}
    if b is not None:
        result = _two_models(a, b, as_a, as_b, dtype, tasks, rows, max_kl, min_top1)
    else:
        limits = {key: value for key, value in (("max_kl", max_kl), ("min_top1", min_top1)) if value is not None}
        server = dict(model=model, timeout=timeout)
        result = _served(a, as_a, dtype, endpoint, server, other, tasks, rows, dict(count=places, top=top, **limits), with_tasks=data is None)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(settings | result, indent=1) + "\n")
    return 1 if result.get("verdict") == "no" else 0


def _tasks(data: str | None, names: tuple[str, ...], limit: int) -> list[Any]:
    from gptoss_jax.cli.evaluate import load_tasks, replace_limit
    from gptoss_jax.errors import UsageError
    from gptoss_jax.evaluation import Task

    if data is not None and names:
        raise UsageError("give --task or --data, not both")
    tasks = [Task("data", data=data)] if data is not None else load_tasks(names, "dev")
    return [replace_limit(one, limit) for one in tasks]


def _with_answers(tasks: list[Any], rows: list[list[Any]]) -> tuple[list[Any], Any]:
    """Rows of all tasks that have a reference answer, and the one system message of the tasks."""
    from gptoss_jax.errors import UsageError

    answered = [row for part in rows for row in part if row["messages"][-1]["role"] == "assistant"]
    systems = {task.system for task in tasks}
    if not answered:
        raise UsageError("no row has an answer: conversations with reference answers are needed, give them with --data")
    if len(systems) > 1:
        raise UsageError("the tasks have different system messages: compare on one of them at a time")
    return answered, systems.pop()


def _two_models(a, b, as_a, as_b, dtype, tasks, rows, max_kl, min_top1) -> dict[str, Any]:
    from gptoss_jax.cli.evaluate import local_subject, progress_bar
    from gptoss_jax.evaluation.compare import compare_models

    answered, system = _with_answers(tasks, rows)
    subjects = local_subject(a, as_a, dtype), local_subject(b, as_b, dtype)
    with progress_bar() as bar, bar("comparing", len(answered)) as report:
        found = compare_models(*subjects, answered, system=system, report=report).to_dict()
    reasons = []
    if max_kl is not None and found["kl_ab"] > max_kl:
        reasons.append(f"mean KL(A || B) is {found['kl_ab']:.4g}, above {max_kl:g}")
    if min_top1 is not None and found["top1_agreement"] < min_top1:
        reasons.append(f"the most probable token is the same at {found['top1_agreement']:.1%}, below {min_top1:.0%}")
    lines = [
        ("answer tokens compared", f"{found['tokens']:,}"),
        ("mean KL(A || B), KL(B || A)", f"{found['kl_ab']:.3g}, {found['kl_ba']:.3g} nats"),
        ("same most probable token", f"{found['top1_agreement']:.2%}"),
        ("loss of A, of B", f"{found['loss_a']:.4f}, {found['loss_b']:.4f}"),
        ("log p_B - log p_A of the answer", _quantiles(found["logprob_difference"])),
        ("largest |difference| of a likely token", _quantiles(found["largest_logprob_difference"])),
    ]
    names = ["embedding", *(f"layer {i}" for i in range(len(found["layer_error"]) - 1))]
    lines += [(f"relative error after {name}", f"{error:.3g}") for name, error in zip(names, found["layer_error"])]
    _print_table(lines, reasons if max_kl is not None or min_top1 is not None else None)
    verdict = {"verdict": "no" if reasons else "yes", "reasons": reasons} if max_kl is not None or min_top1 is not None else {}
    return {**found, **verdict}


def _served(a, as_a, dtype, url, server, others, tasks, rows, settings, *, with_tasks: bool) -> dict[str, Any]:
    from gptoss_jax.cli.evaluate import local_subject, progress_bar
    from gptoss_jax.evaluation.endpoint import Endpoint
    from gptoss_jax.evaluation.served import compare_served

    answered, system = _with_answers(tasks, rows)
    subject = local_subject(a, as_a, dtype)
    endpoint = Endpoint(url, subject.tokenizer, **server)
    print(endpoint.describe())
    with progress_bar() as bar:
        with bar("distributions", settings["count"]) as report:
            more = {name: local_subject(name, "trained", dtype) for name in others}
            result = compare_served(subject, endpoint, answered, system=system, others=more, report=report, **settings)
        rates = [_both_rates(task, subject, endpoint, part, bar) for task, part in zip(tasks, rows)] if with_tasks else []
    found = result.to_dict() | {"server": endpoint.describe(), "pass_rates": {rate["task"]: rate for rate in rates}}
    lines = [
        ("places compared", f"{found['places']}; the listed tokens hold {found['covered']:.1%} of the probability"),
        ("mean KL(served || local)", f"{found['kl_served']:.3g} nats (limit {result.max_kl:g})"),
        ("mean KL(local || served)", f"{found['kl_local']:.3g} nats"),
        ("same most probable token", f"{found['top1_agreement']:.2%} (limit {result.min_top1:.0%})"),
        ("log p_served - log p_local of the answer", _quantiles(found["logprob_difference"])),
        *((f"mean KL(served || {name})", f"{kl:.3g} nats") for name, kl in result.others.items()),
        *((f"{rate['task']}: passed local, served", f"{rate['local']}, {rate['served']} of {rate['rows']}; {rate['verdicts']}") for rate in rates),
    ]
    _print_table(lines, result.reasons())
    return found


def _both_rates(task: Any, subject: Any, endpoint: Any, rows: list[Any], bar) -> dict[str, Any]:
    """Passed rows of one task on both sides, and for how many rows the verdicts agree."""
    from gptoss_jax.evaluation import run_task

    with bar(f"{task.name} local", len(rows)) as report:
        local = run_task(task.asked_all(), subject, rows, report)
    if local.passed is None:
        return {"task": task.name, "rows": len(rows), "local": "-", "served": "-", "verdicts": "loss alone"}
    with bar(f"{task.name} served", len(rows)) as report:
        served = run_task(task.asked_all(), endpoint, rows, report)
    agree = int((local.passed == served.passed).sum())
    counts = {"local": int(local.passed.sum()), "served": int(served.passed.sum())}
    return {"task": task.name, "rows": len(rows), **counts, "verdicts": f"{agree} rows judged alike"}


def _quantiles(values: dict[str, float]) -> str:
    return ", ".join(f"{float(q):.0%}: {value:.3g}" for q, value in values.items() if q in ("0.05", "0.5", "0.95")) or "-"


def _print_table(lines: list[tuple[str, str]], reasons: list[str] | None) -> None:
    """Name and value per line; then the verdict, if there is one to give (`reasons` against it, none for yes)."""
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")
    if reasons is not None:
        print("verdict: no, " + "; ".join(reasons) if reasons else "verdict: yes")
