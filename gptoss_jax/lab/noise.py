"""Moving weights that lie on a format's grid off it, within their rounding cells."""

from collections.abc import Mapping

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
    moved = {}
    for number, name in enumerate(expert_names(params)):
        x = params[name].astype(jnp.float32)
        elements, scale = fmt.parts(fmt.encode(x))
        magnitudes = np.array(fmt.magnitudes, np.float32)
        middles = (magnitudes[1:] + magnitudes[:-1]) / 2
        lower, upper = np.append(-middles[0], middles), np.append(middles, 2 * magnitudes[-1] - middles[-1])
        blocks = elements * scale
        index = jnp.searchsorted(magnitudes, jnp.abs(elements))
        down, up = jnp.asarray(lower - magnitudes)[index], jnp.asarray(upper - magnitudes)[index]
        uniform = jax.random.uniform(jax.random.fold_in(key, number), elements.shape)
        noise = jnp.where(elements < 0, -1.0, 1.0) * share * (down + uniform * (up - down))
        largest = jnp.abs(blocks) == jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
        moved[name] = jnp.where(largest, blocks, blocks + scale * noise).reshape(x.shape)
    return {**params, **moved}

