"""A row passes if and only if every produced token is right; intervals widen when rows share a pair; greedy decoding agrees."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptoss_jax
from gptoss_jax.data import load_tokenizer, pack
from gptoss_jax.evaluation import EvaluationSet, Prediction, greedy_decode, make_evaluation_set, pass_rate, score, task_rows
from gptoss_jax.evaluation.pass_rate import interval, wilson
from gptoss_jax.model import compute_logits, forward, init_params
from tests.support.documents import document

NANO = Path(gptoss_jax.__file__).parent / "nano"


@pytest.fixture(scope="module")
def evaluation_set():
    rows = task_rows("B", "dev", 0, 60) + task_rows("A", "dev", 0, 40)
    return make_evaluation_set(rows, load_tokenizer(NANO), row_length=96, batch_size=8)


def perfect(batch):
    return Prediction(batch.targets_BT, np.zeros(batch.tokens_BT.shape, np.float32))


def test_a_perfect_predictor_passes_everything(evaluation_set):
    scores = score(perfect, evaluation_set)
    assert scores.passed.all() and scores.mean_loss() == 0 and scores.failures() == []
    assert pass_rate(perfect, evaluation_set)[:2] == (100, 100)


@pytest.mark.parametrize("which", ["first", "last"])
def test_one_wrong_token_fails_exactly_its_row(evaluation_set, which):
    packed, victim = evaluation_set.packed, 37
    trained = np.flatnonzero(packed.rows.loss_weights_BT[packed.row_of[victim]][: packed.start_of[victim] + packed.length_of[victim]])
    trained = trained[trained >= packed.start_of[victim]]
    column = trained[0 if which == "first" else -1]
    row = packed.row_of[victim]

    def predict(batch):
        tokens = batch.targets_BT.copy()
        tokens[(batch.tokens_BT == packed.rows.tokens_BT[row]).all(axis=1), column] += 1
        return Prediction(tokens, np.zeros(tokens.shape, np.float32))

    scores = score(predict, evaluation_set)
    assert np.flatnonzero(~scores.passed).tolist() == [victim] and scores.failures() == [evaluation_set.rows[victim]]
    assert scores.select(task="A").passed.all() and scores.without(task="A").pass_rate()[:2] == (59, 60)


def test_wrong_tokens_where_nothing_is_trained_do_not_matter(evaluation_set):
    def predict(batch):
        return Prediction(np.where(batch.loss_weights_BT > 0, batch.targets_BT, 1), np.where(batch.loss_weights_BT > 0, 2.0, np.nan))

    scores = score(predict, evaluation_set)
    assert scores.passed.all() and scores.mean_loss() == 2.0


def test_the_prompt_is_not_trained_and_the_stop_token_is(evaluation_set):
    tokenizer = load_tokenizer(NANO)
    packed, row = evaluation_set.packed, evaluation_set.rows[0]
    span = (packed.row_of[0], slice(packed.start_of[0], packed.start_of[0] + packed.length_of[0]))
    targets = packed.rows.targets_BT[span][packed.rows.loss_weights_BT[span] > 0]
    assert tokenizer.decode(targets) == f"<|channel|>final<|message|>{row['messages'][-1]['content']}<|return|>"


def test_wilson_matches_published_values():
    np.testing.assert_allclose(wilson(81 / 263, 263), (0.2553, 0.3662), atol=1e-4)  # Newcombe 1998, table I, method 3
    np.testing.assert_allclose(wilson(0 / 20, 20), (0.0, 0.1611), atol=1e-4)


def test_interval_counts_clusters_where_rows_of_a_pair_pass_together():
    rng = np.random.default_rng(0)
    together = np.repeat(rng.random(100) < 0.7, 4)
    pairs = np.repeat(np.arange(100), 4)
    rate = together.mean()
    np.testing.assert_allclose(interval(together, pairs), wilson(rate, 99), atol=1e-9)  # n_eff = clusters - 1: rows of a pair tell nothing new
    assert interval(together, range(400)) == wilson(rate, 400)
    alone = rng.random(400) < 0.7
    np.testing.assert_allclose(interval(alone, pairs), wilson(alone.mean(), 400), atol=0.01)
    assert interval(np.ones(400, bool), pairs) == wilson(1.0, 100)


def test_teacher_forcing_agrees_with_greedy_decoding(tiny_config):
    """References are the model's own greedy answers, half of them with one token changed: just those must fail."""
    params = init_params(tiny_config, jax.random.key(0))
    rng = np.random.default_rng(0)
    row_length, prompts = 20, [rng.integers(0, 160, n).astype(np.int32) for n in (5, 9, 3, 8)]

    @jax.jit
    def apply(tokens_BT, segment_ids_BT, positions_BT, targets_BT):
        hidden_BTD = forward(tiny_config, params, tokens_BT, segment_ids_BT, positions_BT, dtype=jnp.float32, remat=False).hidden_BTD
        log_probs_BTV = jax.nn.log_softmax(compute_logits(params, hidden_BTD, jnp.float32))
        return log_probs_BTV.argmax(-1), -jnp.take_along_axis(log_probs_BTV, targets_BT[..., None], -1)[..., 0]

    def predict(batch):
        return Prediction(*apply(batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT, batch.targets_BT))

    answers = greedy_decode(predict, prompts, row_length, stop_ids=[])
    assert [len(p) + len(a) for p, a in zip(prompts, answers)] == [row_length] * 4
    stopped = greedy_decode(predict, prompts, row_length, stop_ids=[int(answers[1][4])])[1]
    first = answers[1].tolist().index(answers[1][4])
    np.testing.assert_array_equal(stopped, answers[1][: first + 1])

    answers = [a[:8] for a in answers]
    answers[1][3] += 1
    answers[2][7] += 1
    documents = [document(np.concatenate([p, a]), np.arange(len(p) + len(a)) >= len(p)) for p, a in zip(prompts, answers)]
    packed = pack(documents, row_length)
    padded = EvaluationSet([{}] * 4, packed, 4)
    assert score(predict, padded).passed.tolist() == [True, False, False, True]
