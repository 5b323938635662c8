"""A gradient estimator of one's own, trained with and compared, without touching the library: `python scripts/examples/new_estimator.py [OUT]`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import jax.numpy as jnp

from gptoss_jax.lab import load_experiment, run_experiment, write_report
from gptoss_jax.quant import register_estimator


@register_estimator
@dataclass(frozen=True)
class Taper:
    """Straight-through on the grid point, fading to a share 1 - s of the gradient at the border of the cell."""

    s: float = 0.5

    name: ClassVar[str] = "taper"
    needs_input: ClassVar[bool] = True
    linear: ClassVar[bool] = True

    def backward(self, cells, grad):
        from_grid_point = jnp.minimum(2 * jnp.abs(cells.y - cells.q) / cells.width, 1.0)
        return grad * (1 - self.s * from_grid_point)


if __name__ == "__main__":
    # the experiment beside this file: three arms, two seeds, a table with differences to `ste`; what `gptoss-jax lab run` does, in this process
    file, out = Path(__file__).with_suffix(".yaml"), Path(sys.argv[1] if len(sys.argv) > 1 else "runs/lab/new-estimator")
    run_experiment(file, out)
    print(*write_report(*load_experiment(file), out), sep="\n")
