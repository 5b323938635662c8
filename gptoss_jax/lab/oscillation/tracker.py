"""Watching oscillation: how often quantized values flip, flip back, how long they stand, how far they travel."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from gptoss_jax.lab.oscillation.common import RATIO, PerElement, Round, filled, mean, travel_ratio
from gptoss_jax.lab.quantizer import expert_names


class TrackerState(NamedTuple):
    count: Int[Array, ""]
    moved_q: PerElement  # sum of |d w_q| over the window
    moved: PerElement  # sum of |d w|
    direction: PerElement  # of the last flip: -1, 0 (none yet), 1
    stood: PerElement  # steps since the last flip, or since the beginning
    flip_rate: Float[Array, ""]
    return_rate: Float[Array, ""]
    dwell: Float[Array, ""]
    oscillating: Float[Array, ""]
    travel_ratio: Float[Array, ""]

    def report(self) -> dict[str, Array]:
        """Of the last step: share of elements that flipped, that flipped back, and for how many steps those that flipped had stood (0 if none did).
        Of the last whole window: share with ratio >= 16, and the ratio of the sums over all elements."""
        return {
            "flip_rate": self.flip_rate, "return_rate": self.return_rate, "dwell": self.dwell, "oscillating": self.oscillating,
            "travel_ratio": self.travel_ratio,
        }  # fmt: skip


@dataclass(frozen=True)
class OscillationTracker:
    """Counts flips, changes nothing. A flip is any change of w_q, also that of a whole block whose scale changed."""

    window: int = 20

    acts_on: ClassVar[str] = "updates"

    def transform(self, round: Round) -> optax.GradientTransformationExtraArgs:
        def init(params):
            sums, scalars = (filled(params, 0), filled(params, 0)), [jnp.float32(0) for _ in range(5)]  # each its own buffer, to be donated
            return TrackerState(jnp.int32(0), *sums, filled(params, 0, jnp.int8), filled(params, 0, jnp.int32), *scalars)

        def update(updates, state, params, **_):
            count, names = state.count + 1, expert_names(params)
            before, after = round(params), round(optax.apply_updates(params, updates))
            change = {name: after[name].astype(jnp.float32) - before[name].astype(jnp.float32) for name in names}
            sign = {name: jnp.sign(change[name]).astype(jnp.int8) for name in names}
            flipped = {name: sign[name] != 0 for name in names}
            returned = {name: sign[name] * state.direction[name] == -1 for name in names}
            stood = {name: state.stood[name] + 1 for name in names}
            flip_rate = mean(flipped)
            dwell = mean({name: jnp.where(flipped[name], stood[name], 0) for name in names}) / jnp.where(flip_rate > 0, flip_rate, 1.0)

            moved_q = {name: state.moved_q[name] + jnp.abs(change[name]) for name in names}
            moved = {name: state.moved[name] + jnp.abs(updates[name]) for name in names}
            is_end = count % self.window == 0
            share = mean({name: r >= RATIO for name, r in travel_ratio(moved_q, moved).items()})
            total = mean(moved)
            travel = jnp.where(total > 0, mean(moved_q) / jnp.where(total > 0, total, 1.0), 0.0)
            clear = lambda sums: {name: jnp.where(is_end, 0.0, array) for name, array in sums.items()}
            return updates, TrackerState(
                count, clear(moved_q), clear(moved),
                {name: jnp.where(flipped[name], sign[name], state.direction[name]) for name in names},
                {name: jnp.where(flipped[name], 0, stood[name]) for name in names},
                flip_rate, mean(returned), dwell,
                jnp.where(is_end, share, state.oscillating), jnp.where(is_end, travel, state.travel_ratio),
            )  # fmt: skip

        return optax.GradientTransformationExtraArgs(init, update)
