"""Adam's moments in float32, bfloat16, 8 bits or factored, as Optax transformations.

8 bits (`Int8`): blocks along the last dimension, each with its absolute maximum s in float32 and a code k per element,

    x ~ s * sign(k) * (|k| / n)^p          first moment: n = 127, p = 2, int8          second moment: n = 255, p = 4, uint8

A power map spends its codes on small values: the smallest code is 6e-5 (first moment) and 2e-10 (second; 1.5e-5 of its root) of the block's largest
value, and neighbours differ by 1.6 % at the top; a linear map would lose all below 0.4 %. A power needs no table, so it fuses with the update.
Rounding between two neighbours is stochastic and unbiased in x: at b2 = 0.999 a second moment moves by 0.1 % a step, less than half of any spacing
of 8 bits, and with plain rounding would stand still. No positive second moment gets code 0: a zero under a first moment that is not zero would be
divided by eps. (Blockwise 8-bit moments: Dettmers et al. 2021, arXiv:2110.02861, there with a table and plain rounding.)

Factored (`Factored`, second moment): only the means r of rows and c of columns over the last two dimensions are kept, v_ij ~ r_i c_j / mean(r)
(Adafactor, arXiv:1804.04235). The mean of what is decoded is what is stored, so both are Adam's running means with its decay and bias correction.
`optax.scale_by_factored_rms` is not used: it divides before the first moment is taken, so it is another algorithm with another bias correction, and
its factors would not be a storage of Adam's state that can be exchanged for the others. One seed of the nano model cannot rank the two (LOG.md).

Stacked parameters below `MIN_SIZE` elements keep float32 moments in every mode; in a released model these are the sinks and router biases.

What the update reads are the moments as stored. The barrier between them makes XLA write each state in place before the parameter moves: without it
the update recomputes from the old moments, which must then be copied (CPU, 46 M parameters: 2.7 ns and 6.7 B per parameter, against 0.8 ns and 0).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

MIN_SIZE = 4096
MAX_BLOCK, MIN_BLOCK = 256, 32
# `bits(name, moment, count, shape)`: uniform uint32 for the rounding of one moment of one parameter at one update
Bits = Callable[[str, str, Array, tuple[int, ...]], UInt32[Array, "..."]]


class Codes(NamedTuple):
    """An 8-bit moment of a parameter [..., n]: codes [..., n / block, block] and a scale per block [..., n / block]. The codes keep the block
    dimension: XLA then updates them in place, and behind a reshape it copies them."""

    codes: Int[Array, "..."]
    scales: Float[Array, "..."]


class Storage(Protocol):
    """How a moment lies in memory: `decode(encode(x, bits)) ~ x`, for x in the shape that `split` gives the parameter's."""

    def zeros(self, shape: tuple[int, ...]) -> Any: ...
    def split(self, x: Float[Array, "..."]) -> Float[Array, "..."]: ...
    def encode(self, x: Float[Array, "..."], bits: Callable[[tuple[int, ...]], Array]) -> Any: ...
    def decode(self, stored: Any) -> Float[Array, "..."]: ...


@dataclass(frozen=True)
class Plain:
    """Rounded to nearest. bfloat16 (8 bits, steps of 0.4 %) is enough for a first moment, which moves by 10 % a step."""

    dtype: Any

    def zeros(self, shape):
        return jnp.zeros(shape, self.dtype)

    def split(self, x):
        return x

    def encode(self, x, bits):
        return x.astype(self.dtype)

    def decode(self, stored):
        return stored.astype(jnp.float32)


