"""One stage of training from its config alone: model, data, mesh, loop. SFT and QAT are the same stage with and without `quant`.

A QAT stage starts from the parameters of the SFT stage (its run directory, or a safetensors directory) with a fresh optimizer and schedule.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console

from gptoss_jax.checkpoint.models import Model, carried_files, load_base, load_model, look_at, lora_record
from gptoss_jax.data import BatchStream, Packed, Pipeline, System, load_tokenizer, one_pass, report, shared_warning, training_and_held_out
from gptoss_jax.errors import UsageError
from gptoss_jax.formats import Mxfp4, Nvfp4
from gptoss_jax.model import GptOssConfig, abstract_params
from gptoss_jax.model.lora import LORA_A, abstract_adapters
from gptoss_jax.quant import QuantPolicy, make_expert_quant
from gptoss_jax.quant.policy import EXPERT_PROJECTIONS
from gptoss_jax.sharding import local_rows, make_mesh
from gptoss_jax.sharding.distributed import check_same, is_first
from gptoss_jax.training.config import DataConfig, LoraConfig, Mxfp4Quant, Nvfp4Quant, TrainConfig
from gptoss_jax.training.console import Progress
from gptoss_jax.training.environment import environment
from gptoss_jax.training.loop import Trainer
from gptoss_jax.training.plan import Layout, evaluate, present_device, proposed_mesh
from gptoss_jax.training.run_dir import RunDir
from gptoss_jax.training.step import Shardings, TrainState
from gptoss_jax.training.task_rates import TaskRates
from gptoss_jax.training.teacher import load_teacher
from gptoss_jax.training.yaml_config import dump_config

HOW_TO_GIVE_DATA = """: give data.train=FILE (.jsonl, .json, .parquet, a directory, or a hub name), with one conversation a line, as
  {"messages": [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]}
  {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "thinking": "A greeting.", "content": "Hello."}]}
