"""How the next token is chosen from logits.

Temperature divides the logits first; then `top_k` keeps the k most probable tokens, then `top_p` the fewest of those whose probabilities add up to
p or more; one of what is left is drawn. A row's draws come from a stream of their own, made of the seed, the row's number and the number of tokens
it has: they do not depend on which other rows share its batch, nor on the batch size.

Legend: B rows  V vocab  C candidates
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptoss_jax.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 is greedy decoding: the most probable token, of equals the one with the smallest id."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature = {self.temperature} must be 0 (greedy) or above")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top_k = {self.top_k} must be at least 1")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p = {self.top_p} must be above 0 and at most 1")
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"seed = {self.seed} must fit 32 bits")


GREEDY = Sampling()


def row_keys(seed: int, rows_B) -> Array:
    """One key per row, from the seed and the row's number in the whole list of prompts."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(rows_B, jnp.uint32))


def choose(logits_BV: Float[Array, "B V"], sampling: Sampling, keys_B: Array, num_tokens_B: Int[Array, "B"]) -> Int[Array, "B"]:
    """The next token of each row, int32. `num_tokens_B`: tokens that the row has, its place in its stream. The seed is in the keys."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    scores_BC, candidates_BC = logits_BV / sampling.temperature, None
    vocab = logits_BV.shape[-1]
    if sampling.top_k is not None or sampling.top_p < 1:
        scores_BC, candidates_BC = jax.lax.top_k(scores_BC, min(sampling.top_k or vocab, vocab))
    if sampling.top_p < 1:
        probs_BC = jax.nn.softmax(scores_BC, axis=-1)
        before_BC = jnp.cumsum(probs_BC, axis=-1) - probs_BC
        keep_BC = (before_BC < sampling.top_p) | (jnp.arange(scores_BC.shape[-1]) == 0)  # rounding must not empty the set
        scores_BC = jnp.where(keep_BC, scores_BC, -jnp.inf)
    draw = lambda key, num_tokens, scores_C: jax.random.categorical(jax.random.fold_in(key, num_tokens), scores_C)
    index_B = jax.vmap(draw)(keys_B, num_tokens_B, scores_BC)
    if candidates_BC is not None:
        index_B = jnp.take_along_axis(candidates_BC, index_B[:, None], axis=-1)[:, 0]
    return index_B.astype(jnp.int32)
