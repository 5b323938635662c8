"""What is drawn from logits, how often, and from which stream."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.errors import UsageError
from gptoss_jax.evaluation.sampling import Sampling, choose, row_keys

PROBS = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
DRAWS = 4000


def draws(sampling: Sampling) -> np.ndarray:
    """Frequencies of `DRAWS` draws from PROBS, in the stream of one row."""
    logits = jnp.log(jnp.tile(jnp.asarray(PROBS, jnp.float32), (DRAWS, 1)))
    tokens = choose(logits, sampling, row_keys(sampling.seed, np.zeros(DRAWS)), jnp.arange(DRAWS))
    return np.bincount(np.asarray(tokens), minlength=len(PROBS)) / DRAWS


@pytest.mark.parametrize(
    "sampling, want",
    [
        (Sampling(), [1, 0, 0, 0, 0]),
        (Sampling(temperature=1.0), PROBS),
        (Sampling(temperature=0.5), PROBS**2),
        (Sampling(temperature=1.0, top_k=2), [0.4, 0.3, 0, 0, 0]),
        (Sampling(temperature=1.0, top_k=1), [1, 0, 0, 0, 0]),
        (Sampling(temperature=1.0, top_k=100), PROBS),
        (Sampling(temperature=1.0, top_p=0.75), [0.4, 0.3, 0.15, 0, 0]),
        (Sampling(temperature=1.0, top_p=1e-9), [1, 0, 0, 0, 0]),
        (Sampling(temperature=1.0, top_k=3, top_p=0.5), [0.4, 0.3, 0, 0, 0]),
        (Sampling(temperature=0.5, top_p=0.8, seed=3), [0.16, 0.09, 0, 0, 0]),
    ],
    ids=str,
)
def test_tokens_come_as_often_as_they_should(sampling, want):
    want = np.asarray(want) / np.sum(want)
    got = draws(sampling)
    assert ((got > 0) == (want > 0)).all()
    assert np.abs(got - want).max() < 4 * np.sqrt(0.25 / DRAWS)


def test_a_row_draws_the_same_whatever_its_batch():
    logits = jax.random.normal(jax.random.key(0), (6, 50))
    sampling, counts = Sampling(temperature=2.0, seed=5), jnp.arange(6)
    all_rows = choose(logits, sampling, row_keys(5, np.arange(6)), counts)
    some = np.array([4, 1])
    np.testing.assert_array_equal(choose(logits[some], sampling, row_keys(5, some), counts[some]), all_rows[some])


def test_row_place_and_seed_each_change_the_stream():
    logits = jnp.zeros((64, 1000))
    run = lambda seed, rows, counts: np.asarray(choose(logits, Sampling(temperature=1.0), row_keys(seed, rows), counts))
    same, running = np.zeros(64, int), np.arange(64)
    assert len(set(run(0, same, same))) == 1
    streams = [run(0, running, same), run(0, same, running), run(1, running, same)]
    assert all(len(set(stream)) > 50 for stream in streams) and not (streams[0] == streams[2]).any()


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"seed": -1}])
def test_impossible_settings_are_refused_with_their_value(bad):
    with pytest.raises(UsageError, match=f"{next(iter(bad))} = {next(iter(bad.values()))}"):
        Sampling(**bad)
