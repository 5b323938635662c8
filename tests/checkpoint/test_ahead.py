"""Calls in threads: results in order, a bounded number ahead, and a failure in its place."""

import threading
import time
from functools import partial

import pytest

from gptoss_jax.checkpoint.ahead import in_order


def test_results_come_in_order_and_calls_run_at_the_same_time():
    together = threading.Barrier(3, timeout=10)

    def call(i):
        if i < 3:
            together.wait()  # returns only when three calls are here
        time.sleep(0.01 * (5 - i % 5))
        return i

    assert list(in_order((partial(call, i) for i in range(20)), threads=3, ahead=4)) == list(range(20))


@pytest.mark.parametrize("ahead", [1, 4])
def test_no_more_than_asked_for_are_ahead(ahead):
    started, used = [], 0
    for i in in_order((partial(lambda i: started.append(i) or i, i) for i in range(12)), threads=8, ahead=ahead):
        time.sleep(0.01)
        used += 1
        assert i == used - 1 and len(started) < used + ahead


def test_a_failure_comes_in_its_place_and_ends_the_rest():
    called = []

    def call(i):
        called.append(i)
        if i == 2:
            raise ValueError("third")
        return i

    results = in_order((partial(call, i) for i in range(100)), threads=1, ahead=2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="third"):
        next(results)
    assert len(called) < 6
