"""An experiment file: one question, the arms that answer it, and what they share.

    name: e3-estimators
    question: Does it matter how the gradient passes the rounding?
    seeds: [0, 1, 2]
    arm: {steps: 60, format: mxfp4}                         # settings of every arm, over the defaults of `Arm`
    grid:                                                   # all combinations
      estimator: [ste, {name: dge, k: 5}, ewgs]             # a setting of an arm and its values, or
      regime: {2e-4: {sft: {learning_rate: 2e-4}}, ...}     # any name, with the settings of each level
    arms: {SFT + PTQ: {steps: 0}}                           # beside the grid
    reference: {estimator: ste}                             # differences are taken to the arm that has this level, all else equal

An arm is: base model -> [noise] -> SFT -> further training through a quantizer -> export format -> measured on held-out conversations. What two arms
have in common up to some point is trained once (`stages.py`). Data, order of batches and random keys follow from the seed, so differences
between arms of one seed are paired.
"""

import difflib
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from gptoss_jax.errors import UsageError
from gptoss_jax.evaluation.tasks import SFT
from gptoss_jax.lab.parts import parse_export, quantizer_of, tools_of
from gptoss_jax.strict_yaml import merge
from gptoss_jax.training.config import PositiveFloat, PositiveInt, Ratio, Section
from gptoss_jax.training.yaml_config import parse_override, read_yaml

Seed = Annotated[int, Field(ge=0, lt=2**32)]
Spec = str | dict[str, Any]  # a name, or a name with options


class SftSettings(Section):
    """The unquantized fine-tuning that most arms begin with."""

    steps: PositiveInt = 200
    learning_rate: PositiveFloat = 2e-4
    min_ratio: Ratio = 0.1


class Arm(Section):
    """One way from the base to deployed weights."""

    start: Literal["base", "sft"] = "sft"
    sft: SftSettings = SftSettings()
    # before SFT, expert weights move within their rounding cell by up to this share of its width, uniformly; 0: the base as it is
    base_noise: Ratio = 0.0
    # of the training that follows; 0: none
    steps: Annotated[int, Field(ge=0)] = 60
    learning_rate: PositiveFloat = 1e-4
    min_ratio: Ratio = 0.1
    # what it goes through: nothing, fake quantization with an estimator, or another quantizer of the format (`parts.py` has the names)
    format: Spec | None = None
    estimator: Spec = "ste"
    # which weight the gradient of an expert's input goes through (`quant/two_way.py`)
    backward_weight: Literal["quantized", "original"] = "quantized"
    quantizer: Spec | None = None
    tools: tuple[Spec, ...] = ()
    # weight of the divergence from the SFT model in the loss; cross-entropy has the rest
    distill: Ratio = 0.0
    # what is measured: the quantizer's own rounding ("same"), "bf16", or the masters in another format
    export: Spec = "same"

    @model_validator(mode="after")
    def _consistent(self):
        if self.distill and self.start != "sft":
            raise ValueError("distill needs start: sft, whose model is the teacher")
        if self.backward_weight != "quantized" and (self.format is None or self.quantizer is not None):
            raise ValueError("backward_weight is for fake quantization: it needs a format and no quantizer")
        if self.quantizer is not None and (self.format is None or self.estimator != "ste"):
            raise ValueError("quantizer needs a format, and takes the place of fake quantization with an estimator")
        if not self.steps and (self.tools or self.distill):
            raise ValueError("steps: 0 is no training, so tools and distill mean nothing")
        quantizer_of(self), tools_of(self), parse_export(self.export)
        return self


class Data(Section):
    """Training conversations of the nano tasks, made from the seed."""

    documents: PositiveInt = 20000
    row_length: PositiveInt = 128
    rows: PositiveInt = 16  # of a batch


class EvaluationSet(Section):
    """`dev` is where settings are chosen; `fresh` shares no question with any set looked at before (see `held_out.py`)."""

    set: Literal["dev", "fresh"] = "fresh"
    rows: dict[Literal[*SFT], PositiveInt] = Field(default={"A": 500, "B": 300, "H": 100, "Eng": 100}, min_length=1)
    # the held-out loss of the deployed weights is measured every so many steps on every eighth row
    curve_every: PositiveInt | None = 20


