"""A packed row is its documents: logits, loss and every gradient equal those of the documents run alone."""

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.model import compute_logits, forward
from gptoss_jax.ops.cross_entropy import cross_entropy_sum
from tests.support.params import lively_params

LENGTHS = (13, 3, 25, 7, 1)  # above and below the window of 7, and equal to it; a tail of padding follows
ROW = 56


def test_packed_row_equals_its_documents_alone(tiny_config):
    config, params = tiny_config, lively_params(tiny_config)
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, config.vocab_size, n).astype(np.int32) for n in LENGTHS]
    row = {key: np.zeros((1, ROW), np.float32 if key == "weights" else np.int32) for key in ("tokens", "targets", "weights", "segments", "positions")}
    at = 0
    for index, document in enumerate(documents):
        span = slice(at, at + len(document))
        row["tokens"][0, span], row["segments"][0, span], row["positions"][0, span] = document, index + 1, np.arange(len(document))
        row["targets"][0, span][:-1], row["weights"][0, span][:-1] = document[1:], 1
        at += len(document)
    assert at < ROW

    def loss_and_logits(params, tokens, targets, weights, segments=None, positions=None):
        hidden = forward(config, params, tokens, segments, positions, dtype=jnp.float32).hidden_BTD
        return cross_entropy_sum(hidden, params["lm_head.weight"], targets, weights, jnp.float32), compute_logits(params, hidden)

    grad = jax.jit(jax.value_and_grad(loss_and_logits, has_aux=True))
    (packed_loss, packed_logits), packed_grads = grad(params, row["tokens"], row["targets"], row["weights"], row["segments"], row["positions"])
    total, sums, at = 0.0, None, 0
    for document in documents:
        tokens = document[None]
        weights = np.ones(tokens.shape, np.float32)
        weights[:, -1] = 0
        (loss, logits), grads = grad(params, tokens, np.roll(tokens, -1, axis=1), weights)
        np.testing.assert_allclose(packed_logits[0, at : at + len(document)], logits[0], atol=1e-4)
        total, sums = total + loss, grads if sums is None else jax.tree.map(jnp.add, sums, grads)
        at += len(document)
    np.testing.assert_allclose(packed_loss, total, rtol=1e-5)
    for name, value in packed_grads.items():
        error = jnp.linalg.norm(value - sums[name]) / (jnp.linalg.norm(sums[name]) + 1e-8)
        assert error < 1e-4, (name, float(error))


def test_padding_does_not_count_in_router_statistics(tiny_config):
    params = lively_params(tiny_config)
    tokens = np.arange(20, dtype=np.int32)[None]
    segments = (np.arange(20) < 14).astype(np.int32)[None]
    router = forward(tiny_config, params, tokens, segments, dtype=jnp.float32).router
    np.testing.assert_array_equal(router.num_tokens, 14)
    np.testing.assert_allclose(router.assignments_E.sum(-1), 14 * tiny_config.num_experts_per_tok)
    alone = forward(tiny_config, params, tokens[:, :14], dtype=jnp.float32).router
    for got, want in zip(router, alone):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
