"""Runs a recipe: original -> SFT -> QAT -> export -> verify -> pass rates, for all variants and seeds, ending in a table.

    stages   base -> sft -> qat_mxfp4, qat_nvfp4, qad_mxfp4      base -> direct (QAT from the base, as long as SFT and QAT together)
                        -> sft_longer (as long as QAT, not quantized: what QAT is compared with at equal cost)
    rows     a stage and the number format that it is exported in; every row is measured on the exported files, loaded again

    OUTPUT/[VARIANT/]seed-S/{sft,qat_mxfp4,...}   run directories        OUTPUT/results.json, recipe.json, gate.json and the report
                           /export/ROW            exported models        /rejected/ROW   what did not pass the gate
                           /failures/ROW/TASK.jsonl  every failing sample

What is finished is not done again, so an interrupted recipe goes on where it stopped; stages that variants share run once.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gptoss_jax.checkpoint.models import load_model, look_at
from gptoss_jax.data.harmony import load_tokenizer
from gptoss_jax.errors import UsageError
from gptoss_jax.training.recipe.config import RecipeConfig
from gptoss_jax.training.recipe.evaluate import Evaluation
from gptoss_jax.training.recipe.gate import GATE, GateFailed, judge, verdict
from gptoss_jax.training.recipe.results import RESULTS, Measured, Results, read_results, write_atomic
from gptoss_jax.training.recipe.rows import ROWS
from gptoss_jax.training.recipe.stages import Say, Stages
from gptoss_jax.training.stage import make_shardings

Key = tuple[str, str, int]  # row, variant, seed
SETTINGS = "recipe.json"
SHOWN_FAILURES = 3


class Recipe:
    """Runs the stages that its rows need, each once.

    Raises:
      UsageError: data, tasks or guard cannot be used, or OUTPUT holds a recipe with other settings.
    """

    def __init__(self, config: RecipeConfig, say: Say = print):
        if jax.process_count() > 1:
            raise UsageError("a recipe runs in one process, because exports do: run sft, qat, export and eval one by one")
        self.config, self.say, self.root = config, say, Path(config.output)
        self.dtype = jnp.dtype(config.sft.compute_dtype)
        model_config, directory = look_at(config.model)
        shardings = make_shardings(config.sft, model_config)
        self.shardings = shardings and shardings.params
        self.stages = Stages(config, say, self.shardings)
        self.evaluation = Evaluation(config, load_tokenizer(directory), self.dtype, self._load)

    def run(self) -> Results:
        """All rows, variants and seeds; `results.json` grows with every row.

        Raises:
          GateFailed: a row may not be shipped.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        self._check_settings()
        done = read_results(self.root).results if (self.root / RESULTS).exists() else ()
        found = {measured.key: measured for measured in done if measured.row in self.config.rows and self.evaluation.is_complete(measured)}
        found = {key: measured for key, measured in found.items() if not self._is_rejected(key)}  # those are measured and judged anew
        seeds, variants = list(self.config.seeds), ["", *self.stages.variants]
        # one seed after the other: an interrupted recipe has whole tables of fewer seeds
        for key in sorted(self._keys(), key=lambda key: (seeds.index(key[2]), variants.index(key[1]))):
            if key not in found:
                found[key] = self._known(key, found) or self._row(*key)
                self._write(found)
        results = self._write(found)
        if self.config.gate:
            self._judge(found)
        return results

    # ---- what there is to do ----------------------------------------------------------------------------------------------------
    def _keys(self) -> list[Key]:
        """In the order of the table's lines. Settings that a row does not depend on do not multiply it."""
        keys = []
        for row in self.config.rows:
            owners = dict.fromkeys(self.stages.owner(ROWS[row].stage, variant) for variant in self.stages.variants)
            keys += [(row, variant, seed) for variant in owners for seed in self.config.seeds]
        return keys

    def _known(self, key: Key, found: dict[Key, Measured]) -> Measured | None:
        """The original is the same for every seed."""
        row, variant, seed = key
        first = found.get((row, variant, self.config.seeds[0])) if ROWS[row].stage == "base" else None
        return first and first.model_copy(update={"seed": seed})

    def _is_rejected(self, key: Key) -> bool:
        row, variant, seed = key
        return (self.stages.place(variant, seed) / "rejected" / row).exists()

    def _write(self, found: dict[Key, Measured]) -> Results:
        results = Results(tasks=self.evaluation.columns, results=tuple(found[key] for key in self._keys() if key in found))
        write_atomic(self.root / RESULTS, results.model_dump_json(indent=1) + "\n")
        return results

    def _check_settings(self) -> None:
        """Refuses to go on with settings under which old and new rows would not belong to one table. Rows, seeds, variants and limits may grow."""
        file = self.root / SETTINGS
        now = self.config.model_dump(mode="json")
        if file.exists():
            before = json.loads(file.read_text(encoding="utf-8"))
            kept = ("model", "data", "train_documents", "evaluation", "tasks", "sft", "qat")
            changes = [text for name in kept for text in _differences(name, before.get(name), now[name])]
            shared = before.get("variants", {}).keys() & now["variants"].keys()
            changes += [text for name in sorted(shared) for text in _differences(f"variants.{name}", before["variants"][name], now["variants"][name])]
            guards = [(settings.get("gate") or {}).get("guard") for settings in (before, now)]
            changes += _differences("gate.guard", *guards) if all(guards) else []
            if changes:
                raise UsageError(f"{self.root}: holds a recipe with other settings ({'; '.join(changes[:3])}): choose another output")
        write_atomic(file, json.dumps(now, indent=1) + "\n")

    # ---- one row --------------------------------------------------------------------------------------------------------------
    def _row(self, name: str, variant: str, seed: int) -> Measured:
        run, steps = self.stages.run(ROWS[name].stage, variant, seed)
        outcome = self.evaluation.measure(self._load(self.stages.export(name, variant, seed, run)))
        outcome.write_failures(self.stages.place(variant, seed) / "failures" / name)
        measured = Measured(
            row=name, variant=variant, seed=seed, pass_rates=outcome.pass_rates, loss=outcome.loss, steps_trained=steps, kl=outcome.kl
        )  # fmt: skip
        rates = ", ".join(f"{task} {measured.rate(task):.1%}" for task in self.evaluation.columns)
        self.say(f"[seed {seed}] {self.stages.label(name, variant)}: {rates}, loss {measured.loss:.4f}")
        return measured

    def _load(self, path: str | Path) -> Any:
        return load_model(path, self.dtype, self.shardings)

    # ---- gate -----------------------------------------------------------------------------------------------------------------
    def _judge(self, found: dict[Key, Measured]) -> None:
        """Compares every gated row with its limits; exports that break one are moved to `rejected/`, with the reasons beside the weights."""
        gate, verdicts, failed = self.config.gate, [], []
        for key in (key for key in self._keys() if key[0] in gate.rows):
            row, variant, seed = key
            place = self.stages.place(variant, seed)
            export, rejected = place / "export" / row, place / "rejected" / row
            findings = judge(gate, found[key], found.get(("sft", self.stages.owner("sft", variant), seed)), self.evaluation.columns)
            broken = [finding for finding in findings if not finding.ok]
            shutil.rmtree(rejected, ignore_errors=True)  # of an earlier judgement
            record = verdict(found[key], findings, str((rejected if broken else export).relative_to(self.root)))
            if broken:
                moved = ""
                if export.exists():
                    rejected.parent.mkdir(exist_ok=True)
                    os.rename(export, rejected)
                    write_atomic(rejected / GATE, json.dumps(record, indent=1) + "\n")
                    moved = f"; moved to {rejected}"
                samples = "".join(self._samples(place / "failures" / row / f"{finding.task}.jsonl") for finding in broken if finding.task)
                failed.append(f"{self.stages.label(row, variant)}, seed {seed}: {'; '.join(map(str, broken))}{samples}{moved}")
            else:
                self.say(f"[seed {seed}] {self.stages.label(row, variant)}: passes the gate ({len(findings)} limits)")
            verdicts.append(record)
        write_atomic(self.root / GATE, json.dumps(verdicts, indent=1) + "\n")
        if failed:
            raise GateFailed("gate failed: " + "; ".join(failed))

    def _samples(self, file: Path) -> str:
        """The first failing samples of a task, and where all of them are."""
        if not file.exists():
            return ""
        samples = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        shown = ", ".join(repr(sample["prompt"][-1]["content"][-60:]) for sample in samples[:SHOWN_FAILURES])
        return f"; fails {shown} ({len(samples)} in {file})"


def _differences(name: str, before: Any, now: Any) -> list[str]:
    """`sft.steps: 200 -> 100` for every leaf that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [text for key in keys for text in _differences(f"{name}.{key}", before.get(key), now.get(key))]
    return [] if before == now else [f"{name}: {before!r} -> {now!r}"]
