"""One stage of training from its config alone: model, data, mesh, loop. SFT and QAT are the same stage with and without `quant`.

A QAT stage starts from the parameters of the SFT stage (its run directory, or a safetensors directory) with a fresh optimizer and schedule.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from gptoss_jax.checkpoint import orbax_store
from gptoss_jax.checkpoint.models import Model, carried_files, load_model
from gptoss_jax.checkpoint.source import open_checkpoint
from gptoss_jax.data import BatchStream, Packed, encode_conversations, load_rows, load_tokenizer, one_pass, pack, system_text
from gptoss_jax.errors import UsageError
from gptoss_jax.formats import Mxfp4, Nvfp4
from gptoss_jax.model import GptOssConfig, abstract_params
from gptoss_jax.quant import QuantPolicy, default_policy, make_expert_quant
from gptoss_jax.sharding import local_rows, make_mesh
from gptoss_jax.sharding.distributed import check_same, is_first
from gptoss_jax.training.config import DataConfig, TrainConfig
from gptoss_jax.training.console import Progress
from gptoss_jax.training.loop import Trainer
from gptoss_jax.training.plan import present_device, proposed_mesh
from gptoss_jax.training.run_dir import RunDir
from gptoss_jax.training.step import Shardings, TrainState
from gptoss_jax.training.yaml_config import dump_config


def quant_policy(train: TrainConfig, config: GptOssConfig) -> QuantPolicy | None:
    """The fake quantization that a config asks for, checked against the model; None for SFT.

    Raises:
      UsageError: a rule that matches nothing, or that cannot be carried out.
    """
    if train.quant is None:
        return None
    fmt = Mxfp4(scale_rule=train.quant.scale_rule) if train.quant.format == "mxfp4" else Nvfp4(global_scale=train.quant.global_scale)
    try:
        policy = default_policy(fmt) if train.quant.rules is None else QuantPolicy(tuple((pattern, fmt) for pattern in train.quant.rules))
        policy.match(abstract_params(config))
        make_expert_quant(policy, jnp.dtype(train.compute_dtype))
    except ValueError as error:
        raise UsageError(f"config: quant: {error}") from None
    return policy


def load_packed(path: str, tokenizer: Any, data: DataConfig) -> Packed:
    """Conversations of a file or directory, rendered, tokenized and packed as the config says."""
    system = system_text(data.system_date, data.reasoning_effort) if data.system_date else None
    documents = encode_conversations(load_rows(path).rows, tokenizer, system=system, train_on=data.loss)
    return pack(documents, data.row_length, packed=data.packing, too_long=data.too_long)


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
    return Shardings.on(config, make_mesh(**train.mesh.model_dump()))


def _look_at(path: str) -> tuple[GptOssConfig, Path]:
    """Architecture and tokenizer directory of a model, without its weights."""
    found = orbax_store.locate(path)
    if found is None:
        source = open_checkpoint(path)
        return source.config, source.path
    return GptOssConfig.from_dict(orbax_store.read_meta(*found).model), orbax_store.step_dir(*found) / orbax_store.ASSETS


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
    for name, value in (("model", train.model or model), ("data.train", train.data.train), ("output", train.output)):
        if not value:
            raise UsageError(f"config: {name} is not set")
    # products of float32 are TF32 on a GPU unless asked otherwise
    precision = jax.default_matmul_precision("highest") if train.compute_dtype == "float32" else nullcontext()
    with RunDir(train.output, resume=resume, overwrite=overwrite) as run, precision:
        config, directory = (model.config, model.directory) if model else _look_at(train.model)
        policy = quant_policy(train, config)
        automatic, train = train.mesh.auto, with_mesh(train, config)
        shardings = make_shardings(train, config)
        tokenizer = load_tokenizer(directory)
        packed = load_packed(train.data.train, tokenizer, train.data)
        held_out = load_packed(train.data.eval, tokenizer, train.data) if train.data.eval else None
        train = train.with_steps(len(packed.rows.tokens_BT))
        progress = progress or Progress(train.steps, None if is_first() else Console(quiet=True))
        if automatic:
            progress.note(f"mesh: auto -> {train.mesh} on {len(jax.devices())} devices")
        progress.note(f"{Path(train.output).name}: {packed.describe()}")
        if policy is not None:
            progress.note(policy.describe(abstract_params(config)))
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
            shardings=shardings,
            assets=carried_files(directory),
            progress=progress,
        )
        if not resume or trainer.resume() is None:
            start = model or load_model(train.model, jnp.dtype(train.master_dtype), shardings and shardings.params)
            trainer.start(start.params, source=start.source, donate=model is None)
        run.write_config(dump_config(train))
        return run.path, trainer.fit()
