"""Loss spikes: a step whose loss stands far above those before it. They are told, not acted upon: the update is applied as every other.

The measure is robust, so that one spike does not hide the next: distance to the median of the last 64 losses, in units of 1.4826 times their median
absolute deviation (the standard deviation, if they were normal). A loss that stays high becomes the new median after 32 steps, and the warnings end.
"""

from collections import deque
from collections.abc import Iterable

import numpy as np

WINDOW = 64
LEAST = 16  # losses that must have been seen: the first steps of a run fall steeply
# of the median: the least spread that is assumed, for losses that hardly differ
FLOOR = 1e-3


class SpikeWatch:
    """`watch(loss)` is the distance of a loss above the recent ones, where that is more than `sigmas`, else None.

    Args:
      sigmas: None never finds a spike.
    """

    def __init__(self, sigmas: float | None):
        self.sigmas = sigmas
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def restore(self, losses: Iterable[float | None]) -> None:
        """Goes on behind these losses of the same run, as if they had been watched."""
        self._losses.clear()
        self._losses.extend(loss for loss in losses if loss is not None)

    def __call__(self, loss: float) -> float | None:
        if self.sigmas is None or not np.isfinite(loss):  # those that are not finite are skipped and counted elsewhere
            return None
        before = np.array(self._losses)
        self._losses.append(loss)
        if len(before) < LEAST:
            return None
        median = np.median(before)
        spread = max(1.4826 * np.median(np.abs(before - median)), FLOOR * abs(median))
        distance = (loss - median) / spread if spread else 0.0
        return round(float(distance), 1) if distance > self.sigmas else None
