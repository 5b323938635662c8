"""Block scales that are trained: LSQ (arXiv:1902.08153) and dual-LSQ for MXFP4 and NVFP4, as quantizers of the lab.

    lsq        w_q = X Q(w / X)                dL/dw = g [a <= 6]         dL/dX = sum_block g (Q(y) - y [a <= 6])
    dual-lsq   w_q = X' Q(w / X)               dL/dw = g [a <= 6] X'/X    dL/dX' = sum_block g Q(y)      dL/dX = -sum_block g y [a <= 6] X'/X

y = w/X, a = |y|, g = dL/dw_q. Gradients of scales are multiplied with 1/sqrt(6 Q), Q the block size, as LSQ does. What is trained is

    MXFP4   theta = log2 X, X = 2^round(theta)                               straight-through: dX/dtheta = X ln 2
    NVFP4   the block maximum A, X = E4M3(A / (6 global)) global             straight-through: dX/dA = 1/6

with the global scale of the present weights (the power of two that the format takes), so X is a scale that the format can store. Both begin at the
scale with the least squared error of the block: MXFP4 among three exponents (the rule `mse`), NVFP4 among eleven E4M3 values from 4 below the one
that the format takes (which clips) to 6 above it (where the maximum is a 4). dual-LSQ trains X' alone unless told otherwise. An optimizer that
moves every array by about its learning rate (Adam) would take thousands of steps from one power of two to the next, so MXFP4 stores theta / 64: a
learning rate of 1e-4 moves theta by .0064 a step.

What can be exported: the codes (`encode`), which decode to what training computed with, bit for bit, as long as X' lies on the grid of scales
(`on_grid`). An MXFP4 file of the deployed values (`round`) needs no codes: encoding decoded values under rceil, floor or even changes none of them.
NVFP4 would choose other scales, so there the codes themselves must be stored. With `on_grid=False` X' is any float: research, not a file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, UInt8

from gptoss_jax.formats import Format, Mxfp4, Nvfp4, get_format, mxfp4, nvfp4
from gptoss_jax.formats import bits as fb
from gptoss_jax.formats.minifloat import e2m1_value, e4m3_byte, e4m3_value
from gptoss_jax.lab.quantizer import Params, expert_names
from gptoss_jax.lab.straight import straight

_MIDPOINTS = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))  # and whether a tie goes up
_BYTES = {"mxfp4": (3, 240), "nvfp4": (1, 0x7E)}  # scales whose products with all midpoints are normal and finite
_SWEEP = range(-4, 7)  # E4M3 bytes around the format's own


class Scale(NamedTuple):
    """Block scales on the grid of the format. `value` carries the gradient, `byte` is what a file stores, `global_scale` is NVFP4's."""

    value: Float32[Array, "*batch C"]
    byte: UInt8[Array, "*batch C"]
    global_scale: Float32[Array, "*matrices"] | None


def scale_of(trained: Float32[Array, "*batch C"], fmt: Format, global_scale: Array | None) -> Scale:
    """The scale that log2 X (MXFP4) or the block maximum (NVFP4) stands for."""
    low, high = _BYTES[fmt.name]
    if fmt.name == "mxfp4":
        byte = jnp.clip(jnp.round(trained).astype(jnp.int32) + 127, low, high)
        value = fb.from_bits(lax.stop_gradient(byte) << fb.EXP_SHIFT)
        return Scale(straight(value, jnp.log(2.0) * value * trained), byte.astype(jnp.uint8), None)
    unit = 6 * global_scale[..., None, None]
    quotient = fb.to_bits(lax.stop_gradient(jnp.maximum(trained / unit, 2.0**-9)))
    byte = jnp.clip(e4m3_byte(quotient), low, high)
    return Scale(straight(e4m3_value(byte.astype(jnp.uint8)) * global_scale[..., None, None], trained / 6), byte.astype(jnp.uint8), global_scale)


