"""What a training run is: one frozen tree of settings, the same for SFT and QAT (which differ in `quant`).

Defaults are those of NVIDIA's gpt-oss recipe: AdamW at 2e-5, cosine to 10 % with 3 % warm-up, clip 1.0, 4096 tokens, 32 rows per step, one epoch,
BF16 compute on float32 masters. Two departures: the loss is on assistant tokens (`data.loss: all` gives the recipe's), rows are packed.
"""

import dataclasses
import datetime
import difflib
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    Tag,
    ValidationError,
    model_serializer,
    model_validator,
)

from gptoss_jax.data.sources import Source
from gptoss_jax.errors import UsageError
from gptoss_jax.formats import Format, format_from_dict, get_format
from gptoss_jax.model.lora import LoraSpec
from gptoss_jax.quant.estimators import Estimator, Ste, estimator_from_dict, estimator_to_dict, get_estimator
from gptoss_jax.sharding.experts import Transport

Ratio = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    # allow_inf_nan: 1e999 is infinite in YAML and JSON alike
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# a path, or a list of paths and of {path, weight, split, columns, limit, response} (data/sources.py)
_ListedSource = Annotated[Source, BeforeValidator(lambda value: Source(value) if isinstance(value, str) else value)]
Sources = Annotated[
    Annotated[str, Tag("path")] | Annotated[tuple[_ListedSource, ...], Tag("list"), Field(min_length=1)],
    Discriminator(
        lambda value: {str: "path", list: "list", tuple: "list"}.get(type(value)),
        custom_error_type="sources",
        custom_error_message="give a path, or a list of paths and of {path: ..., weight: ..., split: ..., columns: ..., limit: ...}",
    ),
]

Loss = Annotated[
    Annotated[Literal["assistant", "all", "analysis", "commentary", "final"], Tag("name")]
    | Annotated[tuple[Literal["analysis", "commentary", "final"], ...], Tag("list"), Field(min_length=1)],
    Discriminator(lambda value: "list" if isinstance(value, list | tuple) else "name"),
]


