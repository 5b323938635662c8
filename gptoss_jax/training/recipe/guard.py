"""How far a model has moved from the one it came from, on conversations that training should leave alone: mean KL(base || model).

The base's final hidden states are kept on the host (2 or 4 bytes x hidden size per token: 0.6 GB for 100,000 tokens of gpt-oss in bfloat16), so
the two models need not be in memory together, and logits exist for one block of tokens at a time.

Legend: B batch  T tokens of a row  D hidden  V vocabulary
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.data import System
from gptoss_jax.evaluation import LocalSubject
from gptoss_jax.evaluation.compare import distances
from gptoss_jax.model import Params, forward


class Guard:
    """Guard conversations and the base's opinion of them.

    Args:
      base: the model that is the measure, with the numerics that are meant; its weights are not kept, but for the unembedding.
      rows: conversations; what counts are the answers.
    """

    def __init__(self, base: LocalSubject, rows: Sequence[dict[str, Any]], system: System | str | None = None):
        config, dtype = base.model.config, base.dtype
        self._set = base.evaluation_set(rows, system)
        self._base_head_VD = base.model.params["lm_head.weight"]
        self._precision = base.precision

        def run(params, batch, expert_quant=None):
            tokens = batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT
            return forward(config, params, *tokens, dtype=dtype, expert_quant=expert_quant).hidden_BTD

        @jax.jit
        def kl_sum(params, batch, base_hidden_BTD, base_head_VD):
            heads = base_head_VD, params["lm_head.weight"]
            # of all distances only this one is used, and compiled
            kl_BT = distances(base_hidden_BTD, run(params, batch), heads, batch.targets_BT, (dtype, dtype)).kl_ab
            return jnp.sum(jnp.where(batch.loss_weights_BT > 0, kl_BT, 0)), jnp.sum(batch.loss_weights_BT > 0)

        self._kl_sum = kl_sum
        hidden = jax.jit(lambda params, batch: run(params, batch, base.expert_quant))
        with base.precision():
            self._base_hidden = [np.asarray(hidden(dict(base.model.params), batch)) for batch in self._set.batches()]

    def mean_kl(self, params: Params) -> float:
        """Nats per trained token, of a model whose weights are what it computes with (an export)."""
        total, tokens = 0.0, 0
        with self._precision():
            for batch, base_hidden_BTD in zip(self._set.batches(), self._base_hidden):
                kl, count = self._kl_sum(dict(params), batch, base_hidden_BTD, self._base_head_VD)
                total, tokens = total + float(kl), tokens + int(count)
        return total / tokens
