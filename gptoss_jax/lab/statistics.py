"""Means over seeds with 95 % intervals, and differences between arms that had the same seeds.

Interval: Student's t over n seeds, mean +- t(0.975, n-1) * s / sqrt(n); with one seed there is none. For three seeds t is 4.30, so an interval that
leaves out zero is strong evidence and one that holds it is weak evidence of no difference. A difference is taken seed by seed first: what a seed's
data, order of batches and start do to both arms cancels.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from scipy.special import stdtrit


class Estimate(NamedTuple):
    """A mean over `n` seeds and half the width of its 95 % interval (None for one seed)."""

    mean: float
    half: float | None
    n: int

    @property
    def low(self) -> float:
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        return self.mean + (self.half or 0.0)


def estimate(values: Sequence[float]) -> Estimate:
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return Estimate(mean, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return Estimate(mean, float(stdtrit(n - 1, 0.975)) * math.sqrt(variance / n), n)


def paired(ours: Mapping[Any, float], theirs: Mapping[Any, float]) -> Estimate | None:
    """The mean difference over the seeds that both have; None where they share none."""
    seeds = [seed for seed in ours if seed in theirs]
    return estimate([ours[seed] - theirs[seed] for seed in seeds]) if seeds else None
