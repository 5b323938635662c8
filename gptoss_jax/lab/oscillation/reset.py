"""Resetting: what oscillates, or stands at a border, is put onto its grid point."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from gptoss_jax.formats import Format
from gptoss_jax.formats.bits import join_blocks
from gptoss_jax.lab.oscillation.common import RATIO, PerElement, Round, filled, mean, set_where, travel_ratio
from gptoss_jax.lab.quantizer import expert_names
from gptoss_jax.quant.cells import Cells, cells_of


class ResetState(NamedTuple):
    count: Int[Array, ""]
    moved_q: PerElement
    moved: PerElement
    share: Float[Array, ""]

    def report(self) -> dict[str, Array]:
        """Share of the elements that the last step set to their quantized value."""
        return {"reset_rate": self.share}


@dataclass(frozen=True)
class OsciReset:
    """Every `window` steps, w := w_q where sum |d w_q| >= ratio * sum |d w| over the window (TetraJet-v2, arXiv:2510.27527)."""

    window: int = 20
    ratio: float = RATIO

    acts_on: ClassVar[str] = "updates"

    def transform(self, round: Round) -> optax.GradientTransformationExtraArgs:
        def init(params):
            return ResetState(jnp.int32(0), filled(params, 0), filled(params, 0), jnp.float32(0))

        def update(updates, state, params, **_):
            count, names = state.count + 1, expert_names(params)
            before, after = round(params), round(optax.apply_updates(params, updates))
            moved_q = {name: state.moved_q[name] + jnp.abs(after[name].astype(jnp.float32) - before[name]) for name in names}
            moved = {name: state.moved[name] + jnp.abs(updates[name]) for name in names}
            is_due = count % self.window == 0
            reset = {name: is_due & (r >= self.ratio) for name, r in travel_ratio(moved_q, moved).items()}
            clear = lambda sums: {name: jnp.where(is_due, 0.0, array) for name, array in sums.items()}
            return set_where(reset, updates, after, params), ResetState(count, clear(moved_q), clear(moved), mean(reset))

        return optax.GradientTransformationExtraArgs(init, update)


@dataclass(frozen=True)
class EdgeReset:
    """Every `window` steps, w := w_q where |y - Q(y)| > edge * width of Q(y)'s bin, y in units of the block scale: whatever stands at a border,
    whether it oscillates or not. Bin widths as TetraJet-v2 has them, .5 .5 .5 .5 .75 1 1.5 2: where the bin is not symmetric (2, 4) only its wider
    side can be that far away."""

    format: Format
    window: int = 20
    edge: float = 0.495

    acts_on: ClassVar[str] = "updates"

    def transform(self, round: Round) -> optax.GradientTransformationExtraArgs:
        def init(params):
            return ResetState(jnp.int32(0), {}, {}, jnp.float32(0))

        def update(updates, state, params, **_):
            count, moved = state.count + 1, optax.apply_updates(params, updates)
            cells = {name: cells_of(moved[name], self.format) for name in expert_names(params)}
            is_due = count % self.window == 0
            reset = {name: is_due & join_blocks(jnp.abs(c.y - c.q) > self.edge * _bin_width(c)) for name, c in cells.items()}
            values = {name: join_blocks(c.q * c.scale) for name, c in cells.items()}
            return set_where(reset, updates, values, params), ResetState(count, {}, {}, mean(reset))

        return optax.GradientTransformationExtraArgs(init, update)


def _bin_width(cells: Cells) -> Float[Array, "*batch C Q"]:
    """Half the distance between the neighbours of |q|; at both ends of the grid the whole distance to the one neighbour."""
    grid = cells.magnitudes
    width = jnp.full_like(cells.q, grid[1])
    for low, middle, high in zip(grid, grid[1:], (*grid[2:], 2 * grid[-1] - grid[-2]), strict=False):
        width = jnp.where(jnp.abs(cells.q) == middle, 0.5 * (high - low), width)
    return width
