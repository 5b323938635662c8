"""The whole recipe from one YAML: original -> SFT -> QAT -> export -> verify -> pass rates, for several seeds, ending in a table.

    stages   base -> sft -> qat_mxfp4, qat_nvfp4                 base -> direct (QAT from the base, as many steps as SFT and QAT together)
                        -> sft_longer (as many steps as QAT, not quantized: what QAT is compared with at equal cost)
    rows     a stage and the number format that it is exported in; every row is measured on the exported files, loaded again

Everything lies in one directory and what is finished is not done again, so an interrupted recipe goes on where it stopped.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp
from pydantic import Field

from gptoss_jax.checkpoint import export_hf, orbax_store, verify_dir
from gptoss_jax.checkpoint.models import Model, load_model
from gptoss_jax.checkpoint.source import NANO
from gptoss_jax.data.harmony import load_tokenizer
from gptoss_jax.data.sources import load_rows
from gptoss_jax.errors import RunError, UsageError
from gptoss_jax.evaluation.pass_rate import EvaluationSet, Scores, make_evaluation_set, score
from gptoss_jax.evaluation.predict import make_predict
from gptoss_jax.evaluation.tasks import sft_rows, write_jsonl
from gptoss_jax.formats import Mxfp4, Nvfp4
from gptoss_jax.training.config import PositiveInt, Section, TrainConfig
from gptoss_jax.training.stage import run_stage

Say = Callable[[str], None]
Stage = Literal["base", "sft", "sft_longer", "qat_mxfp4", "qat_nvfp4", "direct"]


@dataclass(frozen=True)
class Row:
    """One line of the table: which weights, exported how."""

    label: str
    stage: Stage
    format: Literal["mxfp4", "nvfp4", "bf16"]
    nvidia: str = ""  # multilingual / over-refusal pass rates of gpt-oss-20b in NVIDIA's recipe (LMSYS blog, 2025-08-28)


ROWS = {
    "original": Row("original MXFP4", "base", "mxfp4", "16 / 30"),
    "sft": Row("SFT BF16", "sft", "bf16", "99 / 98"),
    "sft_ptq": Row("SFT + PTQ MXFP4", "sft", "mxfp4", "89 / 59"),
    "qat_mxfp4": Row("SFT + QAT MXFP4", "qat_mxfp4", "mxfp4", "100 / 97"),
    "qat_nvfp4": Row("SFT + QAT NVFP4", "qat_nvfp4", "nvfp4"),
    "sft_ptq_nvfp4": Row("SFT + PTQ NVFP4", "sft", "nvfp4"),
    "sft_longer": Row("longer SFT BF16", "sft_longer", "bf16"),
    "sft_longer_ptq": Row("longer SFT + PTQ MXFP4", "sft_longer", "mxfp4"),
    "direct": Row("direct QAT MXFP4", "direct", "mxfp4"),
}
DEMO_ROWS = ("original", "sft", "sft_ptq", "qat_mxfp4", "qat_nvfp4")
RowName = Literal["original", "sft", "sft_ptq", "qat_mxfp4", "qat_nvfp4", "sft_ptq_nvfp4", "sft_longer", "sft_longer_ptq", "direct"]


class RecipeConfig(Section):
    model: str = "nano"
    output: str
    rows: tuple[RowName, ...] = tuple(ROWS)
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    # conversations of the two tasks and their guards that training sees (made anew for every seed)
    train_documents: PositiveInt
    # rows of conversations with exact answers; the nano tasks have a development and a final file
    evaluation: Literal["dev", "final"] = "final"
    eval_rows: PositiveInt = 16
    # of both stages; `model`, `output`, data files and seed are filled in
    sft: TrainConfig
    qat: TrainConfig


class Measured(Section):
    """One row of one seed: passed / total and a 95 % interval per task, loss per trained token of all evaluation rows,
    optimizer steps since the base."""

    row: RowName
    seed: int
    pass_rates: dict[str, tuple[int, int, float, float]]
    loss: float
    steps_trained: int

    def rate(self, task: str) -> float:
        return self.pass_rates[task][0] / self.pass_rates[task][1]


def _measure(name: RowName, seed: int, scores: Scores, steps: int) -> Measured:
    tasks = {task: scores.select(task=task) for task in ("A", "B", "H", "Eng")}
    tasks["A_other"] = tasks["A"].without(language="English")
    rates = {task: part.pass_rate() for task, part in tasks.items()}
    counts = {task: (rate.passed, rate.total, rate.low, rate.high) for task, rate in rates.items()}
    return Measured(row=name, seed=seed, pass_rates=counts, loss=scores.mean_loss(), steps_trained=steps)


class Recipe:
    """Runs the stages that its rows need, each once."""

    def __init__(self, config: RecipeConfig, say: Say = print):
        for name in ("sft", "qat"):
            stage = getattr(config, name)
            if stage.steps is None or stage.quant is not None or stage.model or stage.output or stage.data.train:
                raise UsageError(f"recipe: {name} sets steps, and leaves model, output, data files and quant to the recipe")
        if config.sft.compute_dtype != config.qat.compute_dtype:
            raise UsageError("recipe: sft and qat must compute in the same dtype, or the rows would not be comparable")
        self.config, self.say, self.root = config, say, Path(config.output)
        self.dtype = jnp.dtype(config.sft.compute_dtype)
        self.base = load_model(config.model, jnp.bfloat16)  # the upcast: MXFP4 decodes exactly to BF16
        self.predict = make_predict(self.base.config, self.dtype)
        tokenizer = load_tokenizer(self.base.directory)
        rows = load_rows(NANO / "tasks" / f"{config.evaluation}.jsonl").rows
        self.evaluation: EvaluationSet = make_evaluation_set(rows, tokenizer, config.sft.data.row_length, config.eval_rows)

    def run(self) -> list[Measured]:
        """All rows of all seeds, in the order of the config; `results.json` grows with every row."""
        self.root.mkdir(parents=True, exist_ok=True)
        file = self.root / "results.json"
        done = [Measured.model_validate(entry) for entry in json.loads(file.read_text())] if file.exists() else []
        found = {(m.row, m.seed): m for m in done}
        for seed in self.config.seeds:
            for name in self.config.rows:
                if (name, seed) not in found:
                    found[name, seed] = self._row(name, seed)
                    entries = [m.model_dump(mode="json") for m in found.values()]
                    file.write_text(json.dumps(entries, indent=1))
        return [found[name, seed] for name in self.config.rows for seed in self.config.seeds]

    # ---- one row --------------------------------------------------------------------------------------------------------------
    def _row(self, name: RowName, seed: int) -> Measured:
        row = ROWS[name]
        run, steps = self._stage(row.stage, seed)
        directory = self._export(name, row, seed, run)
        model = load_model(directory, self.dtype)
        measured = _measure(name, seed, score(self.predict(model.params), self.evaluation), steps)
        rates = ", ".join(f"{task} {measured.rate(task):.1%}" for task in ("A", "B", "H", "Eng"))
        self.say(f"[seed {seed}] {row.label}: {rates}, loss {measured.loss:.4f}")
        return measured

    def _export(self, name: str, row: Row, seed: int, run: Path | None) -> Path:
        """The exported directory of a row, verified; the base is what it is."""
        if run is None:
            return self.base.directory
        target = self.root / f"seed-{seed}" / "export" / name
        if target.exists():
            return target
        model = load_model(run, jnp.bfloat16)
        fmt = {"mxfp4": Mxfp4(), "nvfp4": Nvfp4(), "bf16": "bf16"}[row.format]
        export_hf(target, model.config, model.params, format=fmt, source_dir=model.directory, provenance=model.source)
        if model.code_hashes is not None:
            report = verify_dir(target, against=model.code_hashes)
            if not report.ok:
                raise RunError(f"{target}: the exported codes are not those that training computed: {report.failures[0]}")
            self.say(f"[seed {seed}] {row.label}: exported codes equal the trained ones ({len(model.code_hashes)} expert matrices)")
        return target

    # ---- stages ---------------------------------------------------------------------------------------------------------------
    def _stage(self, stage: Stage, seed: int) -> tuple[Path | None, int]:
        """(run directory, steps trained so far) of a stage, training what it needs."""
        sft, qat = self.config.sft, self.config.qat
        if stage == "base":
            return None, 0
        if stage == "sft":
            return self._train(stage, seed, sft, self.base), sft.steps
        if stage == "direct":
            longer = sft.model_copy(update={"steps": sft.steps + qat.steps, "quant": _quant("mxfp4")})
            return self._train(stage, seed, longer, self.base), longer.steps
        start, _ = self._stage("sft", seed)
        settings = qat if stage == "sft_longer" else qat.model_copy(update={"quant": _quant(stage.removeprefix("qat_"))})
        return self._train(stage, seed, settings, start), sft.steps + qat.steps

    def _train(self, stage: Stage, seed: int, settings: TrainConfig, start: Model | Path) -> Path:
        directory = self.root / f"seed-{seed}" / stage
        if orbax_store.latest_step(directory / orbax_store.CHECKPOINTS) == settings.steps:
            return directory
        data = self._data(seed)
        train = settings.model_copy(
            update={"model": str(start) if isinstance(start, Path) else self.config.model, "output": str(directory), "seed": seed,
                    "data": settings.data.model_copy(update={"train": str(data)})}
        )  # fmt: skip
        if not directory.exists():
            self.say(f"[seed {seed}] {stage}: {train.steps} steps, learning rate {train.optimizer.learning_rate:g}")
        run_stage(train, resume=directory.exists(), model=start if isinstance(start, Model) else None)
        return directory

    def _data(self, seed: int) -> Path:
        file = self.root / f"seed-{seed}" / "train.jsonl"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_jsonl(sft_rows(seed, self.config.train_documents), file)
        return file


def _quant(name: str) -> Any:
    return TrainConfig(quant={"format": name}).quant
