"""Running the arms of an experiment: each arm and seed once, on as many processes as asked for, going on where an earlier run stopped.

    OUT/experiment.json                the experiment as it was run last
    OUT/results/ARM/seed-S.json        settings, what was measured, what was recorded step by step
    OUT/../stages/                     trained weights that arms share, of all experiments beside this one

A process takes the first task that nobody holds (a lock file, freed with the process), SFT stages first, until none is left. A result is there whole
or not at all. Results of a changed definition are refused with the difference; arms and seeds may be added.
"""

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptoss_jax.errors import CorruptError, RunError, UsageError
from gptoss_jax.lab.experiment import Arm, Experiment, NamedArm, fingerprint, load_experiment
from gptoss_jax.lab.held_out import deployed, deployed_format, rounding_of
from gptoss_jax.lab.parts import parse_export, quantizer_of
from gptoss_jax.lab.stages import Say, Stages, label_of, locked
from gptoss_jax.training.recipe.results import write_atomic

RESULTS, EXPERIMENT, STAGES = "results", "experiment.json", "stages"
MOST_CURVES = 3  # exports of the same weights whose loss is followed during training


@dataclass(frozen=True)
class Task:
    """One arm under one seed."""

    arm: NamedArm
    seed: int

    def file(self, out: Path) -> Path:
        """Names are readable; those that differ in other characters alone are kept apart by a hash."""
        name = re.sub(r"[^A-Za-z0-9=.+-]+", "_", self.arm.name)
        if name != self.arm.name.replace(", ", "_").replace(" ", "_"):
            name += f"-{fingerprint(self.arm.name)[:6]}"
        return out / RESULTS / name / f"seed-{self.seed}.json"

    def __str__(self) -> str:
        return f"{self.arm.name}, seed {self.seed}"


def tasks_of(experiment: Experiment, arms: list[NamedArm], limit: int | None = None) -> list[Task]:
    """Seed after seed, so that an interrupted run has whole tables of fewer seeds; `limit` keeps the first ones."""
    return [Task(arm, seed) for seed in experiment.seeds for arm in arms][:limit]


def definition(experiment: Experiment, task: Task) -> dict[str, Any]:
    """What a result depends on."""
    shared = experiment.model_dump(mode="json", include={"model", "data", "evaluation"})
    return {**shared, "arm": task.arm.settings.model_dump(mode="json"), "seed": task.seed}


def read_result(file: Path) -> dict[str, Any]:
    """Raises CorruptError where it is none."""
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        result["definition"], result["measured"], result["history"]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptError(f"{file}: is no result of an arm ({type(error).__name__}: {error}); remove it to run the arm again") from None
    return result


