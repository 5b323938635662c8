"""What to do about quantized weights that flip back and forth, as Optax transformations: watch them, reset them, hold them, freeze them.

A latent weight near the border of two cells crosses it with every small step of the optimizer, and its quantized value jumps by a whole cell. Each
tool is a frozen dataclass; `tool.transform(round)` makes it an `optax.GradientTransformationExtraArgs` over a dict of parameters, of which it touches
the expert projections alone. `round(params) -> params` gives the quantized values of given weights: any quantizer's deployed form. The tools come
after the optimizer and the learning rate, where updates are what will be added; `Dampening`, a term of the loss, comes before (`acts_on`).

    tracker = OscillationTracker(window=20)
    optimizer = optax.chain(optax.adam(1e-4), tracker.transform(round), OsciReset(window=20).transform(round))

Every state has `report() -> dict of scalars` for the log. Notation: w latent, w_q = round(w), d w and d w_q their changes in one step.
"""

from gptoss_jax.lab.oscillation.hold import Dampening, IterativeFreezing
from gptoss_jax.lab.oscillation.q_ema import QEma, TrackEma
from gptoss_jax.lab.oscillation.reset import EdgeReset, OsciReset
from gptoss_jax.lab.oscillation.tracker import OscillationTracker

__all__ = ["Dampening", "EdgeReset", "IterativeFreezing", "OsciReset", "OscillationTracker", "QEma", "TrackEma"]
