"""A recipe file: model, data, tasks, rows, seeds, variants, the two stages, and the gate.

    model: openai/gpt-oss-20b
    output: runs/mine
    data: {train: train.jsonl, eval: held_out.jsonl, row_length: 4096}     # of both stages; eval: what the loss column is measured on
    tasks: [{file: tasks/mine.yaml, title: my question}]                   # beside the recipe file; a task without data asks about `data.eval`
    rows: [original, sft, sft_ptq, qat_mxfp4]
    seeds: [0, 1, 2]
    variants: {lr_1e-5: {}, lr_5e-6: {qat.optimizer.learning_rate: 5e-6}}  # every row and seed for each; stages with equal settings run once
    sft: {epochs: 1, optimizer: {learning_rate: 2e-5}}
    qat: {epochs: 1, optimizer: {learning_rate: 1e-5}}
    gate: {min_pass: {mine: 0.9}}                                          # see gate.py

`data.train: nano` are the conversations of the nano tasks, made anew for every seed.
"""

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from gptoss_jax.errors import UsageError
from gptoss_jax.strict_yaml import merge
from gptoss_jax.training.config import DataConfig, Distillation, PositiveInt, Section, TrainConfig
from gptoss_jax.training.recipe.gate import GateConfig
from gptoss_jax.training.recipe.rows import ROWS, NvidiaTask, RowName
from gptoss_jax.training.yaml_config import parse_override, read_yaml

NANO_DATA = "nano"
VARIANT_SECTIONS = ("sft", "qat", "data")


class TaskEntry(Section):
    """A task file, or the name of a task that comes along, with the title of its column, NVIDIA's task beside it, and limits over the file's."""

    file: str
    title: str | None = None
    limit: PositiveInt | None = None
    max_new_tokens: PositiveInt | None = None
    nvidia: NvidiaTask | None = None


NANO_TASKS = (
    TaskEntry(file="A", title="A: language asked for", nvidia="multilingual"), TaskEntry(file="B", title="B: answered", nvidia="over_refusal"),
    TaskEntry(file="H", title="H: refused"), TaskEntry(file="Eng", title="English kept"),
)  # fmt: skip


class RecipeConfig(Section):
    model: str = "nano"
    output: str
    data: DataConfig = DataConfig()
    # data.train: nano: how many conversations of its tasks and their guards
    train_documents: PositiveInt | None = None
    # which file of a task that has several
    evaluation: Literal["dev", "final"] = "final"
    tasks: Annotated[tuple[TaskEntry, ...], Field(min_length=1)] = NANO_TASKS
    rows: Annotated[tuple[RowName, ...], Field(min_length=1)] = tuple(ROWS)
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    # name -> dotted settings of sft, qat and data over those below; none: the recipe as it stands
    variants: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.+-]*$")], dict[str, Any]] = Field(default_factory=dict)
    # `model`, `output`, `quant`, `distill` and `seed` are filled in; what a stage says about `data` goes before the recipe's
    sft: TrainConfig
    qat: TrainConfig
    # of the stage qad_mxfp4: QAT with the settings of `qat` towards the probabilities of the SFT model
    qad: Distillation = Distillation()
    gate: GateConfig | None = None

    @model_validator(mode="after")
    def _consistent(self):
        for name in ("sft", "qat"):
            stage: TrainConfig = getattr(self, name)
            if stage.quant is not None or stage.distill or stage.model or stage.output or stage.data.train or stage.data.eval:
                raise ValueError(f"{name} leaves model, output, data files, quant and distill to the recipe")
        if self.sft.compute_dtype != self.qat.compute_dtype:
            raise ValueError("sft and qat must compute in the same dtype, or the rows would not be comparable")
        if self.data.train is None:
            raise ValueError("data.train is not set: a file, or nano")
        if (self.data.train == NANO_DATA) != (self.train_documents is not None):
            raise ValueError("train_documents and data.train: nano belong together")
        if "direct" in self.rows and (self.sft.steps is None) != (self.qat.steps is None):
            raise ValueError("the row direct needs the steps of both stages, or epochs of both")
        if self.gate and "original" in self.gate.rows:
            raise ValueError("gate: the original is no export of the recipe")
        if self.gate and not set(self.gate.rows) & set(self.rows):
            raise ValueError(f"gate: it is for {', '.join(self.gate.rows)}, and none of these is among the rows")
        if self.gate and self.gate.needs_reference and "sft" not in self.rows:
            raise ValueError("gate: max_drop and max_loss_increase compare with the row sft, which is not among the rows")
        for name, settings in self.variants.items():
            for key in settings:
                if key.partition(".")[0] not in VARIANT_SECTIONS:
                    raise ValueError(f"variants: {name}: {key!r} does not begin with {', '.join(VARIANT_SECTIONS[:-1])} or {VARIANT_SECTIONS[-1]}")
            self.of_variant(name)
        return self

    def stage(self, name: Literal["sft", "qat"]) -> TrainConfig:
        """Settings of a stage with the recipe's data under its own."""
        stage: TrainConfig = getattr(self, name)
        data = self.data.model_copy(update={key: getattr(stage.data, key) for key in stage.data.model_fields_set})
        return stage.model_copy(update={"data": data})

    def of_variant(self, name: str) -> "RecipeConfig":
        """The recipe with the settings of one variant, and without variants; "" is the recipe itself."""
        values = self.model_dump(mode="json", exclude_unset=True)
        for key, value in values.pop("variants", {}).get(name, {}).items():
            nested: Any = value
            for part in reversed(key.split(".")):
                nested = {part: nested}
            values = merge(values, nested)
        return parse_recipe(values, f"variants: {name}") if name else self


