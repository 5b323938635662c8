"""A config to start with, for a model, a data file and the hardware at hand: the recipe's settings where they fit, compact state where they do not.

First the recipe as it is (float32 masters and moments, 32 rows a step) in every layout; if none fits, bfloat16 masters with compact moments as in
configs/sft_20b_1gpu.yaml, with ever smaller steps. The learning rate goes with the square root of the rows (a rule of thumb for Adam, not tried on
these models).
"""

import math
from dataclasses import dataclass
from typing import Any

from gptoss_jax.errors import UsageError
from gptoss_jax.sharding import MESH_AXES
from gptoss_jax.training.config import TrainConfig, parse
from gptoss_jax.training.plan.architecture import architecture
from gptoss_jax.training.plan.devices import Device
from gptoss_jax.training.plan.search import Candidate, search

ROWS = 32  # of a step in the recipe
SFT_RATE, QAT_RATE = 2e-5, 1e-5
COMPACT = {"master_dtype": "bfloat16", "optimizer": {"first_moment": "int8", "second_moment": "factored", "master_residual": "int8"}}
GIB = 2**30


@dataclass(frozen=True)
class Start:
    """The chosen layout on its devices; compact: in bfloat16 masters and 8-bit moments."""

    candidate: Candidate
    device: Device
    compact: bool

    @property
    def train(self) -> TrainConfig:
        return self.candidate.layout.train

    def rate(self, full: float) -> float:
        """Learning rate for the rows of a step, of that for the recipe's; two digits."""
        return float(f"{full * math.sqrt(self.train.batch.rows / ROWS):.2g}")

    @property
    def mesh(self) -> dict[str, int]:
        """Axes of more than one device."""
        return {axis: size for axis in MESH_AXES if (size := getattr(self.train.mesh, axis)) > 1}

    def describe(self) -> str:
        memory, speed = self.candidate.memory, self.candidate.speed
        return (
            f"{self.train.mesh.size} x {self.device.name}: peak {memory.peak / GIB:.1f} of {self.device.usable / GIB:.1f} GiB, "
            f"{speed.tokens_per_second_in_turn:,.0f} to {speed.tokens_per_second:,.0f} tokens/s, estimated, not measured"
        )


def start(model: str, device: Device, devices: int, row_length: int) -> Start:
    """The layout that is estimated to be the fastest of those that fit.

    Raises:
      UsageError: an unknown model, or none fits, with the smallest.
    """
    config, _ = architecture(model)
    values: dict[str, Any] = {"model": model, "data": {"row_length": row_length}, "batch": {"rows": ROWS}}
    best = search(config, parse(values), device, devices)[0]
    if best.fits(device):
        return Start(best, device, compact=False)
    rows = ROWS
    while rows >= devices or rows == 1:
        best = search(config, parse({**values, **COMPACT, "batch": {"rows": rows}}), device, devices)[0]
        if best.fits(device):
            return Start(best, device, compact=True)
        rows //= 2
    raise UsageError(
        f"{model} does not fit on {devices} x {device.name}: the smallest found ({best.name}, compact state) takes {best.memory.peak / GIB:.1f} of "
        f"{device.usable / GIB:.1f} GiB; take more devices, shorter rows (--row-length), or adapters (lora: {{base: mxfp4}}) on one device"
    )
