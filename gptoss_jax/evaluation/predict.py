"""A model as the pass rates see it: batch in, most probable tokens and losses out."""

from functools import lru_cache

import jax
import jax.numpy as jnp

from gptoss_jax.data.packing import Batch
from gptoss_jax.evaluation.pass_rate import Predict, Prediction
from gptoss_jax.model import GptOssConfig, Params, forward
from gptoss_jax.ops.cross_entropy import token_losses
from gptoss_jax.quant import ExpertQuant


@lru_cache
def make_predict(config: GptOssConfig, dtype, expert_quant: ExpertQuant | None = None):
    """A compiled `predict(params) -> Predict`: one compilation serves all models of this config, dtype and `expert_quant` (the same object)."""

    @jax.jit
    def run(params: Params, batch: Batch) -> Prediction:
        out = forward(
            config, params, batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT, dtype=dtype, expert_quant=expert_quant
        )
        losses_BT, tokens_BT = token_losses(out.hidden_BTD, params["lm_head.weight"], batch.targets_BT, jnp.dtype(dtype))
        return Prediction(tokens_BT, losses_BT)

    def predict(params: Params) -> Predict:
        return lambda batch: run(dict(params), batch)

    return predict
