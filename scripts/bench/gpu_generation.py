"""The generation part of `gpu_suite.py`: one row of 20b, token by token, as a share of what the memory bandwidth allows."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from gptoss_jax.formats import mxfp4
from gptoss_jax.model import GptOssConfig
from gptoss_jax.model.cache import init_cache
from gptoss_jax.model.inference import decode_step, prepare_params
from scripts.bench.common import best
from scripts.bench.gpu_correctness import TINY
from scripts.bench.gpu_speed import memory, random_params

TOKENS = 16  # in one call


def bytes_of_token(config: GptOssConfig, params, cache) -> int:
    """What one token of one row must read: all weights but the embedding and the experts not chosen, and the cache."""
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    share = config.num_experts_per_tok / config.num_local_experts
    weights = sum(size(value) * (share if "experts" in name else 1) for name, value in params.items() if name != "embed_tokens.weight")
    return int(weights + size(cache))


def packed_experts(params: dict) -> dict:
    """The same shapes with random MXFP4 codes in the place of the expert matrices."""

    def codes(number: int, value):
        key, *outer, width = jax.random.key(number), *value.shape
        packed = jax.random.bits(key, (*outer, width // 2), jnp.uint8)
        return mxfp4.Codes(packed, jnp.full((*outer, width // mxfp4.BLOCK_SIZE), 120, jnp.uint8))

    is_matrix = lambda name: name.endswith(("experts.gate_up_proj", "experts.down_proj"))
    return {name: codes(i, value) if is_matrix(name) else value for i, (name, value) in enumerate(params.items())}


def decode(smoke: bool) -> dict:
    """Tokens per second of decoding, one row with a cache of 4,096 slots, experts in bfloat16 and packed; bound: bytes over a copy's bandwidth."""
    config, slots = (TINY, 32) if smoke else (GptOssConfig(), 4096)
    words = jnp.zeros(1 << (16 if smoke else 30), jnp.uint16)
    copy_rate = 2 * words.nbytes / best(jax.jit(lambda x: x ^ 1), words, repeats=10)
    del words
    step = partial(decode_step, config, dtype=jnp.bfloat16)

    @jax.jit
    def run(params, cache):
        def turn(_, carry):
            token_B, cache = carry
            logits_BV, cache = step(params, token_B, cache)
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), cache

        return lax.fori_loop(0, TOKENS, turn, (jnp.zeros(1, jnp.int32), cache))[0]

    rows, params = [], random_params(config, jnp.bfloat16)
    for experts in ("bfloat16", "mxfp4"):
        if experts == "mxfp4":
            params = packed_experts(params)
        ready = prepare_params(params, jnp.bfloat16)
        cache = init_cache(config, 1, slots, jnp.bfloat16)._replace(lengths_B=jnp.array([slots - TOKENS - 1], jnp.int32))
        seconds = best(run, ready, cache, repeats=5) / TOKENS
        moved = bytes_of_token(config, ready, cache)
        rows.append({"experts": experts, "tokens_per_s": round(1 / seconds, 1), "mb_per_token": round(moved / 1e6, 1),
                     "of_bandwidth": round(moved / seconds / copy_rate, 3)})  # fmt: skip
    return {"copy_gb_per_s": round(copy_rate / 1e9, 1), "rows": rows, **memory()}
