"""Moving weights that lie on a format's grid off it, within their rounding cells."""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gptoss_jax.formats import Format
from gptoss_jax.lab.quantizer import expert_names


def move_in_cell(params: Mapping[str, Array], fmt: Format, share: float, key: Array) -> dict[str, Array]:
    """Experts on the grid of `fmt` plus uniform noise over `share` of the cell of values that round to the same grid point.

    A base on its grid has every weight in the middle of a cell, so small updates never reach a border and rounding undoes them all. Spread over its
    cell, a weight crosses a border with a probability that grows with its update: rounding to nearest then acts like stochastic rounding, while the
    base itself, rounded, stays what it was.

    The cell of a magnitude reaches half way to its neighbours; that of the largest as far up as down. The block maximum keeps its value, so that
    scales, which follow from it, stay too.
    """
    make = lambda number, name: _moved(params[name].astype(jnp.float32), fmt, share, jax.random.fold_in(key, number))
    return {**params, **{name: make(number, name) for number, name in enumerate(expert_names(params))}}


@partial(jax.jit, static_argnums=(1, 2))
def _moved(x: Array, fmt: Format, share: float, key: Array) -> Array:
    elements, scale = fmt.parts(fmt.encode(x))
    magnitudes = np.array(fmt.magnitudes, np.float32)
    middles = (magnitudes[1:] + magnitudes[:-1]) / 2
    lower, upper = np.append(-middles[0], middles), np.append(middles, 2 * magnitudes[-1] - middles[-1])
    index = jnp.searchsorted(magnitudes, jnp.abs(elements))
    down, up = jnp.asarray(lower - magnitudes)[index], jnp.asarray(upper - magnitudes)[index]
    noise = jnp.where(elements < 0, -1.0, 1.0) * share * (down + jax.random.uniform(key, elements.shape) * (up - down))
    largest = jnp.abs(elements) == jnp.max(jnp.abs(elements), axis=-1, keepdims=True)
    return (scale * jnp.where(largest, elements, elements + noise)).reshape(x.shape)