def parse_recipe(values: dict[str, Any], where: str) -> RecipeConfig:
    """Validates plain values.

    Raises:
      UsageError: naming the first bad key, and the nearest known one of an unknown key.
    """
    try:
        return RecipeConfig.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        # a misspelt key is the cause of the missing one beside it
        first = min(error.errors(), key=lambda entry: entry["type"] != "extra_forbidden")
        path = [str(part) for part in first["loc"]]
        reason = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            known = _fields(first["loc"][:-1])
            near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
            reason = "unknown key" + (f"; did you mean {'.'.join([*path[:-1], near[0]])!r}?" if near else f"; known are {', '.join(known)}")
        given = "" if isinstance(first["input"], dict | list | BaseModel) or first["type"] == "extra_forbidden" else f" = {first['input']!r}"
        raise UsageError(f"{where}: {'.'.join(path)}{given}: {reason}" if path else f"{where}: {reason}") from None


def _fields(path: Sequence[Any]) -> list[str]:
    """Field names of the section at a pydantic error path."""
    section: Any = RecipeConfig
    for part in path:
        annotation = section.model_fields[part].annotation if part in getattr(section, "model_fields", {}) else section
        kinds = [kind for kind in (annotation, *getattr(annotation, "__args__", ())) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        section = kinds[0] if kinds else section
    return list(section.model_fields)


def load_recipe(path: str | Path, overrides: Sequence[str] = (), output: str | Path | None = None) -> RecipeConfig:
    """The recipe of a file, dotted overrides over it. Task files and the guard are looked for beside the file, then from where the command runs.

    Raises:
      UsageError: anything that is not a valid recipe, in one line.
    """
    values = read_yaml(path)
    for text in overrides:
        values = merge(values, parse_override(text))
    if output is not None:
        values["output"] = str(output)
    config = parse_recipe(values, str(path))
    folder = Path(path).parent
    near = lambda name: str(folder / name) if (folder / name).is_file() else name
    tasks = tuple(entry.model_copy(update={"file": near(entry.file)}) for entry in config.tasks)
    gate = config.gate and config.gate.model_copy(update={"guard": near(config.gate.guard)} if config.gate.guard else {})
    return config.model_copy(update={"tasks": tasks, "gate": gate})
