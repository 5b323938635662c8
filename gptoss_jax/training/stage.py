"""One stage of training from its config alone: model, data, mesh, loop. SFT and QAT are the same stage with and without `quant`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from gptoss_jax.checkpoint.models import Model, carried_files, load_model
from gptoss_jax.data.batches import BatchStream
from gptoss_jax.data.harmony import encode_conversations, load_tokenizer, system_text
from gptoss_jax.data.packing import Batch, Packed, pack
from gptoss_jax.data.sources import load_rows
from gptoss_jax.errors import UsageError
from gptoss_jax.formats import Mxfp4, Nvfp4
from gptoss_jax.model import abstract_params
from gptoss_jax.quant import QuantPolicy, default_policy
from gptoss_jax.sharding import batch_sharding, make_mesh, param_shardings, replicated
from gptoss_jax.training.config import DataConfig, TrainConfig
from gptoss_jax.training.console import Progress
from gptoss_jax.training.loop import Trainer
from gptoss_jax.training.run_dir import RunDir
from gptoss_jax.training.step import Shardings, TrainState
from gptoss_jax.training.yaml_config import dump_config


def quant_policy(train: TrainConfig) -> QuantPolicy | None:
    """The fake quantization that a config asks for."""
    if train.quant is None:
        return None
    fmt = Mxfp4(scale_rule=train.quant.scale_rule) if train.quant.format == "mxfp4" else Nvfp4(global_scale=train.quant.global_scale)
    return default_policy(fmt) if train.quant.rules is None else QuantPolicy(tuple((pattern, fmt) for pattern in train.quant.rules))


def load_packed(path: str, tokenizer: Any, data: DataConfig) -> Packed:
    """Conversations of a file or directory, rendered, tokenized and packed as the config says."""
    system = system_text(data.system_date) if data.system == "release" else None
    documents = encode_conversations(load_rows(path).rows, tokenizer, system=system, train_on=data.loss)
    return pack(documents, data.row_length, packed=data.packing, too_long=data.too_long)


def _eval_batches(rows: Batch, batch_size: int) -> Callable[[], Any]:
    """A pass over all rows in order; the last batch is filled with padding rows."""
    total = len(rows.tokens_BT)

    def batches():
        for start in range(0, total, batch_size):
            part = Batch(*(array[start : start + batch_size] for array in rows))
            missing = batch_size - len(part.tokens_BT)
            if missing:
                zeros = (array[:1].repeat(missing, axis=0) * 0 for array in part)
                part = Batch(*(jnp.concatenate([array, zero]) for array, zero in zip(part, zeros)))
            yield part

    return batches


def make_shardings(train: TrainConfig, config) -> Shardings | None:
    """Layout on the mesh of the config; None on one device."""
    if train.mesh.size == 1:
        return None
    mesh = make_mesh(data=train.mesh.data, fsdp=train.mesh.fsdp)
    return Shardings(param_shardings(config, mesh), batch_sharding(mesh), replicated(mesh))


def run_stage(
    train: TrainConfig, *, resume: bool = False, overwrite: bool = False, model: Model | None = None, progress: Progress | None = None
) -> tuple[Path, TrainState]:
    """Trains one stage in `train.output`; returns the run directory and the final state.

    Args:
      resume: go on from the newest good checkpoint of that directory (from the beginning if there is none).
      overwrite: remove an earlier run there.
      model: the start, if it is loaded already; default `train.model`.

    Raises:
      UsageError: the config names no model, data or output, or they do not fit together.
    """
    for name, value in (("model", train.model or model), ("data.train", train.data.train), ("output", train.output)):
        if not value:
            raise UsageError(f"config: {name} is not set")
    with RunDir(train.output, resume=resume, overwrite=overwrite) as run:
        model = model or load_model(train.model, jnp.dtype(train.master_dtype))
        policy = quant_policy(train)
        if policy is not None:
            try:
                policy.match(abstract_params(model.config))
            except ValueError as error:
                raise UsageError(f"config: quant: {error}") from None
        tokenizer = load_tokenizer(model.directory)
        packed = load_packed(train.data.train, tokenizer, train.data)
        train = train.with_steps(len(packed.rows.tokens_BT))
        held_out = load_packed(train.data.eval, tokenizer, train.data) if train.data.eval else None
        run.write_config(dump_config(train))
        progress = progress or Progress(train.steps)
        progress.note(f"{Path(train.output).name}: {packed.describe()}")
        if policy is not None:
            progress.note(policy.describe(abstract_params(model.config)))
        trainer = Trainer(
            model.config,
            train,
            run,
            BatchStream(packed.rows, train.batch.rows, train.seed, tokenizer),
            policy=policy,
            eval_batches=_eval_batches(held_out.rows, train.batch.rows) if held_out else None,
            shardings=make_shardings(train, model.config),
            assets=carried_files(model.directory),
            source=model.source,
            progress=progress,
        )
        if not resume or trainer.resume() is None:
            trainer.start(model.params)
        del model
        return run.path, trainer.fit()