class Experiment(Section):
    """All of it. `arm` and the levels of `grid` are partial settings of an `Arm`."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")]
    question: str
    expected: str = ""
    model: str = "nano"
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0, 1, 2)
    data: Data = Data()
    evaluation: EvaluationSet = EvaluationSet()
    arm: dict[str, Any] = Field(default_factory=dict)
    grid: dict[str, list[Any] | dict[str, dict[str, Any]]] = Field(default_factory=dict)
    arms: dict[str, dict[str, Any]] = Field(default_factory=dict)
    reference: str | dict[str, str] | None = None

    @field_validator("grid")
    @classmethod
    def _levels(cls, grid):
        for factor, levels in grid.items():
            if not levels:
                raise ValueError(f"{factor}: no levels")
            if isinstance(levels, list) and factor not in Arm.model_fields:
                near = difflib.get_close_matches(factor, Arm.model_fields, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"settings are {', '.join(Arm.model_fields)}"
                raise ValueError(f"{factor}: a list gives the values of a setting of an arm, and this is none; {hint}")
        return grid


@dataclass(frozen=True)
class NamedArm:
    """An arm with the levels that make its name: `{factor: label}`, or `{"arm": name}` for one beside the grid."""

    levels: Mapping[str, str]
    settings: Arm

    @property
    def name(self) -> str:
        return ", ".join(self.levels.values())


def expand(experiment: Experiment, where: str) -> list[NamedArm]:
    """All arms, those of the grid first.

    Raises:
      UsageError: settings that are no arm, two arms of one name, no arm, or a reference that is none of them.
    """
    arms = []
    factors = [[(factor, label, settings) for label, settings in _levels(factor, levels)] for factor, levels in experiment.grid.items()]
    for chosen in itertools.product(*factors) if factors else ():
        levels = {factor: label for factor, label, _ in chosen}
        arms.append(_arm(levels, experiment, [settings for _, _, settings in chosen], where))
    arms += [_arm({"arm": name}, experiment, [settings], where) for name, settings in experiment.arms.items()]
    names = [arm.name for arm in arms]
    if not arms:
        raise UsageError(f"{where}: no arms: give grid or arms")
    if len(set(names)) < len(names):
        raise UsageError(f"{where}: two arms are called {next(name for name in names if names.count(name) > 1)!r}")
    if experiment.reference is not None and not any(reference_of(experiment, arms, arm) for arm in arms):
        raise UsageError(f"{where}: reference = {experiment.reference!r} is no arm; there is {'; '.join(names)}")
    return arms


def reference_of(experiment: Experiment, arms: Sequence[NamedArm], arm: NamedArm) -> NamedArm | None:
    """The arm that this one is compared with."""
    wanted = experiment.reference
    if wanted is None:
        return None
    if isinstance(wanted, str):
        return next((other for other in arms if other.name == wanted), None)
    levels = {**arm.levels, **wanted} if wanted.keys() <= arm.levels.keys() else wanted
    return next((other for other in arms if other.levels == levels), None)


def _levels(factor: str, levels: list[Any] | dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """(label, settings) of each level."""
    if isinstance(levels, dict):
        return list(levels.items())
    return [(_label(value), {factor: value}) for value in levels]


def _label(value: Any) -> str:
    """`dge k=5` of {name: dge, k: 5}; numbers and names as they are."""
    if isinstance(value, dict):
        rest = (f"{key}={_label(option)}" for key, option in value.items() if key != "name")
        return " ".join([str(value.get("name", "")), *rest]).strip()
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def _arm(levels: Mapping[str, str], experiment: Experiment, parts: list[dict[str, Any]], where: str) -> NamedArm:
    """Settings over each other: of `sft` key by key, of everything else as a whole."""
    values: dict[str, Any] = {}
    for part in (experiment.arm, *parts):
        sft = {**values.get("sft", {}), **part["sft"]} if isinstance(part.get("sft"), dict) else values.get("sft")
        values = {**values, **part, **({} if sft is None else {"sft": sft})}
    return NamedArm(levels, _validate(Arm, values, f"{where}: arm {', '.join(levels.values())!r}"))


def _validate(kind: type[Section], values: dict[str, Any], where: str) -> Any:
    """Raises UsageError with the first bad key, and the nearest known one of an unknown key."""
    try:
        return kind.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        first = min(error.errors(), key=lambda entry: entry["type"] != "extra_forbidden")
        path = [str(part) for part in first["loc"] if part not in ("str", "dict[str,any]")]
        reason = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            section: Any = kind
            for part in first["loc"][:-1]:
                section = section.model_fields[part].annotation
            near = difflib.get_close_matches(path[-1], section.model_fields, n=1, cutoff=0.5)
            reason = "unknown key" + (f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(section.model_fields)}")
        given = "" if isinstance(first["input"], dict | BaseModel) or first["type"] in ("extra_forbidden", "missing") else f" = {first['input']!r}"
        raise UsageError(f"{where}: {'.'.join(path)}{given}: {reason}" if path else f"{where}: {reason}") from None


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Experiment, list[NamedArm]]:
    """The experiment of a file with its arms; dotted overrides over the file.

    Raises:
      UsageError: anything that is not a valid experiment, in one line.
    """
    values = read_yaml(path)
    for text in overrides:
        values = merge(values, parse_override(text))
    experiment = _validate(Experiment, values, str(path))
    return experiment, expand(experiment, str(path))


def fingerprint(values: Any) -> str:
    """16 hexadecimal digits of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

