"""Any model that a command is given: an HF directory, OpenAI's original layout, a hub id, or a training checkpoint of ours."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from gptoss_jax.checkpoint import orbax_store
from gptoss_jax.checkpoint.ahead import Tick
from gptoss_jax.checkpoint.hf_config import COMPANIONS
from gptoss_jax.checkpoint.load import load_params
from gptoss_jax.checkpoint.source import open_checkpoint
from gptoss_jax.errors import UsageError
from gptoss_jax.model import GptOssConfig
from gptoss_jax.quant import QuantPolicy, estimator_to_dict, make_expert_quant


@dataclass(frozen=True)
class Model:
    """Parameters with what is known about them.

    Attributes:
      params: as stored: masters of a training checkpoint, decoded weights of anything else.
      directory: where tokenizer, chat template and config.json lie.
      policy: the fake quantization that the checkpoint was trained under, None elsewhere.
      code_hashes: of the codes that the compiled training program computed, None elsewhere.
      source: plain values saying where the parameters came from.
    """

    config: GptOssConfig
    params: dict[str, jax.Array]
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
    found = orbax_store.locate(path)
    if found is None:
        source = open_checkpoint(path)
        return source.config, source.path
    return GptOssConfig.from_dict(orbax_store.read_meta(*found).model), orbax_store.step_dir(*found) / orbax_store.ASSETS


def load_model(
    path: str | Path, dtype, shardings: Shardings | Callable[[GptOssConfig], Shardings | None] | None = None, *, packed: bool = False,
    tick: Tick | None = None,
) -> Model:
    """Loads any model. `dtype` is that of decoded weights; the masters of a training checkpoint keep their own.

    Args:
      shardings: by parameter name, or what gives them for a config; None puts everything on the first device.
      packed: the expert matrices of an MXFP4 checkpoint stay codes, which `model.inference` runs on and nothing else.
      tick: as of `load_params`; not called for training checkpoints.

    Raises:
      UsageError, CorruptError: nothing readable at `path`, or damaged.
    """
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
    params = orbax_store.restore_params(directory, step, shardings(config) if callable(shardings) else shardings)
    policy = QuantPolicy.from_dict(meta.quant) if meta.quant else None
    source = {"run": directory.parent.name, "step": step, "base": meta.source}
    if policy is not None:
        source["estimator"] = estimator_to_dict(policy.estimator)  # the format stands elsewhere in a manifest
    assets = orbax_store.step_dir(directory, step) / orbax_store.ASSETS
    return Model(config, params, assets, policy, meta.code_hashes, source)


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
