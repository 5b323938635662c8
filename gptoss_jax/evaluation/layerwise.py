"""Hidden states after every layer, one layer after another: for comparisons, where the model's own scan over layers hides them.

The layers are the model's `Block`, each with its slice of the stacked parameters; layers of a kind share one compiled program.

Legend: B batch  T tokens of a row  D hidden
"""

from collections.abc import Iterator
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
from flax import nnx

from gptoss_jax.data.packing import Batch
from gptoss_jax.model import GptOssConfig, Params
from gptoss_jax.model.context import Context
from gptoss_jax.model.layers import RMSNorm
from gptoss_jax.model.rope import rope_tables
from gptoss_jax.model.transformer import Block
from gptoss_jax.model.weights import fill_state
from gptoss_jax.ops.embedding import embedding
from gptoss_jax.quant import ExpertQuant


def layer_params(config: GptOssConfig, params: Params, layer: int) -> dict[str, jax.Array]:
    """The parameters of one layer, by their names inside it."""
    period, repeat = layer % config.period, layer // config.period
    tail = layer - config.period * config.repeats
    prefix, index = (f"tail.{tail}.", None) if tail >= 0 else (f"blocks.{period}.", repeat)
    return {
        name.removeprefix(prefix): value if index is None else value[index] for name, value in params.items() if name.startswith(prefix)
    }


@lru_cache
def _abstract(config: GptOssConfig, kind: str | None):
    """A layer of this kind, or the final norm (None), without weights."""

    def build():
        make = dict(rngs=nnx.Rngs(0), dtype=jnp.float32)
        return Block(config, kind, **make) if kind else RMSNorm(config.hidden_size, config.rms_norm_eps, **make)

    return nnx.split(nnx.eval_shape(build))


def layer_module(config: GptOssConfig, kind: str | None, params: Params) -> nnx.Module:
    """A layer of this kind (`Block`), or the final norm (None), around these parameters."""
    graph, state = _abstract(config, kind)
    return nnx.merge(graph, fill_state(state, dict(params)))


def layer_context(config: GptOssConfig, batch: Batch, expert_quant: ExpertQuant) -> Context:
    """What a layer needs to know of a batch."""
    cos_BTC, sin_BTC = rope_tables(batch.positions_BT, config.rope, config.head_dim)
    return Context(batch.segment_ids_BT, cos_BTC, sin_BTC, expert_quant, False)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run(config: GptOssConfig, kind: str | None, expert_quant: ExpertQuant, params: Params, x_BTD, batch: Batch):
    module = layer_module(config, kind, params)
    return module(x_BTD) if kind is None else module(x_BTD, layer_context(config, batch, expert_quant))[0]


def hidden_states(config: GptOssConfig, params: Params, batch: Batch, dtype, expert_quant: ExpertQuant) -> Iterator[jax.Array]:
    """[B, T, D] in `dtype`, L + 2 of them: the embedding, after each layer, and after the final norm (what the unembedding reads)."""
    x_BTD = embedding(params["embed_tokens.weight"], jnp.asarray(batch.tokens_BT)).astype(dtype)
    yield x_BTD
    for layer, kind in enumerate(config.layer_types):
        x_BTD = _run(config, kind, expert_quant, layer_params(config, params, layer), x_BTD, batch)
        yield x_BTD
    yield _run(config, None, expert_quant, {"weight": params["norm.weight"]}, x_BTD, batch)
