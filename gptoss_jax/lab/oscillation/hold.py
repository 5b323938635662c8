"""Holding back: a term of the loss that pulls weights to their grid points, and freezing of what oscillates."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from gptoss_jax.formats import Format
from gptoss_jax.formats.bits import join_blocks
from gptoss_jax.lab.oscillation.common import PerElement, Round, cosine, filled, mean, set_where
from gptoss_jax.lab.quantizer import expert_names
from gptoss_jax.quant.cells import cells_of


class DampeningState(NamedTuple):
    count: Int[Array, ""]
    distance: Float[Array, ""]

    def report(self) -> dict[str, Array]:
        """Root mean square of w - w_q."""
        return {"distance_to_grid": self.distance}


@dataclass(frozen=True)
class Dampening:
    """Adds the gradient of lambda * sum (w - sg(w_q))^2, 2 lambda (w - w_q), lambda growing along a cosine from 0 to `weight` over `steps` steps, or
    constant without `steps` (arXiv:2203.11086). With `format`, elements beyond the grid are left out, as there."""

    weight: float = 1e-3
    steps: int | None = None
    format: Format | None = None

    acts_on: ClassVar[str] = "gradients"

    def transform(self, round: Round) -> optax.GradientTransformationExtraArgs:
        def init(params):
            return DampeningState(jnp.int32(0), jnp.float32(0))

        def update(updates, state, params, **_):
            weight = self.weight if self.steps is None else cosine(state.count, 0.0, self.weight, self.steps)
            rounded = round(params)
            distance = {name: params[name].astype(jnp.float32) - rounded[name] for name in expert_names(params)}
            if self.format is not None:
                distance = {name: jnp.where(join_blocks(cells_of(params[name], self.format).inside), d, 0.0) for name, d in distance.items()}
            added = {name: updates[name] + (2 * weight * d).astype(updates[name].dtype) for name, d in distance.items()}
            return {**updates, **added}, DampeningState(state.count + 1, jnp.sqrt(mean({name: d * d for name, d in distance.items()})))

        return optax.GradientTransformationExtraArgs(init, update)


class FreezeState(NamedTuple):
    count: Int[Array, ""]
    frequency: PerElement  # running mean of "flipped back"
    direction: PerElement
    average: PerElement  # running mean of w_q
    is_frozen: PerElement
    value: PerElement  # where frozen

    def report(self) -> dict[str, Array]:
        """Share of elements that are frozen, and the mean frequency of flipping back."""
        return {"frozen": mean(self.is_frozen), "oscillation_frequency": mean(self.frequency)}


@dataclass(frozen=True)
class IterativeFreezing:
    """Freezes elements that flip back more often than a threshold, for good, at that of the two values that they took more of the time
    (arXiv:2203.11086). The frequency f <- m [flipped against the last direction] + (1 - m) f crosses the threshold at a flip: the values are w_q
    before and after it, and the nearer to the running mean of w_q wins. The threshold goes along a cosine from `threshold` to `final_threshold`
    over `steps` (constant without). What is frozen is the latent weight: a scale that changes later moves the grid under it."""

    threshold: float = 0.04
    final_threshold: float = 0.01
    steps: int | None = None
    momentum: float = 0.01

    acts_on: ClassVar[str] = "updates"

    def transform(self, round: Round) -> optax.GradientTransformationExtraArgs:
        def init(params):
            rounded = round(params)
            average = {name: jnp.array(rounded[name], jnp.float32) for name in expert_names(params)}
            zeros = partial(filled, params)
            return FreezeState(jnp.int32(0), zeros(0), zeros(0, jnp.int8), average, zeros(False, jnp.bool_), zeros(0))

        def update(updates, state, params, **_):
            m, threshold, names = self.momentum, cosine(state.count, self.threshold, self.final_threshold, self.steps), expert_names(params)
            held = set_where(state.is_frozen, updates, state.value, params)
            before, after = (
                {name: rounded[name].astype(jnp.float32) for name in names} for rounded in (round(params), round(optax.apply_updates(params, held)))
            )
            sign = {name: jnp.sign(after[name] - before[name]).astype(jnp.int8) for name in names}
            frequency = {name: m * (sign[name] * state.direction[name] == -1) + (1 - m) * state.frequency[name] for name in names}
            is_new = {name: (frequency[name] > threshold) & ~state.is_frozen[name] for name in names}
            nearer = {
                name: jnp.where(jnp.abs(before[name] - state.average[name]) <= jnp.abs(after[name] - state.average[name]), before[name], after[name])
                for name in names
            }
            value = {name: jnp.where(is_new[name], nearer[name], state.value[name]) for name in names}
            new = FreezeState(
                state.count + 1, frequency,
                {name: jnp.where(sign[name] != 0, sign[name], state.direction[name]) for name in names},
                {name: m * after[name] + (1 - m) * state.average[name] for name in names},
                {name: state.is_frozen[name] | is_new[name] for name in names},
                value,
            )  # fmt: skip
            return set_where(new.is_frozen, updates, value, params), new

        return optax.GradientTransformationExtraArgs(init, update)
