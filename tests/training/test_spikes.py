"""What counts as a loss spike: far above the recent losses, by a measure that one spike does not spoil."""

import numpy as np

from gptoss_jax.training.spikes import LEAST, WINDOW, SpikeWatch

RNG = np.random.default_rng(0)
QUIET = (2.0 + 0.1 * RNG.standard_normal(200)).tolist()


def test_a_spike_is_found_also_right_behind_another():
    watch = SpikeWatch(6)
    assert not any(watch(loss) for loss in QUIET)
    assert watch(4.0) > 10 and watch(4.0) > 10 and watch(2.05) is None and watch(0.5) is None


def test_a_steep_begin_is_none():
    watch = SpikeWatch(6)
    assert not any(watch(loss) for loss in [11.0, 30.0, *np.linspace(10, 3, LEAST - 2)])


def test_a_level_that_stays_becomes_the_new_one():
    watch = SpikeWatch(6)
    found = [watch(loss) is not None for loss in [*QUIET, *(loss + 3 for loss in QUIET)]]
    assert sum(found) == found[len(QUIET) :].index(False) and WINDOW // 2 - 4 <= sum(found) <= WINDOW // 2 + 1


def test_equal_losses_and_those_that_are_not_finite_do_not_break_it():
    watch = SpikeWatch(6)
    assert not any(watch(loss) for loss in [2.0] * WINDOW + [float("nan"), float("inf"), 2.001])
    assert watch(2.1) is not None


def test_off_by_default_and_goes_on_after_restore_as_without():
    assert not any(map(SpikeWatch(None), [*QUIET, 1e9]))
    one, other = SpikeWatch(3), SpikeWatch(3)
    told = [one(loss) for loss in [*QUIET, 5.0, 2.3]]
    other.restore([None, *QUIET[:-20]])
    assert [other(loss) for loss in [*QUIET[-20:], 5.0, 2.3]] == told[-22:]
