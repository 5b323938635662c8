"""What rounding to a format does to the expert weights of a checkpoint, expert by expert.

With x a weight, X the scale of its block, y = x/X, a = |y|, and l <= a < u the neighbours of a on the element type's grid:

    sqnr_db        10 log10(sum x^2 / sum (Q(x) - x)^2); None where rounding changes nothing
    clipped        share of weights with a above the largest magnitude (6 for E2M1)
    zero           share that becomes 0
    tie            share exactly between two neighbours, where the rule for ties decides
    near_edge      share within 5 % of a cell of its midpoint, where rounding changes direction: weights that flip easily
    changed        share that rounding changes at all
    codes          counts of the codes, sign * number of magnitudes + index of the magnitude: 16 for E2M1
    cell           counts of (a - l)/(u - l), where a weight lies in its cell, in 20 bins over [0, 1): 0 is the grid point below, 1/2 the midpoint.
                   The distance to the edge, as a share of the cell, is |it - 1/2|. Without clipped weights and those on the largest magnitude
    exponents, first_exponent    counts of floor(log2 X) over blocks, beginning with the given exponent
    weights, weight2, error2     number of weights, sum x^2, sum (Q(x) - x)^2

x is compared with products of X and grid values that are exact in float32 for power-of-two scales and for NVFP4's default global scale. Rows of
layers and of the whole model add up those of the experts looked at. Weights are read, rounded and counted one expert at a time; of a training
checkpoint, whose masters are stored per parameter and not per expert, all masters are in memory.

    E experts  C blocks of a row  Q block size  M magnitudes
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gptoss_jax.formats import Format, get_format
from gptoss_jax.formats.bits import split_blocks, to_bits
from gptoss_jax.lab.probes.rows import Row, placed
from gptoss_jax.training.diagnose.weights import expert_slices

CELL_BINS = 20
NEAR_EDGE = 0.05
_COUNTS = ("weights", "clipped", "zero", "tie", "near_edge", "changed")
_MOST_COMPARED = 16  # magnitudes up to which comparing with each is faster than a binary search


def probe_weights(
    checkpoint: str | Path,
    fmt: Format | str,
    *,
    max_experts: int | None = None,
    key: Array | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Rows for the whole model, every layer, and every expert of every projection. Columns: see the head of this file.

    Args:
      checkpoint: HF directory, OpenAI's original layout, hub id, training checkpoint, or "nano".
      max_experts: of each matrix at most so many, spread evenly; None is all.
      key: of a format that rounds at random.

    Raises:
      UsageError, CorruptError: nothing readable there, or damaged.
    """
    fmt, found = get_format(fmt), {}
    for number, (layer, projection, expert, read) in enumerate(expert_slices(checkpoint, max_experts)[1]):
        report(f"layer {layer} {projection} expert {expert}")
        found[layer, projection, expert] = _sums(read(), fmt, None if key is None else jax.random.fold_in(key, number))
    rows = [_row((None, None, None), fmt, list(found.values()))]
    for layer in sorted({scope[0] for scope in found}):
        rows.append(_row((layer, None, None), fmt, [sums for scope, sums in found.items() if scope[0] == layer]))
        rows += [_row(scope, fmt, [sums]) for scope, sums in found.items() if scope[0] == layer]
    return rows


def probe_array(x: Array, fmt: Format | str, key: Array | None = None) -> Row:
    """The same measures of any float32 or bfloat16 array [..., n], blocks along the last dim."""
    return _row((None, None, None), get_format(fmt), [_sums(x, get_format(fmt), key)])


Sums = dict[str, np.ndarray]


def _sums(x: Array, fmt: Format, key: Array | None) -> Sums:
    """Counts (int64) and sums of squares (float64) of a few expert matrices."""
    found = jax.device_get(_count(x, fmt, key))
    exact = {name: np.asarray(value, np.float64 if name.endswith("2") else np.int64) for name, value in found.items()}
    # float32 adds up rows, float64 the rows
    return {name: value.sum() if name.endswith("2") or name in _COUNTS else value for name, value in exact.items()} | {"weights": np.int64(x.size)}


