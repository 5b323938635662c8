"""Is the model that is exported the model whose loss was measured? Through the real exporter and loader, not through their formulas.

    differing_weights  expert weights whose bits differ between fake quantization and the loaded export; must be 0
    loss               of the fake-quantized model, its other parameters as the export stores them, in bfloat16
    exported_loss      of the loaded export, by the same compiled program
    gap                exported_loss - loss; must be exactly 0
    in_layer_loss      of fake quantization inside the layers, as training does by default: another program, equal up to the order of sums
    masters_loss       of fake quantization with the other parameters unrounded: what storing them in bfloat16 costs is loss - masters_loss
"""

import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.checkpoint import export_hf, load_params
from gptoss_jax.data.packing import Batch
from gptoss_jax.formats import Format, get_format
from gptoss_jax.lab.probes.objective import Objective, as_quantizer, rounded
from gptoss_jax.lab.probes.rows import Row, placed
from gptoss_jax.model import GptOssConfig, Params
from gptoss_jax.quant import default_policy, make_expert_quant
from gptoss_jax.training.config import TrainConfig
from gptoss_jax.training.step import make_eval_step


def export_gap(config: GptOssConfig, params: Params, batch: Batch, fmt: Format | str, *, dtype: Any = "float32") -> Row:
    """Exports the masters, loads the result and compares. One row; columns: see the head of this file.

    Raises:
      UsageError, CorruptError, RunError: as `export_hf`.
    """
    fmt, dtype = get_format(fmt), str(jnp.dtype(dtype))
    with tempfile.TemporaryDirectory() as folder:
        _, loaded = load_params(export_hf(Path(folder) / "model", config, params, format=fmt), jnp.float32)
    masters, exported = Objective(config, params, dtype), Objective(config, loaded, dtype)
    weights = rounded(as_quantizer(fmt), masters.experts)
    stored = {name: value.astype(jnp.bfloat16).astype(jnp.float32) for name, value in masters.others.items()}
    deployed = Objective(config, {**stored, **weights}, dtype)
    bits = lambda value: np.asarray(value, np.float32).view(np.uint32)
    differing = sum(int((bits(weights[name]) != bits(exported.experts[name])).sum()) for name in weights)
    loss, exported_loss = (float(objective.loss(objective.experts, batch)) for objective in (deployed, exported))
    train = TrainConfig(compute_dtype=dtype)
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        nll, weight = make_eval_step(config, train, make_expert_quant(default_policy(fmt), jnp.dtype(dtype)))({**masters.experts, **stored}, batch)
    return {
        "probe": "export", "format": fmt.name, **placed((None, None, None)), "differing_weights": differing, "loss": loss,
        "exported_loss": exported_loss, "gap": exported_loss - loss, "in_layer_loss": float(nll) / max(float(weight), 1e-30),
        "masters_loss": float(masters.loss(weights, batch)),
    }  # fmt: skip