class DataConfig(Section):
    # file, directory, hub name owner/name[:config][@split], or a list of these with weights
    train: Sources | None = None
    eval: Sources | None = None
    # instead of `eval`: this share of the conversations of `train` is held out; the recipe has 0.1 with seed 42
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    # of the held-out share, and of what a weight takes of a source
    split_seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    # leave rows out that are no conversations, instead of refusing the set
    skip_bad_rows: bool = False
    row_length: PositiveInt = 4096
    packing: bool = True
    # which tokens carry the loss: all that the model writes, those of some of its channels, or every token
    loss: Loss = "assistant"
    # conversations longer than a row
    too_long: Literal["error", "truncate", "drop"] = "error"
    # the release's system message with this date (its own template writes the day on which it runs); None is no system message
    system_date: datetime.date | None = None
    reasoning_effort: Literal["low", "medium", "high"] = "medium"
    # that the system message declares
    builtin_tools: tuple[Literal["browser", "python"], ...] = ()

    @model_validator(mode="after")
    def _one_evaluation_set(self):
        if self.eval is not None and self.eval_fraction is not None:
            raise ValueError(f"eval = {self.eval} and eval_fraction = {self.eval_fraction} exclude each other")
        return self

    def sources(self, name: Literal["train", "eval"]) -> tuple[Source, ...]:
        """The list under `train` or `eval`; a path is a list of one."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else () if value is None else (Source(str(value)),)


class BatchConfig(Section):
    # rows of one optimizer step, on all devices together
    rows: PositiveInt = 32
    # microbatches that a step is cut into; changes memory, not the result
    accumulation: PositiveInt = 1

    @model_validator(mode="after")
    def _divides(self):
        if self.rows % self.accumulation:
            raise ValueError(f"rows = {self.rows} is not a multiple of accumulation = {self.accumulation}")
        return self


class OptimizerConfig(Section):
    name: Literal["adamw"] = "adamw"
    learning_rate: PositiveFloat = 2e-5
    b1: Momentum = 0.9
    b2: Momentum = 0.999
    eps: PositiveFloat = 1e-8
    # never applied to biases, norms, sinks, router and embeddings
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    # how Adam's moments are stored (training/moments.py): 4, 2 or 1 bytes per parameter; a factored second moment takes next to none
    first_moment: Literal["float32", "bfloat16", "int8"] = "float32"
    second_moment: Literal["float32", "int8", "factored"] = "float32"
    # bits below bfloat16 masters, kept beside the moments instead of rounding them off at random (training/rounding.py)
    master_residual: Literal["int8", "int16"] | None = None


class ScheduleConfig(Section):
    name: Literal["cosine"] = "cosine"
    min_ratio: Ratio = 0.1
    warmup_ratio: Ratio = 0.03


def _estimator(value: Any) -> Estimator:
    if isinstance(value, str | Estimator):
        return get_estimator(value)
    if isinstance(value, dict) and isinstance(value.get("name", ""), str):
        return estimator_from_dict(value)
    raise ValueError("give a name, or {name: ..., hyperparameter: ...}")


def _plain_estimator(estimator: Estimator) -> str | dict[str, Any]:
    plain = estimator_to_dict(estimator)
    return plain if len(plain) > 1 else estimator.name


# how the gradient of the quantized weight passes to the master (quant/estimators): a name, or {name: dge, k: 5}
QuantEstimator = Annotated[Any, BeforeValidator(_estimator), PlainSerializer(_plain_estimator)]


def _format(value: Any) -> Format | None:
    if value is None or isinstance(value, Format):
        return value
    if isinstance(value, dict):
        try:
            return format_from_dict(value)
        except TypeError as error:  # an option that is a list or a mapping
            raise ValueError(f"{error} in {value!r}") from None
    if isinstance(value, str):
        return get_format(value)
    raise ValueError("give a name, or {name: ..., option: ...}")


# a name, or {name: mxfp8, element: e5m2}
NumberFormat = Annotated[Any, BeforeValidator(_format), PlainSerializer(lambda fmt: fmt and fmt.to_dict())]


class ExpertQuantConfig(Section):
    """What the kinds of fake quantization have in common."""

    estimator: QuantEstimator = Ste()
    # which weight the gradient of an expert's input goes through
    backward_weight: Literal["quantized", "original"] = "quantized"
    # format that the inputs of both expert products are rounded to, as engines do that compute in 8 or 4 bits; None leaves them as they are
    activations: NumberFormat = None
    # name patterns of the weights to quantize; None is the expert projections
    rules: tuple[str, ...] | None = None


class Mxfp4Quant(ExpertQuantConfig):
    format: Literal["mxfp4"]
    scale_rule: Literal["rceil", "floor", "even", "mse"] = "rceil"


class Nvfp4Quant(ExpertQuantConfig):
    format: Literal["nvfp4"]
    global_scale: Literal["pow2", "exact"] = "pow2"


class Distillation(Section):
    """How a teacher's next-token probabilities enter the loss, see ops/distillation."""

    # of KL(teacher || student) in the loss; the rest is the cross-entropy
    weight: Annotated[float, Field(gt=0, le=1)] = 1.0
    temperature: PositiveFloat = 1.0


class DistillConfig(Distillation):
    """Training towards the probabilities of another model, which is held in the compute dtype beside the state."""

    # any model with the same vocabulary, by rule the SFT model that QAT starts from
    teacher: str


class LoraConfig(Section):
    """Adapters that are trained over a frozen model; nothing else is then trained, and checkpoints hold the adapters alone. See model/lora.py."""

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    # scale alpha / sqrt(rank) instead of alpha / rank
    rslora: bool = False
    # names, or patterns over parameter names, of projections of attention and experts
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = LoraSpec.targets
    # layers, from 0, whose experts are adapted; None is all
    expert_layers: tuple[int, ...] | None = None
    # how the frozen model is held: in bfloat16, in float32, or its experts as the MXFP4 codes of its files and the rest in bfloat16
    base: Literal["bfloat16", "float32", "mxfp4"] = "bfloat16"

    @property
    def spec(self) -> LoraSpec:
        return LoraSpec(self.rank, self.alpha, self.rslora, self.targets, self.expert_layers)


