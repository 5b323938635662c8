"""A packed row is the sum of its documents: logits, loss and every gradient equal those of the documents run alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.data import pack
from gptoss_jax.model import compute_logits, forward
from gptoss_jax.ops.cross_entropy import cross_entropy_sum
from tests.support.documents import document
from tests.support.params import lively_params

LENGTHS = (17, 4, 17, 4)  # sliding_window is 7: above and below it; 42 tokens in a row of 48, so a padded tail


@functools.partial(jax.jit, static_argnums=0)
def run(config, params, batch):
    def loss(params):
        hidden_BTD = forward(config, params, batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT, dtype=jnp.float32).hidden_BTD
        total = cross_entropy_sum(hidden_BTD, params["lm_head.weight"], batch.targets_BT, batch.loss_weights_BT, jnp.float32)
        return total, compute_logits(params, hidden_BTD, jnp.float32)

    return jax.value_and_grad(loss, has_aux=True)(params)


@pytest.fixture(scope="module")
def outcome(tiny_config):
    rng = np.random.default_rng(0)
    params = lively_params(tiny_config)
    documents = [document(rng.integers(0, tiny_config.vocab_size, n), rng.random(n) < 0.7) for n in LENGTHS]
    packed = pack(documents, 48)
    assert len(packed.rows.tokens_BT) == 1
    alone = [run(tiny_config, params, pack([document], len(document.ids)).rows) for document in documents]
    return packed, run(tiny_config, params, packed.rows), alone


def test_logits_of_a_packed_row_are_those_of_its_documents(outcome):
    packed, ((_, logits_BTV), _), alone = outcome
    for start, length, ((_, own_BTV), _) in zip(packed.start_of, packed.length_of, alone):
        np.testing.assert_allclose(logits_BTV[0, start : start + length], own_BTV[0], atol=1e-4, rtol=1e-4)


def test_loss_of_a_packed_row_is_the_sum_of_its_documents(outcome):
    _, ((loss, _), _), alone = outcome
    np.testing.assert_allclose(loss, sum(own for (own, _), _ in alone), rtol=1e-5)


def test_every_gradient_of_a_packed_row_is_the_sum_of_its_documents(outcome):
    _, (_, gradients), alone = outcome
    for name, gradient in gradients.items():
        expected = sum(np.asarray(own[name]) for _, own in alone)
        assert np.linalg.norm(expected) > 0, name
        assert np.linalg.norm(gradient - expected) <= 1e-4 * np.linalg.norm(expected), name
