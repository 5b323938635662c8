"""Q-EMA (TetraJet, arXiv:2502.20853): a running mean of the weight, not the weight, says to which end of its cell it rounds.

    ema <- decay ema + (1 - decay) w                    after every update
    w_q = X u if ema/X is past the middle of w's cell [l, u], else X l         X, cell and clipping are those of w

A weight at a border keeps its value until its mean has crossed too. Two parts that belong together: the quantizer holds the means as arrays of its
own (`<param>.ema`), the tool moves them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float

from gptoss_jax.formats import Format, get_format
from gptoss_jax.formats.bits import join_blocks, split_blocks
from gptoss_jax.lab.oscillation.common import Round
from gptoss_jax.lab.quantizer import Params, expert_names
from gptoss_jax.lab.straight import straight
from gptoss_jax.quant.cells import cells_of

SUFFIX = ".ema"


@dataclass(frozen=True)
class QEma:
    """The quantizer. Its values lie on the grid of the format at the scale of w, so MXFP4 files hold them exactly; NVFP4's scales would move."""

    format: Format

    def __post_init__(self):
        object.__setattr__(self, "format", get_format(self.format))

    def init(self, params: Params) -> dict[str, Array]:
        """The means, beginning at the weights."""
        return {name + SUFFIX: jnp.array(params[name], jnp.float32) for name in expert_names(params)}

    def __call__(self, params: Params, extra: Params, key: Array, step: Array) -> dict[str, Array]:
        """Straight-through for the weights, no gradient for the means."""
        rounded = self.round(params, extra)
        return {**params, **{name: straight(rounded[name], params[name]) for name in expert_names(params)}}

    def round(self, params: Params, extra: Params) -> dict[str, Array]:
        """The same values, without a gradient."""
        return {**params, **{name: self._rounded(params[name], extra[name + SUFFIX]).astype(params[name].dtype) for name in expert_names(params)}}

    def _rounded(self, w: Float[Array, "*batch n"], ema: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
        w, ema = lax.stop_gradient((w, ema))
        cells = cells_of(w, self.format)
        toward = split_blocks(ema, self.format.block_size) * jnp.sign(cells.y)  # along w's own direction
        is_up = toward > cells.middle * cells.scale
        between = jnp.where(is_up, cells.upper, cells.lower)
        is_fixed = (cells.magnitude == cells.lower) | (cells.magnitude >= cells.magnitudes[-1])  # on a grid point, or clipped
        return join_blocks(jnp.where(is_fixed, cells.q, jnp.sign(cells.y) * between) * cells.scale)

    def to_dict(self) -> dict[str, Any]:
        return {"name": "q_ema", "format": self.format.to_dict()}


@dataclass(frozen=True)
class TrackEma:
    """The tool: moves every `<param>.ema` of the dict toward what its parameter will be after the update. 0.9972 is TetraJet's decay."""

    decay: float = 0.9972

    acts_on: ClassVar[str] = "updates"

    def transform(self, round: Round) -> optax.GradientTransformationExtraArgs:
        def update(updates: Mapping[str, Array], state: Any, params: Params, **_):
            moved = {}
            for name in (name for name in params if name.endswith(SUFFIX)):
                weight = name.removesuffix(SUFFIX)
                moved[name] = (1 - self.decay) * (params[weight] + updates[weight] - params[name])
            return {**updates, **moved}, state

        return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