@dataclass(frozen=True)
class Int8:
    """Blockwise power map; see above."""

    power: int
    signed: bool

    def zeros(self, shape):
        # not the code of zeros: XLA would compute that while it compiles, for minutes
        block = block_size(shape[-1])
        blocks = (*shape[:-1], shape[-1] // block)
        return Codes(jnp.zeros((*blocks, block), jnp.int8 if self.signed else jnp.uint8), jnp.zeros(blocks, jnp.float32))

    def split(self, x):
        return x.reshape(*x.shape[:-1], -1, block_size(x.shape[-1]))

    def encode(self, x, bits):
        scales = jnp.max(jnp.abs(x), axis=-1)
        # in [0, 1]; the product of a maximum and its reciprocal may miss 1 by an ulp
        share = jnp.minimum(jnp.abs(x) * _reciprocal(scales)[..., None], 1.0)
        low = jnp.floor((jnp.sqrt(share) if self.power == 2 else jnp.sqrt(jnp.sqrt(share))) * self.top)
        low_value, high_value = _power(low / self.top, self.power), _power((low + 1) / self.top, self.power)
        uniform = (bits(x.shape) >> 8).astype(jnp.float32) * 2.0**-24
        code = jnp.minimum(low + (uniform * (high_value - low_value) < share - low_value), self.top)
        if self.signed:
            return Codes(jnp.where(x < 0, -code, code).astype(jnp.int8), scales)
        return Codes(jnp.where(x > 0, jnp.maximum(code, 1), code).astype(jnp.uint8), scales)

    def decode(self, stored):
        code = stored.codes.astype(jnp.float32)
        value = _power(jnp.abs(code) / self.top, self.power)
        return jnp.where(code < 0, -value, value) * stored.scales[..., None]

    @property
    def top(self) -> int:
        return 127 if self.signed else 255


class Factors(NamedTuple):
    """Means over the last dimension [..., n, 1] and over the one before it [..., 1, m]."""

    rows: Float[Array, "..."]
    columns: Float[Array, "..."]


@dataclass(frozen=True)
class Factored:
    """[..., n, m] as the outer product of its means."""

    def zeros(self, shape):
        return Factors(jnp.zeros((*shape[:-1], 1), jnp.float32), jnp.zeros((*shape[:-2], 1, shape[-1]), jnp.float32))

    def split(self, x):
        return x

    def encode(self, x, bits):
        return Factors(jnp.mean(x, axis=-1, keepdims=True), jnp.mean(x, axis=-2, keepdims=True))

    def decode(self, stored):
        return stored.rows * _reciprocal(jnp.mean(stored.rows, axis=-2, keepdims=True)) * stored.columns


def _power(x, power: int):
    return x * x if power == 2 else (x * x) * (x * x)


def _reciprocal(scales):
    """1 / s, and 0 for a block of zeros or of values whose reciprocal would overflow."""
    return jnp.where(scales > 2.0**-126, 1 / scales, 0.0)


def block_size(size: int) -> int | None:
    """Block of a last dimension: its largest divisor up to 256 that leaves a multiple of 16 blocks (so that 2, 4, 8 or 16 devices cut between
    blocks), else its largest divisor up to 256; None if that is below 32. 2880 -> 180, 4096 -> 256."""
    divisors = [b for b in range(MIN_BLOCK, MAX_BLOCK + 1) if size % b == 0]
    return max([b for b in divisors if size // b % 16 == 0] or divisors, default=None)


def storage(kind: str, moment: str, shape: tuple[int, ...]) -> Storage:
    """Storage of one moment ("mu" or "nu") of a parameter of this shape."""
    unfit = (kind == "factored" and len(shape) < 2) or (kind == "int8" and block_size(shape[-1]) is None)
    if kind == "float32" or unfit or math.prod(shape) < MIN_SIZE:
        return Plain(jnp.float32)
    if kind == "int8":
        return Int8(power=2, signed=True) if moment == "mu" else Int8(power=4, signed=False)
    return {"bfloat16": Plain(jnp.bfloat16), "factored": Factored()}[kind]


def _advance(kind: str, moment: str, decay: float, order: int, bits: Bits, values, stored, count, finite):
    """(moment as stored, moment as read back) of all parameters after `x <- decay * x + (1 - decay) * value^order`; unchanged unless finite."""
    new, read = {}, {}
    for name, value in values.items():
        store = storage(kind, moment, value.shape)
        moved = decay * store.decode(stored[name]) + (1 - decay) * store.split(value) ** order
        encoded = store.encode(moved, lambda shape, name=name: bits(name, moment, count, shape))
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), encoded, stored[name])
        new[name] = lax.optimization_barrier(kept)
        read[name] = jnp.broadcast_to(store.decode(new[name]), store.split(value).shape).reshape(value.shape)
    return new, read


def _zeros(kind: str, moment: str, params):
    return {name: storage(kind, moment, param.shape).zeros(param.shape) for name, param in params.items()}


def scale_by_adam(b1: float, b2: float, eps: float, first: str, second: str, bits: Bits) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam` on a flat dict, with chosen storage and an extra argument `finite`: if False the state stays as it is."""

    def init(params):
        return optax.ScaleByAdamState(jnp.int32(0), _zeros(first, "mu", params), _zeros(second, "nu", params))

    def update(grads, state, params=None, *, finite=True, **_):
        count = state.count + jnp.asarray(finite, jnp.int32)
        mu, m = _advance(first, "mu", b1, 1, bits, grads, state.mu, count, finite)
        nu, v = _advance(second, "nu", b2, 2, bits, grads, state.nu, count, finite)
        m_scale, v_scale = 1 / (1 - b1**count), 1 / (1 - b2**count)
        updates = {name: m[name] * m_scale / (jnp.sqrt(v[name] * v_scale) + eps) for name in grads}
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)
