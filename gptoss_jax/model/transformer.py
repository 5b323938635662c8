"""The gpt-oss transformer, and the functions through which everything else uses it.

Parameters are a flat dict of arrays. Names are those of the Hugging Face checkpoint, with the layer index replaced: `blocks.{j}.` holds the
layers at position j of the repeating pattern of `layer_types`, stacked along a leading dimension that is scanned over; `tail.{j}.` holds the
layers left over. So compile time does not grow with depth, and any pattern of layers works.

Legend: B batch  T tokens of a row  D hidden  V vocab
"""

import dataclasses
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from gptoss_jax.model.attention import Attention
from gptoss_jax.model.cache import KVCache, LayerCache
from gptoss_jax.model.config import GptOssConfig
from gptoss_jax.model.context import Context, Distribute
from gptoss_jax.model.layers import RMSNorm
from gptoss_jax.model.moe import Moe, RouterStats
from gptoss_jax.model.rope import rope_tables
from gptoss_jax.model.weights import fill_state, named_axes, named_leaves, weight
from gptoss_jax.ops.embedding import embedding
from gptoss_jax.ops.grouped_matmul.xla import values
from gptoss_jax.ops.remat import Remat, product, rematerialize
from gptoss_jax.precision import wide
from gptoss_jax.quant import ExpertQuant, plain_cast

Params = Mapping[str, Array]


class Block(nnx.Module):
    """One layer, or `layers` of them stacked: pre-norm attention and pre-norm mixture of experts, each with a residual."""

    def __init__(self, config: GptOssConfig, kind: str, *, rngs, dtype, layers: int | None = None):
        make = dict(rngs=rngs, dtype=dtype, layers=layers)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **make)
        self.self_attn = Attention(config, kind, **make)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **make)
        self.mlp = Moe(config, **make)

    def __call__(self, x_BTD, context: Context):
        x_BTD = product(x_BTD + self.self_attn(self.input_layernorm(x_BTD), context))
        y_BTD, stats, captured = self.mlp(self.post_attention_layernorm(x_BTD), context)
        return x_BTD + y_BTD, (stats, captured if context.capture else None)

    def cached(self, x_BTD, context: Context, past: LayerCache | None):
        """The layer in generation, with the keys and values of x: see `Attention.cached`."""
        out_BTD, new = self.self_attn.cached(self.input_layernorm(x_BTD), context, past)
        x_BTD = x_BTD + out_BTD
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD), context)[0], new


class Embedding(nnx.Module):
    """A [V, D] table: token embedding or unembedding."""

    def __init__(self, config: GptOssConfig, *, rngs, dtype):
        self.weight = weight(rngs, (config.vocab_size, config.hidden_size), ("vocab", "embed"), layers=None, dtype=dtype)


