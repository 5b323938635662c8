"""Training forwards that are not the codec: smooth or noisy stand-ins for rounding. What is deployed (`round`) is the hard format in every case.

    soft     X r_T(y), the tanh staircase of temperature T; dL/dw = g r_T'(y)              T from `start` to `end` along a cosine over `steps` steps
    noise    w + X d U(-1/2, 1/2), d the width of w's cell; dL/dw = g                      unbiased; nothing is rounded in training

X (scale) and d are constants of the derivative. These are quantizers and not gradient estimators, because an estimator leaves the forward pass alone:
through `fake_quant` the loss is always that of the model that will be exported, and here it is not, until the end.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from gptoss_jax.formats import Format, get_format
from gptoss_jax.formats.bits import join_blocks
from gptoss_jax.lab.quantizer import Params, expert_names
from gptoss_jax.lab.straight import straight
from gptoss_jax.quant.cells import cells_of
from gptoss_jax.quant.estimators.zoo import soft_slope, soft_value


class _Surrogate:
    """No arrays of its own; deployed as the format rounds."""

    format: Format
    name: ClassVar[str]

    def __post_init__(self):
        object.__setattr__(self, "format", get_format(self.format))
        if self.format.stochastic:
            raise ValueError(f"{self.name}: {self.format!r} rounds at random; what is deployed here rounds to nearest")

    def init(self, params: Params) -> dict[str, Array]:
        return {}

    def round(self, params: Params, extra: Params) -> dict[str, Array]:
        return {**params, **{name: self.format.encode_decode(params[name], params[name].dtype)[0] for name in expert_names(params)}}

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self), "format": self.format.to_dict()}


@dataclass(frozen=True)
class SoftRounding(_Surrogate):
    """The soft staircase, annealed from nearly the identity (T = 1) to nearly the format (T = 0.01, in units of the element type)."""

    format: Format
    steps: int
    start: float = 1.0
    end: float = 0.01

    name: ClassVar[str] = "soft_rounding"

    def __post_init__(self):
        super().__post_init__()
        if not (0 < self.end <= self.start and self.steps > 0):
            raise ValueError(f"soft_rounding needs 0 < end <= start and steps > 0, not {self}")

    def temperature(self, step: Array) -> Float[Array, ""]:
        """At a step of the run; `end` from `steps` on."""
        progress = jnp.clip(jnp.asarray(step, jnp.float32) / self.steps, 0.0, 1.0)
        return self.end + (self.start - self.end) * 0.5 * (1 + jnp.cos(jnp.pi * progress))

    def __call__(self, params: Params, extra: Params, key: Array, step: Array) -> dict[str, Array]:
        temperature = self.temperature(step)

        def soft(w):
            cells = cells_of(lax.stop_gradient(w), self.format)
            value, slope = join_blocks(soft_value(cells, temperature) * cells.scale), join_blocks(soft_slope(cells, temperature))
            return straight(value, slope * w)

        return {**params, **{name: soft(params[name]) for name in expert_names(params)}}


@dataclass(frozen=True)
class PseudoNoise(_Surrogate):
    """Uniform noise of the width of the cell in place of rounding."""

    format: Format

    name: ClassVar[str] = "pseudo_noise"

    def __call__(self, params: Params, extra: Params, key: Array, step: Array) -> dict[str, Array]:
        def noisy(w, key):
            cells = cells_of(lax.stop_gradient(w), self.format)
            noise = jax.random.uniform(key, cells.y.shape, minval=-0.5, maxval=0.5)
            return w + join_blocks(noise * cells.width * cells.scale)

        return {**params, **{name: noisy(params[name], jax.random.fold_in(key, n)) for n, name in enumerate(expert_names(params))}}
