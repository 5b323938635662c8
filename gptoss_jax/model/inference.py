"""Generation with a KV cache: `prepare_params` once, `prefill` a batch of prompts, then `decode_step` token by token.

All three are pure; jit them with the cache donated. The layers are those of training (`GptOss.cached` runs the same modules), so there is no second
copy of the arithmetic. Logits are computed where they are read, at the last token of each row.

Legend: B rows  T tokens of a prompt, padded  V vocab
"""

import re
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from gptoss_jax.formats import mxfp4
from gptoss_jax.model.cache import KVCache, append, fill
from gptoss_jax.model.config import GptOssConfig
from gptoss_jax.model.context import Context
from gptoss_jax.model.rope import rope_tables
from gptoss_jax.model.transformer import Params, build_model
from gptoss_jax.ops.grouped_matmul.xla import bits, values
from gptoss_jax.quant import ExpertQuant, LoraWeight, merged_weight, plain_cast, with_activations
from gptoss_jax.quant.two_way import forward_weight

_EXPERT_MATRIX = re.compile(r"experts\.(gate_up_proj|down_proj)$")
_CAST = re.compile(r"(_proj\.weight|embed_tokens\.weight|lm_head\.weight)$")  # what the forward pass casts; norms, router, biases and sinks stay


def prepare_params(params: Params, dtype, expert_quant: ExpertQuant | None = None) -> dict[str, Array | mxfp4.Codes]:
    """The compute weights of a forward pass in `dtype`, made once: every cast, and the quantization of the experts, bit for bit.

    Arrays that need no change are handed through, not copied. Expert projections that are MXFP4 codes already stay packed, and so do those that come
    of codes and adapters where `expert_quant` gives MXFP4 codes; other adapters are merged. On a CPU bfloat16 arrays are kept as uint16 bits
    (`gptoss_jax.ops.grouped_matmul.xla.bits`).
    """
    dtype = jnp.dtype(dtype)
    as_bits = dtype == jnp.bfloat16 and jax.default_backend() == "cpu"

    def one(name: str, value):
        projection = _EXPERT_MATRIX.search(name)
        if isinstance(value, mxfp4.Codes) or not (projection or _CAST.search(name)):
            return value
        quant = projection and expert_quant and partial(expert_quant, projection[1])
        if quant and jax.eval_shape(quant, _one_layer(value))[1] is None:
            quant = None  # it has no codes: a cast
        unchanged = quant is None and value.dtype == dtype and not as_bits and not isinstance(value, LoraWeight)
        return value if unchanged else _ready(value, projection[1] if quant else None, expert_quant if quant else None, dtype, as_bits)

    return {name: one(name, value) for name, value in params.items()}


def _one_layer(value):
    """Shapes of the first of stacked experts."""
    return jax.eval_shape(lambda x: jax.tree.map(lambda leaf: leaf[0], x) if value.ndim == 4 else x, value)


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _ready(value, projection: str | None, quant: ExpertQuant | None, dtype, as_bits: bool):
    """The compute weight of one parameter; quantized layer by layer, so that what this needs besides its result is one layer's."""
    adapted = isinstance(value, LoraWeight)
    packed = adapted and isinstance(value.base, mxfp4.Codes)

    def of_layer(layer):
        if quant is None:
            return merged_weight(layer).astype(dtype)
        weight, codes = quant(projection, layer)
        return codes if packed and isinstance(codes, mxfp4.Codes) else forward_weight(weight)

    if quant is None and not adapted:
        ready = value.astype(dtype)
    else:
        ready = lax.map(of_layer, value) if value.ndim == 4 else of_layer(value)
    return bits(ready) if as_bits and not isinstance(ready, mxfp4.Codes) else ready


def _context(positions_BT, segment_ids_BT, config: GptOssConfig, dtype, backend, activations, stacked, lengths_B=None) -> Context:
    cos_BTC, sin_BTC = rope_tables(positions_BT, config.rope, config.head_dim)
    quant = with_activations(plain_cast(dtype), activations)
    return Context(segment_ids_BT, cos_BTC, sin_BTC, quant, False, backend, lengths_B=lengths_B, stacked=stacked)


def _logits(params: Mapping, hidden_BD, dtype) -> Float[Array, "B V"]:
    """Float32 logits from a product in `dtype`."""
    w_VD = values(params["lm_head.weight"])
    return lax.dot_general(hidden_BD.astype(dtype), w_VD, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def prefill(
    config: GptOssConfig,
    params: Mapping[str, Array | mxfp4.Codes],
    tokens_BT: Int[Array, "B T"],
    lengths_B: Int[Array, "B"],
    cache: KVCache,
    *,
    dtype,
    backend: str | None = None,
    activations: Callable[[Array], Array] | None = None,
    stacked: Callable | None = None,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Reads prompts into an empty cache; the logits of the token that follows each.

    Args:
      params: of `prepare_params` with this dtype.
      tokens_BT: prompts, padded on the right with any token.
      lengths_B: tokens of each prompt, at least 1.
      cache: of `init_cache`; full layers must have T slots or more.
      activations: `activation_rounding(expert_quant)` of the `expert_quant` that `prepare_params` had.
      stacked: how experts that are cut over a mesh are run (`gptoss_jax.sharding.stacked_experts`).
    """
    positions_T = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
    real_BT = positions_T < lengths_B[:, None]
    positions_BT = jnp.broadcast_to(positions_T, tokens_BT.shape)
    context = _context(positions_BT, real_BT.astype(jnp.int32), config, dtype, backend, activations, stacked)
    hidden_BTD, new, new_tail = build_model(config, params).cached(tokens_BT, context, cache, dtype, is_prompt=True)
    write = lambda layers, news: tuple(fill(old, *kv, lengths_B) for old, kv in zip(layers, news, strict=True))
    last_BD = jnp.take_along_axis(hidden_BTD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
    return _logits(params, last_BD, dtype), KVCache(write(cache.blocks, new), write(cache.tail, new_tail), lengths_B)


def decode_step(
    config: GptOssConfig,
    params: Mapping[str, Array | mxfp4.Codes],
    token_B: Int[Array, "B"],
    cache: KVCache,
    active_B: Bool[Array, "B"] | None = None,
    *,
    dtype,
    backend: str | None = None,
    activations: Callable[[Array], Array] | None = None,
    stacked: Callable | None = None,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Reads one more token of each row; the logits of the one that follows.

    Rows that are not `active_B` are computed too, but do not get longer: what they wrote stays invisible. Full layers must have a free slot for every
    active row. `activations` as in `prefill`.
    """
    lengths_B = cache.lengths_B
    context = _context(lengths_B[:, None], jnp.ones_like(token_B)[:, None], config, dtype, backend, activations, stacked, lengths_B)
    hidden_B1D, new, new_tail = build_model(config, params).cached(token_B[:, None], context, cache, dtype, is_prompt=False)
    one_token = lambda kv: jax.tree.map(lambda x_LBKTH: x_LBKTH[..., 0, :], kv)
    write = lambda layers, news: tuple(append(old, *one_token(kv), lengths_B) for old, kv in zip(layers, news, strict=True))
    longer_B = lengths_B + (1 if active_B is None else active_B.astype(jnp.int32))
    return _logits(params, hidden_B1D[:, 0], dtype), KVCache(write(cache.blocks, new), write(cache.tail, new_tail), longer_B)