`gptoss-jax data inspect FILE` shows what training makes of it"""  # noqa: E501


def number_format(quant: Mxfp4Quant | Nvfp4Quant) -> Mxfp4 | Nvfp4:
    """The format that a `quant` section names."""
    return Mxfp4(scale_rule=quant.scale_rule) if quant.format == "mxfp4" else Nvfp4(global_scale=quant.global_scale)


def quant_policy(train: TrainConfig, config: GptOssConfig) -> QuantPolicy | None:
    """The fake quantization that a config asks for, checked against the model; None for SFT.

    Raises:
      UsageError: a rule that matches nothing, or that cannot be carried out.
    """
    if train.quant is None:
        return None
    fmt = number_format(train.quant)
    try:
        patterns = (EXPERT_PROJECTIONS,) if train.quant.rules is None else train.quant.rules
        rules, quant = tuple((pattern, fmt) for pattern in patterns), train.quant
        policy = QuantPolicy(rules, quant.estimator, quant.backward_weight, quant.activations)
        policy.match(abstract_params(config))
        make_expert_quant(policy, jnp.dtype(train.compute_dtype))
    except ValueError as error:
        raise UsageError(f"config: quant: {error}") from None
    return policy


def describe_adapters(lora: LoraConfig, config: GptOssConfig) -> str:
    """What is adapted, in one line.

    Raises:
      UsageError: targets or layers that the model does not have.
    """
    try:
        shapes = abstract_adapters(config, lora.spec)
    except ValueError as error:
        raise UsageError(f"config: lora: {error}") from None
    names = sorted({name.split(".", 2)[2].removesuffix(LORA_A) for name in shapes if name.endswith(LORA_A)})
    layers = "" if lora.expert_layers is None else f" (experts of layers {', '.join(map(str, lora.expert_layers))})"
    count = sum(leaf.size for leaf in shapes.values())
    return f"adapters of rank {lora.rank}, scale {lora.spec.scale:g}, on {', '.join(names)}{layers}: {count:,} parameters; base {lora.base}, frozen"


def data_pipeline(data: DataConfig, tokenizer: Any) -> Pipeline:
    """How the `data` section turns conversations into rows."""
    return Pipeline(
        tokenizer, data.row_length, packing=data.packing, train_on=data.loss, too_long=data.too_long, skip_bad_rows=data.skip_bad_rows,
        system=System(data.system_date, data.reasoning_effort, data.builtin_tools) if data.system_date else None,
    )  # fmt: skip


def load_packed(data: DataConfig, tokenizer: Any, progress: Progress) -> tuple[Packed, Packed | None]:
    """Training and evaluation rows, read, tokenized and packed as the config says. What they hold and what looks wrong goes to `progress`.

    Raises:
      CorruptError: bad rows. UsageError: no such source, or nothing to train on in one of the sets.
    """
    pipeline = data_pipeline(data, tokenizer)
    with progress.reading() as tick:
        corpus = pipeline.tokenize(data.sources("train"), tick, together=True)
        held_out = pipeline.tokenize(data.sources("eval"), tick, together=True) if data.eval else None
    training, evaluation = training_and_held_out(corpus, held_out, data.eval_fraction, data.split_seed)
    sets = {"train": training} | ({} if evaluation is None else {"eval": evaluation})
    reports = [report(name, selected, pipeline) for name, selected in sets.items()]
    for line in (line for counts in reports for line in counts.describe()):
        progress.note(line)
    for warning in [*(line for counts in reports for line in counts.warnings()), *shared_warning(training, evaluation)]:
        progress.note(f"WARNING: {warning}")
    packed = {name: pipeline.pack(f"data.{name}", selected) for name, selected in sets.items()}
    return packed["train"], packed.get("eval")


def with_mesh(train: TrainConfig, config: GptOssConfig) -> TrainConfig:
    """The config with `mesh: auto` resolved for all devices present.

    Raises:
      UsageError: no mesh fits, or the kind of device is unknown.
    """
    if not train.mesh.auto:
        return train
    return train.model_copy(update={"mesh": proposed_mesh(config, train, present_device(), len(jax.devices()))})


def make_shardings(train: TrainConfig, config: GptOssConfig) -> Shardings | None:
    """Layout on the mesh of the config; None on one device.

    Raises:
      UsageError: processes whose devices the mesh leaves out: they would have nothing to do.
    """
    processes, devices = jax.process_count(), jax.device_count()
    if processes > 1 and train.mesh.size != devices:
        raise UsageError(f"config: mesh has {train.mesh.size} devices, but {processes} processes with {devices} devices take part")
    if train.mesh.size == 1:
        return None
    return Shardings.on(config, make_mesh(**train.mesh.model_dump()), transport=train.expert_transport)


class Prepared(NamedTuple):
    """All of a stage but its weights: what its config names was found, read and checked."""

    config: GptOssConfig
    directory: Path  # of the model
    train: TrainConfig  # with steps and mesh known
    policy: QuantPolicy | None
    shardings: Shardings | None
    tokenizer: Any
    packed: Packed
    held_out: Packed | None
    rates: TaskRates | None


def prepare(train: TrainConfig, progress: Progress, model: Model | None = None) -> Prepared:
    """Everything that can be checked before weights are read; `progress` is told what was found.

    Raises:
      UsageError: the parts of the config do not fit together, or to the model or the devices. CorruptError: bad rows.
    """
    config, directory = (model.config, model.directory) if model else look_at(train.model)
    policy = quant_policy(train, config)
    automatic, train = train.mesh.auto, with_mesh(train, config)
    shardings = make_shardings(train, config)
    tokenizer = load_tokenizer(directory)
    packed, held_out = load_packed(train.data, tokenizer, progress)
    train = train.with_steps(len(packed.rows.tokens_BT))
    progress.steps = train.steps
    if automatic:
        progress.note(f"mesh: auto -> {train.mesh} on {len(jax.devices())} devices")
    progress.note(f"{Path(train.output).name}: {packed.describe()}")
    rates = TaskRates(train.eval_tasks, config, policy, tokenizer, train.compute_dtype, Path(train.output)) if train.eval_tasks else None
    if policy is not None:
        progress.note(policy.describe(abstract_params(config)))
    if train.lora:
        progress.note(describe_adapters(train.lora, config))
    return Prepared(config, directory, train, policy, shardings, tokenizer, packed, held_out, rates)


def check_named(train: TrainConfig, model: Model | None = None) -> None:
    """Raises UsageError where the config names no model, data or output."""
    for name, value in (("model", train.model or model), ("data.train", train.data.train), ("output", train.output)):
        if not value:
            raise UsageError(f"config: {name} is not set{HOW_TO_GIVE_DATA if name == 'data.train' else ''}")


def dry_run(train: TrainConfig, progress: Progress) -> TrainConfig:
    """Checks a stage as far as that goes without weights, and estimates its memory on the devices present; writes nothing.

    Raises:
      UsageError, CorruptError: what `run_stage` would raise before it reads weights.
    """
    check_named(train)
    ready = prepare(train, progress)
    try:
        device = present_device()
    except UsageError:  # a card that plans know nothing about
        return ready.train
    if not ready.train.lora:  # frozen weights and adapters are not in the plan
        found = evaluate(Layout(ready.config, ready.train), device)
        peak, usable = (f"{n / 2**30:.2f} GiB" for n in (found.memory.peak, device.usable))
        where = f"each of {ready.train.mesh.size} x {device.name}"
        progress.note(f"memory, estimated: peak {peak} of {usable} on {where}: {'fits' if found.fits(device) else 'DOES NOT FIT'}")
    return ready.train


def run_stage(
    train: TrainConfig, *, resume: bool = False, overwrite: bool = False, model: Model | None = None, progress: Progress | None = None
) -> tuple[Path, TrainState]:
    """Trains one stage in `train.output`; returns the run directory and the final state.

    Args:
      resume: go on from the newest good checkpoint of that directory (from the beginning if there is none).
      overwrite: remove an earlier run there.
      model: the start, if it is loaded already (it stays usable); default `train.model`, whose weights are read last, after every other check.

    Raises:
      UsageError: the config names no model, data or output, or they do not fit together.
    """
    if train.lora:
        model = None  # adapters are checkpointed with the name of their base, which is read in its own dtype
    check_named(train, model)
    # products of float32 are TF32 on a GPU unless asked otherwise
    precision = jax.default_matmul_precision("highest") if train.compute_dtype == "float32" else nullcontext()
    with RunDir(train.output, resume=resume, overwrite=overwrite) as run, precision:
        progress = progress or Progress(console=None if is_first() else Console(quiet=True))
        config, directory, train, policy, shardings, tokenizer, packed, held_out, rates = prepare(train, progress, model)
        share = local_rows(train.batch.rows, train.data.row_length, shardings.batch) if shardings else slice(None)
        batches = BatchStream(packed.rows, train.batch.rows, train.seed, tokenizer, share)
        check_same("the training data or the tokenizer", batches.digest())
        trainer = Trainer(
            config,
            train,
            run,
            batches,
            policy=policy,
            eval_batches=(lambda: one_pass(held_out.rows, train.batch.rows, share)) if held_out else None,
            measure=rates,
            shardings=shardings,
            teacher=load_teacher(train, config, shardings) if train.distill else None,
            assets=carried_files(directory),
            progress=progress,
        )
        if train.lora:
            base = load_base(train.model, train.lora.base)
            source = {**base.source, "lora": lora_record(train.lora.spec, train.lora.base, train.model, base.params)}
            if not resume or trainer.resume(base.params, source) is None:
                trainer.start(base.params, source=source, donate=True)
        elif not resume or trainer.resume() is None:
            start = model or load_model(train.model, jnp.dtype(train.master_dtype), shardings and shardings.params)
            trainer.start(start.params, source=start.source, donate=model is None)
        run.write_config(dump_config(train))
        run.record_start(environment(trainer.step))
        return run.path, trainer.fit()