def nearest_elements(w: Float[Array, "*batch n"], scale: Float32[Array, "*batch C"], block_size: int) -> UInt8[Array, "*batch n"]:
    """E2M1 codes of w under given scales, ties to even, saturating. Products of midpoints (3 bits) and scales (4 bits at most) are exact."""
    bits = fb.split_blocks(fb.to_bits(w), block_size)
    size = fb.from_bits(fb.magnitude(bits))
    scale = scale[..., None]
    index = sum((size >= m * scale if tie_up else size > m * scale).astype(jnp.uint8) for m, tie_up in _MIDPOINTS)
    return fb.join_blocks(index | ((bits >> 28) & 8).astype(jnp.uint8))


def encode(w: Float[Array, "*batch n"], grid: Scale, store: Scale, fmt: Format) -> mxfp4.Codes | nvfp4.Codes:
    """Codes of w rounded under the scale `grid` and stored with the scale `store` (LSQ: the same)."""
    packed = fb.pack(nearest_elements(w, grid.value, fmt.block_size))
    if fmt.name == "mxfp4":
        return mxfp4.Codes(packed, store.byte)
    return nvfp4.Codes(packed, lax.bitcast_convert_type(store.byte, jnp.float8_e4m3fn), store.global_scale)


def scaled_round(
    w: Float[Array, "*batch n"], grid: Float32[Array, "*batch C"], store: Float32[Array, "*batch C"], fmt: Format
) -> Float32[Array, "*batch n"]:
    """store * Q(w / grid) with the gradients above: Q is straight-through inside the grid and constant where it clips."""
    q = lax.stop_gradient(fb.split_blocks(e2m1_value(nearest_elements(w, grid, fmt.block_size)), fmt.block_size))
    blocks = fb.split_blocks(w.astype(jnp.float32), fmt.block_size)
    # y as blocks/grid, written so that the derivative by grid, -y/grid, is computed without the square of a scale, which underflows
    constant = lax.stop_gradient(grid)[..., None]
    y = blocks / constant * (2 - grid[..., None] / constant)
    elements = straight(q, jnp.where(jnp.abs(blocks) <= 6 * constant, y, 0.0))
    return fb.join_blocks(elements * store[..., None])


@partial(jax.jit, static_argnums=1)
def best_trained(w: Float[Array, "*batch n"], fmt: Format) -> Float32[Array, "*batch C"]:
    """The trained quantity (log2 X or block maximum) whose scale has the least squared error in each block; of equals the first of the sweep."""
    if fmt.name == "mxfp4":
        return mxfp4.encode(w, "mse").scales.astype(jnp.float32) - 127
    own = nvfp4.encode(w)
    byte = lax.bitcast_convert_type(own.scales, jnp.uint8).astype(jnp.int32)
    blocks = fb.split_blocks(w.astype(jnp.float32), fmt.block_size)

    def error(offset):
        scale = e4m3_value(jnp.clip(byte + offset, *_BYTES["nvfp4"]).astype(jnp.uint8)) * own.global_scale[..., None, None]
        q = fb.split_blocks(e2m1_value(nearest_elements(w, scale, fmt.block_size)), fmt.block_size)
        return jnp.sum((blocks - q * scale[..., None]) ** 2, axis=-1)

    best = jnp.argmin(jnp.stack([error(offset) for offset in _SWEEP]), axis=0) + _SWEEP[0]
    return 6 * e4m3_value(jnp.clip(byte + best, *_BYTES["nvfp4"]).astype(jnp.uint8)) * own.global_scale[..., None, None]