class GptOss(nnx.Module):
    """The whole model; `__call__` ends before the unembedding, because logits are 201,088 wide (see `gptoss_jax.ops.cross_entropy`)."""

    def __init__(self, config: GptOssConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        make = dict(rngs=rngs, dtype=dtype)
        self.config = config
        self.embed_tokens = Embedding(config, **make)
        kinds = config.layer_types
        self.blocks = nnx.List([Block(config, kinds[j], layers=config.repeats, **make) for j in range(config.period)])
        self.tail = nnx.List([Block(config, kinds[j], **make) for j in range(config.num_tail_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **make)
        self.lm_head = Embedding(config, **make)

    def __call__(self, tokens_BT, context: Context, dtype, remat: Remat):
        """Final normed hidden states, and per block position / tail layer (router statistics, captured expert weights)."""
        graphs, stacked = zip(*map(nnx.split, self.blocks))

        # layer by layer, not period by period: while one is differentiated, values and decoded weights of the others do not exist
        def layer(x_BTD, graph, state):
            return nnx.merge(graph, state)(x_BTD, context)

        layer = rematerialize(layer, remat, static_argnums=(1,))

        def period(x_BTD, states):
            extras = []
            for graph, state in zip(graphs, states):
                x_BTD, extra = layer(x_BTD, graph, state)
                extras.append(extra)
            return x_BTD, extras

        lookup = context.distribute.embedding if context.distribute else lambda w_VD, tokens_BT, dtype: embedding(w_VD, tokens_BT).astype(dtype)
        x_BTD = lookup(self.embed_tokens.weight[...], tokens_BT, dtype)
        x_BTD, extras = lax.scan(period, x_BTD, stacked)
        tail_extras = []
        for block in self.tail:
            x_BTD, extra = layer(x_BTD, *nnx.split(block))
            tail_extras.append(extra)
        return self.norm(x_BTD), extras, tail_extras

    def cached(self, tokens_BT, context: Context, cache: KVCache, dtype, *, is_prompt: bool):
        """Final normed hidden states, and the keys and values [.., B, K, T, H] of the tokens per block position and tail layer.

        Expert weights are not scanned over but indexed, see `gptoss_jax.ops.experts.inference`.
        """
        graph, experts, others = nnx.split(self.blocks, lambda path, _: "experts" in path, ...)

        def past_of(layers: LayerCache, index) -> LayerCache | None:
            return None if is_prompt else layers.layer(index)

        def period(x_BTD, scanned):
            index, others = scanned
            here, new = dataclasses.replace(context, layer=index), []
            for block, layers in zip(nnx.merge(graph, experts, jax.tree.map(values, others)), cache.blocks, strict=True):
                x_BTD, kv = block.cached(x_BTD, here, past_of(layers, index))
                new.append(kv)
            return x_BTD, new

        x_BTD = values(self.embed_tokens.weight[...][tokens_BT]).astype(dtype)
        x_BTD, new = lax.scan(period, x_BTD, (jnp.arange(self.config.repeats), others))
        new_tail = []
        for block, layers in zip(self.tail, cache.tail, strict=True):
            block_graph, experts, others = nnx.split(block, lambda path, _: "experts" in path, ...)
            block = nnx.merge(block_graph, experts, jax.tree.map(values, others))
            x_BTD, kv = block.cached(x_BTD, dataclasses.replace(context, layer=0), past_of(layers, 0))
            new_tail.append(jax.tree.map(lambda x: x[None], kv))
        return self.norm(x_BTD), new, new_tail


class Output(NamedTuple):
    """Result of `forward`. Router statistics are stacked over all layers in layer order; `captured` maps parameter names of expert projections
    to (compute weight, codes), shaped like the parameters, or is None."""

    hidden_BTD: Float[Array, "B T D"]
    router: RouterStats
    captured: dict[str, tuple[Array, Any]] | None


@lru_cache
def _abstract_model(config: GptOssConfig, dtype):
    return nnx.split(nnx.eval_shape(lambda: GptOss(config, rngs=nnx.Rngs(0), dtype=dtype)))


def abstract_params(config: GptOssConfig, dtype=jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of all parameters by name; allocates nothing."""
    return named_leaves(_abstract_model(config, jnp.dtype(dtype))[1])


def logical_axes(config: GptOssConfig) -> dict[str, tuple[str | None, ...]]:
    """Logical axes of all parameters by name."""
    return named_axes(_abstract_model(config, jnp.dtype(jnp.float32))[1])


def num_params(config: GptOssConfig) -> int:
    return sum(leaf.size for leaf in abstract_params(config).values())


def init_params(config: GptOssConfig, key: Array, dtype=jnp.float32) -> dict[str, Array]:
    """Random parameters: normal with standard deviation 0.02, biases and sinks 0, norms 1."""
    return named_leaves(nnx.split(GptOss(config, rngs=nnx.Rngs(params=key), dtype=dtype))[1])


def build_model(config: GptOssConfig, params: Params) -> GptOss:
    """The modules around these parameters."""
    graph, state = _abstract_model(config, jnp.dtype(jnp.float32))
    return nnx.merge(graph, fill_state(state, dict(params)))


def forward(
    config: GptOssConfig,
    params: Params,
    tokens_BT: Int[Array, "B T"],
    segment_ids_BT: Int[Array, "B T"] | None = None,
    positions_BT: Int[Array, "B T"] | None = None,
    *,
    dtype=jnp.bfloat16,
    expert_quant: ExpertQuant | None = None,
    remat: Remat = "none",
    capture: bool = False,
    backend: str | None = None,
    distribute: Distribute | None = None,
) -> Output:
    """Runs the transformer up to the final norm.

    Args:
      segment_ids_BT: document of each token, 0 = padding; default one document per row.
      positions_BT: position inside the document; default 0..T-1.
      dtype: compute dtype of activations and weights; norms, router, softmax and accumulation are float32.
      expert_quant: maps stored expert weights to compute weights; None casts them to `dtype`.
      remat: what the backward pass computes again, see `gptoss_jax.ops.remat`.
      backend: of attention and experts, "xla" or "triton"; None chooses by platform.
      capture: also return the expert compute weights that this program used.
      distribute: how embedding, attention and experts run on a mesh (`gptoss_jax.sharding.distribution`); None leaves their layout to the compiler.
    """
    if segment_ids_BT is None:
        segment_ids_BT = jnp.ones_like(tokens_BT)
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    model = build_model(config, params)
    cos_BTC, sin_BTC = rope_tables(positions_BT, config.rope, config.head_dim, dtype)
    context = Context(segment_ids_BT, cos_BTC, sin_BTC, expert_quant or plain_cast(dtype), capture, backend, distribute)
    hidden_BTD, extras, tail_extras = model(tokens_BT, context, dtype, remat)

    # scanned statistics come as one [repeats, ...] stack per position of the period: interleave to layer order, then the tail
    in_order = jax.tree.map(lambda *xs: jnp.stack(xs, axis=1).reshape(-1, *xs[0].shape[1:]), *(stats for stats, _ in extras))
    router = jax.tree.map(lambda x, *tail: jnp.concatenate([x, *(t[None] for t in tail)]), in_order, *(stats for stats, _ in tail_extras))
    captured = None
    if capture:
        captured = {
            f"{part}.{j}.mlp.experts.{name}": value
            for part, items in (("blocks", extras), ("tail", tail_extras))
            for j, (_, weights) in enumerate(items)
            for name, value in weights.items()
        }
    return Output(hidden_BTD, router, captured)


def compute_logits(params: Params, hidden_BTD: Float[Array, "B T D"], dtype=jnp.float32) -> Float[Array, "B T V"]:
    """Unembedding: float32 logits from a product in `dtype` with float32 accumulation."""
    w_VD = params["lm_head.weight"].astype(dtype)
    return jnp.einsum("btd,vd->btv", hidden_BTD.astype(dtype), w_VD, preferred_element_type=wide(dtype))
