"""Rotary position embedding with YaRN scaling (arXiv 2309.00071), half-split convention: the pairs are (x_j, x_{j + H/2}).

With c = H/2 frequencies f_j = theta^(-2j/H): below `low` they are kept, above `high` divided by `factor`, blended linearly between. For the
releases low = 8.0928 and high = 17.3980, kept fractional (`truncate: false`). The attention temperature 0.1 ln(factor) + 1 = 1.34657 multiplies
cos and sin alike, so q.k carries its square. Tables are float32 and cast to the activation dtype just before the rotation.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gptoss_jax.model.config import RopeConfig
from gptoss_jax.precision import wide


def yarn_frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Inverse frequencies float32 [head_dim/2] and the factor on cos and sin."""
    half = head_dim // 2
    frequency = rope.rope_theta ** (-np.arange(half, dtype=np.float64) / half)

    def dim_of_rotations(rotations: float) -> float:
        return half * math.log(rope.original_max_position_embeddings / (rotations * 2 * math.pi)) / math.log(rope.rope_theta)

    low, high = dim_of_rotations(rope.beta_fast), dim_of_rotations(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(half, dtype=np.float64) - low) / (high - low), 0, 1)
    concentration = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
    return (frequency * (1 - ramp) + frequency / rope.factor * ramp).astype(np.float32), concentration


def rope_tables(
    positions_BT: Int[Array, "B T"], rope: RopeConfig, head_dim: int, dtype=jnp.float32
) -> tuple[Float[Array, "B T C"], Float[Array, "B T C"]]:
    """cos and sin, C = head_dim/2, with the concentration multiplied in; float32, or float64 for activations of that `dtype`."""
    inv_freq_C, concentration = yarn_frequencies(rope, head_dim)
    angle_BTC = positions_BT[..., None].astype(wide(dtype)) * inv_freq_C
    return jnp.cos(angle_BTC) * concentration, jnp.sin(angle_BTC) * concentration


def rotate(x_BTNH: Float[Array, "B T N H"], cos_BTC: Float[Array, "B T C"], sin_BTC: Float[Array, "B T C"]) -> Float[Array, "B T N H"]:
    """Rotates every head."""
    cos, sin = cos_BTC[:, :, None].astype(x_BTNH.dtype), sin_BTC[:, :, None].astype(x_BTNH.dtype)
    first, second = jnp.split(x_BTNH, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
