"""Causal attention with learned sinks, grouped-query heads, document segments and an optional sliding window."""

from jaxtyping import Array, Float, Int

from gptoss_jax.ops.attention.blockwise import blockwise_attention
from gptoss_jax.ops.attention.keys import Keys
from gptoss_jax.ops.backend import resolve_backend


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    sinks_N: Float[Array, "N"],
    segment_ids_BT: Int[Array, "B T"],
    window: int | None = None,
    backend: str | None = None,
    keys: Keys | None = None,
) -> Float[Array, "B T N H"]:
    """Scores `q.k / sqrt(H)` and softmax in float32; the sink is a logit per query head added after scaling and masking.

    Query head n reads kv head n // (N/K). A token sees itself and earlier tokens of its own segment, with `window` only the last `window` of
    them, itself included. A row that sees nothing but its sink gives 0. Layers with a window cost O(T * window), the memory of others is O(T) too.

    Args:
      backend: "xla" (blockwise.py) or "triton" (NVIDIA GPUs); None chooses by platform.
      keys: where k and v are of other tokens than q; None where they are of the same (S = T).
    """
    if resolve_backend(backend) == "triton":
        from gptoss_jax.ops.attention.triton import flash_attention  # 0.1 s to import, and only GPUs run it

        return flash_attention(q_BTNH, k_BSKH, v_BSKH, sinks_N, segment_ids_BT, window, keys)
    return blockwise_attention(q_BTNH, k_BSKH, v_BSKH, sinks_N, segment_ids_BT, window, keys)


__all__ = ["Keys", "attention"]
