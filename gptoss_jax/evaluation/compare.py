"""How far two models are apart on the same tokens: distributions of the next token, and hidden states layer by layer.

    KL(a || b) = sum_v p_a(v) (log p_a(v) - log p_b(v))      in nats, per token, both ways
    top-1      share of tokens where both find the same next token most probable
    logprob    log p_b - log p_a of the token that stands there: quantiles
    layer      |h_b - h_a| / |h_a| after each layer, over all tokens (Frobenius norms)

Logits exist for one block of tokens at a time, so a vocabulary of 201,088 costs 2 x 256 MiB.

Legend: B batch  T tokens of a row  S tokens  D hidden  V vocab
"""

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gptoss_jax.data.harmony import System
from gptoss_jax.data.packing import Batch
from gptoss_jax.errors import UsageError
from gptoss_jax.evaluation.layerwise import hidden_states
from gptoss_jax.evaluation.subjects import LocalSubject, Report
from gptoss_jax.ops.cross_entropy.blocks import MAX_BLOCK_LOGITS

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


class TokenDistances(NamedTuple):
    """One value per compared token, in the order of the rows."""

    kl_ab: np.ndarray  # float32
    kl_ba: np.ndarray  # float32
    same_top: np.ndarray  # bool
    logprob_a: np.ndarray  # float32, of the token that stands there
    logprob_b: np.ndarray  # float32
    largest: np.ndarray  # float32, the largest |difference of log-probabilities| among tokens that either finds more probable than 1e-4


class Comparison(NamedTuple):
    """`trained` are the tokens that training looks at (the answers), `layers` the relative error after the embedding and each layer."""

    tokens: TokenDistances
    trained: np.ndarray  # bool
    layers: np.ndarray  # float64 [L + 1]

    def to_dict(self) -> dict[str, Any]:
        tokens, chosen = self.tokens, self.trained
        difference = (tokens.logprob_b - tokens.logprob_a)[chosen]
        return {
            "tokens": int(chosen.sum()),
            "kl_ab": float(tokens.kl_ab[chosen].mean(dtype=np.float64)),
            "kl_ba": float(tokens.kl_ba[chosen].mean(dtype=np.float64)),
            "kl_ab_all_tokens": float(tokens.kl_ab.mean(dtype=np.float64)),
            "top1_agreement": float(tokens.same_top[chosen].mean()),
            "top1_agreement_all_tokens": float(tokens.same_top.mean()),
            "loss_a": -float(tokens.logprob_a[chosen].mean(dtype=np.float64)),
            "loss_b": -float(tokens.logprob_b[chosen].mean(dtype=np.float64)),
            "logprob_difference": {f"{q:g}": float(v) for q, v in zip(QUANTILES, np.quantile(difference, QUANTILES))},
            "largest_logprob_difference": {f"{q:g}": float(v) for q, v in zip(QUANTILES, np.quantile(tokens.largest[chosen], QUANTILES))},
            "layer_error": [float(value) for value in self.layers],
        }


def _block_distances(w_a_VD, w_b_VD, dtypes, block):
    """TokenDistances of a block of tokens, as arrays [S]."""
    hidden_a_SD, hidden_b_SD, targets_S = block

    def log_probs(hidden_SD, w_VD, dtype):
        logits_SV = jnp.einsum("sd,vd->sv", hidden_SD.astype(dtype), w_VD.astype(dtype), preferred_element_type=jnp.float32)
        return jax.nn.log_softmax(logits_SV)

    a_SV, b_SV = log_probs(hidden_a_SD, w_a_VD, dtypes[0]), log_probs(hidden_b_SD, w_b_VD, dtypes[1])
    picked = lambda x_SV: jnp.take_along_axis(x_SV, targets_S[:, None], axis=1)[:, 0]
    likely_SV = jnp.maximum(a_SV, b_SV) > np.log(1e-4)
    return TokenDistances(
        jnp.sum(jnp.exp(a_SV) * (a_SV - b_SV), axis=1),
        jnp.sum(jnp.exp(b_SV) * (b_SV - a_SV), axis=1),
        jnp.argmax(a_SV, axis=1) == jnp.argmax(b_SV, axis=1),
        picked(a_SV),
        picked(b_SV),
        jnp.max(jnp.where(likely_SV, jnp.abs(a_SV - b_SV), 0), axis=1),
    )


