"""Useful floating-point operations of a training step: two per multiply-add of the forward products, three forward passes' worth in all.

Counted are the products that the architecture defines: projections, router, the experts a token is sent to, causal (and windowed) attention
scores and values, unembedding. Not counted: elementwise work, recomputation, padding of expert rows.
"""

from gptoss_jax.model.config import SLIDING, GptOssConfig


def visible_pairs(length: int, window: int | None) -> int:
    """Pairs (query, key) of a causal row of one document; with a window the last `window` keys, the query's own included."""
    window = length if window is None else min(window, length)
    return window * length - window * (window - 1) // 2


def forward_flops(config: GptOssConfig, rows: int, length: int, *, logits: bool = True) -> int:
    """Operations of the forward pass of `rows` full rows of one document each."""
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    projections = hidden * (2 * heads + 2 * config.num_key_value_heads * config.head_dim)
    experts = config.num_experts_per_tok * 3 * hidden * config.intermediate_size + config.num_local_experts * hidden
    per_token = config.num_hidden_layers * (projections + experts) + (config.vocab_size * hidden if logits else 0)
    pairs = sum(visible_pairs(length, config.sliding_window if kind == SLIDING else None) for kind in config.layer_types)
    return 2 * rows * (length * per_token + pairs * 2 * heads)


def train_flops(config: GptOssConfig, rows: int, length: int) -> int:
    """Operations of forward and backward: the gradients of a product's two factors cost as much as the product, each."""
    return 3 * forward_flops(config, rows, length)