class _LearnedScale:
    """What both quantizers share. Subclasses say which arrays they train and how `grid` and `store` come from them."""

    format: Format
    name: ClassVar[str]

    def __post_init__(self):
        object.__setattr__(self, "format", get_format(self.format))
        if self.format not in (Mxfp4(getattr(self.format, "scale_rule", "rceil")), Nvfp4()):
            raise ValueError(f"{self.name} learns the scales of plain mxfp4 and nvfp4 with a power-of-two global scale, not of {self.format!r}")

    @property
    def suffix(self) -> str:
        """Of the arrays: what is trained."""
        return ".log2_scale" if self.format.name == "mxfp4" else ".amax"

    @property
    def rate(self) -> float:
        """theta = rate * stored array; a power of two, so exact."""
        return 64.0 if self.format.name == "mxfp4" else 1.0

    def _scale(self, w: Array, stored: Array) -> Scale:
        """The scale of a stored array, its gradient times 1/sqrt(6 Q)."""
        trained = straight(stored, stored / jnp.sqrt(6.0 * self.format.block_size)) * self.rate
        return scale_of(trained, self.format, None if self.format.name == "mxfp4" else lax.stop_gradient(nvfp4.encode(w).global_scale))

    def _scales(self, name: str, w: Array, extra: Params) -> tuple[Scale, Scale]:
        """(grid, store) of a parameter."""
        raise NotImplementedError

    def __call__(self, params: Params, extra: Params, key: Array, step: Array) -> dict[str, Array]:
        made = {}
        for name in expert_names(params):
            grid, store = self._scales(name, params[name], extra)
            made[name] = scaled_round(params[name], grid.value, store.value, self.format)
        return {**params, **made}

    def round(self, params: Params, extra: Params) -> dict[str, Array]:
        return {**params, **lax.stop_gradient({name: w for name, w in self(params, extra, None, None).items() if name in expert_names(params)})}

    def encode(self, params: Params, extra: Params) -> dict[str, mxfp4.Codes | nvfp4.Codes]:
        """The codes of every expert projection; decoded they are `round`.

        Raises:
          ValueError: scales that no file can hold.
        """
        if not getattr(self, "on_grid", True):
            raise ValueError("dual_lsq with on_grid=False has scales that are no E8M0 or E4M3 numbers: nothing can store them")
        return {name: encode(params[name], *self._scales(name, params[name], extra), self.format) for name in expert_names(params)}


@dataclass(frozen=True)
class Lsq(_LearnedScale):
    """One learned scale per block."""

    format: Format

    name: ClassVar[str] = "lsq"

    def init(self, params: Params) -> dict[str, Array]:
        """`<param>.log2_scale` / 64 or `<param>.amax`, float32 [*batch, C]."""
        return {name + self.suffix: best_trained(params[name], self.format) / self.rate for name in expert_names(params)}

    def _scales(self, name: str, w: Array, extra: Mapping[str, Array]) -> tuple[Scale, Scale]:
        scale = self._scale(w, extra[name + self.suffix])
        return scale, scale

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "format": self.format.to_dict()}


@dataclass(frozen=True)
class DualLsq(_LearnedScale):
    """One scale to round with (`_pre`) and one to multiply with (`_post`), equal at first."""

    format: Format
    learn: Literal["post", "both"] = "post"
    on_grid: bool = True

    name: ClassVar[str] = "dual_lsq"

    def __post_init__(self):
        super().__post_init__()
        if self.learn not in ("post", "both"):
            raise ValueError(f"dual_lsq learns 'post' or 'both', not {self.learn!r}")

    def init(self, params: Params) -> dict[str, Array]:
        """`<param>.log2_scale_pre`, `_post` (/ 64) or `<param>.amax_pre`, `_post`. The first gets no gradient under `learn="post"`."""
        made = {}
        for name in expert_names(params):
            best = best_trained(params[name], self.format) / self.rate
            made |= {f"{name}{self.suffix}_pre": best, f"{name}{self.suffix}_post": jnp.array(best)}
        return made

    def _scales(self, name: str, w: Array, extra: Mapping[str, Array]) -> tuple[Scale, Scale]:
        pre, post = extra[f"{name}{self.suffix}_pre"], extra[f"{name}{self.suffix}_post"]
        grid, store = self._scale(w, lax.stop_gradient(pre) if self.learn == "post" else pre), self._scale(w, post)
        if not self.on_grid:
            trained = straight(post, post / jnp.sqrt(6.0 * self.format.block_size)) * self.rate
            store = store._replace(value=jnp.exp2(trained) if self.format.name == "mxfp4" else trained / 6)
        return grid, store

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "format": self.format.to_dict(), "learn": self.learn, "on_grid": self.on_grid}
