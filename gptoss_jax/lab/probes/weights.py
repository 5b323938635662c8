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
checkpoint one parameter, a projection of several layers, is in memory. On a CPU that takes 29 ns of processor time per weight (measured on
[1440, 2880] in MXFP4), most of it for the histograms: nine minutes for the 19.1e9 expert weights of gpt-oss-20b, one with `max_experts=4` of 32.

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
from gptoss_jax.quant import fake_quant
from gptoss_jax.quant.cells import cells_of
from gptoss_jax.training.diagnose.weights import expert_slices

CELL_BINS = 20
NEAR_EDGE = 0.05
_COUNTS = ("weights", "clipped", "zero", "tie", "near_edge", "changed")


def probe_weights(
    checkpoint: str | Path,
    fmt: Format | str,
    *,
    max_experts: int | None = None,
    seed: int = 0,
    report: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Rows for the whole model, every layer, and every expert of every projection. Columns: see the head of this file.

    Args:
      checkpoint: HF directory, OpenAI's original layout, hub id, training checkpoint, or "nano".
      max_experts: of each matrix at most so many, spread evenly; None is all.
      seed: of a format that rounds at random.

    Raises:
      UsageError, CorruptError: nothing readable there, or damaged.
    """
    fmt, found = get_format(fmt), {}
    for number, (layer, projection, expert, read) in enumerate(expert_slices(checkpoint, max_experts)[1]):
        report(f"layer {layer} {projection} expert {expert}")
        found[layer, projection, expert] = _sums(read(), fmt, _key(fmt, seed, number))
    rows = [_row((None, None, None), fmt, list(found.values()))]
    for layer in sorted({scope[0] for scope in found}):
        rows.append(_row((layer, None, None), fmt, [sums for scope, sums in found.items() if scope[0] == layer]))
        rows += [_row(scope, fmt, [sums]) for scope, sums in found.items() if scope[0] == layer]
    return rows


def probe_array(x: Array, fmt: Format | str, seed: int = 0) -> Row:
    """The same measures of any float32 or bfloat16 array [..., n], blocks along the last dim."""
    fmt = get_format(fmt)
    return _row((None, None, None), fmt, [_sums(x, fmt, _key(fmt, seed, 0))])


def _key(fmt: Format, seed: int, number: int) -> Array | None:
    return jax.random.fold_in(jax.random.key(seed), number) if fmt.stochastic else None


Sums = dict[str, np.ndarray]


def _sums(x: Array, fmt: Format, key: Array | None) -> Sums:
    """Counts (int64) and sums of squares (float64) of a few expert matrices."""
    found = jax.device_get(_count(x, fmt, key))
    exact = {name: np.asarray(value, np.float64 if name.endswith("2") else np.int64) for name, value in found.items()}
    # float32 adds up rows, float64 the rows
    return {name: value.sum() if name.endswith("2") or name in _COUNTS else value for name, value in exact.items()} | {"weights": np.int64(x.size)}


@partial(jax.jit, static_argnums=1)
def _count(x, fmt: Format, key) -> dict[str, Array]:
    cells, grid = cells_of(x, fmt, key), np.asarray(fmt.magnitudes, np.float32)
    blocks = lambda values: split_blocks(values.astype(jnp.float32), fmt.block_size)
    size, error = jnp.abs(blocks(x)), blocks(fake_quant(x, fmt, dtype=jnp.float32, key=key)) - blocks(x)
    within = cells.magnitude < grid[-1]
    position = (cells.magnitude - cells.lower) / cells.width
    bins = jnp.where(within, jnp.clip((position * CELL_BINS).astype(jnp.int32), 0, CELL_BINS - 1), CELL_BINS)
    code = jnp.searchsorted(jnp.asarray(grid), jnp.abs(cells.q)) + jnp.where(jnp.signbit(cells.q), len(grid), 0)
    rows = lambda values: jnp.sum(values.astype(jnp.float32), axis=(-2, -1))
    return {
        "weight2": rows(size * size),
        "error2": rows(error * error),
        "clipped": rows(~cells.inside),
        "zero": rows(cells.q == 0),
        # a product with the scale is exact where the quotient is not
        "tie": rows(within & (size == cells.middle * cells.scale) & (size > 0)),
        "near_edge": rows(within & (jnp.abs(position - 0.5) < NEAR_EDGE)),
        "changed": rows(error != 0),
        "codes": _histogram(code, 2 * len(grid)),
        "cell": _histogram(bins, CELL_BINS + 1)[:CELL_BINS],
        "exponents": _histogram((to_bits(cells.scale) >> 23) & 0xFF, 256),
    }


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
