"""The weights of a recipe: which runs there are, training them once, and exporting them in the format of a row."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from gptoss_jax.checkpoint import export_hf, orbax_store, verify_dir
from gptoss_jax.checkpoint.models import load_model
from gptoss_jax.errors import RunError
from gptoss_jax.evaluation.tasks import sft_rows, write_jsonl
from gptoss_jax.formats import Mxfp4, Nvfp4
from gptoss_jax.training.config import DataConfig, DistillConfig, TrainConfig
from gptoss_jax.training.recipe.config import NANO_DATA, RecipeConfig
from gptoss_jax.training.recipe.rows import ROWS, Stage
from gptoss_jax.training.run_dir import CONFIG
from gptoss_jax.training.stage import run_stage
from gptoss_jax.training.yaml_config import read_yaml

Say = Callable[[str], None]
_DEPENDS_ON: dict[str, tuple[str, ...]] = {"base": (), "sft": ("sft",)}  # whose settings a stage depends on; all others: both
_FORMATS = {"mxfp4": Mxfp4(), "mxfp4 sr": Mxfp4(element_round="sr", seed=0), "nvfp4": Nvfp4(), "bf16": "bf16"}


class Stages:
    """Runs and exports below one directory, `ROOT/[VARIANT/]seed-S/`; what is there is not made again.

    Args:
      shardings: of parameters that are loaded for an export; None puts them on the first device.
    """

    def __init__(self, config: RecipeConfig, say: Say, shardings: Any):
        self.config, self.say, self.shardings, self.root = config, say, shardings, Path(config.output)
        self.variants = {name: config.of_variant(name) for name in (config.variants or {"": {}})}

    def place(self, variant: str, seed: int) -> Path:
        return self.root / variant / f"seed-{seed}"

    def owner(self, stage: Stage, variant: str) -> str:
        """The first variant that trains this stage with the same settings; "" for the base, which is that of all."""
        if stage == "base":
            return ""
        settings = lambda name: [self.variants[name].stage(part) for part in _DEPENDS_ON.get(stage, ("sft", "qat"))]
        return next(name for name in self.variants if settings(name) == settings(variant))

    def label(self, row: str, variant: str) -> str:
        return ROWS[row].label + (f", {variant}" if len(self.variants) > 1 and variant else "")

    def run(self, stage: Stage, variant: str, seed: int) -> tuple[Path | str, int]:
        """(run directory or base model, steps trained since the base) of a stage, training what it needs."""
        if stage == "base":
            return self.config.model, 0
        config = self.variants[variant]
        sft, qat = config.stage("sft"), config.stage("qat")
        if stage == "sft":
            return self._train(stage, variant, seed, sft, config.model)
        if stage == "direct":
            length = {"steps": sft.steps + qat.steps} if sft.steps else {"epochs": (sft.epochs or 1.0) + (qat.epochs or 1.0)}
            return self._train(stage, variant, seed, sft.model_copy(update={**length, "quant": _quant("mxfp4")}), config.model)
        start, before = self.run("sft", self.owner("sft", variant), seed)
        settings = qat if stage == "sft_longer" else qat.model_copy(update={"quant": _quant(stage.partition("_")[2])})
        if stage.startswith("qad"):
            settings = settings.model_copy(update={"distill": DistillConfig(teacher=str(start), **config.qad.model_dump())})
        directory, steps = self._train(stage, variant, seed, settings, str(start))
        return directory, before + steps

    def _train(self, stage: Stage, variant: str, seed: int, settings: TrainConfig, start: str) -> tuple[Path, int]:
        """(run directory, steps) of a finished stage."""
        directory = self.place(variant, seed) / stage
        finished = orbax_store.latest_step(directory / orbax_store.CHECKPOINTS)
        if finished is None or finished != read_yaml(directory / CONFIG).get("steps"):
            train = settings.model_copy(update={"model": start, "output": str(directory), "seed": seed, "data": self._data(settings, variant, seed)})
            if not directory.exists():
                length = f"{train.steps} steps" if train.steps else f"{train.epochs or 1:g} epochs"
                self.say(f"[seed {seed}] {variant and variant + ', '}{stage}: {length}, learning rate {train.optimizer.learning_rate:g}")
            _, state = run_stage(train, resume=directory.exists())
            finished = int(state.step)
        return directory, finished

    def _data(self, settings: TrainConfig, variant: str, seed: int) -> DataConfig:
        """The data settings of a stage, with nano's conversations written out."""
        if settings.data.train != NANO_DATA:
            return settings.data
        file = self.place(variant, seed) / "train.jsonl"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_jsonl(sft_rows(seed, self.config.train_documents), file)
        return settings.data.model_copy(update={"train": str(file)})

    def export(self, name: str, variant: str, seed: int, run: Path | str) -> Path | str:
        """The exported model of a row, verified; the base is what it is."""
        row, target = ROWS[name], self.place(variant, seed) / "export" / name
        if row.stage == "base":
            return run
        if target.exists():
            return target
        model = load_model(run, jnp.bfloat16, self.shardings)
        export_hf(target, model.config, model.params, format=_FORMATS[row.format], source_dir=model.directory, provenance=model.source)
        if model.code_hashes is not None:
            report = verify_dir(target, against=model.code_hashes)
            if not report.ok:
                raise RunError(f"{target}: the exported codes are not those that training computed: {report.failures[0]}")
            count = len(model.code_hashes)
            self.say(f"[seed {seed}] {self.label(name, variant)}: exported codes equal the trained ones ({count} expert matrices)")
        return target


def _quant(name: str) -> Any:
    return TrainConfig(quant={"format": name}).quant
