"""KL, agreement and layer errors are those of their definitions, on a model small enough to write them down; nothing differs from itself."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.checkpoint.models import Model
from gptoss_jax.checkpoint.source import NANO
from gptoss_jax.data import load_tokenizer
from gptoss_jax.errors import UsageError
from gptoss_jax.evaluation import LocalSubject, compare
from gptoss_jax.evaluation.compare import compare_models, states
from gptoss_jax.evaluation.layerwise import layer_params
from gptoss_jax.model import compute_logits, forward, init_params
from tests.support.params import lively_params

ROWS = [
    {"messages": [{"role": "user", "content": f"Spell out {n}."}, {"role": "assistant", "content": answer}]}
    for n, answer in ((7, "seven"), (21, "twenty-one"), (123, "one hundred twenty-three"))
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(NANO)


@pytest.fixture(scope="module")
def subjects(tiny_config, tokenizer):
    """Two random models of one shape, five layers: a period of two and a tail."""
    config = dataclasses.replace(tiny_config, vocab_size=len(tokenizer), num_hidden_layers=5, layer_types=())
    params = lively_params(config, 1)
    others = {name: value * (1.1 if "q_proj" in name else 1.0) for name, value in params.items()}
    return [LocalSubject(Model(config, p, NANO, None, None, {}), tokenizer) for p in (params, others)]


@partial(jax.jit, static_argnums=0)
def run_whole(config, params, batch):
    return forward(config, params, batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT, dtype=jnp.float32).hidden_BTD


def log_probs(subject, batch):
    hidden = run_whole(subject.model.config, subject.model.params, batch)
    return np.asarray(jax.nn.log_softmax(compute_logits(subject.model.params, hidden)), np.float64)


def test_distances_are_those_of_the_definitions(subjects):
    a, b = subjects
    found = compare_models(a, b, ROWS)
    (batch,) = a.evaluation_set(ROWS).batches()
    p, q = log_probs(a, batch), log_probs(b, batch)
    real = (batch.segment_ids_BT > 0) & (np.roll(batch.segment_ids_BT, -1, axis=1) == batch.segment_ids_BT)
    np.testing.assert_allclose(found.tokens.kl_ab, (np.exp(p) * (p - q)).sum(-1)[real], atol=1e-5)
    np.testing.assert_allclose(found.tokens.kl_ba, (np.exp(q) * (q - p)).sum(-1)[real], atol=1e-5)
    np.testing.assert_array_equal(found.tokens.same_top, (p.argmax(-1) == q.argmax(-1))[real])
    targets = batch.targets_BT[..., None]
    np.testing.assert_allclose(found.tokens.logprob_b, np.take_along_axis(q, targets, -1)[..., 0][real], atol=1e-4)
    np.testing.assert_array_equal(found.trained, (batch.loss_weights_BT > 0)[real])
    values = found.to_dict()
    assert values["tokens"] == found.trained.sum() and values["kl_ab"] > 1e-4 and 0 < values["top1_agreement"] <= 1
    assert values["loss_a"] == pytest.approx(a.score(ROWS).mean_loss(), rel=1e-5)


def test_layers_one_by_one_end_where_the_model_ends_and_the_first_difference_is_in_the_first_layer(subjects):
    a, b = subjects
    (batch,) = a.evaluation_set(ROWS).batches()
    *layers, last = states(a, batch)
    whole = run_whole(a.model.config, a.model.params, batch)
    real = batch.segment_ids_BT > 0
    np.testing.assert_allclose(np.asarray(last)[real], np.asarray(whole)[real], atol=2e-4)
    errors = compare_models(a, b, ROWS).layers
    assert len(layers) == len(errors) == 6 and errors[0] == 0 and (errors[1:] > 0).all()
    h_a, h_b = (np.asarray(list(states(s, batch))[3], np.float64)[real] for s in (a, b))
    assert errors[3] == pytest.approx(np.linalg.norm(h_b - h_a) / np.linalg.norm(h_a), rel=1e-4)


def test_parameters_of_a_layer_are_those_of_its_slot(subjects):
    model = subjects[0].model
    for layer, (name, index) in enumerate((("blocks.0", 0), ("blocks.1", 0), ("blocks.0", 1), ("blocks.1", 1), ("tail.0", None))):
        stacked = model.params[f"{name}.self_attn.sinks"]
        expected = stacked if index is None else stacked[index]
        np.testing.assert_array_equal(layer_params(model.config, model.params, layer)["self_attn.sinks"], expected)


def test_a_model_does_not_differ_from_itself_whatever_the_block_of_logits(subjects, monkeypatch):
    a, b = subjects
    same = compare_models(a, a, ROWS)
    assert not same.tokens.kl_ab.any() and same.tokens.same_top.all() and not same.layers.any() and not same.tokens.largest.any()
    whole = compare_models(a, b, ROWS)
    monkeypatch.setattr(compare, "MAX_BLOCK_LOGITS", 100 * a.model.config.vocab_size)
    compare.distances.clear_cache()
    for x, y in zip(whole.tokens, compare_models(a, b, ROWS).tokens):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_other_depths_are_compared_by_their_output_and_other_vocabularies_not_at_all(subjects, tokenizer):
    a = subjects[0]
    shallow = dataclasses.replace(a.model.config, num_hidden_layers=2, layer_types=())
    b = a.with_model(Model(shallow, init_params(shallow, jax.random.key(0)), NANO, None, None, {}))
    found = compare_models(a, b, ROWS)
    assert not len(found.layers) and found.to_dict()["kl_ab"] > 0.1 and found.to_dict()["layer_error"] == []
    fewer = SimpleNamespace(model=SimpleNamespace(config=dataclasses.replace(a.model.config, vocab_size=1000)), tokenizer=tokenizer)
    with pytest.raises(UsageError, match="different vocabularies"):
        compare_models(a, fewer, ROWS)
