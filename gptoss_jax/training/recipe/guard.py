"""How far a model has moved from the one it came from, on conversations that training should leave alone: mean KL(base || model).

The base's final hidden states are kept on the host (2 or 4 bytes x hidden size per token: 0.6 GB for 100,000 tokens of gpt-oss in bfloat16), so
the two models need not be in memory together, and logits exist for one block of tokens at a time.

Legend: B batch  T tokens of a row  D hidden  V vocabulary
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.data import Packed, one_pass
from gptoss_jax.evaluation.compare import distances
from gptoss_jax.model import GptOssConfig, Params, forward


class Guard:
    """Packed guard conversations and the base's opinion of them.

    Args:
      base: parameters of the model that is the measure; `dtype` is that of activations.
      batch_size: rows of a batch.
    """

    def __init__(self, config: GptOssConfig, base: Params, packed: Packed, dtype, batch_size: int = 16):
        self._batches: Callable[[], Iterable[Any]] = partial(one_pass, packed.rows, batch_size)
        self._base_head_VD = base["lm_head.weight"]

        @jax.jit
        def hidden(params, batch):
            return forward(config, params, batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT, dtype=dtype).hidden_BTD

        @jax.jit
        def kl_sum(params, batch, base_hidden_BTD, base_head_VD):
            hidden_BTD = forward(config, params, batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT, dtype=dtype).hidden_BTD
            heads = base_head_VD, params["lm_head.weight"]
            # of all distances only this one is used, and compiled
            kl_BT = distances(base_hidden_BTD, hidden_BTD, heads, batch.targets_BT, (jnp.dtype(dtype),) * 2).kl_ab
            return jnp.sum(jnp.where(batch.loss_weights_BT > 0, kl_BT, 0)), jnp.sum(batch.loss_weights_BT > 0)

        self._kl_sum = kl_sum
        self._base_hidden = [np.asarray(hidden(dict(base), batch)) for batch in self._batches()]

    def mean_kl(self, params: Params) -> float:
        """Nats per trained token."""
        total, tokens = 0.0, 0
        for batch, base_hidden_BTD in zip(self._batches(), self._base_hidden):
            kl, count = self._kl_sum(dict(params), batch, base_hidden_BTD, self._base_head_VD)
            total, tokens = total + float(kl), tokens + int(count)
        return total / tokens