@partial(jax.jit, static_argnums=(4,))
def distances(hidden_a_BTD, hidden_b_BTD, heads, targets_BT, dtypes) -> TokenDistances:
    """Arrays [B, T] from final hidden states of both models; `heads` are the two unembeddings [V, D]."""
    num_tokens, vocab = targets_BT.size, heads[0].shape[0]
    block = max(1, min(num_tokens, MAX_BLOCK_LOGITS // vocab))
    num_blocks = -(-num_tokens // block)

    def split(x):
        x = x.reshape(num_tokens, *x.shape[2:])
        return jnp.pad(x, [(0, num_blocks * block - num_tokens)] + [(0, 0)] * (x.ndim - 1)).reshape(num_blocks, block, *x.shape[1:])

    found = lax.map(partial(_block_distances, *heads, dtypes), (split(hidden_a_BTD), split(hidden_b_BTD), split(targets_BT)))
    return jax.tree.map(lambda x: x.reshape(-1)[:num_tokens].reshape(targets_BT.shape), found)


def compare_models(
    a: LocalSubject, b: LocalSubject, rows: Sequence[dict[str, Any]], *, system: System | str | None = None, report: Report | None = None
) -> Comparison:
    """Both models on the conversations of `rows`, with the same input. Layers are compared where depth and width are the same.

    Raises:
      UsageError: the models have different vocabularies.
    """
    if a.model.config.vocab_size != b.model.config.vocab_size or a.tokenizer.get_vocab() != b.tokenizer.get_vocab():
        raise UsageError(f"the models have different vocabularies ({a.model.config.vocab_size} and {b.model.config.vocab_size} tokens)")
    evaluation_set = a.evaluation_set(rows, system)
    heads = a.model.params["lm_head.weight"], b.model.params["lm_head.weight"]
    found, trained, sums = [], [], []
    for number, batch in enumerate(evaluation_set.batches(), 1):
        hidden_a, hidden_b, errors = _run_both(a, b, batch)
        with a.precision():
            result = jax.device_get(distances(hidden_a, hidden_b, heads, batch.targets_BT, (a.dtype, b.dtype)))
        # the last token of a document has no target
        real_BT = (batch.segment_ids_BT > 0) & (np.roll(batch.segment_ids_BT, -1, axis=1) == batch.segment_ids_BT)
        real_BT[:, -1] = False
        found.append(jax.tree.map(lambda x, real_BT=real_BT: x[real_BT], result))
        trained.append(batch.loss_weights_BT[real_BT] > 0)
        sums.append(errors)
        if report:
            report(min(len(rows), number * evaluation_set.batch_size * len(rows) // len(evaluation_set.packed.rows.tokens_BT)))
    total = np.sum(sums, axis=0)
    return Comparison(TokenDistances(*map(np.concatenate, zip(*found))), np.concatenate(trained), np.sqrt(total[:, 0] / total[:, 1]))


@jax.jit
def _squares(a_BTD, b_BTD, segment_ids_BT):
    """float32 [2]: sums over real tokens of |b - a|^2 and |a|^2."""
    a_BTD, b_BTD = (jnp.where((segment_ids_BT > 0)[..., None], x.astype(jnp.float32), 0) for x in (a_BTD, b_BTD))
    return jnp.stack([jnp.sum(jnp.square(b_BTD - a_BTD)), jnp.sum(jnp.square(a_BTD))])


def states(subject: LocalSubject, batch: Batch) -> Iterator[jax.Array]:
    """`hidden_states` of a subject."""
    with subject.precision():
        yield from hidden_states(subject.model.config, subject.model.params, batch, subject.dtype, subject.expert_quant)


def _run_both(a: LocalSubject, b: LocalSubject, batch: Batch) -> tuple[jax.Array, jax.Array, np.ndarray]:
    """Final hidden states of both, and float64 [L + 1, 2]: `_squares` after the embedding and each layer ([0, 2] where shapes differ)."""
    depth_and_width = [(s.model.config.num_hidden_layers, s.model.config.hidden_size) for s in (a, b)]
    if depth_and_width[0] != depth_and_width[1]:
        return *(deque(states(s, batch), maxlen=1)[0] for s in (a, b)), np.zeros((0, 2))
    squares = []
    for h_a, h_b in zip(states(a, batch), states(b, batch)):
        squares.append(_squares(h_a, h_b, batch.segment_ids_BT))
    return h_a, h_b, np.array(jax.device_get(squares[:-1]), np.float64)
