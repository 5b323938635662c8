"""What a step reports about routing: by its formulas, and the same on any mesh."""

import json

import jax
import numpy as np
import pytest

from gptoss_jax.model import RouterStats
from gptoss_jax.ops.grouped_matmul import groups
from gptoss_jax.sharding import make_mesh
from gptoss_jax.training.console import format_line
from gptoss_jax.training.router import router_numbers, router_table
from gptoss_jax.training.step import Shardings, init_state, make_train_step
from tests.training.support import CONFIG, Batches, make_params, make_train

EVEN = RouterStats(np.full((2, 4), 6.0), np.full((2, 4), 2.0), np.full(2, 8.0), np.zeros(2))


def stats_of(sizes=None, accumulation=1):
    train = make_train(batch={"rows": 8, "accumulation": accumulation})
    shardings = sizes and Shardings.on(CONFIG, make_mesh(**sizes))
    batch = next(Batches())
    state = init_state(CONFIG, train, make_params(), shardings)
    metrics = make_train_step(CONFIG, train, None, shardings)(state, jax.device_put(batch, shardings.batch) if sizes else batch)[1]
    return jax.device_get(metrics["router"])


@pytest.fixture(scope="module")
def one_device():
    return stats_of()


def test_numbers_by_their_formulas():
    even = router_numbers(EVEN)
    assert even == {"router/load_max": [1, 1], "router/load_cv": [0, 0], "router/entropy": [1, 1], "router/dropped": 0}
    skewed = RouterStats(np.array([[9.0, 3, 0, 0]]), np.array([[4.0, 4, 0, 0]]), np.array([8.0]), np.array([5.0]))
    expected = {"router/load_max": [3], "router/load_cv": [round(13.5**0.5 / 3, 4)], "router/entropy": [0.5], "router/dropped": 5}
    assert router_numbers(skewed) == expected
    assert "DROPPED 5" in format_line({"step": 1, **expected}, 2) and "DROPPED" not in format_line({"step": 1, **even}, 2)


def test_padding_alone_and_nan_are_null():
    empty = RouterStats(np.zeros((1, 4)), np.zeros((1, 4)), np.zeros(1), np.zeros(1))
    nan = empty._replace(probability_E=np.full((1, 4), np.nan), num_tokens=np.ones(1))
    for stats in (empty, nan):
        assert router_numbers(stats)["router/load_max"] == router_numbers(stats)["router/entropy"] == [None]
        assert json.loads(json.dumps(router_table(0, stats), allow_nan=False))["probability"] == [[None] * 4]


@pytest.mark.parametrize("sizes,accumulation", [(None, 4), (dict(expert=2, context=2), 1), (dict(data=2, expert=2, tensor=2), 2)], ids=str)
def test_statistics_are_the_same_on_any_mesh_and_for_any_accumulation(one_device, sizes, accumulation):
    got = stats_of(sizes, accumulation)
    np.testing.assert_array_equal(got.assignments_E, one_device.assignments_E)
    np.testing.assert_allclose(got.probability_E, one_device.probability_E, rtol=1e-5)
    np.testing.assert_array_equal(got.num_tokens, one_device.num_tokens)
    np.testing.assert_array_equal(got.num_dropped, 0)


def test_a_buffer_that_is_too_small_is_counted(monkeypatch):
    """Dropped rows are those that lie in no computed block: with half the blocks they show."""
    whole = groups.max_slots
    monkeypatch.setattr(groups, "max_slots", lambda rows, experts, block: block * (whole(rows, experts, block) // block // 2))
    assert (stats_of().num_dropped > 0).all()
