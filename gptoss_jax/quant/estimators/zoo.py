"""The gradient estimators that the literature offers for a forward pass that rounds. The forward pass is the format's and always the same.

Notation, per element of a block with scale X: y = x/X, Q(y) the grid point chosen, a = |y|, cell [l, u] of the grid with width d = u - l and middle
t, g the gradient that arrives (dL/dw of the quantized weight w = X Q(y)), M the largest magnitude (6 for E2M1). dL/dx is

    ste          g                                                  X a constant; NVIDIA's recipe
    ste_clip     g [a <= M]                                         differs from ste where the scale rule clips (floor 2 % of the elements)
    ste_scale    g + [i = argmax |x|] sign(x) / M * sum_j g_j (Q(y_j) - y_j [a_j <= M])
                                                                    the gradient through X = max|x| / M as well
    dge          g min(|2 (a - l)/d - 1|^(1/k - 1) / k, c) [a <= M] arXiv:2501.17116; zero slope at grid points, steep in the middle
    ewgs         g (1 + delta sign(g) (y - Q(y)))                   arXiv:2104.00903; not linear in g
    trust        g [|y - Q(y)| <= T]                                QuEST, arXiv:2502.05003; elements far from their grid point wait
    soft_round   g d/(2T) sech^2((a - t)/T) / tanh(d/(2T)) [a <= M] slope of the soft staircase whose hard limit is the forward pass

The scale is a constant in all but ste_scale. NVFP4's E4M3 scale and MXFP4's power of two count as straight-through there.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float32

from gptoss_jax.quant.cells import Cells
from gptoss_jax.quant.estimators.registry import register_estimator, require

Blocks = Float32[Array, "*batch C Q"]


@register_estimator
@dataclass(frozen=True)
class Ste:
    """Straight-through: dL/dx = dL/dw, scales taken as constants. Keeps nothing. What NVIDIA's recipe uses (`pass_through_bwd`)."""

    name: ClassVar[str] = "ste"
    needs_input: ClassVar[bool] = False
    linear: ClassVar[bool] = True

    def backward(self, cells: None, grad):
        return grad


@register_estimator
@dataclass(frozen=True)
class SteClip:
    """Straight-through, but nothing for what the grid clips."""

    name: ClassVar[str] = "ste_clip"
    needs_input: ClassVar[bool] = True
    linear: ClassVar[bool] = True

    def backward(self, cells: Cells, grad: Blocks) -> Blocks:
        return jnp.where(cells.inside, grad, 0.0)


@register_estimator
@dataclass(frozen=True)
class SteScale:
    """Straight-through, with the gradient of the scale reaching the element that sets it (the first of equals)."""

    name: ClassVar[str] = "ste_scale"
    needs_input: ClassVar[bool] = True
    linear: ClassVar[bool] = True

    def backward(self, cells: Cells, grad: Blocks) -> Blocks:
        grad_scale = jnp.sum(grad * (cells.q - jnp.where(cells.inside, cells.y, 0.0)), axis=-1, keepdims=True)
        index = jnp.arange(grad.shape[-1])
        sets_scale = index == jnp.argmax(cells.magnitude, axis=-1, keepdims=True)
        return grad + jnp.where(sets_scale, jnp.sign(cells.y) * grad_scale / cells.magnitudes[-1], 0.0)


@register_estimator
@dataclass(frozen=True)
class Dge:
    """Differentiable gradient estimator: the slope of a power-law staircase of order k, at most c."""

    k: float = 5.0
    c: float = 3.0

    name: ClassVar[str] = "dge"
    needs_input: ClassVar[bool] = True
    linear: ClassVar[bool] = True

    def __post_init__(self):
        require(self, k=(1.0, 1e3), c=(1e-3, 1e6))

    def backward(self, cells: Cells, grad: Blocks) -> Blocks:
        from_middle = jnp.abs(2 * (cells.magnitude - cells.lower) / cells.width - 1)
        slope = jnp.minimum(from_middle ** (1 / self.k - 1) / self.k, self.c)
        return jnp.where(cells.inside, slope * grad, 0.0)


@register_estimator
@dataclass(frozen=True)
class Ewgs:
    """Element-wise gradient scaling: larger where the step leads away from the grid point, smaller where it leads back."""

    delta: float = 0.2

    name: ClassVar[str] = "ewgs"
    needs_input: ClassVar[bool] = True
    linear: ClassVar[bool] = False

    def __post_init__(self):
        require(self, delta=(0.0, 1.0))

    def backward(self, cells: Cells, grad: Blocks) -> Blocks:
        return grad * (1 + self.delta * jnp.sign(grad) * (cells.y - cells.q))


@register_estimator
@dataclass(frozen=True)
class Trust:
    """Trusts the gradient of elements within T of their grid point, in units of the element type (the narrow cells of E2M1 are 0.5 wide)."""

    T: float = 0.5

    name: ClassVar[str] = "trust"
    needs_input: ClassVar[bool] = True
    linear: ClassVar[bool] = True

    def __post_init__(self):
        require(self, T=(0.0, 1e3))

    def backward(self, cells: Cells, grad: Blocks) -> Blocks:
        return jnp.where(jnp.abs(cells.y - cells.q) <= self.T, grad, 0.0)


@register_estimator
@dataclass(frozen=True)
class SoftRound:
    """The slope of a tanh staircase of temperature T behind the hard forward pass. The form that anneals T and computes with the soft values is a
    forward pass of its own, not an estimator: `gptoss_jax.lab.SoftRounding`."""

    T: float = 0.5

    name: ClassVar[str] = "soft_round"
    needs_input: ClassVar[bool] = True
    linear: ClassVar[bool] = True

    def __post_init__(self):
        require(self, T=(1e-3, 1e3))

    def backward(self, cells: Cells, grad: Blocks) -> Blocks:
        return grad * soft_slope(cells, self.T)


def soft_value(cells: Cells, temperature: float | Array) -> Blocks:
    """The tanh staircase, sign(y) (t + d/2 tanh((a - t)/T) / tanh(d/(2T))): y for T -> infinity, Q(y) for T -> 0; at most the largest magnitude."""
    half = 0.5 * cells.width
    inner = half * jnp.tanh((cells.magnitude - cells.middle) / temperature) / jnp.tanh(half / temperature)
    return jnp.sign(cells.y) * jnp.where(cells.inside, cells.middle + inner, cells.magnitudes[-1])


def soft_slope(cells: Cells, temperature: float | Array) -> Blocks:
    """Derivative of `soft_value` with respect to y, 0 where clipped."""
    half = 0.5 * cells.width
    inner = jnp.tanh((cells.magnitude - cells.middle) / temperature)
    return jnp.where(cells.inside, half / temperature * (1 - inner * inner) / jnp.tanh(half / temperature), 0.0)