def prepare(experiment: Experiment, tasks: list[Task], out: Path) -> None:
    """Makes `out` the directory of this experiment. Once, before processes are started.

    Raises:
      UsageError: a result there was made under other settings; it names them.
    """
    for task in tasks:
        file = task.file(out)
        if file.exists():
            before = read_result(file)["definition"]
            # settings that came later had their default
            before = {**before, "arm": {**Arm().model_dump(mode="json"), **before["arm"]}}
            changes = list(_differences("", before, definition(experiment, task)))
            if changes:
                raise UsageError(f"{file}: was made with other settings ({'; '.join(changes[:3])}): choose another --out, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / EXPERIMENT, json.dumps(experiment.model_dump(mode="json"), indent=1) + "\n")


def _differences(name: str, before: Any, now: Any) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            yield from _differences(f"{name}.{key}".lstrip("."), before.get(key), now.get(key))
    elif before != now:
        yield f"{name}: {before!r} -> {now!r}"


def work(
    experiment: Experiment, tasks: list[Task], out: Path, say: Say = lambda text: None, done: Callable[[Task], None] = lambda task: None
) -> None:
    """Runs tasks until none is left that another process does not hold.

    Args:
      done: called with every task that this process finished.
    """
    stages = Stages(experiment, out.parent / STAGES, say)
    name = lambda task: fingerprint(stages.settings(task.arm.settings, task.seed))
    sharing: dict[str, list[Arm]] = {}
    for task in tasks:
        sharing.setdefault(name(task), []).append(task.arm.settings)
    _sft_first(stages, [task for task in tasks if not task.file(out).exists()])
    for task in tasks:
        file = task.file(out)
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(file.with_suffix(".lock"), wait=False) as mine:
            if mine and not file.exists():
                say(str(task))
                write_atomic(file, json.dumps(_result(stages, task, sharing[name(task)])) + "\n")
                done(task)


def _sft_first(stages: Stages, tasks: list[Task]) -> None:
    """SFT stages that nobody is at; the rest is waited for where it is needed."""
    seen = set()
    for task in tasks:
        arm, name = task.arm.settings, fingerprint(stages.sft_settings(task.arm.settings, task.seed))
        if arm.start == "base" or name in seen:
            continue
        seen.add(name)
        with locked(stages.root / f"{name}.claim", wait=False) as mine:
            if mine:
                stages.say(f"SFT, seed {task.seed}: {arm.sft.steps} steps at {arm.sft.learning_rate:g}")
                stages.sft(arm, task.seed)


def _result(stages: Stages, task: Task, sharing: list[Arm]) -> dict[str, Any]:
    """Trains and measures one arm. `sharing`: all arms, itself among them, that deploy the same weights; the first exports get a curve."""
    import jax

    start, arm, seed = time.monotonic(), task.arm.settings, task.seed
    sft = stages.sft(arm, seed)
    exports = list({label_of(other.export): other.export for other in sharing}.values())[:MOST_CURVES]
    final = stages.final(arm, seed, keep=len(sharing) > 1, exports=exports)
    quantizer, export = quantizer_of(arm), parse_export(arm.export)
    made = deployed(stages.model.config, final.params, final.extra, quantizer, export)
    measured = stages.held_out.measure(made)
    measured["rounding"] = rounding_of(final.params, made, stages.model.params, deployed_format(quantizer, export))
    return {
        "arm": task.arm.name,
        "levels": dict(task.arm.levels),
        "seed": seed,
        "definition": definition(stages.experiment, task),
        "measured": measured,
        "history": final.record["history"],
        "curve": final.record["curve"].get(label_of(arm.export), []),
        "sft": {"history": sft.record["history"], "curve": sft.record["curve"].get("bf16", [])},
        "seconds": {"arm": round(time.monotonic() - start, 2), "training": round(final.record["seconds"], 2)},
        "versions": {"jax": jax.__version__, "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()},
    }


def run_experiment(path: str | Path, out: Path, overrides: Sequence[str] = (), say: Say = print) -> list[dict[str, Any]]:
    """Runs an experiment in this process and returns all its results; what is there is not run again.

    Raises:
      UsageError: no valid experiment, or results of other settings in `out`. RunError: another process is still at some of it.
    """
    experiment, arms = load_experiment(path, overrides)
    tasks = tasks_of(experiment, arms)
    prepare(experiment, tasks, out)
    work(experiment, tasks, out, say)
    check_complete(tasks, out)
    return results_of(experiment, arms, out)


def results_of(experiment: Experiment, arms: list[NamedArm], out: Path) -> list[dict[str, Any]]:
    """All results that are there, in the order of the arms, then of the seeds.

    Raises:
      UsageError: there is none. CorruptError: one is damaged.
    """
    files = [Task(arm, seed).file(out) for arm in arms for seed in experiment.seeds]
    found = [read_result(file) for file in files if file.exists()]
    if not found:
        raise UsageError(f"{out}: no results of {experiment.name}: run `gptoss-jax lab run` first")
    return found


def check_complete(tasks: list[Task], out: Path) -> None:
    """Raises RunError where a result is missing after all processes ended."""
    missing = [str(task) for task in tasks if not task.file(out).exists()]
    if missing:
        raise RunError(f"{out}: {len(missing)} of {len(tasks)} results are missing, the first: {missing[0]}")
