"""Random Hadamard rotation around fake quantization: w = H^T Q(H x), H = W D / sqrt(size) along the block dim, in groups of `size`.

W is the Walsh-Hadamard matrix (entries +-1), D random signs, one for every column of x: outliers spread over the group before the blocks are rounded,
and the rotation is undone after. H is orthogonal, so the error of w is that of the rotated blocks, and whatever an estimator does to the gradient it
does in rotated coordinates: dL/dx = H^T estimator(H dL/dw), which follows from the chain rule because rotations are linear.

For research. What a file would hold are codes of H x, and no inference engine knows H: the rotation is no part of a format and cannot be exported;
a model that computes with w can be, in BF16 (round w to it as any other weight).

Float32 throughout, in log2(size) butterflies whose sums have a fixed order: the same bits on every device and sharding. Rotating there and back
costs 2 log2(size) additions an element and moves values by a few float32 ulp of the group's largest.
"""

from dataclasses import asdict, dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from gptoss_jax.formats import Format
from gptoss_jax.formats.bits import as_input
from gptoss_jax.formats.noise import matrix_keys, random_bits
from gptoss_jax.quant.estimators import Estimator
from gptoss_jax.quant.fake_quant import fake_quant

SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Hadamard:
    """A rotation: width of the groups, seed of the signs."""

    size: int = 32
    seed: int = 0

    def __post_init__(self):
        if self.size not in SIZES:
            raise ValueError(f"a rotation has size {', '.join(map(str, SIZES))}, not {self.size!r}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in 0..2^32-1, not {self.seed}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def rotate(self, x: Float[Array, "*shape"], axis: int = -1) -> Float32[Array, "*shape"]:
        """H x.

        Raises:
          ValueError: x.shape[axis] is not a multiple of the size.
        """
        x = jnp.moveaxis(as_input(x).astype(jnp.float32), axis, -1)
        return jnp.moveaxis(self._walsh(x * self._signs(x.shape[-1])), -1, axis)

    def rotate_back(self, y: Float32[Array, "*shape"], axis: int = -1) -> Float32[Array, "*shape"]:
        """H^T y: W is symmetric."""
        y = jnp.moveaxis(y, axis, -1)
        return jnp.moveaxis(self._walsh(y) * self._signs(y.shape[-1]), -1, axis)

    def _signs(self, width: int) -> Float32[Array, "n"]:
        if width % self.size:
            raise ValueError(f"a dim of {width} is not a multiple of the size {self.size} of the rotation")
        bits = random_bits(jnp.asarray(matrix_keys(self.seed, "hadamard", range(1))[0]), (width,))
        return jnp.where(bits >> 31, -1.0, 1.0).astype(jnp.float32)

    def _walsh(self, x: Float32[Array, "*batch n"]) -> Float32[Array, "*batch n"]:
        shape, half = x.shape, 1
        while half < self.size:
            pairs = x.reshape(*shape[:-1], shape[-1] // (2 * half), 2, half)
            a, b = pairs[..., 0, :], pairs[..., 1, :]
            x = jnp.stack([a + b, a - b], axis=-2).reshape(shape)
            half *= 2
        return x * np.float32(self.size**-0.5)


def rotated_fake_quant(
    x: Float[Array, "*shape"],
    fmt: str | Format,
    rotation: Hadamard,
    estimator: str | Estimator = "ste",
    *,
    axis: int = -1,
    dtype=None,
    key: Array | None = None,
) -> Float[Array, "*shape"]:
    """`fake_quant` in rotated coordinates, its arguments and errors. The key is that of a format that rounds stochastically."""
    rotated = fake_quant(rotation.rotate(x, axis), fmt, estimator, axis=axis, dtype=jnp.float32, key=key)
    return rotation.rotate_back(rotated, axis).astype(x.dtype if dtype is None else dtype)
