"""What the oscillation tools share: which parameters they touch, sums per element, schedules."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gptoss_jax.lab.quantizer import Params, expert_names

# w_q of given weights, in a dict of all that it was given
Round = Callable[[Params], Params]
PerElement = dict[str, Array]

RATIO = 16.0  # of TetraJet-v2: an element whose quantized value moved 16 times as far as the element itself


def filled(params: Params, value, dtype=jnp.float32) -> PerElement:
    return {name: jnp.full(params[name].shape, value, dtype) for name in expert_names(params)}


def mean(arrays: Mapping[str, Array]) -> Float[Array, ""]:
    """Mean over all elements of all arrays."""
    return sum(jnp.sum(a.astype(jnp.float32)) for a in arrays.values()) / sum(a.size for a in arrays.values())


def travel_ratio(moved_q: PerElement, moved: PerElement) -> PerElement:
    """sum |d w_q| / sum |d w| of each element, 0 where it did not move."""
    return {name: jnp.where(moved[name] > 0, moved_q[name] / jnp.where(moved[name] > 0, moved[name], 1.0), 0.0) for name in moved}


def cosine(count: Int[Array, ""], start: float, end: float, steps: int | None) -> Float[Array, ""]:
    """From start to end over `steps` along half a cosine; the start throughout without `steps`."""
    if steps is None:
        return jnp.float32(start)
    progress = jnp.clip(count.astype(jnp.float32) / steps, 0.0, 1.0)
    return start + (end - start) * 0.5 * (1 - jnp.cos(jnp.pi * progress))


def set_where(reset: Mapping[str, Bool[Array, "..."]], updates: Params, values: Params, params: Params) -> dict[str, Array]:
    """Updates that lead to `values` where `reset` (to an ulp of w: updates are differences)."""
    return {**updates, **{name: jnp.where(mask, values[name].astype(jnp.float32) - params[name], updates[name]) for name, mask in reset.items()}}