@partial(jax.jit, static_argnums=1)
def _count(x, fmt: Format, key) -> dict[str, Array]:
    q = fmt.encode(x) if key is None else fmt.encode(x, key=key)
    elements, scale = fmt.parts(q)
    x_CQ = split_blocks(x.astype(jnp.float32), fmt.block_size)
    magnitude, error = jnp.abs(x_CQ), split_blocks(fmt.decode(q, jnp.float32), fmt.block_size) - x_CQ
    grid = np.asarray(fmt.magnitudes, np.float32)
    index, code = _index_below(magnitude, scale, grid), _index_of(jnp.abs(elements), grid)
    below, above = jnp.asarray(grid)[index], jnp.asarray(grid)[jnp.minimum(index + 1, len(grid) - 1)]
    inside = (index < len(grid) - 1) & (scale > 0)
    # neighbours of the grid have equal spacing or a factor of two between them: the midpoint has one more significant bit than they
    cell = (magnitude / jnp.where(scale > 0, scale, 1) - below) / jnp.where(inside, above - below, 1)
    bins = jnp.where(inside, jnp.clip((cell * CELL_BINS).astype(jnp.int32), 0, CELL_BINS - 1), CELL_BINS)
    exponents = (to_bits(scale) >> 23) & 0xFF
    rows = lambda values: jnp.sum(values.astype(jnp.float32), axis=(-2, -1))
    return {
        "weight2": rows(magnitude * magnitude),
        "error2": rows(error * error),
        "clipped": rows(magnitude > grid[-1] * scale),
        "zero": rows(elements == 0),
        "tie": rows(inside & (magnitude == 0.5 * (below + above) * scale) & (magnitude > 0)),
        "near_edge": rows(inside & (jnp.abs(cell - 0.5) < NEAR_EDGE)),
        "changed": rows(error != 0),
        "codes": _histogram(code + jnp.where(jnp.signbit(elements), len(grid), 0), 2 * len(grid)),
        "cell": _histogram(bins, CELL_BINS + 1)[:CELL_BINS],
        "exponents": _histogram(exponents, 256),
    }


def _index_below(magnitude: Array, scale: Array, grid: np.ndarray) -> Array:
    """Index of the largest grid value with grid * scale <= magnitude."""
    if len(grid) <= _MOST_COMPARED:
        return sum((magnitude >= g * scale).astype(jnp.int32) for g in grid[1:])
    return jnp.searchsorted(jnp.asarray(grid), magnitude / jnp.where(scale > 0, scale, 1), side="right").astype(jnp.int32) - 1


def _index_of(values: Array, grid: np.ndarray) -> Array:
    """Index of grid values."""
    if len(grid) <= _MOST_COMPARED:
        return sum((values >= g).astype(jnp.int32) for g in grid[1:])
    return jnp.searchsorted(jnp.asarray(grid), values).astype(jnp.int32)


def _histogram(values: Array, size: int) -> Array:
    return jnp.zeros(size, jnp.int32).at[values.reshape(-1)].add(1)


def _row(scope: tuple[int | None, str | None, int | None], fmt: Format, parts: list[Sums]) -> Row:
    total: dict[str, Any] = {name: sum(part[name] for part in parts) for name in parts[0]}
    weights, filled = int(total["weights"]), np.flatnonzero(total["exponents"])
    first, last = (int(filled[0]), int(filled[-1])) if len(filled) else (127, 126)
    return {
        "probe": "weights",
        "format": fmt.name,
        **placed(scope),
        "sqnr_db": float(10 * np.log10(total["weight2"] / total["error2"])) if total["error2"] and total["weight2"] else None,
        **{name: float(total[name] / weights) for name in _COUNTS[1:]},
        "codes": total["codes"].tolist(),
        "cell": total["cell"].tolist(),
        "first_exponent": first - 127,
        "exponents": total["exponents"][first : last + 1].tolist(),
        "weights": weights,
        "weight2": float(total["weight2"]),
        "error2": float(total["error2"]),
    }