class MeshConfig(Section):
    """Devices along each axis of the mesh, see sharding/mesh.py; or `auto`: the layout that `gptoss-jax plan` proposes for the devices present."""

    data: PositiveInt = 1
    fsdp: PositiveInt = 1
    expert: PositiveInt = 1
    # cuts the rows: for rows too long for one device
    context: PositiveInt = 1
    # divides the key-value heads
    tensor: PositiveInt = 1
    auto: Annotated[bool, Field(exclude=True, repr=False)] = False

    @model_validator(mode="before")
    @classmethod
    def _read_auto(cls, value):
        return {"auto": True} if value == "auto" else value

    @model_validator(mode="after")
    def _auto_is_alone(self):
        if self.auto and self.size > 1:
            raise ValueError("auto chooses all sizes")
        return self

    @model_serializer(mode="wrap")
    def _write(self, plain):
        return "auto" if self.auto else plain(self)

    @property
    def size(self) -> int:
        return self.data * self.fsdp * self.expert * self.context * self.tensor

    @property
    def row_groups(self) -> int:
        """Groups of devices among which the rows of a batch are dealt."""
        return self.data * self.fsdp * self.expert


class TrainConfig(Section):
    """All settings of a run; `configs/` has examples."""

    # HF directory, OpenAI directory, Orbax checkpoint of ours, or hub id
    model: str | None = None
    output: str | None = None
    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    # exactly one of the two counts; with neither it is one epoch
    steps: PositiveInt | None = None
    epochs: PositiveFloat | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    # largest global norm of the gradient
    clip: PositiveFloat = 1.0
    # bfloat16 masters are updated with stochastic rounding: with plain rounding 85 % of them do not move at 1e-5
    master_dtype: Literal["float32", "bfloat16"] = "float32"
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # what the backward pass computes again: whole layers (least memory), all but matrix products (fastest), nothing
    remat: Literal["none", "products", "layer"] = "layer"
    # where masters become compute weights (a cast in SFT, fake quantization in QAT): inside each layer, so that one layer's are alive, or once
    # per step for all layers and microbatches, which holds them all
    cast_at: Literal["layer", "step"] = "layer"
    # attention and experts: Triton kernels on NVIDIA GPUs and XLA elsewhere (auto), or one of the two by name
    kernels: Literal["auto", "xla", "triton"] = "auto"
    quant: Annotated[Mxfp4Quant | Nvfp4Quant, Field(discriminator="format")] | None = None
    distill: DistillConfig | None = None
    lora: LoraConfig | None = None
    # parameter name patterns that are not trained
    freeze: tuple[str, ...] = ()
    # the release's config.json carries 0.9; a run asks for it or does without
    router_aux_loss_coef: Annotated[float, Field(ge=0)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    # in steps; the start (evaluation) and the end (both) come in any case
    eval_every: PositiveInt | None = None
    checkpoint_every: PositiveInt | None = None
    # a loss so many robust standard deviations above the median of the last 64 (training/spikes.py) is told and its batch kept; None: none is
    spike_sigmas: PositiveFloat | None = None
    # task files, or names of tasks that come along: pass rates of the present parameters, measured together with the evaluation loss
    eval_tasks: tuple[str, ...] = ()
    # newest checkpoints that stay on disk
    keep: PositiveInt = 2
    mesh: MeshConfig = MeshConfig()
    # how rows get to experts of other devices: to all by an all-gather, or only to those that hold their experts by `ragged_all_to_all`, which has
    # been compiled for GPUs, not run; auto takes the latter on GPUs where it is expected to send less than 3/4
    expert_transport: Transport = "auto"

    @model_validator(mode="after")
    def _consistent(self):
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"steps = {self.steps} and epochs = {self.epochs} exclude each other")
        if self.optimizer.master_residual is not None and self.master_dtype != "bfloat16":
            raise ValueError(
                f"optimizer.master_residual = {self.optimizer.master_residual} belongs to master_dtype bfloat16, not {self.master_dtype}"
            )
        if self.lora is not None:
            self._check_lora()
        microbatch = self.batch.rows // self.batch.accumulation
        if microbatch % self.mesh.row_groups:
            raise ValueError(
                f"a microbatch of {microbatch} rows (batch.rows / batch.accumulation) does not divide among "
                f"mesh.data * mesh.fsdp * mesh.expert = {self.mesh.row_groups} devices"
            )
        if self.data.row_length % self.mesh.context:
            raise ValueError(f"data.row_length = {self.data.row_length} does not divide by mesh.context = {self.mesh.context}")
        return self

    def _check_lora(self):
        if self.master_dtype != "float32":
            raise ValueError(f"master_dtype = {self.master_dtype}: adapters are float32; lora.base says how the frozen model is held")
        if self.mesh.size > 1 or self.mesh.auto:
            raise ValueError("lora runs on one device: leave mesh out")
        if self.cast_at != "layer":
            raise ValueError("cast_at = step would hold compute weights of all layers beside the frozen ones; lora takes cast_at layer")
        if self.quant is not None and (self.quant.estimator != Ste() or self.quant.backward_weight != "quantized"):
            raise ValueError("adapters are trained straight-through: lora takes no other quant.estimator or quant.backward_weight")

    def with_steps(self, num_rows: int) -> "TrainConfig":
        """The config with its length in steps, given the rows of one epoch (at least one step)."""
        if self.steps is not None:
            return self
        epochs = 1.0 if self.epochs is None else self.epochs
        return self.model_copy(update={"steps": max(1, int(num_rows * epochs / self.batch.rows)), "epochs": None})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML or JSON; `parse` reads them back."""
        return self.model_dump(mode="json")


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every setting in plain values."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def parse(raw: dict[str, Any], where: str = "config", lines: dict[tuple, int] | None = None) -> TrainConfig:
    """Validates plain values.

    Args:
      where: file name for the message.
      lines: line of each key path in that file, for the message.

    Raises:
      UsageError: naming the first bad key with its value, or the nearest known name of an unknown one.
    """
    try:
        # JSON in strict mode: lists are tuples and mappings are sections, but "3" is no number and "yes" no boolean
        return TrainConfig.model_validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        raise UsageError(_explain(error.errors()[0], where, lines or {})) from None


# pydantic puts the kind of a union into its error paths: quant.mxfp4.scale_rule, data.train.list.0.weight
_KINDS = {("quant",): ("mxfp4", "nvfp4"), ("data", "train"): ("path", "list"), ("data", "eval"): ("path", "list"), ("data", "loss"): ("name", "list")}


def _explain(error: dict, where: str, lines: dict[tuple, int]) -> str:
    loc = error["loc"]
    path = tuple(part for i, part in enumerate(loc) if part not in _KINDS.get(loc[:i], ()))
    place = f"{where}:{lines[path]}" if path in lines else where
    name = ".".join(str(part) for part in path)
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _known(loc[:-1])
        near = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)
        hint = f"; did you mean {'.'.join(map(str, (*path[:-1], near[0])))!r}?" if near else f"; known are {', '.join(known)}"
        return f"{place}: unknown key {name!r}{hint}"
    reason = error["msg"].removeprefix("Value error, ")
    given = "" if isinstance(error["input"], dict | BaseModel) else f" = {error['input']!r}"
    return f"{place}: {name}{given}: {reason}" if name else f"{place}: {reason}"


def _known(loc: tuple) -> list[str]:
    """Field names of the section at a pydantic error path."""
    if "list" in loc:
        return [field.name for field in dataclasses.fields(Source)]
    section: Any = TrainConfig
    for part in loc:
        if part in ("mxfp4", "nvfp4"):
            section = {"mxfp4": Mxfp4Quant, "nvfp4": Nvfp4Quant}[part]
        elif part != "quant":
            section = {"distill": DistillConfig, "lora": LoraConfig}.get(part) or section.model_fields[part].annotation
    return list(section.model_fields)
