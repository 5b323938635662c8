"""What quantized experts change downstream: which experts the next layers choose, and what the model predicts.

Routers are not quantized; their choices change because their inputs do. Both models run on the same tokens, each on its own hidden states.
Rows of layers, over the tokens that are not padding:

    flipped        share of tokens whose set of chosen experts differs
    moved          share of all choices (token, place among the k) that are not among the other model's
    top_flipped    share of tokens whose most weighted expert differs
    weight_moved   mean over tokens of half the sum over experts of |difference of their weights|: 0 the same mixture, 1 another one altogether
    hidden_error   |h_q - h| / |h| after the layer (Frobenius)
    load, quantized_load   choices of each expert as a share of all; lists over experts

The row of the whole model, over the tokens that have a target in the same document:

    kl, kl_reverse                KL(full || quantized) and the other way, nats per token
    top1_agreement                share of tokens where both find the same next token most probable
    loss, quantized_loss          nats per trained token

    B batch  T tokens of a row  S tokens  D hidden  E experts  A experts per token
"""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gptoss_jax.data.packing import Batch
from gptoss_jax.evaluation.compare import distances
from gptoss_jax.evaluation.layerwise import layer_context, layer_module, layer_params
from gptoss_jax.formats import Format
from gptoss_jax.lab.probes.objective import as_quantizer, rounded, split_experts
from gptoss_jax.lab.probes.rows import Row, placed
from gptoss_jax.lab.quantizer import Quantizer
from gptoss_jax.model import GptOssConfig, Params
from gptoss_jax.ops.embedding import embedding
from gptoss_jax.quant import ExpertQuant, plain_cast


def probe_routing(
    config: GptOssConfig, params: Params, batch: Batch, fmt: Format | str | Quantizer, *, dtype: Any = "float32"
) -> list[Row]:
    """A row for the whole model and one for every layer. Columns: see the head of this file."""
    dtype = jnp.dtype(dtype)
    cast = plain_cast(dtype)
    experts, others = split_experts(params)
    quantized = {**others, **rounded(as_quantizer(fmt), experts)}
    with jax.default_matmul_precision("highest") if dtype == jnp.float32 else nullcontext():
        layers, ends = [], None
        for full, other in zip(_layers(config, params, batch, dtype, cast), _layers(config, quantized, batch, dtype, cast)):
            if full[1] is not None:
                layers.append(jax.device_get(_differences(full, other, batch.segment_ids_BT)))
            ends = full[0], other[0]
        heads = params["lm_head.weight"], params["lm_head.weight"]
        tokens = jax.device_get(distances(*ends, heads, jnp.asarray(batch.targets_BT), (dtype, dtype)))
    rows = [_model_row(tokens, batch)]
    for layer, found in enumerate(layers):
        row = {name: value.tolist() if value.ndim else float(value) for name, value in found.items()}
        rows.append({"probe": "routing", **placed((layer, None, None)), **row})
    return rows


def _layers(config: GptOssConfig, params: Params, batch: Batch, dtype, expert_quant: ExpertQuant) -> Iterator[tuple[Array, Array | None]]:
    """(hidden states [B, T, D], weight of every expert for every token [S, E], 0 where not chosen) after each layer; then the final norm's, None."""
    x_BTD = embedding(params["embed_tokens.weight"], jnp.asarray(batch.tokens_BT)).astype(dtype)
    for layer, kind in enumerate(config.layer_types):
        x_BTD, mixture_SE = _run(config, kind, expert_quant, layer_params(config, params, layer), x_BTD, batch)
        yield x_BTD, mixture_SE
    yield layer_module(config, None, {"weight": params["norm.weight"]})(x_BTD), None


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run(config: GptOssConfig, kind: str, expert_quant: ExpertQuant, params: Params, x_BTD, batch: Batch):
    block, context = layer_module(config, kind, params), layer_context(config, batch, expert_quant)
    # the compiler makes one of the two attentions, this one and that of the layer
    between_BTD = x_BTD + block.self_attn(block.input_layernorm(x_BTD), context)
    experts_BTA, weights_BTA, _ = block.mlp.router(block.post_attention_layernorm(between_BTD), context.real_BT)
    # weights are softmax values, above 0, so that a chosen expert shows
    mixture_BTE = jnp.einsum("bta,btae->bte", weights_BTA, jax.nn.one_hot(experts_BTA, config.num_local_experts))
    return block(x_BTD, context)[0], mixture_BTE.reshape(-1, config.num_local_experts)


@jax.jit
def _differences(full: tuple[Array, Array], other: tuple[Array, Array], segment_ids_BT) -> dict[str, Array]:
    """The columns of a layer."""
    (h_BTD, a_SE), (h_q_BTD, b_SE) = full, other
    real_S = (segment_ids_BT.reshape(-1) > 0).astype(jnp.float32)
    count = jnp.maximum(jnp.sum(real_S), 1)
    per_token = lambda values_S: jnp.sum(jnp.where(real_S > 0, values_S, 0)) / count
    chosen_a_SE, chosen_b_SE = a_SE > 0, b_SE > 0
    left_S = jnp.sum(chosen_a_SE & ~chosen_b_SE, axis=1)
    square = lambda x_BTD: jnp.sum(jnp.square(x_BTD.astype(jnp.float32)).reshape(real_S.size, -1) * real_S[:, None])
    load = lambda chosen_SE: real_S @ chosen_SE / jnp.maximum(jnp.sum(real_S @ chosen_SE), 1)
    return {
        "flipped": per_token(left_S > 0),
        "moved": jnp.sum(real_S * left_S) / jnp.maximum(jnp.sum(real_S @ chosen_a_SE), 1),
        "top_flipped": per_token(jnp.argmax(a_SE, axis=1) != jnp.argmax(b_SE, axis=1)),
        "weight_moved": per_token(0.5 * jnp.sum(jnp.abs(a_SE - b_SE), axis=1)),
        "hidden_error": jnp.sqrt(square(h_q_BTD - h_BTD) / square(h_BTD)),
        "load": load(chosen_a_SE),
        "quantized_load": load(chosen_b_SE),
    }


def _model_row(tokens: Any, batch: Batch) -> Row:
    segments_BT, weights_BT = np.asarray(batch.segment_ids_BT), np.asarray(batch.loss_weights_BT)
    # the last token of a document has no target
    real_BT = (segments_BT > 0) & (np.roll(segments_BT, -1, axis=1) == segments_BT)
    real_BT[:, -1] = False
    mean = lambda values_BT: float(values_BT[real_BT].mean(dtype=np.float64)) if real_BT.any() else None
    trained = weights_BT.sum(dtype=np.float64)
    loss = lambda logprob_BT: float(-(weights_BT * logprob_BT).sum(dtype=np.float64) / trained) if trained else None
    return {
        "probe": "routing",
        **placed((None, None, None)),
        "kl": mean(tokens.kl_ab),
        "kl_reverse": mean(tokens.kl_ba),
        "top1_agreement": mean(tokens.same_top),
        "loss": loss(tokens.logprob_a),
        "quantized_loss": loss(tokens.logprob_b),
    }
