"""Any model that a command is given: an HF directory, OpenAI's original layout, a hub id, a training checkpoint of ours, or a directory of adapters
(PEFT's), whose base is one of these."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gptoss_jax.checkpoint import orbax_store
from gptoss_jax.checkpoint.ahead import Tick
from gptoss_jax.checkpoint.hashes import params_hash
from gptoss_jax.checkpoint.hf_config import COMPANIONS
from gptoss_jax.checkpoint.load import load_params
from gptoss_jax.checkpoint.peft_adapters import base_of_peft, is_peft, read_peft
from gptoss_jax.checkpoint.source import open_checkpoint
from gptoss_jax.errors import CorruptError, UsageError
from gptoss_jax.model import GptOssConfig
from gptoss_jax.model.lora import LoraSpec, attach
from gptoss_jax.quant import LoraWeight, QuantPolicy, estimator_to_dict, make_expert_quant, merged_weight


@dataclass(frozen=True)
class Model:
    """Parameters with what is known about them.

    Attributes:
      params: as stored: masters of a training checkpoint, decoded weights of anything else; adapters merged, or as `LoraWeight` beside their base.
      directory: where tokenizer, chat template and config.json lie.
      policy: the fake quantization that the checkpoint was trained under, None elsewhere.
      code_hashes: of the codes that the compiled training program computed, None elsewhere.
      source: plain values saying where the parameters came from.
    """

    config: GptOssConfig
    params: dict[str, Any]
    directory: Path
    policy: QuantPolicy | None
    code_hashes: Mapping[str, str] | None
    source: Mapping[str, Any]

    def expert_quant(self, dtype):
        """The expert weights that this model means: quantized as it was trained, otherwise only cast."""
        return make_expert_quant(self.policy, dtype)


Shardings = Mapping[str, jax.sharding.Sharding]


def look_at(path: str | Path) -> tuple[GptOssConfig, Path]:
    """Architecture and tokenizer directory of a model, without its weights."""
    if is_peft(path):
        return look_at(base_of_peft(path))
    found = orbax_store.locate(path)
    if found is None:
        source = open_checkpoint(path)
        return source.config, source.path
    return GptOssConfig.from_dict(orbax_store.read_meta(*found).model), orbax_store.step_dir(*found) / orbax_store.ASSETS


def load_model(
    path: str | Path, dtype, shardings: Shardings | Callable[[GptOssConfig], Shardings | None] | None = None, *, packed: bool = False,
    apart: bool = False, tick: Tick | None = None,
) -> Model:
    """Loads any model. `dtype` is that of decoded weights; the masters of a training checkpoint keep their own.

    Args:
      shardings: by parameter name, or what gives them for a config; None puts everything on the first device. Adapters and their base are there in
        any case, and refuse shardings by name.
      packed: the expert matrices of an MXFP4 checkpoint stay codes, which `model.inference` runs on and nothing else.
      apart: adapters stay beside their base, as `LoraWeight`s, which forward passes and exports take; default: they are merged, in float32.
      tick: as of `load_params`; not called for training checkpoints.

    Raises:
      UsageError, CorruptError: nothing readable at `path`, or damaged.
    """
    if is_peft(path):
        if (shardings is not None and not callable(shardings)) or packed:
            raise UsageError(f"{path}: holds adapters, which run on one device and over a decoded base")
        base = load_model(base_of_peft(path), dtype, tick=tick)
        spec, adapters = read_peft(path, base.config)
        params = _joined(base.config, spec, {**base.params, **adapters}, apart)
        return dataclasses.replace(base, params=params, policy=None, code_hashes=None, source={"path": Path(path).name, "base": base.source})
    found = orbax_store.locate(path)
    if found is None:
        source = open_checkpoint(path)
        place = shardings(source.config) if callable(shardings) else shardings
        config, params = load_params(source, dtype, place, packed=packed, tick=tick)
        return Model(config, params, source.path, None, None, {"path": source.path.name, "revision": source.revision})
    if packed:
        raise UsageError(f"{path}: is a training checkpoint; only MXFP4 directories can stay packed (gptoss-jax export makes one)")
    directory, step = found
    meta = orbax_store.read_meta(directory, step)
    config = GptOssConfig.from_dict(meta.model)
    place = shardings(config) if callable(shardings) else shardings
    lora = (meta.source or {}).get("lora")
    if lora is None:
        params = orbax_store.restore_params(directory, step, place)
    else:
        if place is not None and not callable(shardings):
            raise UsageError(f"{path}: holds adapters, which run on one device: export it first")
        params = {**_base_of(path, lora), **orbax_store.restore_params(directory, step)}
        params = _joined(config, LoraSpec.from_dict(lora["spec"]), params, apart)
    policy = QuantPolicy.from_dict(meta.quant) if meta.quant else None
    source = {"run": directory.parent.name, "step": step, "base": meta.source}
    if lora is not None:  # without the path of this machine
        base = {**lora["base"], "model": Path(lora["base"]["model"]).name}
        source["base"] = {**meta.source, "lora": {**lora, "base": base}}
    if policy is not None:
        source["estimator"] = estimator_to_dict(policy.estimator)  # the format stands elsewhere in a manifest
    assets = orbax_store.step_dir(directory, step) / orbax_store.ASSETS
    return Model(config, params, assets, policy, meta.code_hashes, source)


_merged = jax.jit(lambda stored: jax.lax.map(merged_weight, stored) if stored.ndim == 4 else merged_weight(stored))


def _joined(config: GptOssConfig, spec: LoraSpec, params: Mapping[str, Any], apart: bool) -> dict[str, Any]:
    """Base and adapters together, merged unless `apart`."""
    params = attach(config, spec, params)
    return params if apart else {name: _merged(value) if isinstance(value, LoraWeight) else value for name, value in params.items()}


def load_adapters(path: str | Path) -> tuple[GptOssConfig, LoraSpec, dict[str, jax.Array], str]:
    """(architecture, spec, adapters, name of the base) of the checkpoint of a LoRA run; the base is not read.

    Raises:
      UsageError: it holds no adapters. CorruptError: damaged.
    """
    found = orbax_store.locate(path)
    meta = orbax_store.read_meta(*found) if found else None
    lora = ((meta and meta.source) or {}).get("lora")
    if lora is None:
        raise UsageError(f"{path}: is no checkpoint of adapters (training with `lora` makes one)")
    adapters = orbax_store.restore_params(*found)
    return GptOssConfig.from_dict(meta.model), LoraSpec.from_dict(lora["spec"]), adapters, lora["base"]["model"]


def load_base(path: str | Path, held: str, tick: Tick | None = None) -> Model:
    """The model under adapters, as `lora.base` says that it is held: its parameters in bfloat16 or float32, or the experts as MXFP4 codes.

    Raises:
      UsageError, CorruptError: as `load_model`.
    """
    dtype = jnp.dtype("bfloat16" if held == "mxfp4" else held)
    base = load_model(path, dtype, packed=held == "mxfp4", tick=tick)
    cast = lambda value: value.astype(dtype) if isinstance(value, jax.Array) else value
    return dataclasses.replace(base, params={name: cast(value) for name, value in base.params.items()})


def lora_record(spec: LoraSpec, held: str, model: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """What the checkpoint of a run says of its adapters and their base; `source` holds it under "lora"."""
    where = str(Path(model).absolute()) if Path(model).exists() else model
    return {"spec": spec.to_dict(), "base": {"model": where, "held": held, "xxh3_128": params_hash(params)}}


def _base_of(path: str | Path, lora: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the model that adapters belong to, checked to be the same."""
    base = lora["base"]
    try:
        params = load_base(base["model"], base["held"]).params
    except UsageError as error:
        raise UsageError(f"{path}: holds adapters of {base['model']}, which cannot be read: {error}") from None
    if params_hash(params) != base["xxh3_128"]:
        raise CorruptError(f"{path}: holds adapters of {base['model']}, but that is another model now (hash {base['xxh3_128']} was trained on)")
    return params


def carried_files(directory: Path) -> list[Path]:
    """Tokenizer files, chat template, generation settings and config.json of a model, as far as it has them."""
    return [directory / name for name in (*COMPANIONS, "config.json") if (directory / name).is_file()]


def export_format(model: Model):
    """The format that the model was trained for.

    Raises:
      UsageError: it was trained for none, or for several.
    """
    formats = {fmt for _, fmt in model.policy.rules} if model.policy else set()
    if len(formats) != 1:
        raise UsageError(f"the checkpoint was trained for {len(formats)} number formats: name the one to export with --format")
    return formats.pop()
